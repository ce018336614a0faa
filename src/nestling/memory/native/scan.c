// The chunk engine's linear recurrence for one memory after the other, all of a tile in a core's cache.
//
// For a network of layers 1 … D with weights W_l and momentum S_l, and for each tile of L tokens, at the weights of its start:
//
//     x_1 = k,  z_l = x_l W_l,  x_{l+1} = σ(z_l),  M(k) = [k +] [LN](z_D)
//     δ_D = [LN]ᵀ ∂ℓ/∂M,  δ_l = (δ_{l+1} W_{l+1}ᵀ) ∘ σ'(z_l)                            gradients of token i: x_{l,i}ᵀ δ_{l,i}
//     ẑ_l = γ (h_l W_l) + f (h_l S_l) − (C ∘ h_l x_lᵀ) δ_l,  h_{l+1} = σ(ẑ_l)              the query's own way, at W_t
//     W ← γ_L W + f_L S − Σ_i C[L,i] x_iᵀ δ_i,   S ← m S − Σ_i b_i x_iᵀ δ_i
//
// A rule that erases, without momentum, has r_l in the place of δ_l, from (I + T) r_l = diag(η) δ_l + diag(ε γ) x_l W_l with
// T[t,i] = ε_t C[t,i] (x_t·x_i) for i < t, ε of a hidden layer damped to ε/(1 + ε‖x‖²).
//
// (Titans, §3.2; derived). The same as `chunked`, whose operations this does one tile and one memory at a time, so that no
// intermediate leaves the cache. The backward pass starts from weights kept every few tiles and makes the rest again.
// A value that is not finite raises a flag; the caller then leaves all to `chunked`, whose guards know what to do.

#include "matrix.h"
#include "activation.h"

#include <pthread.h>
#include <stdlib.h>

#define DEPTH 4
#define BLOCK 8  // rows of a triangular system that are solved one by one

typedef struct {
    int memories, tiles, length, depth, group, threads;
    int width[DEPTH + 1];  // of the layers' inputs, and of the last one's output
    int activation, residual, norm, reads_prediction, before, momentum;
    double epsilon;
    // `[memory, tile · length, width]`; q null where nothing is asked
    const real *q, *k, *v;
    // γ `[memory, tile, length + 1]`, f the same, C `[memory, tile, length + 1, length]`, m `[memory, tile]`,
    // b `[memory, tile, length]`;  γ, f, m, b may be null
    const real *keep, *carry, *write, *keep_s, *write_s;
    const real *step, *erase;  // η and ε `[memory, tile, length]`, null where nothing is erased
    const real *w[DEPTH], *s[DEPTH];  // `[memory, in, out]`; s null without momentum
    real *y, *w_end[DEPTH], *s_end[DEPTH];
    real *kept;  // weights and momentum before each group of tiles, `[groups, memory, numbers]`; null: not kept
    int *broken;  // whether something was not finite, one per memory
    // Gradients, for the backward pass alone. Those of the weights come in as of the end, and leave as of the start.
    const real *of_y;
    real *of_q, *of_k, *of_v, *of_keep, *of_carry, *of_write, *of_keep_s, *of_write_s, *of_step, *of_erase;
    real *of_w[DEPTH], *of_s[DEPTH];
} Scan;

typedef struct {
    const real *q, *k, *v, *keep, *carry, *write, *keep_s, *write_s, *step, *erase;
} Tile;

// What lies in the cache: weights, and what a tile makes.
typedef struct {
    real *w[DEPTH], *s[DEPTH];
    real *x[DEPTH], *z[DEPTH], *slope[DEPTH], *up[DEPTH], *delta[DEPTH], *error, *normed, *scale;
    real *h[DEPTH], *at_w[DEPTH], *at_s[DEPTH], *ahead[DEPTH], *answer_normed, *answer_scale;
    real *rows[DEPTH], *system[DEPTH], *strength[DEPTH];  // r, x xᵀ and the damped ε; rows are delta where nothing is erased
    real *gram, *mixed, *panel, *spare, *other;
    real *of_x[DEPTH], *of_delta[DEPTH], *of_h, *of_z, *of_slope[DEPTH];
} Space;

static size_t numbers(const Scan *c) {
    size_t n = 0;
    for (int l = 0; l < c->depth; l++) n += (size_t)c->width[l] * c->width[l + 1];
    return c->momentum ? 2 * n : n;
}

