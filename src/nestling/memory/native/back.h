// The way back through a tile of tile.h.

#ifndef NESTLING_BACK_H
#define NESTLING_BACK_H

#include "tile.h"

// end = … − Σ_i a_i x_iᵀ r_i of a layer: from its gradient to those of a, x and r.
static void back_written(const Cell *cell, Space *m, int N, int l, const real *a, real *of_a, const real *end) {
    const Network *net = &cell->network;
    int in = in_of(net, l), out = net->width[l + 1], narrow = in <= out, few = narrow ? in : out;
    const real *x = m->at.x[l], *r = m->rows[l], *slim = narrow ? x : r;
    real *of_slim = narrow ? m->of_x[l] : m->of_delta[l];
    scaled(N, few, a, slim, m->spare);
    if (narrow) {
        product(N, in, out, plain(m->spare, in), plain(end, out), m->of_delta[l], out, -1, m->panel);
        product(N, out, in, plain(r, out), turned(end, out), m->other, in, 0, m->panel);
    } else {
        product(N, out, in, plain(m->spare, out), turned(end, out), m->of_x[l], in, -1, m->panel);
        product(N, in, out, plain(x, in), plain(end, out), m->other, out, 0, m->panel);
    }
    for (int i = 0; i < N; i++) {
        const real *restrict back = m->other + (size_t)i * few;
        real *restrict to = of_slim + (size_t)i * few;
        of_a[i] -= dot(back, slim + (size_t)i * few, few);
        for (int j = 0; j < few; j++) to[j] -= a[i] * back[j];
    }
}

// W ← γW + fS − Σ C x_iᵀ r_i, S ← mS − Σ P x_iᵀ r_i
static void back_advance(const Cell *cell, Space *m, const Tile *t, const Stand *at, const Stand *of, OfTile *g) {
    const Network *net = &cell->network;
    int L = t->tokens, N = t->rows;
    const Coefficients *c = t->c;
    if (g->quiet) return;
    for (int l = 0; l < net->depth; l++) {
        size_t n = (size_t)net->width[l] * net->width[l + 1], last = (size_t)L * N;
        back_written(cell, m, N, l, c->write + last, g->c->write + last, of->w[l]);
        if (cell->momentum) back_written(cell, m, N, l, c->impulse + last, g->c->impulse + last, of->s[l]);
        real *restrict of_w = of->w[l], *restrict of_s = of->s[l], keep = c->keep[L];
        const real *restrict w = at->w[l], *restrict s = at->s[l];
        if (cell->momentum) {  // once over all of them, as they come from far
            real carry = c->carry[L], kept = c->decay[L], of_keep = 0, of_carry = 0, of_decay = 0;
#pragma omp simd reduction(+ : of_keep, of_carry, of_decay)
            for (size_t i = 0; i < n; i++) {
                of_keep += of_w[i] * w[i], of_carry += of_w[i] * s[i], of_decay += of_s[i] * s[i];
                of_s[i] = kept * of_s[i] + carry * of_w[i], of_w[i] *= keep;
            }
            if (t->gates->retention) g->c->keep[L] += of_keep;
            g->c->carry[L] += of_carry, g->c->decay[L] += of_decay;
        } else if (t->gates->retention) {
            g->c->keep[L] += dot(of_w, w, n);
            for (size_t i = 0; i < n; i++) of_w[i] *= keep;
        }
    }
}

