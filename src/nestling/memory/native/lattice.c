// The way back through a tile of lattice.h, and a memory of such tiles.

#include "lattice.h"

// ---- backward ------------------------------------------------------------------------------------------------------

// From the gradient of the weights behind the tile, `of`, to those of what they are made of; the first to be taken.
static void back_slots(const Scan *s, Hand *h, int L, int settled, real *of) {
    int m = h->m, d = h->d, forgets = h->gates.retention != 0;
    real keep = h->c.keep[L], *last = h->of_r + (size_t)L * m;
    const real *D = h->c.write + (size_t)L * L;
    if (settled)
        for (int i = 0; i < m; i++) {
            const real *restrict unit = h->after + (size_t)i * d;
            real *restrict row = of + (size_t)i * d, part = R(1.0) / h->norms[i], in = dot(row, unit, d);
            for (int j = 0; j < d; j++) row[j] = part * (row[j] - in * unit[j]);
        }
    for (int i = 0; i < m; i++) {
        size_t row = (size_t)i * d;
        real *restrict of_f = h->of_f + row, *restrict of_u = h->of_u + row, scale = keep * h->rho[i] + h->r[(size_t)L * m + i];
        const real *restrict end = of + row;
        real in = dot(end, h->f + row, d);
        last[i] += in, h->of_rho[i] += keep * in;
        if (forgets) h->of_c.keep[L] += h->rho[i] * in;
        for (int j = 0; j < d; j++) of_f[j] = scale * end[j];
        if (h->begun) continue;
        if (forgets) h->of_c.keep[L] += dot(end, h->u + row, d);
        for (int j = 0; j < d; j++) of_u[j] = keep * end[j];
    }
    scaled(L, m, D, h->rate, h->spare);
    product(L, m, d, plain(h->spare, m), plain(of, d), h->of_h, d, -1, h->panel);
    product(L, d, m, plain(h->h, d), turned(of, d), h->of_rate, m, 0, h->panel);
    for (int i = 0; i < L; i++) {
        real *restrict row = h->of_rate + (size_t)i * m, decay = -D[i];
        if (forgets) h->of_c.write[(size_t)L * L + i] -= dot(row, h->rate + (size_t)i * m, m);
        for (int j = 0; j < m; j++) row[j] *= decay;
    }
}

