// The coefficients of a tile's updates from its gates, and the way back. With W_0, S_0 at the tile's start and gradients G_i
//
//     W_t = γ_t W_0 + f_t S_0 − Σ_i C[t,i] G_i        S_t = m_t S_0 − Σ_i P[t,i] G_i
//
//     P[t,i] = μ_t P[t−1,i] + η_t w_{t,i}      m_t = μ_t m_{t−1}      w the window's weight of token i at t; without one 1 at i = t
//     C[t,i] = α_t C[t−1,i] + P[t,i]           f_t = α_t f_{t−1} + m_t           without momentum P[t,i] = η_t w_{t,i}
//
// An erasing rule's C is Π α alone, as its rows hold η already. (Titans, §3.2; derived). γ_t is made of the logarithms' sum, so
// that what is kept over many tiles does not gather the roundings of α.

#ifndef NESTLING_GATES_H
#define NESTLING_GATES_H

#include "rows.h"

// Of a tile's own tokens, `[tokens]`, those with a log as logarithms; window `[tokens, window]`, lag 0 first.  Null: not there;
// of a window: all ones.
// fine, of the halo's tokens too: those that act; others come with η = ε = 0 and α = μ = 1, and what they must not do besides is
// add S to W, or be in a window.  Null: all.
typedef struct {
    const real *lr, *retention, *momentum, *erase, *window;
    const unsigned char *fine;
} Gates;

typedef struct {
    real *lr, *retention, *momentum, *erase, *window;
} OfGates;

typedef struct {
    real *keep, *carry, *decay, *write, *impulse;  // γ, f, m `[tokens + 1]`; C, P `[tokens + 1, rows]`
    real *alpha, *mu;                              // `[tokens]`
} Coefficients;

static void lay_coefficients(int tokens, int rows, int momentum, Coefficients *c, Room *room) {
    c->keep = take(room, tokens + 1);
    c->carry = take(room, momentum ? tokens + 1 : 0);
    c->decay = take(room, momentum ? tokens + 1 : 0);
    c->write = take(room, (size_t)(tokens + 1) * rows);
    c->impulse = take(room, momentum ? (size_t)(tokens + 1) * rows : 0);
    c->alpha = take(room, tokens);
    c->mu = take(room, momentum ? tokens : 0);
}

// rows: halo and tokens; window: its length c; erases: C is Π α.
static void coefficients(int tokens, int rows, int window, int erases, const Gates *g, Coefficients *c) {
    int halo = rows - tokens, momentum = g->momentum != 0;
    real total = 0;
    c->keep[0] = 1;
    if (momentum) c->carry[0] = 0, c->decay[0] = 1;
    memset(c->write, 0, rows * sizeof(real));
    if (momentum) memset(c->impulse, 0, rows * sizeof(real));
    for (int t = 1; t <= tokens; t++) {
        real alpha = g->retention ? (real)exp(g->retention[t - 1]) : 1, lr = g->lr[t - 1];
        int now = halo + t - 1, first = now - window + 1 < 0 ? 0 : now - window + 1, acts = !g->fine || g->fine[now];
        const real *before = c->write + (size_t)(t - 1) * rows;
        real *row = c->write + (size_t)t * rows, *added = row;
        c->alpha[t - 1] = alpha;
        if (g->retention) total += g->retention[t - 1];
        c->keep[t] = g->retention ? (real)exp(total) : 1;
        for (int i = 0; i < now; i++) row[i] = alpha * before[i];
        memset(row + now, 0, (rows - now) * sizeof(real));
        if (momentum) {
            real mu = (real)exp(g->momentum[t - 1]);
            const real *past = c->impulse + (size_t)(t - 1) * rows;
            added = c->impulse + (size_t)t * rows;
            for (int i = 0; i < now; i++) added[i] = mu * past[i];
            memset(added + now, 0, (rows - now) * sizeof(real));
            c->mu[t - 1] = mu;
            c->decay[t] = mu * c->decay[t - 1];
            c->carry[t] = alpha * c->carry[t - 1] + (acts ? c->decay[t] : 0);
        }
        if (erases) row[now] = 1;
        else
            for (int i = first; i <= now; i++) {
                real share = g->window ? g->window[(t - 1) * window + now - i] : 1;
                if (g->fine) share = g->fine[i] ? share : 0;
                added[i] += lr * share;  // rounded alike, whether a token is missing or none
            }
        if (momentum && acts) add(now + 1, added, row);
    }
}

// From the gradients of the coefficients, which are lost, to those of the gates, which are added to.
static void back_coefficients(
    int tokens, int rows, int window, int erases, const Gates *g, const Coefficients *c, Coefficients *of, OfGates *to
) {
    int halo = rows - tokens, momentum = g->momentum != 0;
    real total = 0;
    for (int t = tokens; t >= 1; t--) {
        int now = halo + t - 1, first = now - window + 1 < 0 ? 0 : now - window + 1, acts = !g->fine || g->fine[now];
        const real *before = c->write + (size_t)(t - 1) * rows;
        real *row = of->write + (size_t)t * rows, *earlier = row - rows, alpha = c->alpha[t - 1];
        real of_alpha = dot(row, before, now);  // from `now` on, the row before is 0
        for (int i = 0; i < now; i++) earlier[i] += alpha * row[i];
        real *added = row;
        if (momentum) {
            real *past = of->impulse + (size_t)(t - 1) * rows, mu = c->mu[t - 1];
            added = of->impulse + (size_t)t * rows;
            if (acts) add(now + 1, row, added);
            of_alpha += of->carry[t] * c->carry[t - 1];
            of->carry[t - 1] += alpha * of->carry[t];
            if (acts) of->decay[t] += of->carry[t];
            real of_mu = dot(added, c->impulse + (size_t)(t - 1) * rows, now) + of->decay[t] * c->decay[t - 1];
            of->decay[t - 1] += mu * of->decay[t];
            for (int i = 0; i < now; i++) past[i] += mu * added[i];
            to->momentum[t - 1] += mu * of_mu;
        }
        if (!erases)
            for (int i = first; i <= now; i++) {
                if (g->fine && !g->fine[i]) continue;
                int at = (t - 1) * window + now - i;
                to->lr[t - 1] += g->window ? added[i] * g->window[at] : added[i];
                if (g->window) to->window[at] += added[i] * g->lr[t - 1];
            }
        if (g->retention) {
            total += of->keep[t] * c->keep[t];
            to->retention[t - 1] += total + alpha * of_alpha;
        }
    }
}

#endif
