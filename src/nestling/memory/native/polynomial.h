// Polynomial features of rows that lie in a core's cache, and the way back through them (Atlas, eq. 5):
//
//     φ(x) = [r_1 x, r_0, r_2 y^β/√β! …, r_3 y^β/√β! …]      y = x R, or x itself;  r_d = e^{θ_d/2}
//
// The monomials of a degree stand in the order of their first variables: those that begin with y_j are y_j times those of one
// degree lower that have none before j, which are the last ones there.

#ifndef NESTLING_POLYNOMIAL_H
#define NESTLING_POLYNOMIAL_H

#include "rows.h"

typedef struct {
    int in, base, degree;  // numbers of x and of y; in 0: rows are read as they are
} Features;

// What the map of one memory has of its own, and its gradients, which are added to.
typedef struct {
    const real *logs, *projection;  // θ `[degree + 1]`; R `[in, base]`, null: y is x
    real *of_logs, *of_projection;
} Own;

// Room.  root: r;  share: 1/√n of each monomial, n: how often its first variable is in it;  power: a row's monomials;  counts
// `[degree + 1, base + 1]`: of how many there are of a degree in so many variables.  Behind share and the monomials there is room
// for a register more, as these short runs are taken by whole registers: what is written behind one is the next one's to write.
typedef struct {
    real *root, *share, *y, *of_y, *power, *of_power, *sums, *panel;
    int *counts;
} Making;

// Monomials of exactly this degree.
static int monomials_of(int variables, int degree) {
    long count = 1;
    for (int d = 1; d <= degree; d++) count = count * (variables + d - 1) / d;
    return (int)count;
}

// Monomials of all degrees from 1 on.
static int all_monomials(const Features *f) {
    int count = 0;
    for (int d = 1; d <= f->degree; d++) count += monomials_of(f->base, d);
    return count;
}

static void lay_making(const Features *f, int rows, Making *m, Room *room) {
    int all = all_monomials(f);
    real **each[] = {&m->share, &m->power, &m->of_power};
    for (int i = 0; i < 3; i++) *each[i] = take(room, all + LANES);
    m->root = take(room, f->degree + 1);
    m->sums = take(room, f->base);
    m->y = take(room, (size_t)rows * f->base);
    m->of_y = take(room, (size_t)rows * f->base);
    m->panel = take(room, (size_t)(f->in > rows ? f->in : rows) * PANEL);
    m->counts = (int *)take(room, (size_t)(f->degree + 1) * (f->base + 1));
}

static inline const int *counts_of(const Features *f, const Making *m, int degree) { return m->counts + degree * (f->base + 1); }

static void begin_making(const Features *f, const Own *own, Making *m) {
    for (int d = 0; d <= f->degree; d++) {
        m->root[d] = (real)exp(R(0.5) * own->logs[d]);
        for (int n = 0; n <= f->base; n++) m->counts[d * (f->base + 1) + n] = monomials_of(n, d);
    }
    real *lower = m->share, *to = m->share + f->base;  // n itself at first
    for (int j = 0; j < f->base; j++) lower[j] = 1;
    for (int d = 2, below = f->base; d <= f->degree; d++) {
        const int *count = counts_of(f, m, d - 1), *begin = counts_of(f, m, d - 2);
        for (int j = f->base; j > 0; j--)
            for (int i = 0; i < count[j]; i++) *to++ = 1 + (i < begin[j] ? lower[below - count[j] + i] : 0);
        lower += below, below = counts_of(f, m, d)[f->base];
    }
    for (int i = 0, all = all_monomials(f); i < all; i++) m->share[i] = R(1.0) / (real)sqrt(m->share[i]);
}

static inline void times(int n, real y, const real *from, const real *share, real *to) {
    for (int i = 0; i < n; i += LANES) *(vec *)(to + i) = y * *(const vec *)(from + i) * *(const vec *)(share + i);
}

#ifdef DOUBLE
typedef long long whole;
#else
typedef int whole;
#endif
typedef whole wholes __attribute__((vector_size(REGISTER), aligned(4), may_alias));

// A register's numbers from `begin` to before `end`, the others 0.
static inline vec between(int begin, int end, vec x) {
    static const whole order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    wholes place = *(const wholes *)order;
    return (vec)((wholes)x & (place >= (whole)begin) & (place < (whole)end));
}

