// Lattice: m slots, each written with what is orthogonal to it; a tile at a time, all of it in a core's cache.
//
// With the anchor's slots a_i = n_i f_i, D and c the products of retentions, and W = Diag(ρ) F + U before the tile, where U is what
// lies across the anchor's slots (nothing at a chunk's start)
//
//     H = K F − V, −V or V      Z = H Fᵀ      A = K/n or, for an encoding, (Z − K)/n      Ã = diag(γ) A
//     R_t = α_t R_{t−1} + ã_t ∘ z_t
//     S_t = Diag(c_t ρ + R_t) F + c_t U − Σ_i D[t,i] ã_iᵀ h_i
//
//     ‖s_t‖² = c_t² (ρ² + ‖u‖²) + B_t − R_t² − 2 c_t E_t      no less than c_t² ρ², as steps lie across the anchor's slots
//     B_t = α_t² B_{t−1} + ã_t ∘ (M Ã)_t,  M = (2 strictly lower D + I) ∘ H Hᵀ        E_t = α_t E_{t−1} + ã_t ∘ (H Uᵀ)_t
//     y_t = (q_t / ‖s_t‖) S_t
//
// as in `lattice_chunked`, where the parallel form is explained. (derived)

#ifndef NESTLING_LATTICE_H
#define NESTLING_LATTICE_H

#include "pairs.h"
#include "passes.h"

enum { DECODING, SIMILARITY, ENCODING };  // what a slot is written for
enum { BY_TOKEN, BY_CHUNK, AS_THEY_ARE }; // whose norms a read takes from the slots: their own, the anchor's, none

typedef struct {
    Scan scan;
    int objective, norms, retracts;  // retracts: slots go back to the unit sphere at chunk ends
    double epsilon;                  // the least norm of a slot
} Lattice;

// What a thread has in hand. By slot: n, 1/n, ρ, ‖u‖², F, Fᵀ and U; by token: what the equations name; by row 0 … L: R, B and E.
typedef struct {
    int m, d, begun, sound;  // sound: every slot has a direction
    Gates gates;
    OfGates of_gates;
    Coefficients c, of_c;
    real *made, *of_c_begin, *of_c_end;
    size_t apiece;  // numbers of `made` for each tile
    Tile tile;      // the one that was made last
    real *n, *part, *rho, *across, *f, *ft, *u;
    real *h, *z, *a, *rate, *near, *along, *r, *b, *e;      // rate: ã;  near: M Ã;  along: H Uᵀ
    real *gram, *mixed, *score;
    real *size, *asked, *lead;                              // ‖s‖², q/‖s‖ and that times c ρ + R
    real *after, *norms;                                    // weights behind the tile, and their norms
    real *of_n, *of_rho, *of_across, *of_f, *of_u;
    real *of_h, *of_z, *of_rate, *of_asked, *of_r, *of_b, *of_e, *spare, *other, *panel;
} Hand;

static const Lattice *lattice(const Scan *s) { return (const Lattice *)s; }

// Takes in hand what is made of a group's tile.
static size_t hold(const Scan *s, Hand *h, int place) {
    int m = h->m, d = h->d, L = s->longest;
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    lay_coefficients(L, L, 0, &h->c, &room);
    TAKE(&room, m, &h->n, &h->part, &h->rho, &h->across);
    TAKE(&room, (size_t)m * d, &h->f, &h->ft);
    TAKE(&room, s->apart ? (size_t)m * d : 0, &h->u);
    TAKE(&room, (size_t)(L + 1) * m, &h->z, &h->a, &h->rate, &h->r);
    TAKE(&room, (size_t)L * d, &h->h);
    return room.used;
}

