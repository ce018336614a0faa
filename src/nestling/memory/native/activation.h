// σ, σ' and σ'' of the networks' activations, branch-free so that compilers make vector code of loops over them.

#ifndef NESTLING_ACTIVATION_H
#define NESTLING_ACTIVATION_H

#include "matrix.h"

#include <math.h>
#include <stdint.h>

enum { GELU, GELU_TANH, SILU };

#define INVERSE_ROOT_TWO R(0.70710678118654752440)

#ifdef DOUBLE
static inline real exponential(real x) { return exp(x); }
static inline real below_minus(real z, real e) { return (void)e, R(0.5) * erfc(z * INVERSE_ROOT_TWO); }
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

// Φ(−z) for z ≥ 0, given e = exp(−z²/2): e times a polynomial in 1/(1 + 0.35 z), fitted to 3e-8 of
// the value; what comes out is right to 2e-7, by the roundings of single precision.
static inline real below_minus(real z, real e) {
    real t = R(1.0) / (R(1.0) + R(0.35) * z), p = -R(2.915787470e-2);
    p = p * t + R(1.440308665e-1);
    p = p * t - R(2.558388961e-1);
    p = p * t + R(1.593195747e-1);
    p = p * t - R(2.321227238e-2);
    p = p * t + R(1.055524689e-1);
    p = p * t + R(1.198212958e-1);
    p = p * t + R(1.398635144e-1);
    p = p * t + R(1.396213069e-1);
    return e * p * t;
}

#endif

static inline real sigmoid(real x) { return R(1.0) / (R(1.0) + exponential(-x)); }

#define ROOT R(0.79788456080286535588)  // √(2/π)
#define CUBIC R(0.044715)

// z², at most: beyond, slopes are 0 or 1 and curvatures 0, but higher powers would overflow, and ∞ · 0 is no number.
static inline real square(real z) { return z * z < R(1e4) ? z * z : R(1e4); }

#define DENSITY R(0.39894228040143267794)  // 1/√(2π)

// Each: value, slope and curvature; what a caller does not use is not computed.
static inline void gelu(real z, real *value, real *slope, real *curve) {
    real s = square(z), e = exponential(-R(0.5) * s), density = DENSITY * e, far = below_minus(z < 0 ? -z : z, e);
    real below = z < 0 ? far : R(1.0) - far;
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
