// A tile of a memory over exponential features, whose first layer reads pairs of a key and what it wrote; see kernel.py.
//
//     z_1(k) = k A_0 + Σ_j ȧ_j κ(k_j, k) u_j                        keys, at the anchor
//     z_1(q_t) = γ_t q W_0 + Σ_j γ_t a_j κ(k_j, q) u_j + Σ_i C[t,i] κ(k_i, q) u_i       queries: what stood before, and the tile's own
//     u = −δ_1 = −(δ_2 A_2ᵀ) ∘ σ'(z_1)
//
// All behind the first layer is a memory of tile.h whose keys and queries are σ(z_1). Of a span nothing is handed on: every tile reads
// its own tokens and the span before them, at the initial weights.

#ifndef NESTLING_KERNEL_H
#define NESTLING_KERNEL_H

#include "passes.h"
#include "sums.h"

typedef struct {
    Scan scan;
    Kind kind;
    int span, count, room, halo, opens;  // pairs as given and behind the call;  opens: a chunk begins with the call
    const real *scale;                   // s of each head
    const real *key, *write, *weight, *still;                  // as given, `[memory, count, …]`
    real *key_end, *write_end, *weight_end, *still_end;        // behind the call, `[memory, room, …]`; on the way back write_end alone
    const real *from_key, *from_write, *from_weight, *from_still;  // null: 0
    real *of_key, *of_write, *of_weight, *of_still, *of_scale;     // of_scale: one of each memory
} Kernel;

// What a thread has in hand.
typedef struct {
    int memory;
    Cell inner;
    Space space;
    Gates gates;
    OfGates of_gates;
    Coefficients c, of_c;
    real *of_c_begin, *of_c_end, *made, *turned[DEPTH];
    size_t apiece;  // numbers of `made` for each tile
    real *states;   // of a span: its weights and their gradients
    // What is made of a tile: rows are its keys, then its queries; up = δ_2 A_2ᵀ.
    Readers rows;
    real *z, *x, *slope, *up, *u, *targets, *at_w, *h, *rise;
    // What lasts for a step.
    real *space_p, *space_g, *panel, *of_x, *of_h, *of_u, *of_targets, *spare;
    OfReaders of_rows;
    real *keys, *writes;       // of the pairs so far; on the way back, of all
    real *a, *still, *starts;  // before each tile of a group, `[group, room]`; before each group, both
    real *of_a, *of_still, *of_pair_key, *of_pair_write;
    Tile tile;
} Hand;

static int rows_of(const Kernel *k) { return k->scan.longest + k->halo; }
static int tiles_held(const Kernel *k, int backward) { return backward && !k->span ? k->scan.group : 1; }
static int groups_of(const Kernel *k) { return (k->scan.tiles + k->scan.group - 1) / k->scan.group; }

static size_t hold(const Kernel *k, Hand *h, int place) {
    const Network *n = &k->scan.cell.network;
    int N = rows_of(k), L = k->scan.longest, in = n->width[0], out = n->width[1], last = n->width[n->depth];
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    lay_made(&h->inner, N, &h->space, &room);
    lay_coefficients(L, N, 0, &h->c, &room);
    TAKE(&room, (size_t)N * out, &h->z, &h->x, &h->slope, &h->up, &h->u);
    TAKE(&room, (size_t)L * out, &h->at_w, &h->h, &h->rise);
    h->targets = take(&room, (size_t)N * last);
    h->rows.x = take(&room, (size_t)(N + L) * in);
    h->rows.z = take(&room, (size_t)(N + L) * out);
    TAKE(&room, N + L, &h->rows.top, &h->rows.total);
    h->rows.in = in, h->rows.out = out;
    return room.used;
}

