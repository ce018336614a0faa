// Causal attention backward, for the tokens of a call over all that they see:
//
//     P = exp(q Kᵀ − L),  S = P ∘ (∂y Vᵀ − D),  ∂q += S K,  ∂K += Sᵀ q,  ∂V += Pᵀ ∂y
//
// a tile of keys after the other, so that nothing of it leaves the core's cache. q comes scaled, and ∂q goes out to be.

#include "activation.h"

#include <pthread.h>
#include <stdlib.h>

#define TILE 128  // keys at a time

typedef struct {
    int parts, time, dim, threads;  // parts: lanes · heads
    int visible;  // tokens before the call's own that are seen
    int edge;     // token m sees key n where n − m ≥ edge, and n ≤ visible + m
    int begin;    // key from which on gradients of keys and values are wanted
    ptrdiff_t stride, of_stride;  // from one part's keys to the next one's
    const real *q, *grad, *log, *mean;  // `[part, time, dim]`, L and D `[part, time]`
    const real *keys, *values;          // `[visible + time, dim]` of the first part
    real *of_q, *of_keys, *of_values;   // these from key `begin` on
} Back;

static void part(const Back *c, int number, real *room) {
    int time = c->time, dim = c->dim, all = c->visible + time;
    size_t tokens = (size_t)number * time;
    const real *q = c->q + tokens * dim, *grad = c->grad + tokens * dim, *log = c->log + tokens, *mean = c->mean + tokens;
    real *share = room, *slope = share + (size_t)time * TILE, *panel = slope + (size_t)time * TILE;
    for (int first = 0, last; first < all; first = last) {
        int end = first < c->begin ? c->begin : all;
        last = first + TILE < end ? first + TILE : end;
        int n = last - first;
        const real *keys = c->keys + number * c->stride + (size_t)first * dim;
        const real *values = c->values + number * c->stride + (size_t)first * dim;
        product(time, dim, n, plain(q, dim), turned(keys, dim), share, n, 0, panel);
        product(time, dim, n, plain(grad, dim), turned(values, dim), slope, n, 0, panel);
        for (int m = 0; m < time; m++) {
            real *restrict p = share + (size_t)m * n, *restrict s = slope + (size_t)m * n, l = log[m], d = mean[m];
            int low = c->edge + m - first, high = c->visible + m + 1 - first;
            low = low < 0 ? 0 : low > n ? n : low;
            high = high < low ? low : high > n ? n : high;
            for (int i = 0; i < low; i++) p[i] = s[i] = 0;
            for (int i = low; i < high; i++) p[i] = exponential(p[i] > l ? 0 : p[i] - l), s[i] = p[i] * (s[i] - d);
            for (int i = high; i < n; i++) p[i] = s[i] = 0;
        }
        product(time, n, dim, plain(slope, n), plain(keys, dim), c->of_q + tokens * dim, dim, 1, panel);
        if (first < c->begin) continue;
        size_t at = number * c->of_stride + (size_t)(first - c->begin) * dim;
        product(n, time, dim, turned(slope, n), plain(q, dim), c->of_keys + at, dim, 1, panel);
        product(n, time, dim, turned(share, n), plain(grad, dim), c->of_values + at, dim, 1, panel);
    }
}

typedef struct {
    const Back *back;
    int first, failed;
} Share;

static void *work(void *given) {
    Share *share = given;
    const Back *c = share->back;
    int depth = c->time > c->dim ? c->time : c->dim;
    if (depth < TILE) depth = TILE;
    real *room = malloc(((size_t)c->time * TILE * 2 + (size_t)depth * PANEL) * sizeof(real));
    share->failed = !room;
    for (int number = share->first; room && number < c->parts; number += c->threads) part(c, number, room);
    free(room);
    return 0;
}

// 0, or 1 where memory is short.
int nestling_attention_back(const Back *c) {
    Share shares[64];
    pthread_t threads[64];
    int started[64] = {0}, failed = 0;
    for (int n = 0; n < c->threads; n++) shares[n] = (Share){c, n, 0};
    for (int n = 1; n < c->threads; n++) started[n] = !pthread_create(&threads[n], 0, work, &shares[n]);
    work(&shares[0]);
    for (int n = 1; n < c->threads; n++)
        if (started[n]) pthread_join(threads[n], 0);
        else work(&shares[n]);
    for (int n = 0; n < c->threads; n++) failed |= shares[n].failed;
    return failed;
}
