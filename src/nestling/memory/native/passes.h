// A memory's tiles in order, and back. The backward pass goes by groups of tiles: it starts from what was kept before the group, makes
// what stands before each of its tiles, and holds on to what it made of them on the way for when it comes back. A value that is not
// finite raises a flag; the caller then leaves all to `chunked`, whose guards know what to do.

#ifndef NESTLING_PASSES_H
#define NESTLING_PASSES_H

#include "scan.h"

#include <stddef.h>

// What is done at a tile, number n of the runs, with what a thread has in hand; m: what stands before it.
typedef struct {
    size_t hand;  // bytes of what a thread has in hand
    // Lays it out; returns the numbers it takes.
    size_t (*lay)(const Scan *s, int backward, void *hand, real *space);
    // Before a memory's first tile, or null.
    void (*begin)(const Scan *s, void *hand, int memory);
    // Its gradients at the anchor, into the hand's room number `place`; the next call of `ahead` or `onward` is for this tile.
    void (*make)(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m);
    // Answers its queries and goes on in m. Returns whether all is finite.
    int (*ahead)(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m);
    // What stands after it, anchors apart.
    void (*onward)(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after);
    // From the gradients of what stands after it, a chunk that it closes seen to, to those of what stands before.
    void (*behind)(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m, const Stand *g);
} Engine;

static const Run *runs_of(const Scan *s, int memory) { return s->runs + (size_t)(memory / s->heads) * s->tiles; }

static void go_ahead(const Scan *s, int memory, const Engine *engine, void *hand, real *state) {
    const Cell *cell = &s->cell;
    const Run *runs = runs_of(s, memory);
    Stand m;
    stand(cell, s->apart, &m, state);
    load(cell, s->apart, &s->store, memory, 0, &m);
    for (int n = 0; n < s->tiles && runs[n].tokens; n++) {
        if (s->kept && n && n % s->group == 0)
            memcpy(kept_at(s, n, memory), state, numbers(cell, s->apart) * sizeof(real));
        if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
        engine->make(s, hand, memory, runs, n, 0, &m);
        if (!engine->ahead(s, hand, memory, runs, n, &m)) {
            s->broken[memory] = 1;
            return;
        }
        if (runs[n].flags & CLOSES) close_chunk(cell, s->apart, &m);
    }
    unload(cell, s->apart, &s->store, memory, &m);
}

// states: room for what stands before each tile of a group, and for gradients of it that nobody asks for.
static void go_back(const Scan *s, int memory, const Engine *engine, void *hand, real *states) {
    const Cell *cell = &s->cell;
    const Run *runs = runs_of(s, memory);
    size_t size = numbers(cell, s->apart);
    int count = tiles_of(s, runs);
    Stand m, after, g;
    gradients_of(cell, s->apart, &s->store, memory, states + s->group * size, &g);
    for (int first = (count - 1) / s->group * s->group; first >= 0 && count; first -= s->group) {
        int end = first + s->group < count ? first + s->group : count;
        stand(cell, s->apart, &m, states);
        if (first) memcpy(states, kept_at(s, first, memory), size * sizeof(real));
        else load(cell, s->apart, &s->store, memory, 0, &m);
        for (int n = first; n < end; n++) {  // what stands before each tile of the group
            stand(cell, s->apart, &m, states + (n - first) * size);
            if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
            engine->make(s, hand, memory, runs, n, n - first, &m);
            if (n == end - 1) break;
            stand(cell, s->apart, &after, states + (n - first + 1) * size);
            engine->onward(s, hand, memory, runs, n, &m, &after);
            next_anchor(cell, s->apart, runs[n].flags & CLOSES, &m, &after);
        }
        for (int n = end - 1; n >= first; n--) {
            stand(cell, s->apart, &m, states + (n - first) * size);
            if (runs[n].flags & CLOSES) back_close(cell, s->apart, &g);
            engine->behind(s, hand, memory, runs, n, n - first, &m, &g);
            if (runs[n].flags & FRESH) back_fresh(cell, s->apart, &s->store, memory, &g);
        }
    }
}

typedef struct {
    const Scan *scan;
    const Engine *engine;
    int backward;
} Passage;

// Lays out what stands before tiles, and behind it the hand's room. Returns the numbers of both.
static size_t lay_passage(const Passage *p, void *hand, real *space, real **states) {
    const Scan *s = p->scan;
    Room room = {space, 0};
    *states = take(&room, numbers(&s->cell, s->apart) * (p->backward ? s->group + 1 : 1));
    return room.used + p->engine->lay(s, p->backward, hand, space ? space + room.used : 0);
}

static void pass(const void *task, int memory, real *space) {
    const Passage *p = task;
    max_align_t hand[p->engine->hand / sizeof(max_align_t) + 1];
    real *states;
    lay_passage(p, hand, space, &states);
    if (p->engine->begin) p->engine->begin(p->scan, hand, memory);
    if (p->backward) go_back(p->scan, memory, p->engine, hand, states);
    else go_ahead(p->scan, memory, p->engine, hand, states);
}

// All memories of a call. Returns 0, or 1 if there was no room for it.
static int pass_all(const Scan *s, const Engine *engine, int backward) {
    Passage p = {s, engine, backward};
    max_align_t hand[engine->hand / sizeof(max_align_t) + 1];
    real *states;
    return spread(&p, pass, s->lanes * s->heads, s->threads, lay_passage(&p, hand, 0, &states));
}

#endif