static size_t lay(const Scan *s, int backward, void *hand, real *space) {
    const Kernel *k = (const Kernel *)s;
    const Cell *cell = &s->cell;
    Hand *h = hand;
    const Network *n = &cell->network;
    int N = rows_of(k), L = k->scan.longest, in = n->width[0], out = n->width[1], last = n->width[n->depth];
    int most = widest(n) > N + L ? widest(n) : N + L, wide = N > PAIRS ? N : PAIRS, tiles = tiles_held(k, backward);
    Room room = {space, 0};
    h->starts = 0;
    h->inner = *cell;
    h->inner.network.depth = n->depth - 1, h->inner.network.residual = 0;
    memcpy(h->inner.network.width, n->width + 1, n->depth * sizeof *n->width);
    h->made = 0;
    h->apiece = hold(k, h, 0);
    h->made = take(&room, h->apiece * tiles);
    lay_step(&h->inner, L, N, &h->space, &room);
    h->panel = take(&room, (size_t)(most > wide ? most : wide) * PANEL);
    h->space_p = take(&room, (size_t)(N + L) * wide);
    h->spare = take(&room, (size_t)N * out);
    TAKE(&room, (size_t)k->room * tiles, &h->a, &h->still);
    if (k->span) h->states = take(&room, numbers(cell, 0) * (1 + backward));
    if (!backward) return room.used;
    h->of_c_begin = take(&room, 0);
    lay_coefficients(L, N, 0, &h->of_c, &room);
    h->of_c_end = take(&room, 0);
    h->space_g = take(&room, (size_t)(N + L) * wide);
    TAKE(&room, (size_t)N * out, &h->of_x, &h->of_u);
    h->of_h = take(&room, (size_t)L * out);
    h->of_targets = take(&room, (size_t)N * last);
    h->of_rows.z = take(&room, (size_t)(N + L) * out);
    h->of_rows.x = take(&room, (size_t)(N + L) * in);
    h->of_rows.total = take(&room, N + L);
    h->keys = take(&room, (size_t)k->room * in);
    h->starts = take(&room, k->span ? 0 : (size_t)2 * groups_of(k) * k->room);
    TAKE(&room, k->room, &h->of_a, &h->of_still);
    h->of_pair_key = take(&room, (size_t)k->room * in);
    h->of_pair_write = take(&room, (size_t)k->room * out);
    lay_turned(cell, h->turned, &room);
    return room.used;
}

// What is behind the first layer.
static Stand behind_first(const Stand *m) {
    Stand found = {0};
    for (int l = 1; l < DEPTH; l++) found.w[l - 1] = m->w[l], found.a[l - 1] = m->a[l], found.turned[l - 1] = m->turned[l];
    return found;
}

// ---- pairs ---------------------------------------------------------------------------------------------------------

static int opens(const Kernel *k, const Run *runs, int n) { return n ? runs[n - 1].flags & CLOSES : k->opens; }

// Pairs before a tile. A chunk's stand together, with room for the window's before them.
static int before(const Kernel *k, const Run *runs, int n) {
    int count = k->count;
    for (int i = 0; i < n; i++) count += runs[i].tokens + (opens(k, runs, i) ? k->halo : 0);
    return count;
}

// Where the tile's rows stand among the pairs: inside a chunk, those of the window before it stand there already.
static int place_of(const Kernel *k, const Run *runs, int n) {
    return before(k, runs, n) + (opens(k, runs, n) ? k->halo : 0) - runs[n].halo;
}

// a and ȧ after a tile of those before it, in place.
static void move_pairs(const Kernel *k, const Coefficients *c, const Run *runs, int n, real *a, real *still) {
    int count = before(k, runs, n), place = place_of(k, runs, n), N = runs[n].halo + runs[n].tokens, L = runs[n].tokens;
    scaled(1, count, c->keep + L, a, a);
    if (place + N > count) memset(a + count, 0, (place + N - count) * sizeof(real));
    if (place + N > count) memset(still + count, 0, (place + N - count) * sizeof(real));
    add(N, c->write + (size_t)L * N, a + place);
    if (runs[n].flags & CLOSES) memcpy(still, a, (place + N) * sizeof(real));
}

// ---- a tile --------------------------------------------------------------------------------------------------------

// Values come with a token's step behind them where there is a span.
static int value_width(const Kernel *k) { return k->scan.cell.network.width[k->scan.cell.network.depth] + (k->span > 0); }
static size_t row_at(const Kernel *k, int memory, const Run *run) {
    return (size_t)memory * (k->scan.tail + k->scan.time) + k->scan.tail + run->first - run->halo;
}

static int acts(const unsigned char *fine, int row) { return !fine || fine[row]; }

// Whether the span that ends with t tokens of the tile has row i in it.
static int reaches(const Kernel *k, const Run *run, int t, int i) {
    int behind = run->halo + t - 1 - i;
    return behind >= 0 && behind < k->span;
}

// C[t, i] = η_i for the span's tokens that end with t.
static void band(const Kernel *k, const Run *run, const real *v, const unsigned char *fine, Coefficients *c) {
    int N = run->halo + run->tokens, wide = value_width(k);
    for (int t = 0; t <= run->tokens; t++) {
        c->keep[t] = 1;
        for (int i = 0; i < N; i++)
            c->write[(size_t)t * N + i] = reaches(k, run, t, i) && acts(fine, i) ? v[(size_t)i * wide + wide - 1] : 0;
    }
}

