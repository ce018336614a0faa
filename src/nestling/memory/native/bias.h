// ∂ℓ/∂p of the attentional biases, p = M(k), from the misfit e = p − v, and the way back.
//
//     dot product  −v          L2  e          Lp  p tanh(a e) (e² + ε)^{(p−1)/2}               Miras, eq. 10–11 and remark 5,
//                                                                     of an e of at most `cap`
//     Huber        e within the threshold δ; beyond it δ sign(e) where |e_j| > δ ("coordinate") or ‖e‖ > δ ("mixture"),
//                  or δ e/‖e‖ ("norm")                                                          Miras, eq. 13–16

#ifndef NESTLING_BIAS_H
#define NESTLING_BIAS_H

#include "activation.h"
#include "rows.h"

enum { DOT, L2, LP, HUBER_COORDINATE, HUBER_NORM, HUBER_MIXTURE };  // from the first Huber on, a target ends with its threshold

typedef struct {
    int kind;
    double power, slope, epsilon, cap;  // p and a of Lp; what is added to squares under a root; the largest |e| of Lp
} Bias;

static int reads_prediction(const Bias *b) { return b->kind != DOT; }

static int reads_threshold(const Bias *b) { return b->kind >= HUBER_COORDINATE; }

// Whether ∂ℓ/∂p is another than e or −v, so that the way back through it needs e.
static int bends(const Bias *b) { return b->kind > L2; }

static inline real hyperbolic_tangent(real x) { return R(1.0) - R(2.0) / (R(1.0) + exponential(R(2.0) * x)); }

static inline real sign_of(real x) { return (real)((x > 0) - (x < 0)); }

// What is no number stays so.
static inline real capped(real e, real cap) { return e > cap ? cap : e < -cap ? -cap : e; }

static real size_of_misfit(const Bias *b, int n, const real *e) { return (real)sqrt(dot(e, e, n) + (real)b->epsilon); }

// ∂ℓ/∂p of one row of n from its misfit; v: its target.
static void bend(const Bias *b, int n, const real *v, const real *restrict e, real *restrict to) {
    real limit = reads_threshold(b) ? v[n] : 0;
    real size = b->kind >= HUBER_NORM ? size_of_misfit(b, n, e) : 0;
    if (b->kind == LP) {
        real p = (real)b->power, half = (p - 1) / 2, slope = (real)b->slope, epsilon = (real)b->epsilon;
        real cap = (real)b->cap;
        for (int j = 0; j < n; j++) {
            real x = capped(e[j], cap);
            to[j] = p * hyperbolic_tangent(slope * x) * (x * x + epsilon);
        }
        for (int j = 0; j < n && half != 1; j++) {
            real x = capped(e[j], cap);
            to[j] *= (real)pow(x * x + epsilon, half - 1);
        }
    } else if (b->kind == HUBER_COORDINATE) {
        for (int j = 0; j < n; j++) to[j] = (e[j] < 0 ? -e[j] : e[j]) <= limit ? e[j] : limit * sign_of(e[j]);
    } else if (size <= limit || b->kind < LP) {
        for (int j = 0; j < n; j++) to[j] = e[j];
    } else if (b->kind == HUBER_NORM) {
        for (int j = 0; j < n; j++) to[j] = limit / size * e[j];
    } else {
        for (int j = 0; j < n; j++) to[j] = limit * sign_of(e[j]);
    }
}

// The gradient of ∂ℓ/∂p, in of, becomes that of e; of_v: the target's gradient, its threshold's part is added.
static void back_bend(const Bias *b, int n, const real *v, const real *restrict e, real *restrict of, real *of_v) {
    real limit = reads_threshold(b) ? v[n] : 0, of_limit = 0;
    if (b->kind == LP) {
        real p = (real)b->power, half = (p - 1) / 2, slope = (real)b->slope, epsilon = (real)b->epsilon, cap = (real)b->cap;
        for (int j = 0; j < n; j++) {
            real s = e[j] * e[j] + epsilon, t = hyperbolic_tangent(slope * e[j]);
            real rise = p * (slope * (R(1.0) - t * t) * s + t * half * R(2.0) * e[j]);
            of[j] *= half == 1 ? rise : rise * (real)pow(s, half - 1);
            if (e[j] > cap || e[j] < -cap) of[j] = 0;
        }
        return;
    }
    if (b->kind == HUBER_COORDINATE) {
        for (int j = 0; j < n; j++)
            if ((e[j] < 0 ? -e[j] : e[j]) > limit) of_limit += sign_of(e[j]) * of[j], of[j] = 0;
        of_v[n] += of_limit;
        return;
    }
    if (!reads_threshold(b)) return;
    real size = size_of_misfit(b, n, e);
    if (size <= limit) return;
    if (b->kind == HUBER_NORM) {
        real along = dot(e, of, n) / size;
        of_v[n] += along;
        for (int j = 0; j < n; j++) of[j] = limit / size * (of[j] - along / size * e[j]);
    } else {
        for (int j = 0; j < n; j++) of_limit += sign_of(e[j]) * of[j], of[j] = 0;
        of_v[n] += of_limit;
    }
}

#endif