// ẑ = γ (h W) + f (h S) − (C ∘ h xᵀ) δ, layer after layer, from the last
static void back_answers(
    const Cell *cell, Space *m, const Tile *t, const Stand *at, const real *of_y, const Stand *of, OfTile *g
) {
    const Network *n = &cell->network;
    int L = t->tokens, N = t->rows, D = n->depth, first = cell->before ? 0 : 1, last = n->width[D];
    real *of_z = m->of_z, *of_h = m->of_h;
    memcpy(of_z, of_y, (size_t)L * last * sizeof(real));
    if (n->norm) denormalize(L, last, m->normed, m->scale, of_y, of_z);
    for (int l = D - 1; l >= 0; l--) {
        int in = n->width[l], out = n->width[l + 1];
        if (t->scale) {
            for (int i = 0; i < L; i++) {
                size_t row = (size_t)i * out;
                g->scale[l][i] = dot(of_z + row, m->ahead[l] + row, out) / t->scale[l][i];
            }
            scaled(L, out, t->scale[l], of_z, of_z);
        }
        const real *C = t->c->write + (size_t)first * N;
        real *restrict of_write = g->c->write + (size_t)first * N;
        Triangle made = below(MADE, N - L), read = below(READ, N - L), across = below(READ_TURNED, N - L);
        triangular(made, L, in, N, plain(m->h[l], in), turned(m->at.x[l], in), m->gram, N, 0, m->panel);
        triangular(made, L, out, N, plain(of_z, out), turned(m->rows[l], out), m->mixed, N, 0, m->panel);
        for (int i = 0; i < L; i++)
            for (int j = i * N, end = j + reach(made, i, N); j < end; j++) {
                real from = -m->mixed[j], gram = m->gram[j];
                of_write[j] += from * gram;
                m->mixed[j] = from * C[j];
                m->gram[j] = gram * C[j];
            }
        triangular(across, N, L, out, turned(m->gram, N), plain(of_z, out), m->of_delta[l], out, -1, m->panel);
        triangular(across, N, L, in, turned(m->mixed, N), plain(m->h[l], in), m->of_x[l], in, 1, m->panel);
        triangular(read, L, N, in, plain(m->mixed, N), plain(m->at.x[l], in), of_h, in, 0, m->panel);
        for (int of_s = 0; of_s <= cell->momentum; of_s++) {
            const real *scale = (of_s ? t->c->carry : t->c->keep) + first, *answer = of_s ? m->at_s[l] : m->at_w[l];
            real *of_scale = (of_s ? g->c->carry : g->c->keep) + first;
            for (int i = 0; i < L; i++) of_scale[i] += dot(of_z + (size_t)i * out, answer + (size_t)i * out, out);
            scaled(L, out, scale, of_z, m->other);
            Operand back = of_s ? turned(at->s[l], out) : transposed(at->w, t->begun ? at->turned : 0, l, in, out);
            product(L, out, in, plain(m->other, out), back, of_h, in, 1, m->panel);
            if (g->unasked) continue;
            product(
                in, L, out, turned(m->h[l], in), plain(m->other, out), of_s ? of->s[l] : of->w[l], out, 1, m->panel
            );
        }
        if (l) {
            for (int i = 0; i < L * in; i++) of_h[i] *= m->rise[l - 1][i];
            real *swap = of_z;
            of_z = of_h, of_h = swap;
        }
    }
    add((size_t)L * n->width[0], of_h, g->q);
    if (n->residual) add_part(L, last, of_y, last, g->q, n->width[0]);
}

// ẑ = h A, layer after layer, from the last.
static void back_anchor_answers(
    const Cell *cell, Space *m, const Tile *t, const Stand *at, const real *of_y, const Stand *of, OfTile *g
) {
    Trace made = {.normed = m->normed, .scale = m->scale};
    for (int l = 0; l < cell->network.depth; l++) made.x[l] = m->h[l], made.z[l] = m->ahead[l], made.slope[l] = m->rise[l];
    back_answer(
        &cell->network, t->tokens, &made, at->a, at->turned, of_y, g->q, m->of_x, g->unasked ? 0 : of->a, m->of_z, m->of_h, m->panel
    );
}

