// Causal attention of the tokens of a call over all that they see: its own queries and keys turned by the angles of their positions,
// and the way back, a tile of keys after the other, so that nothing of it leaves the core's cache.
//
//     P = exp(q Kᵀ/√d − L),  D = Σ_channels y ∘ ∂y,  S = P ∘ (∂y Vᵀ − D)        L the logarithm of the softmax's sum
//     ∂q = S K/√d,  ∂K += Sᵀ q/√d,  ∂V += Pᵀ ∂y

#include "activation.h"
#include "rows.h"
#include "share.h"

#define TILE 128  // keys at a time

// Where a part's (lane's and head's) rows lie, in reals.
typedef struct {
    ptrdiff_t lane, head, row;
} Layout;

typedef struct {
    int lanes, heads, time, dim, threads;
    int visible;  // tokens before the call's own that are seen
    int edge;     // token m sees key n where n − m ≥ edge, and n ≤ visible + m
    int begin;    // backward: key from which on gradients of keys and values are wanted
    double scale;                         // 1/√d
    Layout at_y, of_grad;                 // of y and of its gradient
    ptrdiff_t stride, of_stride;          // from one part's keys to the next one's
    const real *qkv, *cos, *sin;          // `[lane, time, 3, head, dim]`, `[lane, time, dim / 2]`
    real *q, *keys, *values;              // turned `[part, time, dim]`; of the first part `[visible + time, dim]`
    const real *y, *log, *grad;           // L `[part, time]`; grad null: q and the last `time` keys and values are to be written
    real *of_q, *of_keys, *of_values;     // ∂q `[part, time, dim]`; the others from key `begin` on
    real *of_qkv;                         // like qkv, in the place of ∂q; null: not asked for
} Attention;

static const real *part_of(const real *x, const Layout *at, int lane, int head) { return x + lane * at->lane + head * at->head; }

// By the angles, or back where sign is −1. Rounded as the framework rounds it, product by product, so that a model that reads in
// windows has the same keys as one that does not.
#ifdef __clang__
#define PRODUCTS_APART
#else
#define PRODUCTS_APART __attribute__((optimize("fp-contract=off")))
#endif

PRODUCTS_APART static void turn(
    int half, const real *restrict x, const real *restrict cos, const real *restrict sin, real sign, real *restrict to
) {
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    for (int i = 0; i < half; i++) {
        to[i] = x[i] * cos[i] - sign * x[half + i] * sin[i];
        to[half + i] = x[half + i] * cos[i] + sign * x[i] * sin[i];
    }
}

// Keys of a tile that token m sees, counted from its first.
static void seen(const Attention *c, int m, int first, int n, int *low, int *high) {
    int from = c->edge + m - first, to = c->visible + m + 1 - first;
    *low = from < 0 ? 0 : from > n ? n : from;
    *high = to < *low ? *low : to > n ? n : to;
}

static size_t rows_of(const Attention *c, int lane, int token, int which, int head) {
    return ((((size_t)lane * c->time + token) * 3 + which) * c->heads + head) * c->dim;
}

static void forward(const void *task, int number, real *space) {
    const Attention *c = task;
    int time = c->time, dim = c->dim, half = dim / 2, lane = number / c->heads, head = number % c->heads;
    real *q = c->q + (size_t)number * time * dim, *keys = c->keys + number * c->stride, *values = c->values + number * c->stride;
    (void)space;
    for (int t = 0; t < time; t++) {
        const real *cos = c->cos + ((size_t)lane * time + t) * half, *sin = c->sin + ((size_t)lane * time + t) * half;
        size_t own = (size_t)(c->visible + t) * dim;
        turn(half, c->qkv + rows_of(c, lane, t, 0, head), cos, sin, R(1.0), q + (size_t)t * dim);
        turn(half, c->qkv + rows_of(c, lane, t, 1, head), cos, sin, R(1.0), keys + own);
        memcpy(values + own, c->qkv + rows_of(c, lane, t, 2, head), dim * sizeof(real));
    }
}