static void back_band(const Kernel *k, const Run *run, const Coefficients *of, const unsigned char *fine, real *of_v) {
    int N = run->halo + run->tokens, wide = value_width(k);
    for (int t = 0; t <= run->tokens; t++)
        for (int i = 0; i < N; i++)
            if (reaches(k, run, t, i) && acts(fine, i)) of_v[(size_t)i * wide + wide - 1] += of->write[(size_t)t * N + i];
}

// Those that do not act write nothing.
static void silence(const unsigned char *fine, int rows, int n, real *x) {
    for (int i = 0; fine && i < rows; i++)
        if (!fine[i]) memset(x + (size_t)i * n, 0, n * sizeof(real));
}

// The residual's part of a prediction goes to the target.
static int shifts(const Kernel *k) { return k->scan.cell.network.residual && reads_prediction(&k->scan.cell.bias); }

static const real *queries_at(const Kernel *k, int memory, const Run *run) {
    return k->scan.q + ((size_t)memory * k->scan.time + run->first) * k->scan.cell.network.width[0];
}

// The inner memory's tile, as far as it is known without the products.
static Tile tile_of(const Kernel *k, Hand *h, int memory, const Run *run) {
    Tile t = tile_at(&k->scan, &h->gates, memory, run, 0);
    t.k = h->x, t.v = h->targets, t.q = h->h, t.c = &h->c;
    return t;
}

static void make_tile(const Kernel *k, Hand *h, int memory, const Run *runs, int n, const Stand *m, const real *a, const real *still) {
    const Cell *cell = &k->scan.cell;
    const Network *net = &cell->network;
    const Run *run = &runs[n];
    int L = run->tokens, N = run->halo + L, R = N + L, in = net->width[0], out = net->width[1], last = net->width[net->depth];
    int first = cell->before ? 0 : 1, wide = value_width(k), next = net->width[2];
    size_t row = row_at(k, memory, run);
    const real *keys = k->scan.k + row * in, *v = k->scan.v + row * wide, *q = queries_at(k, memory, run);
    real s = k->scale[memory % k->scan.heads];
    Tile t = h->tile = tile_of(k, h, memory, run);
    if (k->span) band(k, run, v, h->gates.fine, &h->c);
    else coefficients(L, N, cell->window, 0, &h->gates, &h->c);

    Readers *r = &h->rows, asked = readers_from(r, N);
    r->peak = asked.peak = k->kind.unit_peak ? s : 0;
    for (int i = 0; i < N * in; i++) r->x[i] = s * keys[i];
    for (int i = 0; i < L * in; i++) asked.x[i] = s * q[i];
    clear_readers(R, r);
    if (!k->span) {
        Pairs past = {before(k, runs, n), h->keys, h->writes, 0, 0};
        read_pairs(&k->kind, R, N, r, &past, still, a, h->space_p, h->panel);
    }

    divide(&k->kind, N, r);
    product(N, in, out, plain(keys, in), plain(m->a[0], out), h->z, out, 0, h->panel);
    if (!k->span) add((size_t)N * out, r->z, h->z);
    activate_with_slope(net->activation, N * out, h->z, h->x, h->slope);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < last; j++) h->targets[(size_t)i * last + j] = v[(size_t)i * wide + j] - (shifts(k) ? keys[(size_t)i * in + j] : 0);
    Stand at = behind_first(m);
    gradients(&h->inner, &h->space, &t, &at);
    product(N, next, out, plain(h->space.delta[0], next), transposed(at.a, at.turned, 0, out, next), h->up, out, 0, h->panel);
    for (int i = 0; i < N * out; i++) h->u[i] = -h->up[i] * h->slope[i];
    silence(h->gates.fine, N, out, h->u);

    product(L, in, out, plain(q, in), plain(m->w[0], out), h->at_w, out, 0, h->panel);
    const real *keep = h->c.keep + first;
    if (h->gates.retention) take_share(L, keep, &asked);
    Pairs own = {N, keys, h->u, 0, 0};
    read_some(L, &asked, &own, h->space_p, h->panel);
    weigh(&k->kind, L, N, h->c.write + (size_t)first * N, N, h->space_p, &asked);
    add_some(L, &asked, &own, h->space_p, h->panel);
    divide(&k->kind, L, &asked);
    scaled(L, out, keep, h->at_w, h->spare);
    add((size_t)L * out, asked.z, h->spare);
    activate_with_slope(net->activation, L * out, h->spare, h->h, h->rise);
}