// (I + T) r = diag(η) δ + diag(ε γ) z: the gradient of r in of_delta becomes that of δ, and that of z is left in of_read; where the
// tile made its products at the anchor, that is all of it, else it goes on to x and W.
static void back_erased(const Cell *cell, Space *m, const Tile *t, const Stand *at, const Stand *g_of, OfTile *g, int l) {
    int L = t->tokens, in = cell->network.width[l], out = cell->network.width[l + 1];
    real *of = m->of_delta[l], *strength = m->strength[l];
    const real *system = system_of(m, t, l), *read = reading(m, t, l), *x = m->at.x[l], *keep = t->c->keep;
    triangle(m, t, l, system);
    for (int end = L; end > 0; end -= BLOCK) {  // (I + T)ᵀ, from the last row
        int b = end > BLOCK ? end - BLOCK : 0;
        real *from = of + (size_t)b * out;
        if (end < L)
            product(
                end - b, L - end, out, (Operand){m->mixed + end * L + b, 1, L}, plain(of + (size_t)end * out, out), from,
                out, -1, m->panel
            );
        for (int i = end - 1; i > b; i--)
            for (int j = b; j < i; j++) less(out, m->mixed[i * L + j], of + (size_t)i * out, of + (size_t)j * out);
    }
    Triangle made = below(MADE, 0);
    triangular(made, L, out, L, plain(of, out), turned(m->rows[l], out), m->gram, L, 0, m->panel);
    for (int i = 0; i < L; i++) {
        const real *restrict coefficient = t->c->write + (size_t)i * L, *restrict x_x = system + i * L;
        real *restrict of_coefficient = g->c->write + (size_t)i * L, *restrict of_t = m->gram + i * L;
        real of_strength = 0, weight = strength[i], erase = t->gates->erase[i], step = t->gates->lr[i];
        for (int j = 0; j < i; j++) {
            real minus = -of_t[j];
            of_strength += minus * coefficient[j] * x_x[j];
            of_coefficient[j] += minus * weight * x_x[j];
            of_t[j] = minus * weight * coefficient[j];
        }
        for (int j = i, end = reach(made, i, L); j < end; j++) of_t[j] = 0;
        real *restrict back = of + (size_t)i * out, *restrict of_z = m->of_read[l] + (size_t)i * out;
        real along = dot(back, read + (size_t)i * out, out);
        g->gates->lr[i] += dot(back, m->delta[l] + (size_t)i * out, out);
        g->c->keep[i] += along * weight;
        of_strength += along * keep[i];
        for (int j = 0; j < out; j++) of_z[j] = weight * keep[i] * back[j], back[j] *= step;
        if (l) {
            real damped = R(1.0) / (R(1.0) + erase * x_x[i]);
            g->gates->erase[i] += of_strength * damped * damped;
            of_t[i] = -of_strength * erase * erase * damped * damped;  // ‖x‖² is x xᵀ, met twice
        } else {
            g->gates->erase[i] += of_strength;
        }
    }
    triangular(below(READ, 0), L, L, in, plain(m->gram, L), plain(x, in), m->of_x[l], in, 1, m->panel);
    triangular(below(READ_TURNED, 0), L, L, in, turned(m->gram, L), plain(x, in), m->of_x[l], in, 1, m->panel);
    if (t->begun) return;
    product(L, out, in, plain(m->of_read[l], out), turned(at->w[l], out), m->of_x[l], in, 1, m->panel);
    if (!g->unasked) product(in, L, out, turned(x, in), plain(m->of_read[l], out), g_of->w[l], out, 1, m->panel);
}

// From the gradient of row i's ∂ℓ/∂M to that of its misfit, in place, and of its target.
static void back_misfit(const Cell *cell, const Space *m, const Tile *t, int i, real *of, OfTile *g) {
    int last = cell->network.width[cell->network.depth];
    size_t at = (size_t)i * (last + reads_threshold(&cell->bias));
    if (bends(&cell->bias)) back_bend(&cell->bias, last, t->v + at, m->misfit + (size_t)i * last, of, g->v + at);
    less(last, 1, of, g->v + at);
}

// δ_1 = u ∘ z_2 ∘ σ'(z_1) and δ_2 = u ∘ σ(z_1) with u = δ_3 A_3ᵀ: from their gradients to that of u, in place of the second, and
// of the others, that of z_2 in place of the first.
static void back_gated_errors(Space *m, int size) {
    const real *restrict up = m->up[1], *restrict passed = m->at.z[1], *restrict slope = m->at.slope[0], *restrict gate = m->at.slope[1];
    real *restrict first = m->of_delta[0], *restrict second = m->of_delta[1];
    real *restrict of_slope = m->of_slope[0], *restrict of_gate = m->of_slope[1];
    for (int i = 0; i < size; i++) {
        real a = first[i], b = second[i];
        of_slope[i] = a * up[i] * passed[i];
        of_gate[i] = b * up[i];
        first[i] = a * up[i] * slope[i];
        second[i] = a * passed[i] * slope[i] + b * gate[i];
    }
}

