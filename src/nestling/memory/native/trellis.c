// Trellis: two caches of m slots, the second read with what the first answers; a tile at a time, all of it in a core's cache.
//
// With A the caches at the chunk's start and W before the tile, keys for the first and values for the second, D and c the products
// of a cache's retentions
//
//     z = x A,  u = J_φ(z)ᵀ(φ(z) − α)            what a token writes of its code α; without a prediction −J_φ(z)ᵀ α
//     W_t = c_t W − Σ_i D[t,i] x_iᵀ γ_i u_i
//     ŷ = q W_t of keys,  p = f(ŷ),  y = [φ](p W_tᵀ of values)
//
// (Trellis, eq. 6 to 14; the tile's form derived)

#include "pairs.h"
#include "passes.h"

enum { AS_IT_IS, SILU_OF_IT };          // φ
enum { NORMED_SILU, UNIT_SILU, PLAIN }; // f

typedef struct {
    Scan scan;  // lr and retention: those of the first cache
    const real *code, *lr_2, *retention_2;  // the second cache's own, or null
    real *of_code, *of_lr_2, *of_retention_2;
    int phi, between, predicts, reads_phi;
    double norm_epsilon, unit_epsilon;
} Trellis;

// A cache at a tile. in: width of what it reads;  of_*: gradients.
typedef struct {
    int in;
    const real *x, *lr;
    const real *w, *a;
    Coefficients *c, *of_c;
    real *z, *slope, *e, *u, *rate;  // e: φ(z) − α
    real *score, *of_x, *of_rate;
} Cache;

typedef struct {
    int m;
    Gates gates[2];
    OfGates of_gates[2];
    Coefficients c[2], of_c[2];
    real *made, *of_c_begin, *of_c_end;
    size_t apiece;  // numbers of `made` for each tile
    Tile tile;      // the one that was made last
    Cache cache[2];
    real *ahead, *rise, *value, *p, *scale, *y, *slope;  // ŷ, σ'(ŷ), σ(ŷ), f(ŷ);  what φ makes an answer of, and its slope
    real *of_p, *of_y, *mixed, *spare, *other, *panel;
} Hand;

static const Trellis *trellis(const Scan *s) { return (const Trellis *)s; }

static int separate(const Scan *s) { return trellis(s)->lr_2 != 0; }

// Takes in hand what is made of a group's tile.
static size_t hold(const Scan *s, Hand *h, int place) {
    int L = s->longest;
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    for (int n = 0; n < 1 + separate(s); n++) lay_coefficients(L, L, 0, &h->c[n], &room);
    for (int n = 0; n < 2; n++) {
        Cache *k = &h->cache[n];
        TAKE(&room, (size_t)L * h->m, &k->z, &k->slope, &k->e, &k->u, &k->rate);
    }
    return room.used;
}

static size_t lay(const Scan *s, int back, void *hand, real *space) {
    Hand *h = hand;
    const int *width = s->cell.network.width;
    int m = h->m = width[1], L = s->longest, most = widest(&s->cell.network) > L ? widest(&s->cell.network) : L;
    Room room = {space, 0};
    h->made = 0;
    h->apiece = hold(s, h, 0);
    h->made = take(&room, h->apiece * (back ? s->group : 1));
    h->of_c_begin = take(&room, 0);
    for (int n = 0; back && n < 1 + separate(s); n++) lay_coefficients(L, L, 0, &h->of_c[n], &room);
    h->of_c_end = take(&room, 0);
    for (int n = 0; n < 2; n++) {
        Cache *k = &h->cache[n];
        int own = separate(s) ? n : 0;
        k->in = width[2 * n], k->c = &h->c[own], k->of_c = &h->of_c[own];
        k->of_rate = take(&room, (size_t)L * m);
        k->of_x = take(&room, (size_t)L * k->in);
        k->score = take(&room, (size_t)L * L);
    }
    TAKE(&room, (size_t)L * m, &h->ahead, &h->rise, &h->value, &h->p, &h->of_p);
    TAKE(&room, (size_t)L * width[2], &h->y, &h->slope, &h->of_y);
    h->scale = take(&room, L);
    h->mixed = take(&room, (size_t)L * L);
    TAKE(&room, (size_t)most * most, &h->spare, &h->other);
    h->panel = take(&room, (size_t)most * PANEL);
    return room.used;
}

