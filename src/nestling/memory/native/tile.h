// A tile of one memory, all of it in a core's cache: L tokens, before them the halo of a window's; N rows together.
//
// For a network of layers 1 … D with weights W_l and momentum S_l, at the anchor A of the chunk (W at its start):
//
//     x_1 = k,  z_l = x_l A_l,  x_{l+1} = σ(z_l),  M(k) = [k +] [LN](z_D)
//     δ_D = [LN]ᵀ ∂ℓ/∂M,  δ_l = (δ_{l+1} A_{l+1}ᵀ) ∘ σ'(z_l)                            gradients of row i: x_{l,i}ᵀ δ_{l,i}
//     ẑ_l = γ (h_l W_l) + f (h_l S_l) − (C ∘ h_l x_lᵀ) δ_l,  h_{l+1} = σ(ẑ_l)              the query's own way, at W_t
//     ẑ_l = h_l A_l                                                                        or at the boundary, the anchor
//     W ← γ_L W + f_L S − Σ_i C[L,i] x_iᵀ δ_i,   S ← m_L S − Σ_i P[L,i] x_iᵀ δ_i
//
// A rule that erases, without momentum, has r_l in the place of δ_l, from (I + T) r_l = diag(η) δ_l + diag(ε γ) x_l W_l with
// T[t,i] = ε_t C[t,i] (x_t·x_i) for i < t, ε of a hidden layer damped to ε/(1 + ε‖x‖²).  (Titans, §3.2; derived)

#ifndef NESTLING_TILE_H
#define NESTLING_TILE_H

#include "bias.h"
#include "gates.h"
#include "network.h"

#define BLOCK 8  // rows of a triangular system that are solved one by one

typedef struct {
    Network network;
    Bias bias;
    int before, boundary, momentum, erases, window;  // before, boundary: what is read, if not the weights after the token's write
} Cell;

// Weights, momentum and anchor, or their gradients. Where the anchor is the weights, so is the pointer.
typedef struct {
    real *w[DEPTH], *s[DEPTH], *a[DEPTH];
    real *turned[DEPTH];  // the anchor transposed, or null
} Stand;

typedef struct {
    int tokens, rows, begun;  // begun: the weights are the anchor
    const real *q, *k, *v;    // q `[tokens, in]` or null; k, v `[rows, …]`
    const real *gram;         // k kᵀ where it is known already, or null
    const Gates *gates;
    const Coefficients *c;
    real *const *scale;  // what each token's read of a layer is multiplied with, or null
} Tile;

// Gradients of a tile's inputs, all added to.  quiet: none come from the weights behind it;  unasked: nobody asks for those of the
// weights before it.
typedef struct {
    real *q, *k, *v;
    Coefficients *c;
    OfGates *gates;  // of an erasing rule: lr and erase
    real *const *scale;
    int quiet, unasked;
} OfTile;

// What a tile makes: first what `gradients` does, which the way back may find again, then what lasts for a step of it.
typedef struct {
    Trace at;
    real *up[DEPTH], *delta[DEPTH], *error, *misfit;
    real *rows[DEPTH], *read[DEPTH], *system[DEPTH], *strength[DEPTH];  // r, x W, x xᵀ and the damped ε; rows are delta where nothing is erased
    real *h[DEPTH], *at_w[DEPTH], *at_s[DEPTH], *ahead[DEPTH], *rise[DEPTH], *normed, *scale;  // rise: σ'(ẑ)
    real *gram, *mixed, *panel, *spare, *other;
    real *of_x[DEPTH], *of_delta[DEPTH], *of_slope[DEPTH], *of_read[DEPTH], *of_h, *of_z;
} Space;

// Lays out room for the first of it. rows: of a tile with its halo.
static void lay_made(const Cell *cell, int rows, Space *m, Room *room) {
    const Network *n = &cell->network;
    int last = n->width[n->depth];
    lay_trace(n, rows, 0, &m->at, room);
    for (int l = 0; l < n->depth; l++) {
        int out = n->width[l + 1];
        m->up[l] = take(room, l < n->depth - 1 ? (size_t)rows * out : 0);
        m->delta[l] = take(room, (size_t)rows * out);
        m->rows[l] = cell->erases ? take(room, (size_t)rows * out) : m->delta[l];
        m->read[l] = take(room, cell->erases ? (size_t)rows * out : 0);
        m->system[l] = take(room, cell->erases ? (size_t)rows * rows : 0);
        m->strength[l] = take(room, cell->erases ? rows : 0);
    }
    m->error = take(room, (size_t)rows * last);
    m->misfit = take(room, bends(&cell->bias) ? (size_t)rows * last : 0);
}

