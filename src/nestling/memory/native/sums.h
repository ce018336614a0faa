// What rows read of pairs of a key and what it wrote, by an exponential kernel; see kernel.py.
//
//     z_r = Σ_j w_rj κ_rj u_j        normalized: over Σ_j w_rj κ_rj        κ_rj = exp(min(s x_r·k_j − t_r, CAP))
//
// t_r is s for kernels with a unit peak, else 0; normalized, the row's largest exponent that counts, found on the way. The shares w κ
// are made a block of pairs at a time, in the cache, and made again on the way back. With dz and, normalized, dz/D and dD = −dz·z:
//
//     G = dz uᵀ + dD      du = (w κ)ᵀ dz      dw = κ G      of the exponent w κ G

#ifndef NESTLING_SUMS_H
#define NESTLING_SUMS_H

#include "activation.h"
#include "rows.h"

#define PAIRS 128  // at a time

typedef struct {
    int normalized, unit_peak;
    double cap;
} Kind;

// Some rows and what they read. x are the rows times s.
typedef struct {
    int in, out;
    real peak;
    real *x, *z, *top, *total;
} Readers;

// Their gradients; of_x too is of the rows times s. of_peak: of −s.
typedef struct {
    real *z, *total, *x, of_peak;
} OfReaders;

// The weights w_rj of some rows: a row of them for each, `stride` apart, 0: one for all; share: what each row takes of it, or null: all.
typedef struct {
    const real *w, *share;
    int stride;
    real *of_w, *of_share;
} Weighing;

static Readers readers_from(const Readers *r, int first) {
    return (Readers){r->in, r->out, r->peak, r->x + (size_t)first * r->in, r->z + (size_t)first * r->out, r->top + first, r->total + first};
}

static OfReaders of_readers_from(const Readers *r, const OfReaders *of, int first) {
    return (OfReaders){of->z + (size_t)first * r->out, of->total + first, of->x + (size_t)first * r->in, 0};
}

static void clear_readers(int rows, const Readers *r) {
    memset(r->z, 0, (size_t)rows * r->out * sizeof(real));
    for (int i = 0; i < rows; i++) r->total[i] = 0, r->top[i] = -(real)INFINITY;
}

// From the products x·k of some rows with n keys to the shares w κ, in place; what the rows have read so far is brought to their new
// largest exponent. Shares of the row are not taken here.
static void weigh(const Kind *kind, int rows, int n, const real *w, int stride, real *product, const Readers *r) {
    real cap = (real)kind->cap;
    for (int i = 0; i < rows; i++) {
        real *restrict p = product + (size_t)i * n, top = r->peak, total = 0;
        const real *restrict weight = w + (size_t)i * stride;
        if (kind->normalized) {
            real most = r->top[i];
#pragma omp simd reduction(max : most)
            for (int j = 0; j < n; j++) {
                real counted = weight[j] != 0 ? p[j] : -(real)INFINITY;
                most = counted > most ? counted : most;
            }
            if (most > r->top[i]) {
                real less = (real)exp(r->top[i] - most);
                for (int j = 0; j < r->out; j++) r->z[(size_t)i * r->out + j] *= less;
                r->total[i] *= less;
                r->top[i] = most;
            }
            top = most > -(real)INFINITY ? most : top;
        }
#pragma omp simd reduction(+ : total)
        for (int j = 0; j < n; j++) {
            real e = p[j] - top;
            p[j] = exponential(e < cap ? e : cap) * weight[j];
            total += p[j];
        }
        r->total[i] += total;
    }
}

// Both sums of the rows so far, with what a row takes of them.
static void take_share(int rows, const real *share, const Readers *r) {
    scaled(rows, r->out, share, r->z, r->z);
    for (int i = 0; i < rows; i++) r->total[i] *= share[i];
}

// z over the sum of its kernels; what is left in `total` is what z was multiplied with, or none above 0: nothing was divided.
static void divide(const Kind *kind, int rows, const Readers *r) {
    for (int i = 0; i < rows; i++) r->total[i] = kind->normalized && r->total[i] > 0 ? R(1.0) / r->total[i] : 0;
    for (int i = 0; i < rows; i++)
        if (r->total[i] > 0) scaled(1, r->out, r->total + i, r->z + (size_t)i * r->out, r->z + (size_t)i * r->out);
}

// From the gradient of z in of->z to that of both sums.
static void back_divide(int rows, const Readers *r, const OfReaders *of) {
    for (int i = 0; i < rows; i++) {
        real *z = of->z + (size_t)i * r->out;
        of->total[i] = 0;
        if (r->total[i] <= 0) continue;
        scaled(1, r->out, r->total + i, z, z);
        of->total[i] = -dot(z, r->z + (size_t)i * r->out, r->out);
    }
}