// From the gradients of the answers; leaves those of the queries as they were given, and of the norms' parts.
static void back_reads(const Scan *s, Hand *h, const Tile *t, const real *of_y, real *of_q) {
    int m = h->m, d = h->d, L = t->tokens, first = !s->cell.before, forgets = h->gates.retention != 0, norms = lattice(s)->norms;
    const real *D = h->c.write + (size_t)first * L, *keep = h->c.keep + first;
    real *of_D = forgets ? h->of_c.write + (size_t)first * L : 0, *of_keep = h->of_c.keep + first;
    back_pairs(
        L, m, d, D, h->asked, h->rate, h->h, h->score, h->mixed, of_y, of_D, h->of_asked, h->of_rate, h->of_h, h->panel
    );
    product(m, L, d, turned(h->lead, m), plain(of_y, d), h->of_f, d, 1, h->panel);
    if (!h->begun) {
        scaled(L, m, keep, h->asked, h->spare);
        product(m, L, d, turned(h->spare, m), plain(of_y, d), h->of_u, d, 1, h->panel);
        product(L, d, m, plain(of_y, d), turned(h->u, d), h->spare, m, 0, h->panel);
    }
    product(L, d, m, plain(of_y, d), plain(h->ft, m), h->other, m, 0, h->panel);
    real least = (real)(lattice(s)->epsilon * lattice(s)->epsilon);
    for (int i = 0; i < L; i++) {
        size_t row = (size_t)i * m;
        const real *restrict along = h->other + row, *restrict rest = h->spare + row, *restrict asked = h->asked + row;
        const real *restrict size = h->size + row, *restrict n = h->n, *restrict rho = h->rho, *restrict r = h->r + row + first * m;
        const real *restrict across = h->across, *restrict e = h->e + row + first * m;
        real *restrict of = h->of_asked + row, *restrict to = of_q + row, *restrict of_r = h->of_r + row + first * m;
        real *restrict of_b = h->of_b + row + first * m, *restrict of_e = h->of_e + row + first * m;
        real *restrict of_rho = h->of_rho, *restrict of_n = h->of_n, *restrict of_across = h->of_across;
        real c = keep[i], of_c = 0;
        if (!h->begun) {
            of_c += dot(asked, rest, m);
            for (int j = 0; j < m; j++) of[j] += c * rest[j];
        }
#pragma omp simd reduction(+ : of_c)
        for (int j = 0; j < m; j++) {
            real part = asked[j] * along[j];
            of[j] += (c * rho[j] + r[j]) * along[j];
            of_r[j] += part, of_rho[j] += c * part, of_c += rho[j] * part;
        }
        if (norms == AS_THEY_ARE) {
            memcpy(to, of, m * sizeof(real));
        } else if (norms == BY_CHUNK) {
            for (int j = 0; j < m; j++) to[j] = of[j] / n[j], of_n[j] -= to[j] * asked[j];
        } else {
            real square = c * c, cross = h->begun ? 0 : 2 * c;
#pragma omp simd reduction(+ : of_c)
            for (int j = 0; j < m; j++) {
                real held = square * rho[j] * rho[j], all = size[j] < least ? least : size[j], scale = R(1.0) / (real)sqrt(all);
                real of_size = size[j] < least ? 0 : -R(0.5) * of[j] * asked[j] / all, free = size[j] > held ? of_size : 0;
                to[j] = scale * of[j];
                of_b[j] += free;
                of_r[j] -= 2 * r[j] * free;
                of_rho[j] += 2 * square * rho[j] * of_size;
                of_across[j] += square * free;
                of_c += 2 * c * (rho[j] * rho[j] * of_size + across[j] * free);
                if (cross != 0) of_e[j] -= cross * free, of_c -= 2 * e[j] * free;
            }
        }
        if (forgets) of_keep[i] += of_c;
    }
}

// Back through the sums over the tile's tokens, of which row t − 1 and token t make row t; leaves in h->of_z what Z had in R.
static void back_sums(const Scan *s, Hand *h, int L, real *of_retention) {
    int m = h->m, d = h->d, sized = lattice(s)->norms == BY_TOKEN;
    for (int i = L - 1; i >= 0; i--) {
        size_t row = (size_t)i * m;
        real alpha = h->c.alpha[i], square = alpha * alpha, of_alpha = 0;
        const real *restrict r = h->r + row, *restrict z = h->z + row, *restrict rate = h->rate + row, *restrict b = h->b + row;
        const real *restrict near = h->near + row, *restrict e = h->e + row, *restrict along = h->along + row;
        real *restrict of_r = h->of_r + row, *restrict of_b = h->of_b + row, *restrict of_e = h->of_e + row;
        real *restrict of_rate = h->of_rate + row, *restrict of_z = h->of_z + row, *restrict spare = h->spare + row;
        real *restrict of_along = h->other + row;
#pragma omp simd reduction(+ : of_alpha)
        for (int j = 0; j < m; j++) {
            real of = of_r[m + j];
            of_rate[j] += of * z[j], of_z[j] = of * rate[j];
            of_r[j] += alpha * of, of_alpha += of * r[j];
        }
        if (sized) {
#pragma omp simd reduction(+ : of_alpha)
            for (int j = 0; j < m; j++) {
                real of = of_b[m + j];
                of_rate[j] += of * near[j], spare[j] = of * rate[j];
                of_b[j] += square * of, of_alpha += 2 * alpha * of * b[j];
            }
            if (!h->begun) {
#pragma omp simd reduction(+ : of_alpha)
                for (int j = 0; j < m; j++) {
                    real of = of_e[m + j];
                    of_rate[j] += of * along[j], of_along[j] = of * rate[j];
                    of_e[j] += alpha * of, of_alpha += of * e[j];
                }
            }
        }
        if (of_retention) of_retention[i] += alpha * of_alpha;
    }
    if (!sized) return;
    // M Ã, whose gradient is in `spare`
    product(L, m, L, plain(h->spare, m), turned(h->rate, m), h->score, L, 0, h->panel);
    for (int i = 0; i < L; i++) {
        const real *D = h->c.write + (size_t)(i + 1) * L, *gram = h->gram + (size_t)i * L;
        real *of_D = h->of_c.write + (size_t)(i + 1) * L, *of = h->score + (size_t)i * L, *row = h->mixed + (size_t)i * L;
        for (int j = 0; j < i; j++) {
            row[j] = 2 * D[j] * gram[j];
            if (of_retention) of_D[j] += 2 * of[j] * gram[j];
            h->score[(size_t)j * L + i] = of[j] = 2 * D[j] * of[j];
        }
        row[i] = gram[i], of[i] *= 2;
        memset(row + i + 1, 0, (L - i - 1) * sizeof(real));
    }
    product(L, L, m, turned(h->mixed, L), plain(h->spare, m), h->of_rate, m, 1, h->panel);
    product(L, L, d, plain(h->score, L), plain(h->h, d), h->of_h, d, 1, h->panel);
    if (h->begun) return;
    product(L, m, d, plain(h->other, m), plain(h->u, d), h->of_h, d, 1, h->panel);
    product(m, L, d, turned(h->other, m), plain(h->h, d), h->of_u, d, 1, h->panel);
}

