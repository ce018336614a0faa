// What a tile's queries read of what its own tokens wrote: pairs of tokens, each weighted by what is kept between them.

#ifndef NESTLING_PAIRS_H
#define NESTLING_PAIRS_H

#include "rows.h"

// score = A Xᵀ and Y −= (D ∘ score) R, for L rows each. mixed: room for L · L. y null: the scores alone.
static void less_pairs(
    int L, int in, int out, const real *restrict D, const real *a, const real *x, const real *r, real *score, real *mixed, real *y,
    real *panel
) {
    product(L, in, L, plain(a, in), turned(x, in), score, L, 0, panel);
    if (!y) return;
    for (int i = 0; i < L * L; i++) mixed[i] = D[i] * score[i];
    product(L, L, out, plain(mixed, L), plain(r, out), y, out, -1, panel);
}

// The way back: gradients of X and R are added to, that of A is made; of_D, which may be null, is added to. What `score` holds is lost.
static void back_pairs(
    int L, int in, int out, const real *restrict D, const real *a, const real *x, const real *r, real *restrict score,
    real *restrict mixed, const real *of_y, real *restrict of_D, real *of_a, real *of_x, real *of_r, real *panel
) {
    product(L, out, L, plain(of_y, out), turned(r, out), mixed, L, 0, panel);
    for (int i = 0; of_D && i < L * L; i++) of_D[i] -= mixed[i] * score[i];
    for (int i = 0; i < L * L; i++) mixed[i] *= -D[i], score[i] *= D[i];
    product(L, L, out, turned(score, L), plain(of_y, out), of_r, out, -1, panel);
    product(L, L, in, turned(mixed, L), plain(a, in), of_x, in, 1, panel);
    product(L, L, in, plain(mixed, L), plain(x, in), of_a, in, 0, panel);
}

#endif
