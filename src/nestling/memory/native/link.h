// Links of a retention's dual variable Z to the weights, W = link(Z), a layer at a time, and the way back.
//
//     SOFTMAX   W = softmax(Z) over each output's inputs                                      Miras, eq. 21 and 27
//     LQ        W = c Z,  c = max(‖Z‖_q, floor)^{2−q}, the norm over the whole matrix         Miras, eq. 24

#ifndef NESTLING_LINK_H
#define NESTLING_LINK_H

#include "activation.h"
#include "rows.h"

enum { IDENTITY, SOFTMAX, LQ };

typedef struct {
    int kind;
    double power, floor;  // q, and the least norm that counts
} Link;

static inline real magnitude(real x) { return x < 0 ? -x : x; }

// |x|^q
static inline real to_the(real x, real q) {
    real s = x * x;
    return q == 4 ? s * s : q == 2 ? s : (real)pow(magnitude(x), q);
}

// ‖Z‖_q, at least the floor. Its largest entry is taken out, so that no power overflows.
static real norm_of(const Link *link, size_t n, const real *restrict z) {
    real floor = (real)link->floor, q = (real)link->power, top = floor, total = 0;
#pragma omp simd reduction(max : top)
    for (size_t i = 0; i < n; i++) top = magnitude(z[i]) > top ? magnitude(z[i]) : top;
    if (q == 4) {
#pragma omp simd reduction(+ : total)
        for (size_t i = 0; i < n; i++) total += to_the(z[i] / top, 4);
    } else {
        for (size_t i = 0; i < n; i++) total += to_the(z[i] / top, q);
    }
    real norm = top * (real)pow(total, R(1.0) / q);
    return norm > floor ? norm : floor;
}

static real scale_of(const Link *link, size_t n, const real *z) {
    return link->power == 2 ? 1 : (real)pow(norm_of(link, n, z), 2 - link->power);
}

// The way back through the scale: of_z += of_scale ∂c/∂Z, 0 where the norm is at the floor.
static void back_scale(const Link *link, size_t n, const real *restrict z, real of_scale, real *restrict of_z) {
    real q = (real)link->power, norm = norm_of(link, n, z);
    if (norm <= (real)link->floor || q == 2) return;
    real factor = of_scale * (2 - q) * (real)pow(norm, 1 - q);
    if (q == 4)
        for (size_t i = 0; i < n; i++) of_z[i] += factor * (z[i] / norm) * (z[i] / norm) * (z[i] / norm);
    else
        for (size_t i = 0; i < n; i++) of_z[i] += factor * (z[i] < 0 ? R(-1.0) : R(1.0)) * (real)pow(magnitude(z[i]) / norm, q - 1);
}

// The largest of each column.
static void tops(int in, int out, const real *restrict z, real *restrict top) {
    memcpy(top, z, out * sizeof(real));
    for (int i = 1; i < in; i++)
        for (int j = 0; j < out; j++) top[j] = z[(size_t)i * out + j] > top[j] ? z[(size_t)i * out + j] : top[j];
}

// Weights of a layer. spare: 2 · out
static void linked(const Link *link, int in, int out, const real *restrict z, real *restrict w, real *restrict spare) {
    size_t n = (size_t)in * out;
    if (link->kind == LQ) {
        real c = scale_of(link, n, z);
        for (size_t i = 0; i < n; i++) w[i] = c * z[i];
        return;
    }
    real *restrict top = spare, *restrict total = spare + out;
    tops(in, out, z, top);
    memset(total, 0, out * sizeof(real));
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) {
            real e = exponential(z[(size_t)i * out + j] - top[j]);
            w[(size_t)i * out + j] = e;
            total[j] += e;
        }
    for (int j = 0; j < out; j++) total[j] = R(1.0) / total[j];
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) w[(size_t)i * out + j] *= total[j];
}

// From the gradient of the weights to that of Z, which is added to. of_scale: more of the scale's gradient; spare: out
static void back_linked(
    const Link *link, int in, int out, const real *restrict z, const real *restrict w, const real *restrict of_w, real of_scale,
    real *restrict of_z, real *restrict spare
) {
    size_t n = (size_t)in * out;
    if (link->kind == LQ) {
        real c = scale_of(link, n, z);
        for (size_t i = 0; i < n; i++) of_z[i] += c * of_w[i];
        back_scale(link, n, z, of_scale + dot(of_w, z, n), of_z);
        return;
    }
    memset(spare, 0, out * sizeof(real));
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) spare[j] += w[(size_t)i * out + j] * of_w[(size_t)i * out + j];
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) of_z[(size_t)i * out + j] += w[(size_t)i * out + j] * (of_w[(size_t)i * out + j] - spare[j]);
}

#endif