static void backward(const void *task, int number, real *space) {
    const Attention *c = task;
    int time = c->time, dim = c->dim, half = dim / 2, all = c->visible + time, lane = number / c->heads, head = number % c->heads;
    const real *log_sum = c->log + (size_t)number * time;
    const real *keys = c->keys + number * c->stride, *values = c->values + number * c->stride;
    real *q = space, *grad = q + time * dim, *of_q = grad + time * dim, *mean = of_q + time * dim;
    real *share = mean + time, *slope = share + time * TILE, *panel = slope + time * TILE;
    real *of_keys = c->of_keys + number * c->of_stride, *of_values = c->of_values + number * c->of_stride;
    real scale = (real)c->scale;
    for (int i = 0; i < time * dim; i++) q[i] = scale * c->q[(size_t)number * time * dim + i];
    memset(of_q, 0, (size_t)time * dim * sizeof(real));
    for (int t = 0; t < time; t++) {
        real *row = grad + (size_t)t * dim;
        memcpy(row, part_of(c->grad, &c->of_grad, lane, head) + t * c->of_grad.row, dim * sizeof(real));
        mean[t] = dot(row, part_of(c->y, &c->at_y, lane, head) + t * c->at_y.row, dim);
    }
    for (int first = 0, last; first < all; first = last) {
        int end = first < c->begin ? c->begin : all;
        last = first + TILE < end ? first + TILE : end;
        int n = last - first;
        size_t from = (size_t)first * dim;
        product(time, dim, n, plain(q, dim), turned(keys + from, dim), share, n, 0, panel);
        product(time, dim, n, plain(grad, dim), turned(values + from, dim), slope, n, 0, panel);
        for (int m = 0; m < time; m++) {
            real *restrict p = share + (size_t)m * n, *restrict s = slope + (size_t)m * n, l = log_sum[m], d = mean[m];
            int low, high;
            seen(c, m, first, n, &low, &high);
            for (int i = 0; i < low; i++) p[i] = s[i] = 0;
            for (int i = low; i < high; i++) p[i] = exponential(p[i] > l ? 0 : p[i] - l), s[i] = p[i] * (s[i] - d);
            for (int i = high; i < n; i++) p[i] = s[i] = 0;
        }
        product(time, n, dim, plain(slope, n), plain(keys + from, dim), of_q, dim, 1, panel);
        if (first < c->begin) continue;
        size_t at = (size_t)(first - c->begin) * dim;
        product(n, time, dim, turned(slope, n), plain(q, dim), of_keys + at, dim, 1, panel);
        product(n, time, dim, turned(share, n), plain(grad, dim), of_values + at, dim, 1, panel);
    }
    for (int i = 0; i < time * dim; i++) of_q[i] *= scale;
    if (c->of_q) memcpy(c->of_q + (size_t)number * time * dim, of_q, (size_t)time * dim * sizeof(real));
    for (int t = 0; c->of_qkv && t < time; t++) {
        const real *cos = c->cos + ((size_t)lane * time + t) * half, *sin = c->sin + ((size_t)lane * time + t) * half;
        size_t own = (size_t)(c->visible - c->begin + t) * dim;
        turn(half, of_q + (size_t)t * dim, cos, sin, R(-1.0), c->of_qkv + rows_of(c, lane, t, 0, head));
        turn(half, of_keys + own, cos, sin, R(-1.0), c->of_qkv + rows_of(c, lane, t, 1, head));
        memcpy(c->of_qkv + rows_of(c, lane, t, 2, head), of_values + own, dim * sizeof(real));
    }
}

const size_t nestling_size = sizeof(Attention);

// Returns 0, or 1 if there was no memory for it.
int nestling_attention(const Attention *c) {
    size_t depth = c->time > c->dim ? c->time : c->dim;
    if (depth < TILE) depth = TILE;
    size_t reals = c->grad ? (size_t)c->time * (3 * c->dim + 1 + 2 * TILE) + depth * PANEL : 1;
    return spread(c, c->grad ? backward : forward, c->lanes * c->heads, c->threads, reals);
}
