// A call of one memory's scan, and its tiles.

#ifndef NESTLING_SCAN_H
#define NESTLING_SCAN_H

#include "back.h"
#include "polynomial.h"
#include "runs.h"
#include "share.h"

// A retention's link of its dual variable Z to the weights.
//
//     SOFTMAX   W = softmax(Z) over each output's inputs                                      Miras, eq. 21 and 27
//     LQ        W = c Z,  c = max(‖Z‖_q, floor)^{2−q}, the norm over the whole matrix         Miras, eq. 24
enum { IDENTITY, SOFTMAX, LQ };

typedef struct {
    int kind;
    double power, floor;  // q, and the least norm that counts
} Link;

typedef struct {
    Cell cell;
    Link link;
    Features features;
    Store store;
    int lanes, heads, time, tiles, longest, group, apart, threads;
    int tail;         // rows of k and v before the call's own
    const Run *runs;            // `[lane, tiles]`
    const unsigned char *fine;  // `[lane, tail + time]`: tokens that act; null: all
    // `[memory, time, …]`, memory = lane · heads + head; q null where nothing is asked, k and v with the tail before them
    const real *q, *k, *v, *lr, *retention, *momentum, *erase, *window;
    // Where features are made here, k comes without the tail, whose features are `past`; logs and projection `[head, …]`
    const real *past, *logs, *projection;
    real *y;
    real *kept;   // what stands before each group of tiles but the first, `[group, memory, numbers]`; null: not kept
    int *broken;  // whether something was not finite, one per memory
    const real *of_y;
    real *of_q, *of_k, *of_v, *of_lr, *of_retention, *of_momentum, *of_erase, *of_window;
    real *of_past, *of_logs, *of_projection;  // of the map's own, of each memory, to be summed by the caller
} Scan;

static const real *at_token(const real *x, size_t token, int width) { return x ? x + token * width : 0; }
static real *of_token(real *x, size_t token, int width) { return x ? x + token * width : 0; }

static int tiles_of(const Scan *s, const Run *runs) {
    int count = 0;
    while (count < s->tiles && runs[count].tokens) count++;
    return count;
}

// Where weights are kept of the group of tiles that begins with tile n > 0.
static real *kept_at(const Scan *s, int n, int memory) {
    size_t memories = (size_t)s->lanes * s->heads;
    return s->kept + ((size_t)(n / s->group - 1) * memories + memory) * numbers(&s->cell, s->apart);
}

static real *answers_at(const Scan *s, real *y, int memory, const Run *run) {
    return y + ((size_t)memory * s->time + run->first) * s->cell.network.width[s->cell.network.depth];
}

static int target_width(const Cell *c) { return c->network.width[c->network.depth] + reads_threshold(&c->bias); }

// The tile of a run, without coefficients; where features are made here, without keys and queries, see mapped.h.
static Tile tile_at(const Scan *s, Gates *gates, int memory, const Run *run, int begun) {
    const Cell *cell = &s->cell;
    size_t token = (size_t)memory * s->time + run->first;
    size_t all = s->tail + s->time, place = s->tail + run->first - run->halo, row = memory * all + place;
    Tile t = {.tokens = run->tokens, .rows = run->halo + run->tokens, .begun = begun, .gates = gates};
    if (!s->features.in) {
        t.q = at_token(s->q, token, cell->network.width[0]);
        t.k = at_token(s->k, row, cell->network.width[0]);
    }
    t.v = at_token(s->v, row, target_width(cell));
    *gates = (Gates){
        at_token(s->lr, token, 1),
        at_token(s->retention, token, 1),
        at_token(s->momentum, token, 1),
        at_token(s->erase, token, 1),
        at_token(s->window, token, cell->window),
        s->fine ? s->fine + memory / s->heads * all + place : 0,
    };
    return t;
}

// Where the gradients of its inputs go.
static OfTile of_tile_at(const Scan *s, OfGates *gates, int memory, const Run *run) {
    const Cell *cell = &s->cell;
    size_t token = (size_t)memory * s->time + run->first;
    size_t row = (size_t)memory * (s->tail + s->time) + s->tail + run->first - run->halo;
    *gates = (OfGates){
        of_token(s->of_lr, token, 1),
        of_token(s->of_retention, token, 1),
        of_token(s->of_momentum, token, 1),
        of_token(s->of_erase, token, 1),
        of_token(s->of_window, token, cell->window),
    };
    OfTile of = {.v = of_token(s->of_v, row, target_width(cell)), .gates = gates};
    if (!s->features.in) {
        of.q = of_token(s->of_q, token, cell->network.width[0]);
        of.k = of_token(s->of_k, row, cell->network.width[0]);
    }
    return of;
}

#endif
