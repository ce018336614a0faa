// Memories along the runs of their lanes: loading and unloading them, where chunks close and where lanes begin anew.

#ifndef NESTLING_RUNS_H
#define NESTLING_RUNS_H

#include "store.h"
#include "tile.h"

// Whether the weights of a bank, the first or the second, are the anchor before tile n.  apart: not always.
static int begins(int apart, const Run *runs, int n, int bank) {
    return !apart || (runs[n].flags & FRESH) || (n && runs[n - 1].flags & CLOSES << bank);
}

// Numbers of one memory between two tiles. apart: with the anchor.
static size_t numbers(const Cell *c, int apart) { return weights_of(&c->network) * (1 + c->momentum + apart); }

static size_t size_of(const Cell *c, int l) { return (size_t)in_of(&c->network, l) * c->network.width[l + 1]; }

// Let the memory be what lies at `at`: layer after layer, W, S and A.
static real *stand(const Cell *c, int apart, Stand *m, real *at) {
    for (int l = 0; l < c->network.depth; l++) {
        size_t n = size_of(c, l);
        m->w[l] = at, at += n;
        m->s[l] = 0;
        if (c->momentum) m->s[l] = at, at += n;
        m->a[l] = m->w[l];
        if (apart) m->a[l] = at, at += n;
        m->turned[l] = 0;
    }
    return at;
}

// Room for the anchor transposed.
static void lay_turned(const Cell *c, real **turned, Room *room) {
    for (int l = 0; l < c->network.depth; l++) turned[l] = take(room, size_of(c, l));
}

// Let it lie there.
static void turn(const Cell *c, Stand *m, real *const *room) {
    for (int l = 0; l < c->network.depth; l++) m->turned[l] = room[l];
    turn_around(&c->network, m->a, room);
}

// The memory as it is given, or as it begins anew.
static void load(const Cell *c, int apart, const Store *store, size_t memory, int fresh, const Stand *m) {
    for (int l = 0; l < c->network.depth; l++) {
        size_t n = size_of(c, l), bytes = n * sizeof(real);
        const real *start = fresh ? store->start[l] : 0;
        memcpy(m->w[l], (start ? start : store->w[l]) + memory * n, bytes);
        if (c->momentum && fresh) memset(m->s[l], 0, bytes);
        else if (c->momentum) memcpy(m->s[l], store->s[l] + memory * n, bytes);
        if (apart) memcpy(m->a[l], (start ? start : store->a[l]) + memory * n, bytes);
    }
}

static void unload(const Cell *c, int apart, const Store *store, size_t memory, const Stand *m) {
    for (int l = 0; l < c->network.depth; l++) {
        size_t n = size_of(c, l), bytes = n * sizeof(real);
        memcpy(store->w_end[l] + memory * n, m->w[l], bytes);
        if (c->momentum) memcpy(store->s_end[l] + memory * n, m->s[l], bytes);
        if (apart) memcpy(store->a_end[l] + memory * n, m->a[l], bytes);
    }
}

// Whether nothing comes from the end, and whether nobody asks for the gradients of the start.
static int from_nowhere(const Cell *c, int apart, const Store *store) {
    for (int l = 0; l < c->network.depth; l++)
        if (store->from_w[l] || (c->momentum && store->from_s[l]) || (apart && store->from_a[l])) return 0;
    return 1;
}

static int for_nobody(const Cell *c, int apart, const Store *store) {
    for (int l = 0; l < c->network.depth; l++)
        if (store->of_w[l] || (c->momentum && store->of_s[l]) || (apart && store->of_a[l])) return 0;
    return 1;
}

static void come(size_t n, const real *from, size_t memory, real *to) {
    if (from) memcpy(to, from + memory * n, n * sizeof(real));
    else memset(to, 0, n * sizeof(real));
}

// Let g be the gradients of the end where those of the start go, or in `spare` if nobody asks for these. Returns what is behind it.
static real *gradients_of(const Cell *c, int apart, const Store *store, size_t memory, real *spare, Stand *g) {
    real *behind = stand(c, apart, g, spare);
    for (int l = 0; l < c->network.depth; l++) {
        size_t n = size_of(c, l);
        if (store->of_w[l]) g->w[l] = store->of_w[l] + memory * n;
        come(n, store->from_w[l], memory, g->w[l]);
        if (c->momentum) {
            if (store->of_s[l]) g->s[l] = store->of_s[l] + memory * n;
            come(n, store->from_s[l], memory, g->s[l]);
        }
        if (!apart) g->a[l] = g->w[l];
        else {
            if (store->of_a[l]) g->a[l] = store->of_a[l] + memory * n;
            come(n, store->from_a[l], memory, g->a[l]);
        }
    }
    return behind;
}

// The anchor behind a tile, of what stands after it; m: what stood before.
static void next_anchor(const Cell *c, int apart, int closes, const Stand *m, const Stand *after) {
    if (!apart) return;
    for (int l = 0; l < c->network.depth; l++) memcpy(after->a[l], (closes ? after->w : m->a)[l], size_of(c, l) * sizeof(real));
}

// A chunk closes: the anchor moves to the weights.
static void close_chunk(const Cell *c, int apart, const Stand *m) {
    next_anchor(c, apart, 1, m, m);
}

static void back_close(const Cell *c, int apart, const Stand *g) {
    if (!apart) return;
    for (int l = 0; l < c->network.depth; l++) {
        add(size_of(c, l), g->a[l], g->w[l]);
        memset(g->a[l], 0, size_of(c, l) * sizeof(real));
    }
}

// The lane began anew here: what came before has no part in it.
static void back_fresh(const Cell *c, int apart, const Store *store, size_t memory, const Stand *g) {
    for (int l = 0; l < c->network.depth; l++) {
        size_t n = size_of(c, l);
        real *to = store->of_start[l] + memory * n;
        add(n, g->w[l], to);
        memset(g->w[l], 0, n * sizeof(real));
        if (apart) {
            add(n, g->a[l], to);
            memset(g->a[l], 0, n * sizeof(real));
        }
        if (c->momentum) memset(g->s[l], 0, n * sizeof(real));
    }
}

#endif
