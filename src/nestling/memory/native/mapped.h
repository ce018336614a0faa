// Keys and queries of a tile as the network reads them, where they are features that are made here, and their gradients.

#ifndef NESTLING_MAPPED_H
#define NESTLING_MAPPED_H

#include "scan.h"

// Room for a tile's.
typedef struct {
    Making making;
    Own own;
    real *q, *k, *of_q, *of_k;
} Mapped;

static void lay_mapped(const Scan *s, int rows, int backward, Mapped *h, Room *room) {
    size_t width = s->cell.network.width[0], keys = rows * width, queries = s->longest * width;
    lay_making(&s->features, rows, &h->making, room);
    h->k = take(room, keys);
    h->q = take(room, queries);
    h->of_k = take(room, backward ? keys : 0);
    h->of_q = take(room, backward ? queries : 0);
}

// Before a memory's first tile.
static void begin_mapped(const Scan *s, int memory, Mapped *h) {
    const Features *f = &s->features;
    size_t logs = f->degree + 1, projection = (size_t)f->in * f->base;
    int head = memory % s->heads;
    h->own = (Own){
        s->logs + head * logs, at_token(s->projection, head, projection), of_token(s->of_logs, memory, logs),
        of_token(s->of_projection, memory, projection)
    };
    begin_making(f, &h->own, &h->making);
}

// Where a run's rows come from: so many from the tail, of which the first is at `past`, the others from `first` on.
typedef struct {
    int tail;
    size_t past, first;
} Source;

static Source source_of(const Scan *s, int memory, const Run *run) {
    int before = run->halo - run->first;  // rows that lie before the call
    int tail = before > 0 ? before : 0;
    return (Source){tail, ((size_t)memory + 1) * s->tail - tail, (size_t)memory * s->time + run->first - run->halo + tail};
}

// Gives the tile its keys.
static void map_keys(const Scan *s, Mapped *h, int memory, const Run *run, Tile *t) {
    int width = s->cell.network.width[0];
    Source from = source_of(s, memory, run);
    if (from.tail) memcpy(h->k, s->past + from.past * width, (size_t)from.tail * width * sizeof(real));
    real *made = h->k + (size_t)from.tail * width;
    make_features(&s->features, &h->own, &h->making, t->rows - from.tail, s->k + from.first * s->features.in, made);
    t->k = h->k;
}

// Gives the tile its queries, if there are any.
static void map_queries(const Scan *s, Mapped *h, int memory, const Run *run, Tile *t) {
    if (!s->q) return;
    size_t token = (size_t)memory * s->time + run->first;
    make_features(&s->features, &h->own, &h->making, t->tokens, s->q + token * s->features.in, h->q);
    t->q = h->q;
}

// Room for the gradients of the tile's keys and queries, zeros.
static void clear_mapped(const Scan *s, Mapped *h, const Tile *t, OfTile *of) {
    size_t width = s->cell.network.width[0] * sizeof(real);
    memset(of->k = h->of_k, 0, t->rows * width);
    memset(of->q = h->of_q, 0, t->tokens * width);
}

// Hands them on.
static void back_mapped(const Scan *s, Mapped *h, int memory, const Run *run, const Tile *t) {
    int width = s->cell.network.width[0], in = s->features.in;
    Source from = source_of(s, memory, run);
    if (from.tail) add((size_t)from.tail * width, h->of_k, s->of_past + from.past * width);
    size_t made = (size_t)from.tail * width, key = from.first * in, query = ((size_t)memory * s->time + run->first) * in;
    int rows = t->rows - from.tail;
    back_features(&s->features, &h->own, &h->making, rows, s->k + key, h->k + made, h->of_k + made, s->of_k + key);
    if (t->q) back_features(&s->features, &h->own, &h->making, t->tokens, s->q + query, h->q, h->of_q, s->of_q + query);
}

#endif
