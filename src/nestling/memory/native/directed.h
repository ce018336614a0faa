// A tile of a memory whose steps go along Newton–Schulz of its momentum, at the end of runs (Atlas, eq. 32–33):
//
//     S ← m S − Σ_i P_i x_iᵀ δ_i,    W ← γ_L W [+ η_L NS(S)],    ẑ_t = γ_t (h_t W)
//
// with x and δ at the anchor, as in tile.h, and P_i = Σ_t e_t w_{t,i}, e_t = Π_{t<j≤L} μ_j, m = e_0, w the window's weights. Where
// the rule acts and a token reads after its write, the run's last token reads the new weights. (`nestling.memory.directed`)

#ifndef NESTLING_DIRECTED_H
#define NESTLING_DIRECTED_H

#include "back.h"
#include "newton_schulz.h"

// Coefficients of a tile, or their gradients: γ and e `[tokens + 1]`, P `[rows]`.
typedef struct {
    real *keep, *fade, *impulse;
} Course;

static void lay_course(int tokens, int rows, Course *c, Room *room) {
    TAKE(room, tokens + 1, &c->keep, &c->fade);
    c->impulse = take(room, rows);
}

static void course(int tokens, int rows, int window, const Gates *g, Course *c) {
    int halo = rows - tokens;
    real total = 0;
    c->keep[0] = 1;
    for (int t = 1; t <= tokens; t++) {
        if (g->retention) total += g->retention[t - 1];
        c->keep[t] = (real)exp(total);
    }
    total = 0;
    for (int t = tokens; t >= 0; t--) {
        c->fade[t] = (real)exp(total);
        if (t) total += g->momentum[t - 1];
    }
    memset(c->impulse, 0, rows * sizeof(real));
    for (int t = 1; t <= tokens; t++) {
        int now = halo + t - 1, first = now - window + 1 < 0 ? 0 : now - window + 1;
        if (g->fine && !g->fine[now]) continue;
        for (int i = first; i <= now; i++) {
            if (g->fine && !g->fine[i]) continue;
            c->impulse[i] += c->fade[t] * (g->window ? g->window[(t - 1) * window + now - i] : 1);
        }
    }
}

// From the gradients of the coefficients to those of the gates, which are added to.
static void back_course(int tokens, int rows, int window, const Gates *g, const Course *c, const Course *of, OfGates *to) {
    int halo = rows - tokens;
    real total = 0, through = of->fade[0] * c->fade[0];
    for (int t = tokens; t >= 1; t--) {
        total += of->keep[t] * c->keep[t];
        if (g->retention) to->retention[t - 1] += total;
    }
    for (int t = 1; t <= tokens; t++) {
        int now = halo + t - 1, first = now - window + 1 < 0 ? 0 : now - window + 1;
        real of_fade = 0;
        to->momentum[t - 1] += through;  // log μ_t is in every e before t
        if (g->fine && !g->fine[now]) continue;
        for (int i = first; i <= now; i++) {
            if (g->fine && !g->fine[i]) continue;
            int at = (t - 1) * window + now - i;
            of_fade += of->impulse[i] * (g->window ? g->window[at] : 1);
            if (g->window) to->window[at] += of->impulse[i] * c->fade[t];
        }
        through += of_fade * c->fade[t];
    }
}

// Answers of a tile's first tokens, which read decayed weights; y null: what the way back needs instead.
static void directed_answers(const Cell *cell, Space *m, const Tile *t, const Course *c, int tokens, const Stand *at, real *y) {
    const Network *n = &cell->network;
    Tile read = *t;
    read.tokens = tokens;
    m->h[0] = (real *)t->q;
    if (n->gated) m->h[1] = m->h[0];
    for (int l = 0; l < n->depth; l++) {
        int in = in_of(n, l), out = n->width[l + 1];
        product(tokens, in, out, plain(m->h[l], in), plain(at->w[l], out), m->at_w[l], out, 0, m->panel);
        scaled(tokens, out, c->keep + !cell->before, m->at_w[l], m->ahead[l]);
        activate_asked(n, m, tokens, l, !y);
    }
    finish(n, m, &read, y);
}

// Gradients of such answers come in, and of all they are made of leave.
typedef struct {
    int tokens;
    const Course *c, *of_c;
    const Stand *at, *of;
    real *const *turned;  // the weights transposed, or null
    int unasked;          // nobody asks for the weights' gradients
} Asked;

// ẑ = γ (h W): from the gradient of ẑ_l to those of γ, W_l and h; sign as in `product`.
static void back_read(const Cell *cell, Space *m, const Asked *a, int l, const real *of_z, real *of_h, int sign) {
    const Network *n = &cell->network;
    int in = in_of(n, l), out = n->width[l + 1], first = !cell->before, L = a->tokens;
    for (int i = 0; i < L; i++) a->of_c->keep[first + i] += dot(of_z + (size_t)i * out, m->at_w[l] + (size_t)i * out, out);
    scaled(L, out, a->c->keep + first, of_z, m->other);
    product(L, out, in, plain(m->other, out), transposed(a->at->w, a->turned, l, in, out), of_h, in, sign, m->panel);
    if (!a->unasked) product(in, L, out, turned(m->h[l], in), plain(m->other, out), a->of->w[l], out, 1, m->panel);
}

static void back_directed_answers(const Cell *cell, Space *m, const Asked *a, const real *of_y, real *of_q) {
    const Network *n = &cell->network;
    int D = n->depth, L = a->tokens, last = n->width[D], l = D - 1;
    real *of_z = m->of_z, *of_h = m->of_h;
    memcpy(of_z, of_y, (size_t)L * last * sizeof(real));
    if (n->norm) denormalize(L, last, m->normed, m->scale, of_y, of_z);
    for (; l > n->gated; l--) {
        back_read(cell, m, a, l, of_z, of_h, 0);
        if (n->gated) continue;
        for (int i = 0; i < L * n->width[l]; i++) of_h[i] *= m->rise[l - 1][i];
        real *swap = of_z;
        of_z = of_h, of_h = swap;
    }
    if (n->gated) {
        real *restrict first = of_z, *restrict second = m->spare;
        const real *restrict of = of_h, *restrict passed = m->ahead[1], *restrict gate = m->rise[1], *restrict slope = m->rise[0];
        for (int i = 0; i < L * n->width[1]; i++) first[i] = of[i] * passed[i] * slope[i], second[i] = of[i] * gate[i];
        back_read(cell, m, a, 1, m->spare, of_h, 0);
    }
    back_read(cell, m, a, 0, of_z, of_h, n->gated);
    add((size_t)L * n->width[0], of_h, of_q);
    if (n->residual) add_part(L, last, of_y, last, of_q, n->width[0]);
}

#endif