// From the gradients of ã, z and h to those of the tile's inputs and of the anchor's slots.
static void back_rows(const Scan *s, Hand *h, const Tile *t, OfTile *g) {
    int m = h->m, d = h->d, L = t->tokens, objective = lattice(s)->objective;
    for (int i = 0; i < L; i++) {
        size_t row = (size_t)i * m;
        const real *restrict a = h->a + row, *restrict part = h->part;
        real *restrict of = h->of_rate + row, *restrict of_z = h->of_z + row, *restrict of_k = g->k + row, *restrict of_n = h->of_n;
        real lr = h->gates.lr[i];
        g->gates->lr[i] += dot(of, a, m);
        for (int j = 0; j < m; j++) {
            real of_a = lr * of[j] * part[j];
            of_n[j] -= of_a * a[j];
            of_k[j] = objective == ENCODING ? -of_a : of_a;
            if (objective == ENCODING) of_z[j] += of_a;
        }
    }
    product(L, m, d, plain(h->of_z, m), plain(h->f, d), h->of_h, d, 1, h->panel);
    product(m, L, d, turned(h->of_z, m), plain(h->h, d), h->of_f, d, 1, h->panel);
    if (objective == DECODING) {
        product(L, d, m, plain(h->of_h, d), plain(h->ft, m), g->k, m, 1, h->panel);
        product(m, L, d, turned(t->k, m), plain(h->of_h, d), h->of_f, d, 1, h->panel);
    }
    real sign = objective == ENCODING ? 1 : -1;
    for (int i = 0; i < L * d; i++) g->v[i] = sign * h->of_h[i];
}