// Lays out room for the rest, for tiles of so many tokens.
static void lay_step(const Cell *cell, int tokens, int rows, Space *m, Room *room) {
    const Network *n = &cell->network;
    int most = widest(n) > rows ? widest(n) : rows, last = n->width[n->depth];
    for (int l = 0; l < n->depth; l++) {
        int in = in_of(n, l), out = n->width[l + 1];
        m->h[l] = take(room, l ? (size_t)tokens * in : 0);
        m->at_w[l] = take(room, (size_t)tokens * out);
        m->at_s[l] = take(room, cell->momentum ? (size_t)tokens * out : 0);
        m->ahead[l] = take(room, (size_t)tokens * out);
        m->rise[l] = take(room, l < n->depth - 1 ? (size_t)tokens * out : 0);
        m->of_x[l] = take(room, (size_t)rows * in);
        m->of_delta[l] = take(room, (size_t)rows * out);
        m->of_slope[l] = take(room, (size_t)rows * out);
        m->of_read[l] = take(room, cell->erases ? (size_t)rows * out : 0);
    }
    m->normed = take(room, (size_t)tokens * last);
    m->scale = take(room, tokens);
    m->gram = take(room, (size_t)rows * rows);
    m->mixed = take(room, (size_t)rows * rows);
    m->spare = take(room, (size_t)rows * most);
    m->other = take(room, (size_t)rows * most);
    m->of_h = take(room, (size_t)rows * most);
    m->of_z = take(room, (size_t)rows * most);
    m->panel = take(room, (size_t)most * PANEL);
}

// T[t,i] of an erasing layer, i < t, into m->mixed; where it is used, nothing is in a halo.
static void triangle(Space *m, const Tile *t, int l, const real *system) {
    int L = t->tokens;
    for (int i = 0; i < L; i++)
        for (int j = 0; j < i; j++)
            m->mixed[i * L + j] = m->strength[l][i] * t->c->write[(size_t)i * L + j] * system[i * L + j];
}

static const real *system_of(const Space *m, const Tile *t, int l) { return l == 0 && t->gram ? t->gram : m->system[l]; }

// What an erasing layer reads at the weights of the tile's start, x W.
static const real *reading(const Space *m, const Tile *t, int l) { return t->begun ? m->at.z[l] : m->read[l]; }

// r of an erasing layer, block after block of rows: what the blocks before take away is one product.
static void erased(const Cell *cell, Space *m, const Tile *t, const Stand *at, int l) {
    int L = t->tokens, in = cell->network.width[l], out = cell->network.width[l + 1];
    real *rows = m->rows[l], *strength = m->strength[l];
    const real *x = m->at.x[l], *system = system_of(m, t, l), *read = reading(m, t, l);
    if (system == m->system[l]) triangular(below(MADE, 0), L, in, L, plain(x, in), turned(x, in), m->system[l], L, 0, m->panel);
    if (!t->begun) product(L, in, out, plain(x, in), plain(at->w[l], out), m->read[l], out, 0, m->panel);
    for (int i = 0; i < L; i++) {
        real erase = t->gates->erase[i], step = t->gates->lr[i];
        strength[i] = l ? erase / (R(1.0) + erase * system[i * L + i]) : erase;
        real scale = strength[i] * t->c->keep[i];
        const real *restrict z = read + (size_t)i * out, *restrict delta = m->delta[l] + (size_t)i * out;
        real *restrict to = rows + (size_t)i * out;
        for (int j = 0; j < out; j++) to[j] = scale * z[j] + step * delta[j];
    }
    triangle(m, t, l, system);
    for (int b = 0; b < L; b += BLOCK) {
        int end = b + BLOCK < L ? b + BLOCK : L;
        real *from = rows + (size_t)b * out;
        if (b) product(end - b, b, out, plain(m->mixed + b * L, L), plain(rows, out), from, out, -1, m->panel);
        for (int i = b + 1; i < end; i++)
            for (int j = b; j < i; j++) less(out, m->mixed[i * L + j], rows + (size_t)j * out, rows + (size_t)i * out);
    }
}