static int widest(const Scan *c) {
    int most = c->length;
    for (int l = 0; l <= c->depth; l++) most = c->width[l] > most ? c->width[l] : most;
    return most;
}

static real *take(real **at, size_t count) {
    real *found = *at;
    *at += (count + 15) / 16 * 16;
    return found;
}

// Lays the space out from `at`; with at = 0, counts.
static size_t lay(const Scan *c, Space *m, real *at) {
    real *start = at;
    int L = c->length, most = widest(c);
    for (int l = 0; l < c->depth; l++) {
        int in = c->width[l], out = c->width[l + 1];
        m->x[l] = take(&at, l ? (size_t)L * in : 0);
        m->z[l] = take(&at, (size_t)L * out);
        m->slope[l] = take(&at, (size_t)L * out);
        m->up[l] = take(&at, (size_t)L * out);
        m->delta[l] = take(&at, (size_t)L * out);
        m->h[l] = take(&at, l ? (size_t)L * in : 0);
        m->at_w[l] = take(&at, (size_t)L * out);
        m->at_s[l] = take(&at, (size_t)L * out);
        m->ahead[l] = take(&at, (size_t)L * out);
        m->of_x[l] = take(&at, (size_t)L * in);
        m->of_delta[l] = take(&at, (size_t)L * out);
        m->of_slope[l] = take(&at, (size_t)L * out);
        m->rows[l] = c->erase ? take(&at, (size_t)L * out) : m->delta[l];
        m->system[l] = take(&at, c->erase ? (size_t)L * L : 0);
        m->strength[l] = take(&at, c->erase ? L : 0);
    }
    int last = c->width[c->depth];
    m->error = take(&at, (size_t)L * last);
    m->normed = take(&at, (size_t)L * last);
    m->answer_normed = take(&at, (size_t)L * last);
    m->scale = take(&at, L);
    m->answer_scale = take(&at, L);
    m->gram = take(&at, (size_t)L * L);
    m->mixed = take(&at, (size_t)L * L);
    m->spare = take(&at, (size_t)L * most);
    m->other = take(&at, (size_t)L * most);
    m->of_h = take(&at, (size_t)L * most);
    m->of_z = take(&at, (size_t)L * most);
    m->panel = take(&at, (size_t)most * PANEL);
    return at - start;
}

static Tile tile_of(const Scan *c, int memory, int n) {
    size_t at = (size_t)memory * c->tiles + n, L = c->length, first = at * L;
    return (Tile){
        c->q ? c->q + first * c->width[0] : 0,
        c->k + first * c->width[0],
        c->v + first * c->width[c->depth],
        c->keep ? c->keep + at * (L + 1) : 0,
        c->carry ? c->carry + at * (L + 1) : 0,
        c->write + at * (L + 1) * L,
        c->keep_s ? c->keep_s + at : 0,
        c->write_s ? c->write_s + at * L : 0,
        c->step ? c->step + at * L : 0,
        c->erase ? c->erase + at * L : 0,
    };
}

// ---- rows: n numbers each ------------------------------------------------------------------------------------------

static inline real dot(const real *restrict a, const real *restrict b, size_t n) {
    real total = 0;
#pragma omp simd reduction(+ : total)
    for (size_t i = 0; i < n; i++) total += a[i] * b[i];
    return total;
}

static inline real sum(const real *restrict a, size_t n) {
    real total = 0;
#pragma omp simd reduction(+ : total)
    for (size_t i = 0; i < n; i++) total += a[i];
    return total;
}

// to = scale_i from_i, row by row
static void scaled(int rows, int n, const real *restrict scale, const real *restrict from, real *restrict to) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < n; j++) to[(size_t)i * n + j] = scale[i] * from[(size_t)i * n + j];
}

static void add(size_t n, const real *restrict from, real *restrict to) {
    for (size_t i = 0; i < n; i++) to[i] += from[i];
}

// to −= scale from
static void less(int n, real scale, const real *restrict from, real *restrict to) {
    for (int j = 0; j < n; j++) to[j] -= scale * from[j];
}