// Answers, from what was made of the tile; y null: what the way back needs instead.
static void answer_tile(const Kernel *k, Hand *h, const Run *run, const Stand *m, real *y) {
    const Network *net = &k->scan.cell.network;
    Stand at = behind_first(m);
    answers(&h->inner, &h->space, &h->tile, &at, y);
    if (y && net->residual) add_part(run->tokens, net->width[net->depth], queries_at(k, h->memory, run), net->width[0], y, net->width[net->depth]);
}

// What stands after the tile in the weights' place; `to` may be `m`.
static void move_weights(const Kernel *k, Hand *h, const Run *run, const Stand *m, const Stand *to) {
    Stand at = behind_first(m), after = behind_first(to);
    scaled(1, (int)size_of(&k->scan.cell, 0), h->c.keep + run->tokens, m->w[0], to->w[0]);
    advance(&h->inner, &h->space, &h->tile, &at, &after);
}

// Rows of a tile's pairs into their place, zeros where a chunk's window begins before the lane. to: of all the memory's pairs
static void put_rows(const Kernel *k, const Run *runs, int n, int wide, const real *rows, real *to) {
    int first = before(k, runs, n), place = place_of(k, runs, n), N = runs[n].halo + runs[n].tokens;
    if (place > first) memset(to + (size_t)first * wide, 0, (size_t)(place - first) * wide * sizeof(real));
    memcpy(to + (size_t)place * wide, rows, (size_t)N * wide * sizeof(real));
}

static void put_keys(const Kernel *k, int memory, const Run *runs, int n, real *keys) {
    int in = k->scan.cell.network.width[0];
    put_rows(k, runs, n, in, k->scan.k + row_at(k, memory, &runs[n]) * in, keys);
}

