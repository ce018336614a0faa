// Newton–Schulz of one matrix that lies in a core's cache, and the way back through it:
//
//     y_0 = x/‖x‖,   y_{i+1} = a y_i + (bA + cA²) y_i,   A = y_i y_iᵀ       `nestling.memory.newton_schulz`
//
// with x turned so that it has no more rows than columns. A and A² are symmetric, so that half of each is made; aI goes into the
// matrix M = aI + bA + cA² that y is multiplied with. Rows and columns are padded with zeros, which stay zeros, to whole registers.

#ifndef NESTLING_NEWTON_SCHULZ_H
#define NESTLING_NEWTON_SCHULZ_H

#include "rows.h"

typedef struct {
    int steps;
    double a, b, c, epsilon;  // a matrix of a norm up to epsilon gives 0, with a gradient of 0
} Iteration;

// A matrix's iterations, each kept for the way back, or one behind the other in the same place.
typedef struct {
    int rows, columns, in, out;  // rows, columns: padded;  in, out: as the matrix lies
    size_t narrow, wide;                // numbers of A, and of y
    real *y, *gram, *mixed;             // of every step; M
    real *g, *other, *moved, *both, *panel;
    real scale;  // 1/‖x‖; 0 for a matrix without a direction
} Schulz;

static int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// Room for matrices `[in, out]`; keeps: for the way back too.
static void lay_schulz(const Iteration *it, int in, int out, int keeps, Schulz *h, Room *room) {
    int steps = keeps ? it->steps : it->steps > 0;
    h->rows = padded(in < out ? in : out), h->columns = padded(in < out ? out : in);
    h->in = in, h->out = out;
    h->narrow = (size_t)h->rows * h->rows, h->wide = (size_t)h->rows * h->columns;
    h->y = take(room, h->wide * (keeps ? steps + 1 : 2));
    h->gram = take(room, h->narrow * steps);
    h->mixed = take(room, h->narrow * steps);
    h->g = take(room, keeps ? h->wide : 0);
    h->other = take(room, keeps ? h->wide : 0);
    h->moved = take(room, keeps ? h->narrow : 0);
    h->both = take(room, keeps ? h->narrow : 0);
    h->panel = take(room, (size_t)h->columns * PANEL);
}

// to `[columns, rows]` = from `[rows, columns]` turned around, of row lengths `width` and `wide`
static void turned_copy(int rows, int columns, const real *from, int wide, real *to, int width) {
    for (int i = 0; i < columns; i += 8)
        for (int j = 0; j < rows; j += 8)
            transpose(
                columns - i < 8 ? columns - i : 8, rows - j < 8 ? rows - j : 8, from + (size_t)j * wide + i, 1, wide,
                to + (size_t)i * width + j, width
            );
}

// Takes a matrix in, as it is to lie here.
static void take_in(const Schulz *h, const real *x, real *to) {
    memset(to, 0, h->wide * sizeof(real));
    if (h->in > h->out) turned_copy(h->in, h->out, x, h->out, to, h->columns);
    else
        for (int i = 0; i < h->in; i++) memcpy(to + (size_t)i * h->columns, x + (size_t)i * h->out, h->out * sizeof(real));
}

// Makes of the half below the diagonal, which is there in whole panels, the other.
static void mirror(int n, real *x) {
    for (int i = 0; i < n; i += 8)
        for (int j = i; j < n; j += 8) {
            int rows = n - i < 8 ? n - i : 8, columns = n - j < 8 ? n - j : 8;
            real block[8 * 8];
            transpose(rows, columns, x + (size_t)j * n + i, 1, n, block, 8);
            for (int k = 0; k < rows; k++) memcpy(x + (size_t)(i + k) * n + j, block + k * 8, columns * sizeof(real));
        }
}

// The half of C = A B below the diagonal, in whole panels; C is symmetric.
static void half_product(int n, int depth, Operand a, Operand b, real *c, real *panel) {
    for (int j = 0; j < n; j += PANEL) {
        Operand low = {a.at + j * a.row, a.row, a.column}, part = {b.at + j * b.column, b.row, b.column};
        int live = n - j < PANEL ? n - j : PANEL;
        product(n - j, depth, live, low, part, c + (size_t)j * n + j, n, 0, panel);
    }
}

// A and M of a y.
static void mix(const Iteration *it, const Schulz *h, const real *y, real *gram, real *mixed) {
    int n = h->rows, m = h->columns;
    real a = (real)it->a, b = (real)it->b, c = (real)it->c;
    half_product(n, m, plain(y, m), turned(y, m), gram, h->panel);
    mirror(n, gram);
    if (c != 0) {
        half_product(n, n, plain(gram, n), plain(gram, n), mixed, h->panel);
        for (int i = 0; i < n; i++) {
            size_t row = (size_t)i * n;
            int end = i / 8 * 8 + 8 < n ? i / 8 * 8 + 8 : n;  // of the block on the diagonal
            for (int j = 0; j < end; j++) mixed[row + j] = c * mixed[row + j] + b * gram[row + j];
        }
        mirror(n, mixed);
    } else {
        for (size_t i = 0; i < h->narrow; i++) mixed[i] = b * gram[i];
    }
    for (int i = 0; i < n; i++) mixed[(size_t)i * n + i] += a;
}