// ---- forward -------------------------------------------------------------------------------------------------------

// The tile of a run, with what its caches read of it and stand at.
static Tile tile_of(const Scan *s, Hand *h, int memory, const Run *run, const Stand *at) {
    const Trellis *own = trellis(s);
    size_t token = (size_t)memory * s->time + run->first;
    Tile t = tile_at(s, &h->gates[0], memory, run, 0);
    h->gates[1] = h->gates[0];
    if (separate(s)) {
        h->gates[1].lr = own->lr_2 + token;
        h->gates[1].retention = own->retention_2 ? own->retention_2 + token : 0;
    }
    for (int n = 0; n < 2; n++) {
        Cache *k = &h->cache[n];
        k->x = n ? t.v : t.k, k->w = at->w[n], k->a = at->a[n], k->lr = h->gates[n].lr;
    }
    return t;
}

// What a tile's tokens write.
static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *at) {
    const Trellis *own = trellis(s);
    Hand *h = hand;
    hold(s, h, place);
    h->tile = tile_of(s, h, memory, &runs[n], at);
    int m = h->m, L = h->tile.tokens;
    const real *restrict code = own->code + ((size_t)memory * s->time + runs[n].first) * m;
    for (int l = 0; l < 2; l++) {
        Cache *k = &h->cache[l];
        if (l == 0 || separate(s)) coefficients(L, L, 1, 1, &h->gates[l], k->c);
        product(L, k->in, m, plain(k->x, k->in), plain(k->a, m), k->z, m, 0, h->panel);
        if (own->phi == SILU_OF_IT) activate_with_slope(SILU, L * m, k->z, k->e, k->slope);
        else memcpy(k->e, k->z, (size_t)L * m * sizeof(real));
        real *restrict e = k->e, *restrict u = k->u;
        if (own->predicts)
            for (int i = 0; i < L * m; i++) e[i] -= code[i];
        else
            for (int i = 0; i < L * m; i++) e[i] = -code[i];
        memcpy(u, e, (size_t)L * m * sizeof(real));
        if (own->phi == SILU_OF_IT)
            for (int i = 0; i < L * m; i++) u[i] *= k->slope[i];
        scaled(L, m, k->lr, u, k->rate);
    }
}

// What a cache answers: through its weights, or backwards through them.
static void read_cache(const Scan *s, Hand *h, const Cache *k, int L, int backwards, const real *asked, real *y) {
    int m = h->m, d = k->in, first = !s->cell.before, in = backwards ? m : d, out = backwards ? d : m;
    const real *D = k->c->write + (size_t)first * L;
    scaled(L, in, k->c->keep + first, asked, h->spare);
    product(L, in, out, plain(h->spare, in), backwards ? turned(k->w, m) : plain(k->w, m), y, out, 0, h->panel);
    less_pairs(L, in, out, D, asked, backwards ? k->rate : k->x, backwards ? k->x : k->rate, k->score, h->mixed, y, h->panel);
}

// Answers; y null: what the way back needs of them.
static void read_caches(const Scan *s, Hand *h, const Tile *t, real *y) {
    const Trellis *own = trellis(s);
    int m = h->m, L = t->tokens, size = L * h->cache[1].in;
    read_cache(s, h, &h->cache[0], L, 0, t->q, h->ahead);
    if (own->between == PLAIN) memcpy(h->p, h->ahead, (size_t)L * m * sizeof(real));
    else activate_with_slope(SILU, L * m, h->ahead, h->value, h->rise);
    if (own->between == NORMED_SILU) normalize(L, m, (real)own->norm_epsilon, h->value, h->p, h->scale);
    if (own->between == UNIT_SILU) unit_rows(L, m, (real)own->unit_epsilon, h->value, h->p, h->scale);
    int through = own->reads_phi && own->phi == SILU_OF_IT;
    real *to = y && !through ? y : h->y;
    read_cache(s, h, &h->cache[1], L, 1, h->p, to);
    if (!through) return;
    if (y) activate(SILU, size, to, y);
    else activate_with_slope(SILU, size, to, h->of_y, h->slope);
}