// A row's monomials from degree 2 to `degree`, behind y.
static inline void monomials(const Features *f, const Making *m, int degree) {
    const real *const y = m->power, *lower = y, *share = m->share + f->base;
    real *to = m->power + f->base;
    for (int d = 2; d <= degree; d++) {
        const int *const count = counts_of(f, m, d - 1), base = f->base, below = count[base];
        real *first = to;
        for (int j = 0; j < base; j++) {
            int n = count[base - j];
            times(n, y[j], lower + below - n, share, to);
            to += n, share += n;
        }
        lower = first;
    }
}

// From the gradients of those, in of_power, to that of y, which becomes the first part of it. A register of monomials one degree
// lower gathers what all that were made of them hand back.
static inline void back_monomials(const Features *f, const Making *m) {
    const real *const y = m->power, *const share = m->share;
    real *const of = m->of_power, *const of_y = m->sums;
    int base = f->base, first = all_monomials(f);
    memset(of, 0, base * sizeof(real));
    memset(of_y, 0, base * sizeof(real));
    for (int d = f->degree; d > 1; d--) {
        const int *const count = counts_of(f, m, d - 1), below = count[base];
        first -= counts_of(f, m, d)[base];
        for (int i = 0, lower = first - below; i < below; i += LANES, lower += LANES) {
            vec sum = *(const vec *)(of + lower), power = *(const vec *)(y + lower);
            for (int j = 0, at = first + i; j < base; at += count[base - j++]) {
                int begin = below - count[base - j];  // of those lower ones that y_j was multiplied with
                if (begin >= i + LANES) break;
                vec g = *(const vec *)(of + at - begin) * *(const vec *)(share + at - begin);
                of_y[j] += lanes(between(begin - i, below - i, g * power));
                sum += between(begin - i, below - i, g * y[j]);
            }
            *(vec *)(of + lower) = sum;
        }
    }
    add(base, of_y, of);
}

static const real *variables(const Features *f, const Own *own, const Making *m, int rows, const real *x) {
    if (!own->projection) return x;
    product(rows, f->in, f->base, plain(x, f->in), plain(own->projection, f->base), m->y, f->base, 0, m->panel);
    return m->y;
}

static inline void times_number(int n, real factor, const real *restrict from, real *restrict to) {
    for (int i = 0; i < n; i++) to[i] = factor * from[i];
}

// φ of some rows.
static void make_features(const Features *f, const Own *own, const Making *m, int rows, const real *x, real *to) {
    const real *y = variables(f, own, m, rows, x);
    for (int i = 0; i < rows; i++, x += f->in, y += f->base) {
        times_number(f->in, m->root[1], x, to);
        to += f->in;
        *to++ = m->root[0];
        memcpy(m->power, y, f->base * sizeof(real));
        monomials(f, m, f->degree);
        const real *power = m->power + f->base;
        for (int d = 2; d <= f->degree; d++) {
            int n = counts_of(f, m, d)[f->base];
            times_number(n, m->root[d], power, to);
            to += n, power += n;
        }
    }
}

// From the gradients of φ(x), which was made, to those of x and of the map's own, which are added to.
static void back_features(
    const Features *f, const Own *own, const Making *m, int rows, const real *x, const real *made, const real *of, real *of_x
) {
    const real *y = variables(f, own, m, rows, x);
    for (int i = 0; i < rows; i++) {
        real *of_row = of_x + (size_t)i * f->in, *of_power = m->of_power + f->base;
        own->of_logs[1] += R(0.5) * dot(of, made, f->in);  // r_d = e^{θ_d/2}
        less(f->in, -m->root[1], of, of_row);
        of += f->in, made += f->in;
        own->of_logs[0] += R(0.5) * *of++ * *made++;
        memcpy(m->power, y + (size_t)i * f->base, f->base * sizeof(real));
        monomials(f, m, f->degree - 1);
        for (int d = 2; d <= f->degree; d++) {
            int n = counts_of(f, m, d)[f->base];
            own->of_logs[d] += R(0.5) * dot(of, made, n);
            times_number(n, m->root[d], of, of_power);
            of += n, made += n, of_power += n;
        }
        back_monomials(f, m);
        if (own->projection) memcpy(m->of_y + (size_t)i * f->base, m->of_power, f->base * sizeof(real));
        else add(f->base, m->of_power, of_row);
    }
    if (!own->projection) return;
    product(rows, f->base, f->in, plain(m->of_y, f->base), turned(own->projection, f->base), of_x, f->in, 1, m->panel);
    product(f->in, rows, f->base, turned(x, f->in), plain(m->of_y, f->base), own->of_projection, f->base, 1, m->panel);
}

#endif