// Orthogonalizes s `[in, out]`; keeps: what the way back needs. Returns where it lies, as it lies here.
static const real *orthogonalize(const Iteration *it, Schulz *h, const real *s, int keeps) {
    int n = h->rows, m = h->columns;
    real top[LANES] = {0}, largest = 0, *y = h->y;
    take_in(h, s, y);
    for (size_t i = 0; i < h->wide; i += LANES)
        for (int j = 0; j < LANES; j++) {
            real size = y[i + j] < 0 ? -y[i + j] : y[i + j];
            top[j] = size > top[j] ? size : top[j];
        }
    for (int j = 0; j < LANES; j++) largest = top[j] > largest ? top[j] : largest;
    real unit = largest > 0 ? largest : 1;
    for (size_t i = 0; i < h->wide; i++) y[i] /= unit;  // squares of very large or small entries leave the range
    real norm = (real)sqrt(dot(y, y, h->wide));
    h->scale = norm * largest <= (real)it->epsilon ? 0 : R(1.0) / norm;  // what is no number goes on to the guards
    for (size_t i = 0; i < h->wide; i++) y[i] = h->scale == 0 ? 0 : y[i] * h->scale;
    h->scale /= unit;
    for (int step = 0; step < it->steps; step++) {
        size_t place = keeps ? step : 0;
        real *gram = h->gram + place * h->narrow, *mixed = h->mixed + place * h->narrow;
        real *next = keeps || y == h->y ? y + h->wide : h->y;
        mix(it, h, y, gram, mixed);
        product(n, n, m, plain(mixed, n), plain(y, m), next, m, 0, h->panel);
        y = next;
    }
    return y;
}

// to `[in, out]` = keep w + step y, with y as it lies here; to may be w.
static void add_step(const Schulz *h, real keep, const real *w, real step, const real *y, real *to) {
    int tall = h->in > h->out;
    for (int i = 0; i < h->in; i += 8)
        for (int j = 0; j < h->out; j += 8) {
            int rows = h->in - i < 8 ? h->in - i : 8, columns = h->out - j < 8 ? h->out - j : 8;
            real block[8 * 8];
            const real *from = y + (size_t)i * h->columns + j;
            int width = h->columns;
            if (tall) {
                transpose(rows, columns, y + (size_t)j * h->columns + i, 1, h->columns, block, 8);
                from = block, width = 8;
            }
            for (int k = 0; k < rows; k++)
                for (int l = 0; l < columns; l++) {
                    size_t at = (size_t)(i + k) * h->out + j + l;
                    to[at] = keep * w[at] + step * from[(size_t)k * width + l];
                }
        }
}

// From the gradient of the result, all iterations kept, to that of the matrix, times `step`, which is added to. Returns that of
// the result's own factor.
//
// With S = gyᵀ + ygᵀ, the gradient g of one iteration's result becomes Mg + (bS + c(SA + AS))y.
static real back_orthogonalize(const Iteration *it, Schulz *h, const real *of_result, real step, real *of_s) {
    int n = h->rows, m = h->columns;
    real b = (real)it->b, c = (real)it->c, along = 0, *g = h->g, *next = h->other;
    take_in(h, of_result, g);
    if (!it->steps) along = dot(g, h->y, h->wide);
    for (int i = it->steps - 1; i >= 0; i--) {
        const real *y = h->y + i * h->wide, *gram = h->gram + i * h->narrow, *mixed = h->mixed + i * h->narrow;
        real *moved = h->moved, *both = h->both;
        product(n, n, m, plain(mixed, n), plain(g, m), next, m, 0, h->panel);
        if (i == it->steps - 1) along = dot(next, y, h->wide);  // ⟨g, My⟩
        product(n, m, n, plain(g, m), turned(y, m), both, n, 0, h->panel);
        turned_copy(n, n, both, n, moved, n);
        add(h->narrow, both, moved);
        if (c != 0) {
            product(n, n, n, plain(moved, n), plain(gram, n), both, n, 0, h->panel);
            for (size_t j = 0; j < h->narrow; j++) moved[j] = b * moved[j] + c * both[j];
            for (int j = 0; j < n; j += 8)
                for (int k = 0; k < n; k += 8) {
                    int rows = n - j < 8 ? n - j : 8, columns = n - k < 8 ? n - k : 8;
                    real block[8 * 8];
                    transpose(rows, columns, both + (size_t)k * n + j, 1, n, block, 8);
                    for (int r = 0; r < rows; r++)
                        for (int l = 0; l < columns; l++) moved[(size_t)(j + r) * n + k + l] += c * block[r * 8 + l];
                }
        } else {
            for (size_t j = 0; j < h->narrow; j++) moved[j] *= b;
        }
        product(n, n, m, plain(moved, n), plain(y, m), next, m, 1, h->panel);
        real *swap = g;
        g = next, next = swap;
    }
    if (h->scale == 0) return 0;
    real inward = dot(g, h->y, h->wide);
    for (size_t i = 0; i < h->wide; i++) next[i] = g[i] - inward * h->y[i];
    add_step(h, 1, of_s, step * h->scale, next, of_s);
    return along;
}

#endif