// Whether z_D is needed for the gradients.
static int answers_itself(const Cell *cell) { return cell->network.norm || reads_prediction(&cell->bias); }

// Gradients of a tile at the anchor: x, z, slopes, δ, and what is written of them.
static void gradients(const Cell *cell, Space *m, const Tile *t, const Stand *at) {
    const Network *n = &cell->network;
    int N = t->rows, D = n->depth, last = n->width[D], wide = last + reads_threshold(&cell->bias);
    trace(n, N, t->k, at->a, answers_itself(cell) || (cell->erases && t->begun), &m->at, m->panel);
    real *error = n->norm ? m->error : m->delta[D - 1], *misfit = bends(&cell->bias) ? m->misfit : error;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < last; j++) misfit[(size_t)i * last + j] = -t->v[(size_t)i * wide + j];
    if (reads_prediction(&cell->bias)) {
        add((size_t)N * last, n->norm ? m->at.normed : m->at.z[D - 1], misfit);
        if (n->residual) add_part(N, last, t->k, n->width[0], misfit, last);
    }
    if (misfit != error)
        for (int i = 0; i < N; i++) bend(&cell->bias, last, t->v + (size_t)i * wide, misfit + (size_t)i * last, error + (size_t)i * last);
    if (n->norm) denormalize(N, last, m->at.normed, m->at.scale, error, m->delta[D - 1]);
    if (n->gated) {
        int out = n->width[2], size = N * out;
        const real *restrict up = m->up[1], *restrict gate = m->at.slope[1], *restrict passed = m->at.z[1];
        product(N, last, out, plain(m->delta[2], last), transposed(at->a, at->turned, 2, out, last), m->up[1], out, 0, m->panel);
        for (int i = 0; i < size; i++) {
            m->delta[0][i] = up[i] * passed[i] * m->at.slope[0][i];
            m->delta[1][i] = up[i] * gate[i];
        }
    }
    for (int l = D - 2; l >= 0 && !n->gated; l--) {
        int out = n->width[l + 1], next = n->width[l + 2];
        product(N, next, out, plain(m->delta[l + 1], next), transposed(at->a, at->turned, l + 1, out, next), m->up[l], out, 0, m->panel);
        for (int i = 0; i < N * out; i++) m->delta[l][i] = m->up[l][i] * m->at.slope[l][i];
    }
    if (cell->erases)
        for (int l = 0; l < D; l++) erased(cell, m, t, at, l);
}

// h of the next layer from ẑ_l; keeps: σ'(ẑ_l) too, for the way back. Of a gated network: both, and σ(ẑ_1).
static void activate_asked(const Network *n, Space *m, int tokens, int l, int keeps) {
    int size = tokens * n->width[l + 1];
    if (l == n->depth - 1) return;
    if (n->gated) {
        if (l == 1) open_gate(n, size, m->ahead, m->rise[1], m->rise[0], m->h[2]);
        return;
    }
    if (keeps) activate_with_slope(n->activation, size, m->ahead[l], m->h[l + 1], m->rise[l]);
    else activate(n->activation, size, m->ahead[l], m->h[l + 1]);
}

// Answers from ẑ_D: norm, and what the residual adds. y null: not wanted.
static void finish(const Network *n, Space *m, const Tile *t, real *y) {
    int L = t->tokens, last = n->width[n->depth];
    const real *z = m->ahead[n->depth - 1];
    if (n->norm) {
        normalize(L, last, (real)n->epsilon, z, m->normed, m->scale);
        z = m->normed;
    }
    if (!y) return;
    memcpy(y, z, (size_t)L * last * sizeof(real));
    if (n->residual) add_part(L, last, t->q, n->width[0], y, last);
}

