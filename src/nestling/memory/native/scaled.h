// Memories whose weights are their dual variable times a number per layer, W = c Z, that stands for a chunk; the chunk's last token
// reads at the new one. Inside a chunk all is linear, as in tile.h: gradients stand at c A, and what is read is multiplied with c.

#ifndef NESTLING_SCALED_H
#define NESTLING_SCALED_H

#include "scan.h"

static inline real magnitude(real x) { return x < 0 ? -x : x; }

// |x|^q
static inline real to_the(real x, real q) {
    real s = x * x;
    return q == 4 ? s * s : q == 2 ? s : (real)pow(magnitude(x), q);
}

// Of the sums of fourth powers between these the root is as good as any.
#define SMALL R(1e-20)
#define LARGE R(1e20)

// ‖Z‖_q, at least the floor.
static real norm_of(const Link *link, size_t n, const real *restrict z) {
    real floor = (real)link->floor, q = (real)link->power, top = floor, total = 0;
    if (q == 2) return 1;  // nobody asks
    if (q == 4) {
#pragma omp simd reduction(+ : total)
        for (size_t i = 0; i < n; i++) total += to_the(z[i], 4);
        if (total > SMALL && total < LARGE) {
            real norm = (real)pow(total, R(0.25));
            return norm > floor ? norm : floor;
        }
        total = 0;
    }
    // The largest entry is taken out, so that no power overflows.
#pragma omp simd reduction(max : top)
    for (size_t i = 0; i < n; i++) top = magnitude(z[i]) > top ? magnitude(z[i]) : top;
    real part = R(1.0) / top;
    if (q == 4) {
#pragma omp simd reduction(+ : total)
        for (size_t i = 0; i < n; i++) total += to_the(z[i] * part, 4);
    } else {
        for (size_t i = 0; i < n; i++) total += to_the(z[i] * part, q);
    }
    real norm = top * (real)pow(total, R(1.0) / q);
    return norm > floor ? norm : floor;
}

// c
static real scale_of(const Link *link, real norm) { return link->power == 2 ? 1 : (real)pow(norm, 2 - link->power); }

// The way back through the scale: of_z += of_scale ∂c/∂Z, 0 where the norm is at the floor.
static void back_scale(const Link *link, real norm, size_t n, const real *restrict z, real of_scale, real *restrict of_z) {
    real q = (real)link->power;
    if (norm <= (real)link->floor || q == 2) return;
    real factor = of_scale * (2 - q) * (real)pow(norm, 1 - q), part = R(1.0) / norm;
    if (q == 4) {
        for (size_t i = 0; i < n; i++) {
            real share = z[i] * part;
            of_z[i] += factor * share * share * share;
        }
    } else {
        for (size_t i = 0; i < n; i++) of_z[i] += factor * sign_of(z[i]) * (real)pow(magnitude(z[i]) * part, q - 1);
    }
}

// Room for a tile: weights at the anchor, c of every token, and what W goes on to. Norms: of Z at the anchor and behind the tile.
typedef struct {
    real norm[DEPTH], behind[DEPTH];
    real *standing[DEPTH], *scale[DEPTH], *after[DEPTH];
    real *of_standing[DEPTH], *of_scale[DEPTH], *of_w[DEPTH];
} Scaled;

static void lay_scaled(const Cell *c, int tokens, int backward, Scaled *h, Room *room) {
    for (int l = 0; l < c->network.depth; l++) {
        size_t n = size_of(c, l);
        h->standing[l] = take(room, n);
        h->scale[l] = take(room, tokens);
        h->after[l] = take(room, n);
        h->of_standing[l] = take(room, backward ? n : 0);
        h->of_scale[l] = take(room, backward ? tokens : 0);
        h->of_w[l] = take(room, backward ? n : 0);
    }
}

// The memory with its anchor's weights in the place of the anchor.
static Stand standing(const Scan *s, Scaled *h, const Stand *m) {
    Stand at = *m;
    for (int l = 0; l < s->cell.network.depth; l++) {
        size_t n = size_of(&s->cell, l);
        h->norm[l] = norm_of(&s->link, n, m->a[l]);
        real c = scale_of(&s->link, h->norm[l]);
        for (size_t i = 0; i < n; i++) h->standing[l][i] = c * m->a[l][i];
        at.a[l] = h->standing[l];
        at.turned[l] = 0;
        h->scale[l][0] = c;
    }
    return at;
}

// Whether the tile's last token reads at another scale than the others.
static int renews(const Scan *s, const Run *run) { return run->flags & CLOSES && !s->cell.before; }

// Weights behind the tile, and the scales of its reads. The tile's gradients must have been made.
static void write_scaled(const Scan *s, Scaled *h, Space *p, Tile *t, const Stand *at, const Run *run) {
    Stand after = *at;
    for (int l = 0; l < s->cell.network.depth; l++) after.w[l] = h->after[l];
    advance(&s->cell, p, t, at, &after);
    for (int l = 0; l < s->cell.network.depth; l++) {
        real *scale = h->scale[l];
        for (int i = 1; i < t->tokens; i++) scale[i] = scale[0];
        if (!renews(s, run)) continue;
        h->behind[l] = norm_of(&s->link, size_of(&s->cell, l), h->after[l]);
        scale[t->tokens - 1] = scale_of(&s->link, h->behind[l]);
    }
    t->scale = h->scale;
}

// `back_tile` with scales. m: the memory as it is; at: with its anchor's weights.
static void back_scaled(
    const Scan *s, Scaled *h, Space *p, const Tile *t, const Stand *m, const Stand *at, const Run *run, const real *of_y,
    const Stand *of, OfTile *g
) {
    const Cell *cell = &s->cell;
    Stand of_start = *of, of_anchor = *of;
    for (int l = 0; l < cell->network.depth; l++) {
        of_start.w[l] = h->of_w[l];
        of_anchor.a[l] = h->of_standing[l];
        memset(h->of_w[l], 0, size_of(cell, l) * sizeof(real));
        memset(h->of_standing[l], 0, size_of(cell, l) * sizeof(real));
    }
    g->scale = h->of_scale;
    clear_rows(cell, p, t);
    back_answers(cell, p, t, at, of_y, &of_start, g);
    if (renews(s, run))
        for (int l = 0; l < cell->network.depth; l++)
            back_scale(&s->link, h->behind[l], size_of(cell, l), h->after[l], h->of_scale[l][t->tokens - 1], of->w[l]);
    back_advance(cell, p, t, at, of, g);
    back_gradients(cell, p, t, at, &of_anchor, g);
    for (int l = 0; l < cell->network.depth; l++) {
        size_t n = size_of(cell, l);
        real of_c = sum(h->of_scale[l], t->tokens - (renews(s, run) ? 1 : 0)) + dot(h->of_standing[l], m->a[l], n);
        const real *restrict of_standing = h->of_standing[l], *restrict of_w = h->of_w[l];
        real *restrict of_a = of->a[l], scale = scale_of(&s->link, h->norm[l]);
        add(n, of_w, of->w[l]);
        for (size_t i = 0; i < n; i++) of_a[i] += scale * of_standing[i];
        back_scale(&s->link, h->norm[l], n, m->a[l], of_c, of->a[l]);
    }
}

#endif