// From the gradients of n, ρ, ‖u‖², F and U to those of the weights and of the anchor.
static void back_split(Hand *h, const Stand *at, const Stand *of) {
    int m = h->m, d = h->d;
    for (int i = 0; i < m; i++) {
        size_t row = (size_t)i * d;
        const real *restrict f = h->f + row, *restrict u = h->u + row, *restrict w = at->w[0] + row;
        real *restrict of_f = h->of_f + row, *restrict of_u = h->of_u + row, *restrict of_w = of->w[0] + row;
        real of_n = h->of_n[i], of_rho = h->of_rho[i], part = h->part[i];
        if (h->begun) {  // the weights are the anchor, and ρ its norms
            of_n += of_rho;
        } else {
            for (int j = 0; j < d; j++) of_u[j] += 2 * h->of_across[i] * u[j];
            real in = dot(of_u, f, d), rho = h->rho[i];
            for (int j = 0; j < d; j++) {
                of_w[j] = of_u[j] + (of_rho - in) * f[j];
                of_f[j] += (of_rho - in) * w[j] - rho * of_u[j];
            }
        }
        real in = dot(of_f, f, d);
        real *restrict of_a = h->begun ? of_w : of->a[0] + row;
        if (h->begun) memset(of_w, 0, d * sizeof(real));
        for (int j = 0; j < d; j++) of_a[j] += part * (of_f[j] - in * f[j]) + of_n * f[j];
    }
}

// ---- a memory ------------------------------------------------------------------------------------------------------

static int settles(const Scan *s, const Run *run) { return lattice(s)->retracts && run->flags & CLOSES; }

static Tile tile_of(const Scan *s, Hand *h, int memory, const Run *runs, int n) {
    h->begun = begins(s->apart, runs, n, 0);
    return tile_at(s, &h->gates, memory, &runs[n], h->begun);
}

static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *at) {
    Hand *h = hand;
    hold(s, h, place);
    h->tile = tile_of(s, h, memory, runs, n);
    coefficients(h->tile.tokens, h->tile.tokens, 1, 1, &h->gates, &h->c);
    h->sound = split(s, h, at);
    write_rows(s, h, &h->tile);
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *at) {
    Hand *h = hand;
    read_slots(s, h, &h->tile, answers_at(s, s->y, memory, &runs[n]));
    int L = h->tile.tokens, sound = advance_slots(s, h, L, settles(s, &runs[n]), at->w[0]);
    size_t codes = (size_t)L * h->m, values = (size_t)L * h->d;
    real total = sum(h->a, codes) + sum(h->z, codes) + dot(h->h, h->h, values) + sum(at->w[0], size_of(&s->cell, 0));
    return sound && h->sound && total - total == 0;
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *at, const Stand *after) {
    (void)memory, (void)at;
    Hand *h = hand;
    advance_slots(s, h, h->tile.tokens, settles(s, &runs[n]), after->w[0]);
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *at, const Stand *of) {
    Hand *h = hand;
    hold(s, h, place);
    Tile t = tile_of(s, h, memory, runs, n);
    read_slots(s, h, &t, 0);
    if (settles(s, &runs[n])) advance_slots(s, h, t.tokens, 1, h->after);
    OfTile g = of_tile_at(s, &h->of_gates, memory, &runs[n]);
    int L = t.tokens;
    size_t slots = h->m * sizeof(real), codes = (L + 1) * slots;
    memset(h->of_c_begin, 0, (h->of_c_end - h->of_c_begin) * sizeof(real));
    memset(h->of_n, 0, slots), memset(h->of_rho, 0, slots), memset(h->of_across, 0, slots);
    memset(h->of_r, 0, codes), memset(h->of_b, 0, codes), memset(h->of_e, 0, codes);
    memset(h->of_h, 0, (size_t)L * h->d * sizeof(real));
    back_slots(s, h, L, settles(s, &runs[n]), of->w[0]);
    back_reads(s, h, &t, answers_at(s, (real *)s->of_y, memory, &runs[n]), g.q);
    back_sums(s, h, L, h->of_gates.retention);
    back_rows(s, h, &t, &g);
    back_split(h, at, of);
    if (h->gates.retention) back_coefficients(L, L, 1, 1, &h->gates, &h->c, &h->of_c, &h->of_gates);
}

static const Engine ENGINE = {sizeof(Hand), lay, 0, make, ahead, onward, behind};

const size_t nestling_size = sizeof(Lattice);

// Returns 0, or 1 if there was no room for it.
int nestling_lattice(const Lattice *s, int back) { return pass_all(&s->scan, &ENGINE, back); }