static size_t lay(const Scan *s, int back, void *hand, real *space) {
    Hand *h = hand;
    int m = h->m = s->cell.network.width[0], d = h->d = s->cell.network.width[1], L = s->longest;
    int most = m > d ? m : d;
    Room room = {space, 0};
    if (L > most) most = L;
    h->made = 0;
    h->apiece = hold(s, h, 0);
    h->made = take(&room, h->apiece * (back ? s->group : 1));
    h->of_c_begin = take(&room, 0);
    if (back) lay_coefficients(L, L, 0, &h->of_c, &room);
    h->of_c_end = take(&room, 0);
    TAKE(&room, m, &h->norms, &h->of_n, &h->of_rho, &h->of_across);
    TAKE(&room, (size_t)m * d, &h->after, &h->of_f, &h->of_u);
    TAKE(&room, (size_t)(L + 1) * m, &h->near, &h->along, &h->b, &h->e, &h->size, &h->asked, &h->lead);
    TAKE(&room, (size_t)(L + 1) * m, &h->of_z, &h->of_rate, &h->of_asked, &h->of_r, &h->of_b, &h->of_e);
    TAKE(&room, (size_t)L * d, &h->of_h);
    TAKE(&room, (size_t)L * L, &h->gram, &h->mixed, &h->score);
    TAKE(&room, (size_t)most * most, &h->spare, &h->other);
    h->panel = take(&room, (size_t)most * PANEL);
    return room.used;
}

// ---- forward -------------------------------------------------------------------------------------------------------

// The anchor's norms and directions, and what the weights are beside them. Returns whether every slot has a direction.
static int split(const Scan *s, Hand *h, const Stand *at) {
    int m = h->m, d = h->d, sound = 1;
    real least = (real)(lattice(s)->epsilon * lattice(s)->epsilon);
    for (int i = 0; i < m; i++) {
        const real *restrict a = at->a[0] + (size_t)i * d, *restrict w = at->w[0] + (size_t)i * d;
        real *restrict f = h->f + (size_t)i * d, *restrict u = h->u + (size_t)i * d, square = dot(a, a, d);
        sound &= square >= least;
        real part = h->part[i] = R(1.0) / (h->n[i] = h->rho[i] = (real)sqrt(square));
        for (int j = 0; j < d; j++) f[j] = part * a[j];
        h->across[i] = 0;
        if (h->begun) continue;
        real rho = h->rho[i] = dot(f, w, d);
        for (int j = 0; j < d; j++) u[j] = w[j] - rho * f[j];
        h->across[i] = dot(u, u, d);
    }
    for (int i = 0; i < d; i += 8)
        for (int j = 0; j < m; j += 8)
            transpose(d - i < 8 ? d - i : 8, m - j < 8 ? m - j : 8, h->f + (size_t)j * d + i, 1, d, h->ft + (size_t)i * m + j, m);
    return sound;
}

// What a tile's tokens write: h, z, ã and R.
static void write_rows(const Scan *s, Hand *h, const Tile *t) {
    int m = h->m, d = h->d, L = t->tokens, objective = lattice(s)->objective;
    real sign = objective == ENCODING ? 1 : -1, *restrict all = h->h;
    for (int i = 0; i < L * d; i++) all[i] = sign * t->v[i];
    if (objective == DECODING) product(L, m, d, plain(t->k, m), plain(h->f, d), h->h, d, 1, h->panel);
    product(L, d, m, plain(h->h, d), plain(h->ft, m), h->z, m, 0, h->panel);
    memset(h->r, 0, m * sizeof(real));
    for (int i = 0; i < L; i++) {
        size_t row = (size_t)i * m;
        real lr = h->gates.lr[i], alpha = h->c.alpha[i];
        const real *restrict k = t->k + row, *restrict z = h->z + row, *restrict part = h->part;
        real *restrict a = h->a + row, *restrict rate = h->rate + row, *restrict r = h->r + row;
#pragma GCC ivdep
        for (int j = 0; j < m; j++) {
            a[j] = (objective == ENCODING ? z[j] - k[j] : k[j]) * part[j];
            rate[j] = lr * a[j];
            r[m + j] = alpha * r[j] + rate[j] * z[j];
        }
    }
}

// The weights behind the tile; their norms too, where slots go back to the sphere at its end. Returns whether they can.
static int advance_slots(const Scan *s, Hand *h, int L, int settles, real *to) {
    int m = h->m, d = h->d, sound = 1;
    const real *last = h->r + (size_t)L * m;
    real keep = h->c.keep[L];
    for (int i = 0; i < m; i++) {
        const real *restrict f = h->f + (size_t)i * d, *restrict u = h->u + (size_t)i * d;
        real *restrict row = to + (size_t)i * d, scale = keep * h->rho[i] + last[i];
        for (int j = 0; j < d; j++) row[j] = scale * f[j] + (h->begun ? 0 : keep * u[j]);
    }
    scaled(L, m, h->c.write + (size_t)L * L, h->rate, h->spare);
    product(m, L, d, turned(h->spare, m), plain(h->h, d), to, d, -1, h->panel);
    for (int i = 0; settles && i < m; i++) {
        real *restrict row = to + (size_t)i * d, norm = h->norms[i] = (real)sqrt(dot(row, row, d)), part = R(1.0) / norm;
        sound &= norm >= (real)lattice(s)->epsilon;
        for (int j = 0; j < d; j++) row[j] *= part;
    }
    return sound;
}