// From the products x·k in p and dz·u in g to the shares in p and the gradient of the exponent in g; those of the weights are added to.
static void back_weigh(
    const Kind *kind, int rows, int n, const Weighing *w, real *products, real *gradients, const Readers *r, OfReaders *of
) {
    real cap = (real)kind->cap;
    for (int i = 0; i < rows; i++) {
        real *restrict p = products + (size_t)i * n, *restrict g = gradients + (size_t)i * n;
        const real *restrict weight = w->w + (size_t)i * w->stride;
        real *restrict of_w = w->of_w + (size_t)i * w->stride;
        real top = kind->normalized && r->top[i] > -(real)INFINITY ? r->top[i] : r->peak;
        real share = w->share ? w->share[i] : 1, of_total = of->total[i], of_share = 0, all = 0;
#pragma omp simd reduction(+ : of_share, all)
        for (int j = 0; j < n; j++) {
            real e = p[j] - top, below = e < cap ? e : cap, kernel = exponential(below);
            real from = kernel * (g[j] + of_total), taken = share * from, through = e > cap ? 0 : taken * weight[j];
            of_w[j] += taken;
            of_share += from * weight[j];
            p[j] = share * kernel * weight[j];
            g[j] = through;
            all += through;
        }
        if (w->share) w->of_share[i] += of_share;
        if (kind->unit_peak) of->of_peak -= all;
    }
}

// Some pairs: keys, what they wrote, and gradients of these, which are added to.
typedef struct {
    int count;
    const real *key, *write;
    real *of_key, *of_write;
} Pairs;

static Pairs pairs_from(const Pairs *p, const Readers *r, int first) {
    int count = p->count - first < PAIRS ? p->count - first : PAIRS;
    size_t key = (size_t)first * r->in, write = (size_t)first * r->out;
    Pairs some = {count, p->key + key, p->write + write, 0, 0};
    if (p->of_key) some.of_key = p->of_key + key, some.of_write = p->of_write + write;
    return some;
}

static void read_some(int rows, const Readers *r, const Pairs *p, real *product_, real *panel) {
    product(rows, r->in, p->count, plain(r->x, r->in), turned(p->key, r->in), product_, p->count, 0, panel);
}

static void add_some(int rows, const Readers *r, const Pairs *p, const real *shares, real *panel) {
    product(rows, p->count, r->out, plain(shares, p->count), plain(p->write, r->out), r->z, r->out, 1, panel);
}

static void back_some(int rows, const Readers *r, const OfReaders *of, const Pairs *p, const real *shares, const real *of_exponent, real *panel) {
    int n = p->count;
    product(n, rows, r->out, turned(shares, n), plain(of->z, r->out), p->of_write, r->out, 1, panel);
    product(n, rows, r->in, turned(of_exponent, n), plain(r->x, r->in), p->of_key, r->in, 1, panel);
    product(rows, n, r->in, plain(of_exponent, n), plain(p->key, r->in), of->x, r->in, 1, panel);
}

// The first `split` rows read all pairs by their weights w, the others by w_behind.
static void read_pairs(
    const Kind *kind, int rows, int split, const Readers *r, const Pairs *all, const real *w, const real *w_behind, real *space, real *panel
) {
    Readers behind = readers_from(r, split);
    for (int first = 0; first < all->count; first += PAIRS) {
        Pairs p = pairs_from(all, r, first);
        read_some(rows, r, &p, space, panel);
        weigh(kind, split, p.count, w + first, 0, space, r);
        weigh(kind, rows - split, p.count, w_behind + first, 0, space + (size_t)split * p.count, &behind);
        add_some(rows, r, &p, space, panel);
    }
}

static void back_pairs_read(
    const Kind *kind, int rows, int split, const Readers *r, OfReaders *of, const Pairs *all, Weighing w, Weighing w_behind,
    real *space, real *other, real *panel
) {
    Readers behind = readers_from(r, split);
    OfReaders of_behind = of_readers_from(r, of, split);
    for (int first = 0; first < all->count; first += PAIRS) {
        Pairs p = pairs_from(all, r, first);
        size_t past = (size_t)split * p.count;
        read_some(rows, r, &p, space, panel);
        product(rows, r->out, p.count, plain(of->z, r->out), turned(p.write, r->out), other, p.count, 0, panel);
        back_weigh(kind, split, p.count, &w, space, other, r, of);
        back_weigh(kind, rows - split, p.count, &w_behind, space + past, other + past, &behind, &of_behind);
        back_some(rows, r, of, &p, space, other, panel);
        w.w += p.count, w.of_w += p.count, w_behind.w += p.count, w_behind.of_w += p.count;
    }
    of->of_peak += of_behind.of_peak;
}

#endif