// Answers to the tile's queries from the anchor; y null: what the way back needs instead.
static void anchor_answers(const Cell *cell, Space *m, const Tile *t, const Stand *at, real *y) {
    const Network *n = &cell->network;
    int L = t->tokens;
    m->h[0] = (real *)t->q;
    for (int l = 0; l < n->depth; l++) {
        int in = n->width[l], out = n->width[l + 1];
        product(L, in, out, plain(m->h[l], in), plain(at->a[l], out), m->ahead[l], out, 0, m->panel);
        activate_asked(n, m, L, l, !y);
    }
    finish(n, m, t, y);
}

// Answers to the tile's queries; y null: what the way back needs instead.
static void answers(const Cell *cell, Space *m, const Tile *t, const Stand *at, real *y) {
    if (cell->boundary) {
        anchor_answers(cell, m, t, at, y);
        return;
    }
    const Network *n = &cell->network;
    int L = t->tokens, N = t->rows, D = n->depth, first = cell->before ? 0 : 1;
    const real *keep = t->c->keep + first, *carry = cell->momentum ? t->c->carry + first : 0;
    m->h[0] = (real *)t->q;
    for (int l = 0; l < D; l++) {
        int in = n->width[l], out = n->width[l + 1];
        const real *C = t->c->write + (size_t)first * N;
        real *z = m->ahead[l];
        product(L, in, out, plain(m->h[l], in), plain(at->w[l], out), m->at_w[l], out, 0, m->panel);
        if (carry) product(L, in, out, plain(m->h[l], in), plain(at->s[l], out), m->at_s[l], out, 0, m->panel);
        for (int i = 0; i < L; i++) {
            const real *restrict a = m->at_w[l] + (size_t)i * out;
            real *restrict to = z + (size_t)i * out;
            if (carry) {
                const real *restrict b = m->at_s[l] + (size_t)i * out;
                for (int j = 0; j < out; j++) to[j] = keep[i] * a[j] + carry[i] * b[j];
            } else {
                for (int j = 0; j < out; j++) to[j] = keep[i] * a[j];
            }
        }
        Triangle made = below(MADE, N - L), read = below(READ, N - L);
        triangular(made, L, in, N, plain(m->h[l], in), turned(m->at.x[l], in), m->gram, N, 0, m->panel);
        for (int i = 0; i < L; i++)
            for (int j = i * N, end = j + reach(made, i, N); j < end; j++) m->mixed[j] = m->gram[j] * C[j];
        triangular(read, L, N, out, plain(m->mixed, N), plain(m->rows[l], out), z, out, -1, m->panel);
        if (t->scale) scaled(L, out, t->scale[l], z, z);
        activate_asked(n, m, L, l, !y);
    }
    finish(n, m, t, y);
}

// Weights and momentum after the tile; `to` may be `at`.
static void advance(const Cell *cell, Space *m, const Tile *t, const Stand *at, const Stand *to) {
    const Network *net = &cell->network;
    int L = t->tokens, N = t->rows;
    const Coefficients *c = t->c;
    for (int l = 0; l < net->depth; l++) {
        int in = net->width[l], out = net->width[l + 1], narrow = in <= out;
        const real *x = m->at.x[l], *r = m->rows[l];
        Blend of_w = {c->keep[L], cell->momentum ? c->carry[L] : 0, at->w[l], cell->momentum ? at->s[l] : 0};
        for (int of_s = 0; of_s <= cell->momentum; of_s++) {
            scaled(N, narrow ? in : out, (of_s ? c->impulse : c->write) + (size_t)L * N, narrow ? x : r, m->spare);
            blended(
                in, N, out, turned(narrow ? m->spare : x, in), plain(narrow ? r : m->spare, out), of_s ? to->s[l] : to->w[l],
                out, of_s ? (Blend){c->decay[L], 0, at->s[l], 0} : of_w, m->panel
            );
        }
    }
}

// Whether a tile's factors, and weights and momentum, are finite.
static int sound(const Cell *cell, const Space *m, const Tile *t, const Stand *at) {
    const Network *net = &cell->network;
    real total = 0;
    for (int l = 0; l < net->depth; l++) {
        size_t n = (size_t)in_of(net, l) * net->width[l + 1];
        total += sum(at->w[l], n);
        if (cell->momentum) total += sum(at->s[l], n);
        total += sum(m->rows[l], (size_t)t->rows * net->width[l + 1]);
        total += sum(m->at.x[l], (size_t)t->rows * in_of(net, l));
    }
    return total - total == 0;
}

#endif