// The caches behind the tile.
static void advance_caches(Hand *h, int L, real *const *to) {
    for (int n = 0; n < 2; n++) {
        const Cache *k = &h->cache[n];
        Blend kept = {k->c->keep[L], 0, k->w, 0};
        scaled(L, k->in, k->c->write + (size_t)L * L, k->x, h->spare);
        blended(k->in, L, h->m, turned(h->spare, k->in), plain(k->rate, h->m), to[n], h->m, kept, h->panel);
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// From the gradient of a cache behind the tile, `of`, to what it is made of; the first to be taken.
static void back_advance_cache(Hand *h, Cache *k, int L, real *of) {
    int m = h->m, d = k->in;
    size_t size = (size_t)d * m;
    real *D = k->c->write + (size_t)L * L, *of_D = k->of_c->write + (size_t)L * L, keep = k->c->keep[L];
    product(L, d, m, plain(k->x, d), plain(of, m), k->of_rate, m, 0, h->panel);
    product(L, m, d, plain(k->rate, m), turned(of, m), k->of_x, d, 0, h->panel);
    for (int i = 0; i < L; i++) {
        real *restrict of_rate = k->of_rate + (size_t)i * m, *restrict of_x = k->of_x + (size_t)i * d, decay = -D[i];
        of_D[i] -= dot(of_rate, k->rate + (size_t)i * m, m);
        for (int j = 0; j < m; j++) of_rate[j] *= decay;
        for (int j = 0; j < d; j++) of_x[j] *= decay;
    }
    k->of_c->keep[L] += dot(of, k->w, size);
    for (size_t i = 0; i < size; i++) of[i] *= keep;
}

// From the gradient of a cache's answers to that of what was asked, which is made, and to all else.
static void back_cache(
    const Scan *s, Hand *h, Cache *k, int L, int backwards, const real *asked, const real *of_y, real *of_asked, real *of
) {
    int m = h->m, d = k->in, first = !s->cell.before, in = backwards ? m : d, out = backwards ? d : m;
    const real *D = k->c->write + (size_t)first * L, *keep = k->c->keep + first;
    real *of_D = k->of_c->write + (size_t)first * L, *of_keep = k->of_c->keep + first;
    back_pairs(
        L, in, out, D, asked, backwards ? k->rate : k->x, backwards ? k->x : k->rate, k->score, h->mixed, of_y, of_D, of_asked,
        backwards ? k->of_rate : k->of_x, backwards ? k->of_x : k->of_rate, h->panel
    );
    product(L, out, in, plain(of_y, out), backwards ? plain(k->w, m) : turned(k->w, m), h->spare, in, 0, h->panel);
    for (int i = 0; i < L; i++) {
        const real *restrict row = h->spare + (size_t)i * in;
        real *restrict to = of_asked + (size_t)i * in, c = keep[i];
        of_keep[i] += dot(row, asked + (size_t)i * in, in);
        for (int j = 0; j < in; j++) to[j] += c * row[j];
    }
    scaled(L, in, keep, asked, h->spare);
    if (backwards) product(d, L, m, turned(of_y, d), plain(h->spare, m), of, m, 1, h->panel);
    else product(d, L, m, turned(h->spare, d), plain(of_y, m), of, m, 1, h->panel);
}

// From the gradients of what a cache's tokens wrote to those of gates, codes, what it read, and the anchor.
static void back_writes(const Scan *s, Hand *h, Cache *k, int L, real *of_lr, real *restrict of_code, real *of_x, real *of_a) {
    const Trellis *own = trellis(s);
    int m = h->m, d = k->in;
    real *restrict of_e = k->of_rate, *restrict of_slope = h->other;
    const real *restrict e = k->e, *restrict slope = k->slope;
    for (int i = 0; i < L; i++) of_lr[i] += dot(k->of_rate + (size_t)i * m, k->u + (size_t)i * m, m);
    scaled(L, m, k->lr, of_e, of_e);
    if (own->phi == SILU_OF_IT)
        for (int i = 0; i < L * m; i++) of_slope[i] = of_e[i] * e[i], of_e[i] *= slope[i];
    less(L * m, 1, of_e, of_code);
    if (!own->predicts) memset(of_e, 0, (size_t)L * m * sizeof(real));
    if (own->phi == SILU_OF_IT) back_through_both(SILU, L * m, k->z, k->slope, of_slope, of_e);
    if (own->predicts || own->phi == SILU_OF_IT) {
        product(L, m, d, plain(of_e, m), turned(k->a, m), k->of_x, d, 1, h->panel);
        product(d, L, m, turned(k->x, d), plain(of_e, m), of_a, m, 1, h->panel);
    }
    memcpy(of_x, k->of_x, (size_t)L * d * sizeof(real));
}

static void back_caches(const Scan *s, Hand *h, const Tile *t, size_t token, const real *of_y, const Stand *of, OfTile *g) {
    const Trellis *own = trellis(s);
    int m = h->m, L = t->tokens, size = L * h->cache[1].in;
    for (int n = 0; n < 2; n++) back_advance_cache(h, &h->cache[n], L, of->w[n]);
    if (own->reads_phi && own->phi == SILU_OF_IT) {
        for (int i = 0; i < size; i++) h->of_y[i] = of_y[i] * h->slope[i];
        of_y = h->of_y;
    }
    back_cache(s, h, &h->cache[1], L, 1, h->p, of_y, h->of_p, of->w[1]);
    if (own->between == NORMED_SILU) denormalize(L, m, h->p, h->scale, h->of_p, h->of_p);
    if (own->between == UNIT_SILU) back_unit_rows(L, m, h->p, h->scale, h->of_p);
    if (own->between != PLAIN)
        for (int i = 0; i < L * m; i++) h->of_p[i] *= h->rise[i];
    back_cache(s, h, &h->cache[0], L, 0, t->q, h->of_p, g->q, of->w[0]);
    for (int n = 0; n < 2; n++)
        back_writes(s, h, &h->cache[n], L, h->of_gates[n].lr, own->of_code + token * m, n ? g->v : g->k, of->a[n]);
}

// ---- a memory ------------------------------------------------------------------------------------------------------

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *at) {
    Hand *h = hand;
    read_caches(s, h, &h->tile, answers_at(s, s->y, memory, &runs[n]));
    advance_caches(h, h->tile.tokens, at->w);
    real total = 0;
    size_t codes = (size_t)h->tile.tokens * h->m;
    for (int l = 0; l < 2; l++) total += dot(h->cache[l].u, h->cache[l].u, codes) + sum(at->w[l], size_of(&s->cell, l));
    return total - total == 0;
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *at, const Stand *after) {
    (void)s, (void)memory, (void)runs, (void)n, (void)at;
    Hand *h = hand;
    advance_caches(h, h->tile.tokens, after->w);
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *at, const Stand *of) {
    const Trellis *own = trellis(s);
    Hand *h = hand;
    size_t token = (size_t)memory * s->time + runs[n].first;
    hold(s, h, place);
    Tile t = tile_of(s, h, memory, &runs[n], at);
    read_caches(s, h, &t, 0);
    OfTile g = of_tile_at(s, &h->of_gates[0], memory, &runs[n]);
    h->of_gates[1] = h->of_gates[0];
    if (separate(s)) h->of_gates[1].lr = own->of_lr_2 + token, h->of_gates[1].retention = of_token(own->of_retention_2, token, 1);
    memset(h->of_c_begin, 0, (h->of_c_end - h->of_c_begin) * sizeof(real));
    back_caches(s, h, &t, token, answers_at(s, (real *)s->of_y, memory, &runs[n]), of, &g);
    for (int l = 0; l < 1 + separate(s); l++)
        if (h->gates[l].retention) back_coefficients(t.tokens, t.tokens, 1, 1, &h->gates[l], &h->c[l], &h->of_c[l], &h->of_gates[l]);
}

static const Engine ENGINE = {sizeof(Hand), lay, 0, make, ahead, onward, behind};

const size_t nestling_size = sizeof(Trellis);

// Returns 0, or 1 if there was no room for it.
int nestling_trellis(const Trellis *s, int back) { return pass_all(&s->scan, &ENGINE, back); }