// From the gradients of δ and x to those of keys, values and the anchor.
static void back_gradients(const Cell *cell, Space *m, const Tile *t, const Stand *at, const Stand *of, OfTile *g) {
    const Network *net = &cell->network;
    int N = t->rows, D = net->depth, last = net->width[D];
    if (net->gated) back_gated_errors(m, N * net->width[1]);
    for (int l = net->gated; l < D - 1; l++) {
        int out = net->width[l + 1], next = net->width[l + 2], n = net->gated ? 0 : N * out;
        real *restrict of_up = m->of_delta[l], *restrict of_slope = m->of_slope[l];
        for (int i = 0; i < n; i++) of_slope[i] = of_up[i] * m->up[l][i], of_up[i] *= m->at.slope[l][i];
        product(N, out, next, plain(of_up, out), plain(at->a[l + 1], next), m->of_delta[l + 1], next, 1, m->panel);
        if (g->unasked) continue;
        product(out, N, next, turned(of_up, out), plain(m->delta[l + 1], next), of->a[l + 1], next, 1, m->panel);
    }
    real *of_error = m->of_delta[D - 1], *of_z = m->of_z;
    for (int i = 0; i < N; i++) {
        real *restrict g_ = of_error + (size_t)i * last, *restrict to = of_z + (size_t)i * last;
        if (net->norm) {  // δ = s (e − ē − n mean(e ∘ n)), and then through n and s
            const real *restrict e = m->error + (size_t)i * last, *restrict n = m->at.normed + (size_t)i * last;
            real s = m->at.scale[i], of_scale = s > 0 ? dot(g_, m->delta[D - 1] + (size_t)i * last, last) / s : 0;
            real along = dot(g_, n, last) / last, error_along = dot(e, n, last) / last, mean = sum(g_, last) / last;
            for (int j = 0; j < last; j++) {
                to[j] = -s * (g_[j] * error_along + e[j] * along);  // to n
                g_[j] = s * (g_[j] - mean - n[j] * along);          // to e
            }
            back_misfit(cell, m, t, i, g_, g);
            if (reads_prediction(&cell->bias)) add(last, g_, to);
            real mean_n = sum(to, last) / last, along_n = dot(to, n, last) / last + of_scale * s / last;
            for (int j = 0; j < last; j++) to[j] = s * (to[j] - mean_n - n[j] * along_n);
        } else {
            back_misfit(cell, m, t, i, g_, g);
            if (reads_prediction(&cell->bias)) memcpy(to, g_, last * sizeof(real));
            else memset(to, 0, last * sizeof(real));
        }
    }
    if (reads_prediction(&cell->bias) && net->residual) add_part(N, last, of_error, last, g->k, net->width[0]);
    int read = cell->erases && t->begun;
    real *more[DEPTH] = {0, m->of_delta[0]};
    back_layers(
        net, N, &m->at, at->a, at->turned, of_z, m->of_x, m->of_slope, net->gated ? more : read ? m->of_read : 0, g->unasked ? 0 : of->a, answers_itself(cell) || read, m->of_h,
        m->panel
    );
    add((size_t)N * net->width[0], m->of_x[0], g->k);
}

// Before them all: nothing is in the gradients of x and δ.
static void clear_rows(const Cell *cell, Space *m, const Tile *t) {
    const Network *n = &cell->network;
    for (int l = 0; l < n->depth; l++) {
        memset(m->of_x[l], 0, (size_t)t->rows * in_of(n, l) * sizeof(real));
        memset(m->of_delta[l], 0, (size_t)t->rows * n->width[l + 1] * sizeof(real));
    }
}

// A whole tile: from the gradients of its answers and of the weights behind it to those of all it was given. `of` comes in as
// of the end, and leaves as of the start. The tile's gradients and answers must have been made.
static void back_tile(const Cell *cell, Space *m, const Tile *t, const Stand *at, const real *of_y, const Stand *of, OfTile *g) {
    int apart = cell->boundary;  // what is read is not what is written
    if (!(apart && g->quiet)) {
        clear_rows(cell, m, t);
        back_advance(cell, m, t, at, of, g);
        if (t->q && !apart) back_answers(cell, m, t, at, of_y, of, g);
        if (cell->erases)
            for (int l = 0; l < cell->network.depth; l++) back_erased(cell, m, t, at, of, g, l);
        back_gradients(cell, m, t, at, of, g);
    }
    if (t->q && apart) back_anchor_answers(cell, m, t, at, of_y, of, g);  // last: the anchor may be the weights
}

#endif
