// A memory's tiles in order, and back. The backward pass goes by groups of tiles: it starts from what was kept before the group, makes
// what stands before each of its tiles, and holds on to what it made of them on the way for when it comes back. A value that is not
// finite raises a flag; the caller then leaves all to `chunked`, whose guards know what to do.

#ifndef NESTLING_PASSES_H
#define NESTLING_PASSES_H

#include "scan.h"

// What is done at a tile, number n of the runs; m: what stands before it.
typedef struct {
    // Its gradients at the anchor, into the hand's room number `place`; the next call of `ahead` or `onward` is for this tile.  Null:
    // the others make what they need.
    void (*make)(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m);
    // Answers its queries and goes on in m. Returns whether all is finite.
    int (*ahead)(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m);
    // What stands after it, anchors apart.
    void (*onward)(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after);
    // From the gradients of what stands after it, a chunk that it closes seen to, to those of what stands before.
    void (*behind)(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m, const Stand *g);
} Engine;

// Room for what stands before a group's tiles and, on the way back, for gradients of it that nobody asks for.
static real *lay_states(const Scan *s, int backward, Room *room) {
    return take(room, numbers(&s->cell, s->apart) * (backward ? s->group + 1 : 1));
}

static const Run *runs_of(const Scan *s, int memory) { return s->runs + (size_t)(memory / s->heads) * s->tiles; }

static inline void go_ahead(const Scan *s, int memory, Engine engine, void *hand, real *state) {
    const Cell *cell = &s->cell;
    const Run *runs = runs_of(s, memory);
    Stand m;
    stand(cell, s->apart, &m, state);
    load(cell, s->apart, &s->store, memory, 0, &m);
    for (int n = 0; n < s->tiles && runs[n].tokens; n++) {
        if (s->kept && n && n % s->group == 0)
            memcpy(kept_at(s, n, memory), state, numbers(cell, s->apart) * sizeof(real));
        if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
        if (engine.make) engine.make(s, hand, memory, runs, n, 0, &m);
        if (!engine.ahead(s, hand, memory, runs, n, &m)) {
            s->broken[memory] = 1;
            return;
        }
        if (runs[n].flags & CLOSES) close_chunk(cell, s->apart, &m);
    }
    unload(cell, s->apart, &s->store, memory, &m);
}

static inline void go_back(const Scan *s, int memory, Engine engine, void *hand, real *states) {
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
            if (engine.make) engine.make(s, hand, memory, runs, n, n - first, &m);
            if (n == end - 1) break;
            stand(cell, s->apart, &after, states + (n - first + 1) * size);
            engine.onward(s, hand, memory, runs, n, &m, &after);
            next_anchor(cell, s->apart, runs[n].flags & CLOSES, &m, &after);
        }
        for (int n = end - 1; n >= first; n--) {
            stand(cell, s->apart, &m, states + (n - first) * size);
            if (runs[n].flags & CLOSES) back_close(cell, s->apart, &g);
            engine.behind(s, hand, memory, runs, n, n - first, &m, &g);
            if (runs[n].flags & FRESH) back_fresh(cell, s->apart, &s->store, memory, &g);
        }
    }
}

#endif
