// Loops over rows of numbers that lie in a core's cache.

#ifndef NESTLING_ROWS_H
#define NESTLING_ROWS_H

#include "matrix.h"

#include <math.h>

// The sum of a register's lanes, in few dependent steps.
static inline real lanes(vec v) {
    typedef real v32 __attribute__((vector_size(32)));
    typedef real v16 __attribute__((vector_size(16)));
    union {
        vec all;
        v32 half[REGISTER / 32];
    } one = {v};
    union {
        v32 all;
        v16 half[2];
    } two = {REGISTER == 64 ? one.half[0] + one.half[REGISTER / 32 - 1] : one.half[0]};
    v16 last = two.half[0] + two.half[1];
#ifdef DOUBLE
    return last[0] + last[1];
#else
    return (last[0] + last[2]) + (last[1] + last[3]);
#endif
}

static inline real dot(const real *restrict a, const real *restrict b, size_t n) {
    vec one = {}, two = {};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        one += *(const vec *)(a + i) * *(const vec *)(b + i);
        two += *(const vec *)(a + i + LANES) * *(const vec *)(b + i + LANES);
    }
    if (i + LANES <= n) one += *(const vec *)(a + i) * *(const vec *)(b + i), i += LANES;
    real total = lanes(one + two);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

static inline real sum(const real *restrict a, size_t n) {
    vec one = {}, two = {};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        one += *(const vec *)(a + i);
        two += *(const vec *)(a + i + LANES);
    }
    if (i + LANES <= n) one += *(const vec *)(a + i), i += LANES;
    real total = lanes(one + two);
    for (; i < n; i++) total += a[i];
    return total;
}

// to = scale_i from_i, row by row; to may be from.
static void scaled(int rows, int n, const real *restrict scale, const real *from, real *to) {
    for (int i = 0; i < rows; i++)
#pragma GCC ivdep
        for (int j = 0; j < n; j++) to[(size_t)i * n + j] = scale[i] * from[(size_t)i * n + j];
}

static void add(size_t n, const real *restrict from, real *restrict to) {
    for (size_t i = 0; i < n; i++) to[i] += from[i];
}

// Adds the first n columns of `from`, rows of length `wide`, to those of `to`, rows of length `width`.
static void add_part(int rows, int n, const real *from, int wide, real *to, int width) {
    for (int i = 0; i < rows; i++) add(n, from + (size_t)i * wide, to + (size_t)i * width);
}

// to += Σ_i scale_i from_i, over rows of n numbers: some at a time, so that `to` is not read and written for each.
static void add_rows(int rows, int n, const real *restrict scale, const real *restrict from, real *restrict to) {
    int i = 0;
    for (; i + 4 <= rows; i += 4, from += 4 * n) {
        const real *restrict a = from, *restrict b = a + n, *restrict c = b + n, *restrict d = c + n;
        real of_a = scale[i], of_b = scale[i + 1], of_c = scale[i + 2], of_d = scale[i + 3];
        for (int j = 0; j < n; j++) to[j] += of_a * a[j] + of_b * b[j] + of_c * c[j] + of_d * d[j];
    }
    for (; i < rows; i++, from += n)
        for (int j = 0; j < n; j++) to[j] += scale[i] * from[j];
}

// to_i = a · from_i, the same rows.
static void dots(int rows, int n, const real *restrict a, const real *restrict from, real *restrict to) {
    for (int i = 0; i < rows; i++, from += n) to[i] = dot(a, from, n);
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
        real square = dot(normed, normed, n) / n + epsilon;
        scale[i] = (real)sqrt(square) / square;  // 1/∞ would be 0, and what is no number any more look like one
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

// unit = x / √(‖x‖² + ε²), scale = the factor
static void unit_rows(int rows, int n, real epsilon, const real *restrict x, real *restrict unit, real *restrict scale) {
    for (int i = 0; i < rows; i++, x += n, unit += n) {
        scale[i] = R(1.0) / (real)sqrt(dot(x, x, n) + epsilon * epsilon);
        for (int j = 0; j < n; j++) unit[j] = scale[i] * x[j];
    }
}

// of = scale (of − unit (of · unit)): a gradient behind the unit norm, before it.
static void back_unit_rows(int rows, int n, const real *restrict unit, const real *restrict scale, real *restrict of) {
    for (int i = 0; i < rows; i++, unit += n, of += n) {
        real along = dot(of, unit, n);
        for (int j = 0; j < n; j++) of[j] = scale[i] * (of[j] - unit[j] * along);
    }
}

// Room that is laid out part by part; without a base it is only counted.
typedef struct {
    real *base;
    size_t used;
} Room;

static real *take(Room *room, size_t count) {
    real *found = room->base ? room->base + room->used : 0;
    room->used += (count + 15) / 16 * 16;
    return found;
}

// The same for each of some pointers.
#define TAKE(room, count, ...)                                                                               \
    do {                                                                                                     \
        real **each[] = {__VA_ARGS__};                                                                       \
        for (size_t i = 0; i < sizeof each / sizeof *each; i++) *each[i] = take(room, count);                \
    } while (0)

#endif