// From the gradients of a tile's answers and of what stands behind it to those of all it was given. The tile must have been made.
static void back_tile_of(
    const Kernel *k, Hand *h, int memory, const Run *runs, int n, const Stand *m, const Stand *g, const real *a, const real *still
) {
    const Cell *cell = &k->scan.cell;
    const Network *net = &cell->network;
    const Run *run = &runs[n];
    int L = run->tokens, N = run->halo + L, R = N + L, in = net->width[0], out = net->width[1], last = net->width[net->depth];
    int first = cell->before ? 0 : 1, wide = value_width(k), next = net->width[2];
    int past = before(k, runs, n), place = k->span ? 0 : place_of(k, runs, n), known = k->span ? 0 : past - place;
    size_t row = row_at(k, memory, run);
    const real *keys = k->scan.k + row * in, *q = queries_at(k, memory, run), *of_y = answers_at(&k->scan, (real *)k->scan.of_y, memory, run);
    real *of_keys = k->scan.of_k + row * in, *of_v = k->scan.of_v + row * wide, s = k->scale[memory % k->scan.heads];
    real *of_q = k->scan.of_q + ((size_t)memory * k->scan.time + run->first) * in, *of_shared = h->of_targets;
    const real *keep = h->c.keep + first;
    Space *p = &h->space;
    if (N > PANEL) turn(cell, (Stand *)m, h->turned);
    Stand at = behind_first(m), of_behind = behind_first(g);
    Tile t = tile_of(k, h, memory, run);
    p->at.x[0] = h->x;
    answers(&h->inner, p, &t, &at, 0);
    OfTile of = of_tile_at(&k->scan, &h->of_gates, memory, run);
    of.c = &h->of_c, of.q = h->of_h, of.k = h->of_x, of.v = h->of_targets;
    memset(h->of_c_begin, 0, (h->of_c_end - h->of_c_begin) * sizeof(real));
    memset(h->of_h, 0, (size_t)L * out * sizeof(real));
    memset(h->of_x, 0, (size_t)N * out * sizeof(real));
    memset(h->of_targets, 0, (size_t)N * last * sizeof(real));
    memset(h->of_rows.x, 0, (size_t)R * in * sizeof(real));
    h->of_rows.of_peak = 0;
    clear_rows(&h->inner, p, &t);

    memset(h->of_u, 0, (size_t)N * out * sizeof(real));
    if (!k->span) {  // what stands after it
        back_advance(&h->inner, p, &t, &at, &of_behind, &of);
        add(N, h->of_a + place, h->of_c.write + (size_t)L * N);
        if (h->gates.retention) {
            size_t size = size_of(cell, 0);
            h->of_c.keep[L] += dot(h->of_a, a, past) + dot(g->w[0], m->w[0], size);
            scaled(1, past, h->c.keep + L, h->of_a, h->of_a);
            scaled(1, (int)size, h->c.keep + L, g->w[0], g->w[0]);
        }
        size_t skip = known > 0 ? known : 0;  // these were pairs before it
        add((N - skip) * out, h->of_pair_write + (place + skip) * out, h->of_u + skip * out);
        add((N - skip) * in, h->of_pair_key + (place + skip) * in, of_keys + skip * in);
    }

    // The answers, and what they read of the tile's own tokens.
    Readers *r = &h->rows, asked = readers_from(r, N);
    asked.peak = r->peak = k->kind.unit_peak ? s : 0;
    OfReaders of_asked = of_readers_from(r, &h->of_rows, N);
    back_answers(&h->inner, p, &t, &at, of_y, &of_behind, &of);
    if (net->residual) add_part(L, last, of_y, last, of_q, in);
    for (int i = 0; i < L * out; i++) of_asked.z[i] = h->of_h[i] * h->rise[i];
    for (int i = 0; i < L; i++) h->of_c.keep[first + i] += dot(of_asked.z + (size_t)i * out, h->at_w + (size_t)i * out, out);
    scaled(L, out, keep, of_asked.z, h->spare);
    product(L, out, in, plain(h->spare, out), transposed(m->w, m->w[0] == m->a[0] ? m->turned : 0, 0, in, out), of_q, in, 1, h->panel);
    product(in, L, out, turned(q, in), plain(h->spare, out), g->w[0], out, 1, h->panel);
    back_divide(L, &asked, &of_asked);
    Pairs own = {N, keys, h->u, of_keys, h->of_u};
    size_t corner = (size_t)first * N;
    Weighing of_own = {h->c.write + corner, 0, N, h->of_c.write + corner, 0};
    read_some(L, &asked, &own, h->space_p, h->panel);
    product(L, out, N, plain(of_asked.z, out), turned(h->u, out), h->space_g, N, 0, h->panel);
    back_weigh(&k->kind, L, N, &of_own, h->space_p, h->space_g, &asked, &of_asked);
    back_some(L, &asked, &of_asked, &own, h->space_p, h->space_g, h->panel);

    // What was written: u = −up ∘ σ'(z)
    real *of_slope = h->spare;
    silence(h->gates.fine, N, out, h->of_u);
    for (int i = 0; i < N * out; i++) of_slope[i] = -h->of_u[i] * h->up[i], h->of_u[i] *= -h->slope[i];
    product(N, out, next, plain(h->of_u, out), plain(at.a[0], next), p->of_delta[0], next, 1, h->panel);
    product(out, N, next, turned(h->of_u, out), plain(p->delta[0], next), of_behind.a[0], next, 1, h->panel);
    back_gradients(&h->inner, p, &t, &at, &of_behind, &of);
    back_through_both(net->activation, N * out, h->z, h->slope, of_slope, h->of_x);
    product(N, out, in, plain(h->of_x, out), transposed(m->a, m->turned, 0, in, out), of_keys, in, 1, h->panel);
    product(in, N, out, turned(keys, in), plain(h->of_x, out), g->a[0], out, 1, h->panel);

    if (!k->span) {
        memcpy(h->of_rows.z, h->of_x, (size_t)N * out * sizeof(real));
        back_divide(N, r, &h->of_rows);
        Pairs all = {past, h->keys, h->writes, h->of_pair_key, h->of_pair_write};
        Weighing of_stood = {still, 0, 0, h->of_still, 0};
        Weighing of_now = {a, h->gates.retention ? keep : 0, 0, h->of_a, h->of_c.keep + first};
        back_pairs_read(&k->kind, R, N, r, &h->of_rows, &all, of_stood, of_now, h->space_p, h->space_g, h->panel);
    }
    real *of_scale = k->of_scale + memory;
    *of_scale += h->of_rows.of_peak + of_asked.of_peak + dot(h->of_rows.x, r->x, (size_t)R * in) / s;
    for (int i = 0; i < N * in; i++) of_keys[i] += s * h->of_rows.x[i];
    for (int i = 0; i < L * in; i++) of_q[i] += s * of_asked.x[i];
    for (int i = 0; i < N; i++) {
        add(last, of_shared + (size_t)i * last, of_v + (size_t)i * wide);
        if (shifts(k)) less(last, 1, of_shared + (size_t)i * last, of_keys + (size_t)i * in);
    }
    if (k->span) back_band(k, run, &h->of_c, h->gates.fine, of_v);
    else back_coefficients(L, N, cell->window, 0, &h->gates, &h->c, &h->of_c, &h->of_gates);
}

#endif