// Slots' norms at every token, squared: h->size.
static void slot_sizes(Hand *h, int L, int first) {
    int m = h->m, d = h->d;
    product(L, d, L, plain(h->h, d), turned(h->h, d), h->gram, L, 0, h->panel);
    for (int i = 0; i < L; i++) {
        const real *D = h->c.write + (size_t)(i + 1) * L, *gram = h->gram + (size_t)i * L;
        real *row = h->mixed + (size_t)i * L;
        for (int j = 0; j < L; j++) row[j] = 2 * D[j] * gram[j];
        row[i] = gram[i];
    }
    product(L, L, m, plain(h->mixed, L), plain(h->rate, m), h->near, m, 0, h->panel);
    if (!h->begun) product(L, d, m, plain(h->h, d), turned(h->u, d), h->along, m, 0, h->panel);
    memset(h->b, 0, m * sizeof(real));
    memset(h->e, 0, m * sizeof(real));
    for (int i = 0; i < L; i++) {
        size_t row = (size_t)i * m;
        const real *restrict rate = h->rate + row, *restrict near = h->near + row, *restrict along = h->along + row;
        real *restrict b = h->b + row, *restrict e = h->e + row, alpha = h->c.alpha[i];
#pragma GCC ivdep
        for (int j = 0; j < m; j++) b[m + j] = alpha * alpha * b[j] + rate[j] * near[j];
        if (h->begun) continue;
#pragma GCC ivdep
        for (int j = 0; j < m; j++) e[m + j] = alpha * e[j] + rate[j] * along[j];
    }
    for (int i = 0; i < L; i++) {
        size_t row = (size_t)(i + first) * m;
        const real *restrict rho = h->rho, *restrict u = h->across, *restrict r = h->r + row, *restrict b = h->b + row;
        const real *restrict e = h->e + row;
        real *restrict size = h->size + (size_t)i * m, c = h->c.keep[i + first], square = c * c, cross = h->begun ? 0 : 2 * c;
        for (int j = 0; j < m; j++) {
            real least = square * rho[j] * rho[j], all = least + square * u[j] + b[j] - r[j] * r[j];
            if (cross != 0) all -= cross * e[j];
            size[j] = all < least ? least : all;
        }
    }
}

// Queries as they are asked, and their scores. y null: not wanted.
static void read_slots(const Scan *s, Hand *h, const Tile *t, real *y) {
    int m = h->m, d = h->d, L = t->tokens, first = !s->cell.before, norms = lattice(s)->norms;
    real least = (real)(lattice(s)->epsilon * lattice(s)->epsilon);
    if (norms == BY_TOKEN) slot_sizes(h, L, first);
    for (int i = 0; i < L; i++) {
        size_t row = (size_t)i * m;
        const real *restrict q = t->q + row, *restrict n = h->n, *restrict rho = h->rho, *restrict r = h->r + row + first * m;
        real *restrict size = h->size + row, *restrict asked = h->asked + row, *restrict lead = h->lead + row;
        real c = h->c.keep[i + first];
        if (norms == BY_TOKEN)
            for (int j = 0; j < m; j++) asked[j] = q[j] / (real)sqrt(size[j] < least ? least : size[j]);
        else
            for (int j = 0; j < m; j++) asked[j] = norms == BY_CHUNK ? q[j] / n[j] : q[j];
        for (int j = 0; j < m; j++) lead[j] = (c * rho[j] + r[j]) * asked[j];
    }
    if (y) product(L, m, d, plain(h->lead, m), plain(h->f, d), y, d, 0, h->panel);
    if (y && !h->begun) {
        scaled(L, m, h->c.keep + first, h->asked, h->spare);
        product(L, m, d, plain(h->spare, m), plain(h->u, d), y, d, 1, h->panel);
    }
    const real *D = h->c.write + (size_t)first * L;
    less_pairs(L, m, d, D, h->asked, h->rate, h->h, h->score, h->mixed, y, h->panel);
}

#endif