// normed = (z − mean)/σ, scale = 1/σ
static void normalize(int rows, int n, real epsilon, const real *restrict z, real *restrict normed, real *restrict scale) {
    for (int i = 0; i < rows; i++, z += n, normed += n) {
        real mean = sum(z, n) / n;
        for (int j = 0; j < n; j++) normed[j] = z[j] - mean;
        scale[i] = R(1.0) / (real)sqrt(dot(normed, normed, n) / n + epsilon);
        for (int j = 0; j < n; j++) normed[j] *= scale[i];
    }
}

// to = scale (from − mean − normed mean(from ∘ normed)): a gradient behind the norm, before it. to may be from.
static void denormalize(int rows, int n, const real *normed, const real *scale, const real *from, real *to) {
    for (int i = 0; i < rows; i++, normed += n, from += n, to += n) {
        real mean = sum(from, n) / n, along = dot(from, normed, n) / n;
        for (int j = 0; j < n; j++) to[j] = scale[i] * (from[j] - mean - normed[j] * along);
    }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// T[t,i] of an erasing layer, i < t, into m->mixed.
static void triangle(const Scan *c, Space *m, const Tile *t, int l) {
    int L = c->length;
    for (int i = 0; i < L; i++)
        for (int j = 0; j < i; j++)
            m->mixed[i * L + j] = m->strength[l][i] * t->write[(size_t)i * L + j] * m->system[l][i * L + j];
}

// r of an erasing layer, block after block of rows: what the blocks before take away is one product.
static void erased(const Scan *c, Space *m, const Tile *t, int l) {
    int L = c->length, in = c->width[l], out = c->width[l + 1];
    real *rows = m->rows[l], *strength = m->strength[l];
    product(L, in, L, plain(m->x[l], in), turned(m->x[l], in), m->system[l], L, 0, m->panel);
    for (int i = 0; i < L; i++) {
        strength[i] = l ? t->erase[i] / (R(1.0) + t->erase[i] * m->system[l][i * L + i]) : t->erase[i];
        real scale = strength[i] * (t->keep ? t->keep[i] : R(1.0)), step = t->step[i];
        const real *restrict z = m->z[l] + (size_t)i * out, *restrict delta = m->delta[l] + (size_t)i * out;
        real *restrict to = rows + (size_t)i * out;
        for (int j = 0; j < out; j++) to[j] = scale * z[j] + step * delta[j];
    }
    triangle(c, m, t, l);
    for (int b = 0; b < L; b += BLOCK) {
        int end = b + BLOCK < L ? b + BLOCK : L;
        real *at = rows + (size_t)b * out;
        if (b) product(end - b, b, out, plain(m->mixed + b * L, L), plain(rows, out), at, out, -1, m->panel);
        for (int i = b + 1; i < end; i++)
            for (int j = b; j < i; j++) less(out, m->mixed[i * L + j], rows + (size_t)j * out, rows + (size_t)i * out);
    }
}

// Gradients of a tile at its first weights: x, z, slopes, δ, and what is written of them.
static void gradients(const Scan *c, Space *m, const Tile *t) {
    int L = c->length, D = c->depth, last = c->width[D];
    m->x[0] = (real *)t->k;
    for (int l = 0; l < D; l++) {
        int in = c->width[l], out = c->width[l + 1];
        if (l == D - 1 && !c->norm && !c->reads_prediction && !c->erase) break;
        product(L, in, out, plain(m->x[l], in), plain(m->w[l], out), m->z[l], out, 0, m->panel);
        if (l < D - 1) activate_with_slope(c->activation, L * out, m->z[l], m->x[l + 1], m->slope[l]);
    }
    const real *answer = m->z[D - 1];
    if (c->norm) {
        normalize(L, last, c->epsilon, m->z[D - 1], m->normed, m->scale);
        answer = m->normed;
    }
    real *error = c->norm ? m->error : m->delta[D - 1];
    for (int i = 0; i < L * last; i++) error[i] = -t->v[i];
    if (c->reads_prediction) add((size_t)L * last, answer, error);
    if (c->reads_prediction && c->residual) add((size_t)L * last, t->k, error);
    if (c->norm) denormalize(L, last, m->normed, m->scale, error, m->delta[D - 1]);
    for (int l = D - 2; l >= 0; l--) {
        int out = c->width[l + 1], next = c->width[l + 2];
        product(L, next, out, plain(m->delta[l + 1], next), turned(m->w[l + 1], next), m->up[l], out, 0, m->panel);
        for (int i = 0; i < L * out; i++) m->delta[l][i] = m->up[l][i] * m->slope[l][i];
    }
    if (c->erase)
        for (int l = 0; l < D; l++) erased(c, m, t, l);
}

// Answers to the tile's queries; y null: only what is before the last activation is wanted.
static void answers(const Scan *c, Space *m, const Tile *t, real *y) {
    int L = c->length, D = c->depth, first = c->before ? 0 : 1, last = c->width[D];
    m->h[0] = (real *)t->q;
    for (int l = 0; l < D; l++) {
        int in = c->width[l], out = c->width[l + 1];
        const real *C = t->write + (size_t)first * L;
        real *z = m->ahead[l];
        product(L, in, out, plain(m->h[l], in), plain(m->w[l], out), m->at_w[l], out, 0, m->panel);
        if (c->momentum) product(L, in, out, plain(m->h[l], in), plain(m->s[l], out), m->at_s[l], out, 0, m->panel);
        for (int i = 0; i < L; i++) {
            real keep = t->keep ? t->keep[first + i] : R(1.0), carry = c->momentum ? t->carry[first + i] : R(0.0);
            const real *restrict a = m->at_w[l] + (size_t)i * out, *restrict b = m->at_s[l] + (size_t)i * out;
            real *restrict to = z + (size_t)i * out;
            if (c->momentum)
                for (int j = 0; j < out; j++) to[j] = keep * a[j] + carry * b[j];
            else
                for (int j = 0; j < out; j++) to[j] = keep * a[j];
        }
        product(L, in, L, plain(m->h[l], in), turned(m->x[l], in), m->gram, L, 0, m->panel);
        for (int i = 0; i < L * L; i++) m->mixed[i] = m->gram[i] * C[i];
        product(L, L, out, plain(m->mixed, L), plain(m->rows[l], out), z, out, -1, m->panel);
        if (l < D - 1) activate(c->activation, L * out, z, m->h[l + 1]);
    }
    const real *z = m->ahead[D - 1];
    if (c->norm) {
        normalize(L, last, c->epsilon, z, m->answer_normed, m->answer_scale);
        z = m->answer_normed;
    }
    if (!y) return;
    memcpy(y, z, (size_t)L * last * sizeof(real));
    if (c->residual) add((size_t)L * last, t->q, y);
}

// Weights and momentum after the tile, which go to `to`, in the order of `stand`.
static void advance(const Scan *c, Space *m, const Tile *t, real *to) {
    int L = c->length;
    const real *a = t->write + (size_t)L * L;
    for (int l = 0; l < c->depth; l++) {
        int in = c->width[l], out = c->width[l + 1], narrow = in <= out;
        size_t n = (size_t)in * out;
        const real *x = m->x[l], *r = m->rows[l], *w = m->w[l], *s = m->s[l];
        real keep = t->keep ? t->keep[L] : R(1.0), *new_w = to, *new_s = to + n;
        if (c->momentum) {
            real carry = t->carry[L], kept = *t->keep_s;
#pragma omp simd
            for (size_t i = 0; i < n; i++) {
                real old = s[i];
                new_w[i] = keep * w[i] + carry * old;
                new_s[i] = kept * old;
            }
        } else {
#pragma omp simd
            for (size_t i = 0; i < n; i++) new_w[i] = keep * w[i];
        }
        for (int of_s = 0; of_s <= c->momentum; of_s++) {
            scaled(L, narrow ? in : out, of_s ? t->write_s : a, narrow ? x : r, m->spare);
            product(
                in, L, out, turned(narrow ? m->spare : x, in), plain(narrow ? r : m->spare, out), of_s ? new_s : new_w, out,
                -1, m->panel
            );
        }
        to += c->momentum ? 2 * n : n;
    }
}

static int sound(const Scan *c, const Space *m) {
    real total = 0;
    for (int l = 0; l < c->depth; l++) {
        size_t n = (size_t)c->width[l] * c->width[l + 1];
        total += sum(m->w[l], n);
        if (c->momentum) total += sum(m->s[l], n);
        total += sum(m->rows[l], (size_t)c->length * c->width[l + 1]);
        total += sum(m->x[l], (size_t)c->length * c->width[l]);
    }
    return total - total == 0;
}

// Let the weights and momentum be those at `at`: layer after layer, W, then S.
static void stand(const Scan *c, Space *m, real *at) {
    for (int l = 0; l < c->depth; l++) {
        size_t n = (size_t)c->width[l] * c->width[l + 1];
        m->w[l] = at, at += n;
        if (c->momentum) m->s[l] = at, at += n;
    }
}

static void forward(const Scan *c, Space *m, real *state, int memory) {
    stand(c, m, state);
    for (int l = 0; l < c->depth; l++) {
        size_t n = (size_t)c->width[l] * c->width[l + 1];
        memcpy(m->w[l], c->w[l] + memory * n, n * sizeof(real));
        if (c->momentum) memcpy(m->s[l], c->s[l] + memory * n, n * sizeof(real));
    }
    size_t size = numbers(c), row = (size_t)c->length * c->width[c->depth];
    for (int n = 0; n < c->tiles; n++) {
        if (c->kept && n % c->group == 0)
            memcpy(c->kept + ((size_t)(n / c->group) * c->memories + memory) * size, state, size * sizeof(real));
        Tile t = tile_of(c, memory, n);
        gradients(c, m, &t);
        if (c->q) answers(c, m, &t, c->y + ((size_t)memory * c->tiles + n) * row);
        advance(c, m, &t, state);
        if (!sound(c, m)) {
            c->broken[memory] = 1;
            return;
        }
    }
    for (int l = 0; l < c->depth; l++) {
        size_t n = (size_t)c->width[l] * c->width[l + 1];
        memcpy(c->w_end[l] + memory * n, m->w[l], n * sizeof(real));
        if (c->momentum) memcpy(c->s_end[l] + memory * n, m->s[l], n * sizeof(real));
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

typedef struct {
    real *q, *k, *v, *keep, *carry, *write, *keep_s, *write_s, *step, *erase;  // all but of_v are added to
    real *w[DEPTH], *s[DEPTH];
} Gradients;

// W ← γW + fS − Σ a x_iᵀ r_i, S ← mS − Σ b x_iᵀ r_i
static void back_advance(const Scan *c, Space *m, const Tile *t, Gradients *g) {
    int L = c->length;
    for (int l = 0; l < c->depth; l++) {
        int in = c->width[l], out = c->width[l + 1], narrow = in <= out, few = narrow ? in : out;
        size_t n = (size_t)in * out;
        const real *x = m->x[l], *r = m->rows[l], *slim = narrow ? x : r;
        real *of_slim = narrow ? m->of_x[l] : m->of_delta[l];
        for (int of_s = 0; of_s <= c->momentum; of_s++) {
            const real *a = of_s ? t->write_s : t->write + (size_t)L * L, *of = of_s ? g->s[l] : g->w[l];
            real *of_a = of_s ? g->write_s : g->write + (size_t)L * L;
            scaled(L, few, a, slim, m->spare);
            if (narrow) {
                product(L, in, out, plain(m->spare, in), plain(of, out), m->of_delta[l], out, -1, m->panel);
                product(L, out, in, plain(r, out), turned(of, out), m->other, in, 0, m->panel);
            } else {
                product(L, out, in, plain(m->spare, out), turned(of, out), m->of_x[l], in, -1, m->panel);
                product(L, in, out, plain(x, in), plain(of, out), m->other, out, 0, m->panel);
            }
            for (int i = 0; i < L; i++) {
                const real *restrict back = m->other + (size_t)i * few;
                real *restrict to = of_slim + (size_t)i * few;
                of_a[i] -= dot(back, slim + (size_t)i * few, few);
                for (int j = 0; j < few; j++) to[j] -= a[i] * back[j];
            }
        }
        real *restrict of_w = g->w[l], *restrict of_s = g->s[l];
        if (t->keep) g->keep[L] += dot(of_w, m->w[l], n);
        if (c->momentum) {
            g->carry[L] += dot(of_w, m->s[l], n);
            *g->keep_s += dot(of_s, m->s[l], n);
            real keep = t->keep ? t->keep[L] : R(1.0), carry = t->carry[L], kept = *t->keep_s;
            for (size_t i = 0; i < n; i++) of_s[i] = kept * of_s[i] + carry * of_w[i], of_w[i] *= keep;
        } else if (t->keep) {
            real keep = t->keep[L];
            for (size_t i = 0; i < n; i++) of_w[i] *= keep;
        }
    }
}

// ẑ = γ (h W) + f (h S) − (C ∘ h xᵀ) δ, layer after layer, from the last
static void back_answers(const Scan *c, Space *m, const Tile *t, const real *of_y, Gradients *g) {
    int L = c->length, D = c->depth, first = c->before ? 0 : 1, last = c->width[D];
    real *of_z = m->of_z, *of_h = m->of_h;
    memcpy(of_z, of_y, (size_t)L * last * sizeof(real));
    if (c->norm) denormalize(L, last, m->answer_normed, m->answer_scale, of_y, of_z);
    for (int l = D - 1; l >= 0; l--) {
        int in = c->width[l], out = c->width[l + 1];
        const real *C = t->write + (size_t)first * L;
        real *restrict of_write = g->write + (size_t)first * L;
        product(L, in, L, plain(m->h[l], in), turned(m->x[l], in), m->gram, L, 0, m->panel);
        product(L, out, L, plain(of_z, out), turned(m->rows[l], out), m->mixed, L, 0, m->panel);
        for (int i = 0; i < L * L; i++) {
            real of = -m->mixed[i], gram = m->gram[i];
            of_write[i] += of * gram;
            m->mixed[i] = of * C[i];
            m->gram[i] = gram * C[i];
        }
        product(L, L, out, turned(m->gram, L), plain(of_z, out), m->of_delta[l], out, -1, m->panel);
        product(L, L, in, turned(m->mixed, L), plain(m->h[l], in), m->of_x[l], in, 1, m->panel);
        product(L, L, in, plain(m->mixed, L), plain(m->x[l], in), of_h, in, 0, m->panel);
        for (int of_s = 0; of_s <= c->momentum; of_s++) {
            const real *scale = of_s ? t->carry : t->keep, *part = of_z;
            if (scale) {
                real *of_scale = (of_s ? g->carry : g->keep) + first;
                const real *at = of_s ? m->at_s[l] : m->at_w[l];
                for (int i = 0; i < L; i++)
                    of_scale[i] += dot(of_z + (size_t)i * out, at + (size_t)i * out, out);
                scaled(L, out, scale + first, of_z, m->other);
                part = m->other;
            }
            const real *w = of_s ? m->s[l] : m->w[l];
            product(L, out, in, plain(part, out), turned(w, out), of_h, in, 1, m->panel);
            product(in, L, out, turned(m->h[l], in), plain(part, out), of_s ? g->s[l] : g->w[l], out, 1, m->panel);
        }
        if (l) {
            back_through(c->activation, L * in, m->ahead[l - 1], of_h);
            real *swap = of_z;
            of_z = of_h, of_h = swap;
        }
    }
    add((size_t)L * c->width[0], of_h, g->q);
    if (c->residual) add((size_t)L * last, of_y, g->q);
}

// (I + T) r = diag(η) δ + diag(ε γ) z: the gradient of r in of_delta becomes that of δ; that of z goes to of_x and W.
static void back_erased(const Scan *c, Space *m, const Tile *t, Gradients *g, int l) {
    int L = c->length, in = c->width[l], out = c->width[l + 1];
    real *of = m->of_delta[l], *strength = m->strength[l];
    triangle(c, m, t, l);
    for (int end = L; end > 0; end -= BLOCK) {  // (I + T)ᵀ, from the last row
        int b = end > BLOCK ? end - BLOCK : 0;
        real *at = of + (size_t)b * out;
        if (end < L)
            product(
                end - b, L - end, out, (Operand){m->mixed + end * L + b, 1, L}, plain(of + (size_t)end * out, out), at, out,
                -1, m->panel
            );
        for (int i = end - 1; i > b; i--)
            for (int j = b; j < i; j++) less(out, m->mixed[i * L + j], of + (size_t)i * out, of + (size_t)j * out);
    }
    product(L, out, L, plain(of, out), turned(m->rows[l], out), m->gram, L, 0, m->panel);
    for (int i = 0; i < L; i++) {
        const real *restrict coefficient = t->write + (size_t)i * L, *restrict x_x = m->system[l] + i * L;
        real *restrict of_coefficient = g->write + (size_t)i * L, *restrict of_t = m->gram + i * L;
        real of_strength = 0, weight = strength[i];
        for (int j = 0; j < i; j++) {
            real minus = -of_t[j];
            of_strength += minus * coefficient[j] * x_x[j];
            of_coefficient[j] += minus * weight * x_x[j];
            of_t[j] = minus * weight * coefficient[j];
        }
        for (int j = i; j < L; j++) of_t[j] = 0;
        real *restrict back = of + (size_t)i * out, *restrict of_z = m->other + (size_t)i * out;
        real along = dot(back, m->z[l] + (size_t)i * out, out), keep = t->keep ? t->keep[i] : R(1.0), step = t->step[i];
        g->step[i] += dot(back, m->delta[l] + (size_t)i * out, out);
        if (t->keep) g->keep[i] += along * weight;
        of_strength += along * keep;
        for (int j = 0; j < out; j++) of_z[j] = weight * keep * back[j], back[j] *= step;
        if (l) {
            real damped = R(1.0) / (R(1.0) + t->erase[i] * x_x[i]);
            g->erase[i] += of_strength * damped * damped;
            of_t[i] = -of_strength * t->erase[i] * t->erase[i] * damped * damped;  // ‖x‖² is x xᵀ, met twice
        } else {
            g->erase[i] += of_strength;
        }
    }
    product(L, L, in, plain(m->gram, L), plain(m->x[l], in), m->of_x[l], in, 1, m->panel);
    product(L, L, in, turned(m->gram, L), plain(m->x[l], in), m->of_x[l], in, 1, m->panel);
    product(L, out, in, plain(m->other, out), turned(m->w[l], out), m->of_x[l], in, 1, m->panel);
    product(in, L, out, turned(m->x[l], in), plain(m->other, out), g->w[l], out, 1, m->panel);
}

static void back_gradients(const Scan *c, Space *m, Gradients *g) {
    int L = c->length, D = c->depth, last = c->width[D], size = L * last;
    for (int l = 0; l < D - 1; l++) {
        int out = c->width[l + 1], next = c->width[l + 2], n = L * out;
        real *restrict of_up = m->of_delta[l], *restrict of_slope = m->of_slope[l];
        for (int i = 0; i < n; i++) of_slope[i] = of_up[i] * m->up[l][i], of_up[i] *= m->slope[l][i];
        product(L, out, next, plain(of_up, out), plain(m->w[l + 1], next), m->of_delta[l + 1], next, 1, m->panel);
        product(out, L, next, turned(of_up, out), plain(m->delta[l + 1], next), g->w[l + 1], next, 1, m->panel);
    }
    real *of_error = m->of_delta[D - 1], *of_z = m->of_z;
    memset(of_z, 0, size * sizeof(real));
    if (c->norm) {  // δ = s (e − ē − n mean(e ∘ n)), and then through n and s
        for (int i = 0; i < L; i++) {
            real *restrict g_ = of_error + (size_t)i * last, *restrict to = of_z + (size_t)i * last;
            const real *restrict e = m->error + (size_t)i * last, *restrict n = m->normed + (size_t)i * last;
            real s = m->scale[i], of_scale = s > 0 ? dot(g_, m->delta[D - 1] + (size_t)i * last, last) / s : 0;
            real along = dot(g_, n, last) / last, error_along = dot(e, n, last) / last, mean = sum(g_, last) / last;
            for (int j = 0; j < last; j++) {
                to[j] = -s * (g_[j] * error_along + e[j] * along);  // to n
                g_[j] = s * (g_[j] - mean - n[j] * along);          // to e
                if (c->reads_prediction) to[j] += g_[j];
            }
            real mean_n = sum(to, last) / last, along_n = dot(to, n, last) / last + of_scale * s / last;
            for (int j = 0; j < last; j++) to[j] = s * (to[j] - mean_n - n[j] * along_n);
        }
    } else if (c->reads_prediction) {
        memcpy(of_z, of_error, size * sizeof(real));
    }
    for (int i = 0; i < size; i++) g->v[i] = -of_error[i];
    if (c->reads_prediction && c->residual) add(size, of_error, g->k);
    real *next_z = m->of_h;
    for (int l = D - 1; l >= 0; l--) {
        int in = c->width[l], out = c->width[l + 1];
        if (l < D - 1 || c->norm || c->reads_prediction) {
            product(L, out, in, plain(of_z, out), turned(m->w[l], out), m->of_x[l], in, 1, m->panel);
            product(in, L, out, turned(m->x[l], in), plain(of_z, out), g->w[l], out, 1, m->panel);
        }
        if (l) {
            memcpy(next_z, m->of_x[l], (size_t)L * in * sizeof(real));
            back_through_both(c->activation, L * in, m->z[l - 1], m->slope[l - 1], m->of_slope[l - 1], next_z);
            real *swap = of_z;
            of_z = next_z, next_z = swap;
        }
    }
    add((size_t)L * c->width[0], m->of_x[0], g->k);
}

static void backward(const Scan *c, Space *m, real *states, int memory) {
    size_t size = numbers(c), L = c->length, out = c->width[c->depth];
    Gradients g;
    for (int l = 0; l < c->depth; l++) {
        size_t n = (size_t)c->width[l] * c->width[l + 1];
        g.w[l] = c->of_w[l] + memory * n;
        g.s[l] = c->momentum ? c->of_s[l] + memory * n : 0;
    }
    int groups = (c->tiles + c->group - 1) / c->group;
    for (int group = groups - 1; group >= 0; group--) {
        int first = group * c->group, end = first + c->group < c->tiles ? first + c->group : c->tiles;
        memcpy(states, c->kept + ((size_t)group * c->memories + memory) * size, size * sizeof(real));
        for (int n = first; n < end - 1; n++) {  // weights before each tile of the group
            real *state = states + (n - first) * size;
            stand(c, m, state);
            Tile t = tile_of(c, memory, n);
            gradients(c, m, &t);
            advance(c, m, &t, state + size);
        }
        for (int n = end - 1; n >= first; n--) {
            stand(c, m, states + (n - first) * size);
            Tile t = tile_of(c, memory, n);
            size_t at = (size_t)memory * c->tiles + n;
            gradients(c, m, &t);
            if (c->q) answers(c, m, &t, 0);
            for (int l = 0; l < c->depth; l++) {
                memset(m->of_x[l], 0, L * c->width[l] * sizeof(real));
                memset(m->of_delta[l], 0, L * c->width[l + 1] * sizeof(real));
            }
            g.q = c->q ? c->of_q + at * L * c->width[0] : 0;
            g.k = c->of_k + at * L * c->width[0];
            g.v = c->of_v + at * L * out;
            g.keep = c->keep ? c->of_keep + at * (L + 1) : 0;
            g.carry = c->momentum ? c->of_carry + at * (L + 1) : 0;
            g.write = c->of_write + at * (L + 1) * L;
            g.keep_s = c->momentum ? c->of_keep_s + at : 0;
            g.write_s = c->momentum ? c->of_write_s + at * L : 0;
            g.step = c->erase ? c->of_step + at * L : 0;
            g.erase = c->erase ? c->of_erase + at * L : 0;
            back_advance(c, m, &t, &g);
            if (c->q) back_answers(c, m, &t, c->of_y + at * L * out, &g);
            if (c->erase)
                for (int l = 0; l < c->depth; l++) back_erased(c, m, &t, &g, l);
            back_gradients(c, m, &g);
        }
    }
}

// ---- memories over threads -----------------------------------------------------------------------------------------

typedef struct {
    const Scan *scan;
    int first, backward;
    int failed;
} Share;

static void *work(void *given) {
    Share *share = given;
    const Scan *c = share->scan;
    Space m;
    size_t space = lay(c, &m, 0), states = numbers(c) * (share->backward ? c->group : 1);
    real *at = aligned_alloc(64, ((space + states) * sizeof(real) + 63) / 64 * 64);
    if (!at) {
        share->failed = 1;
        return 0;
    }
    lay(c, &m, at);
    for (int memory = share->first; memory < c->memories; memory += c->threads)
        if (share->backward) backward(c, &m, at + space, memory);
        else forward(c, &m, at + space, memory);
    free(at);
    return 0;
}

// Returns 0, or 1 if there was no memory for it.
int nestling_scan(const Scan *scan, int backward) {
    Share shares[64];
    pthread_t threads[64];
    int failed = 0, started[64] = {0};
    for (int n = 0; n < scan->threads; n++) shares[n] = (Share){scan, n, backward, 0};
    for (int n = 1; n < scan->threads; n++) started[n] = !pthread_create(&threads[n], 0, work, &shares[n]);
    work(&shares[0]);
    for (int n = 1; n < scan->threads; n++) {
        if (started[n]) pthread_join(threads[n], 0);
        else work(&shares[n]);
        failed |= shares[n].failed;
    }
    return failed | shares[0].failed;
}
