// σ, σ' and σ'' of the networks' activations, branch-free so that compilers make vector code of loops over them.

#ifndef NESTLING_ACTIVATION_H
#define NESTLING_ACTIVATION_H

#include "matrix.h"

#include <math.h>
#include <stdint.h>

enum { GELU, GELU_TANH, SILU };

#ifdef DOUBLE
static inline real exponential(real x) { return exp(x); }
static inline real error_function(real x) { return erf(x); }
#else
static inline real exponential(real x) {
    x = x < -R(87.0) ? -R(87.0) : x > R(88.0) ? R(88.0) : x;
    real n = __builtin_rintf(x * R(1.44269504));
    real r = x - n * R(0.693359375) + n * R(2.12194440e-4);
    real p = R(1.9875691500e-4);
    p = p * r + R(1.3981999507e-3);
    p = p * r + R(8.3334519073e-3);
    p = p * r + R(4.1665795894e-2);
    p = p * r + R(1.6666665459e-1);
    p = p * r + R(5.0000001201e-1);
    union { float f; uint32_t i; } low = {.f = n + R(12582912.0)};  // + 1.5 · 2²³: n in the lowest bits, of a NaN any
    union { uint32_t i; float f; } two = {.i = (low.i + 127) << 23};
    return (p * r * r + r + R(1.0)) * two.f;
}

// erf to about one unit in the last place: a polynomial near 0, 1 − exp(polynomial) beyond.
static inline real error_function(real x) {
    real t = x < 0 ? -x : x, s = x * x;
    real far = -R(1.72853470e-5) * t + R(3.83197126e-4);
    far = far * s + (-R(3.88396438e-3) * t + R(2.42546219e-2));
    far = far * t - R(1.06777877e-1);
    far = far * t - R(6.34846687e-1);
    far = far * t - R(1.28717512e-1);
    far = R(1.0) - exponential(far * t - t);
    far = x < 0 ? -far : far;
    real near = -R(5.96761703e-4);
    near = near * s + R(4.99119423e-3);
    near = near * s - R(2.67681349e-2);
    near = near * s + R(1.12819925e-1);
    near = near * s - R(3.76125336e-1);
    near = near * s + R(1.28379166e-1);
    near = near * x + x;
    return t > R(0.927734375) ? far : near;
}

#endif

static inline real sigmoid(real x) { return R(1.0) / (R(1.0) + exponential(-x)); }

#define ROOT R(0.79788456080286535588)  // √(2/π)
#define CUBIC R(0.044715)

// z², at most: beyond, slopes are 0 or 1 and curvatures 0, but higher powers would overflow, and ∞ · 0 is no number.
static inline real square(real z) { return z * z < R(1e4) ? z * z : R(1e4); }

#define INVERSE_ROOT_TWO R(0.70710678118654752440)
#define DENSITY R(0.39894228040143267794)  // 1/√(2π)

// Each: value, slope and curvature; what a caller does not use is not computed.
static inline void gelu(real z, real *value, real *slope, real *curve) {
    real s = square(z), below = R(0.5) + R(0.5) * error_function(z * INVERSE_ROOT_TWO);
    real density = DENSITY * exponential(-R(0.5) * s);
    *value = z * below;
    *slope = below + z * density;
    *curve = density * (R(2.0) - s);
}

static inline void gelu_tanh(real z, real *value, real *slope, real *curve) {
    real s = square(z), t = R(1.0) - R(2.0) * sigmoid(-R(2.0) * ROOT * z * (R(1.0) + CUBIC * s));
    real inner = ROOT * (R(1.0) + R(3.0) * CUBIC * s), rise = (R(1.0) - t * t) * inner;
    real bend = (R(1.0) - t * t) * (R(6.0) * ROOT * CUBIC * z) - R(2.0) * t * rise * inner;
    *value = R(0.5) * z * (R(1.0) + t);
    *slope = R(0.5) * (R(1.0) + t) + R(0.5) * z * rise;
    *curve = rise + R(0.5) * z * bend;
}

static inline void silu(real z, real *value, real *slope, real *curve) {
    real s = sigmoid(z), rise = s * (R(1.0) - s);
    *value = z * s;
    *slope = s + z * rise;
    *curve = rise * (R(2.0) + z * (R(1.0) - R(2.0) * s));
}

#define EACH(body)                                                  \
    switch (kind) {                                                 \
    case GELU: for (int i = 0; i < n; i++) { real v, g, c; gelu(z[i], &v, &g, &c); body; (void)v, (void)g, (void)c; } break;       \
    case GELU_TANH: for (int i = 0; i < n; i++) { real v, g, c; gelu_tanh(z[i], &v, &g, &c); body; (void)v, (void)g, (void)c; } break; \
    default: for (int i = 0; i < n; i++) { real v, g, c; silu(z[i], &v, &g, &c); body; (void)v, (void)g, (void)c; }                \
    }

// h = σ(z)
static void activate(int kind, int n, const real *restrict z, real *restrict h) { EACH(h[i] = v) }

// h = σ(z), slope = σ'(z)
static void activate_with_slope(int kind, int n, const real *restrict z, real *restrict h, real *restrict slope) {
    EACH(h[i] = v; slope[i] = g)
}

// grad *= σ'(z)
static void back_through(int kind, int n, const real *restrict z, real *restrict grad) { EACH(grad[i] *= g) }

// grad = grad σ'(z) + of_slope σ''(z)
static void back_through_both(
    int kind, int n, const real *restrict z, const real *restrict slope, const real *restrict of_slope, real *restrict grad
) {
    EACH(grad[i] = grad[i] * slope[i] + of_slope[i] * c)
}

#undef EACH

#endif
