// The weight matrix that modifies itself (Irie et al., 2022), for one head of one lane a tile of tokens after the other:
//
//     y_t, q_t, k_t, b_t = p_t = x_t W_{t−1},   κ = softmax(k),  d = softmax(q) − κ
//     z_t = d_t W_{t−1},  c = σ(b) ∘ z,  W_t = W_{t−1} + κ_tᵀ c_t
//
// With W what stands before the tile, and i its earlier tokens,
//
//     p_t = x_t W + Σ_{i<t} (x_t·κ_i) c_i        z_t = d_t W + Σ_{i<t} (d_t·κ_i) c_i                                  (derived)
//
// Every x is known before, so what is read for them is a product over the tile, and so is what all tokens write. d is made of what
// its token has just read: d W is each token's own pass over the weights, the only one. Columns of W behind those of b, with which
// the caller fills its rows up, are 0 and stay so.
//
// Backward, with G the gradient of the weights behind the tile, and one pass over them for W ∂z:
//
//     ∂c_t = κ_t G + Σ_{i>t} (κ_t·d_i) ∂z_i + (κ_t·x_i) ∂p_i,  ∂z = σ(b) ∘ ∂c,  ∂b = (1 − σ(b)) Σ_{b's columns} c ∘ ∂c
//     ∂d_t = W ∂z_t + Σ_{i<t} (c_i·∂z_t) κ_i
//     ∂κ_t = G c_t + Σ_{i>t} (c_t·∂z_i) d_i + (c_t·∂p_i) x_i − ∂d_t
//     ∂x_t = W ∂p_t + Σ_{i<t} (c_i·∂p_t) κ_i,  G ← G + Σ_t d_tᵀ ∂z_t + x_tᵀ ∂p_t                                      (derived)

#include "passes.h"

#define PARTS 4  // of the columns, each with a step size of its own: y, q, k and the step sizes

// What a thread has in hand. Of a tile's tokens, n numbers of each or all columns of W:
typedef struct {
    int n, columns;
    real *made;
    size_t apiece;                  // numbers of `made` for each tile
    real *query, *key, *d, *c;      // softmax(q), κ, d, c
    real *step;                     // σ(b)
    real *seen, *asked;             // x_t·κ_i and d_t·κ_i, i < t
    real *p;                        // not asked for again
    real *of_p, *of_z, *of_key, *of_d, *of_c;
    real *of_seen, *of_asked;       // c_i·∂p_t and c_i·∂z_t, i < t
    real *panel;
} Hand;

// Takes in hand what is made of a group's tile.
static size_t hold(const Scan *s, Hand *h, int place) {
    int L = s->longest;
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    TAKE(&room, (size_t)L * h->n, &h->query, &h->key, &h->d);
    h->c = take(&room, (size_t)L * h->columns);
    h->step = take(&room, (size_t)L * PARTS);
    TAKE(&room, (size_t)L * L, &h->seen, &h->asked);
    return room.used;
}

static size_t lay(const Scan *s, int backward, void *hand, real *space) {
    Hand *h = hand;
    const int *width = s->cell.network.width;
    int L = s->longest;
    h->n = width[0], h->columns = width[1];
    Room room = {space, 0};
    h->made = 0;
    h->apiece = hold(s, h, 0);
    h->made = take(&room, h->apiece * (backward ? s->group : 1));
    h->p = take(&room, (size_t)L * h->columns);
    if (backward) {
        TAKE(&room, (size_t)L * h->columns, &h->of_p, &h->of_z);
        TAKE(&room, (size_t)L * L, &h->of_seen, &h->of_asked);
        h->of_key = take(&room, (size_t)L * h->n);
        h->of_d = take(&room, h->n);
    }
    h->panel = take(&room, (size_t)(h->columns > L ? h->columns : L) * PANEL);
    return room.used;
}

static size_t at_first(const Scan *s, const Hand *h, int memory, const Run *run) {
    return ((size_t)memory * s->time + run->first) * h->n;
}

// Whether token t of a run writes.
static int writes(const Scan *s, int memory, const Run *run, int t) {
    return !s->fine || s->fine[(size_t)(memory / s->heads) * s->time + run->first + t];
}

static void softmax(int n, const real *restrict x, real *restrict to) {
    real top = x[0], total;
    for (int j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
    for (int j = 0; j < n; j++) to[j] = exponential(x[j] - top);
    total = R(1.0) / sum(to, n);
    for (int j = 0; j < n; j++) to[j] *= total;
}

// From the gradient of what a softmax made, y, to that of what it was made of.
static void back_softmax(int n, const real *restrict y, const real *restrict of_y, real *restrict to) {
    real along = dot(y, of_y, n);
    for (int j = 0; j < n; j++) to[j] = y[j] * (of_y[j] - along);
}

// Columns of part number i.
static int part_of(const Hand *h, int i) { return i < PARTS - 1 ? h->n : PARTS; }

// ---- forward -------------------------------------------------------------------------------------------------------

static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *at) {
    Hand *h = hand;
    hold(s, h, place);
    int L = runs[n].tokens, width = h->n, columns = h->columns;
    const real *x = s->k + at_first(s, h, memory, &runs[n]), *w = at->w[0];
    product(L, width, columns, plain(x, width), plain(w, columns), h->p, columns, 0, h->panel);
    for (int t = 0; t < L; t++) {
        real *p = h->p + (size_t)t * columns, *seen = h->seen + (size_t)t * L, *asked = h->asked + (size_t)t * L;
        real *query = h->query + (size_t)t * width, *key = h->key + (size_t)t * width, *d = h->d + (size_t)t * width;
        real *c = h->c + (size_t)t * columns, *step = h->step + (size_t)t * PARTS;
        dots(t, width, x + (size_t)t * width, h->key, seen);
        add_rows(t, columns, seen, h->c, p);
        softmax(width, p + width, query);
        softmax(width, p + 2 * width, key);
        for (int j = 0; j < width; j++) d[j] = query[j] - key[j];
        dots(t, width, d, h->key, asked);
        memset(c, 0, columns * sizeof(real));
        for (int i = 0; i < PARTS; i++) step[i] = sigmoid(p[(PARTS - 1) * width + i]);
        if (!writes(s, memory, &runs[n], t)) continue;
        add_rows(width, columns, d, w, c);
        add_rows(t, columns, asked, h->c, c);
        for (int i = 0; i < PARTS; i++)
            for (int j = 0; j < part_of(h, i); j++) c[i * width + j] *= step[i];
    }
}

// W behind the tile, where W before it stands.
static void write_tile(Hand *h, int L, real *w) {
    product(h->n, L, h->columns, turned(h->key, h->n), plain(h->c, h->columns), w, h->columns, 1, h->panel);
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *at) {
    Hand *h = hand;
    int L = runs[n].tokens, width = h->n, columns = h->columns;
    real *y = s->y + at_first(s, h, memory, &runs[n]);
    for (int t = 0; t < L; t++) memcpy(y + (size_t)t * width, h->p + (size_t)t * columns, width * sizeof(real));
    write_tile(h, L, at->w[0]);
    real total = sum(h->p, (size_t)L * columns) + sum(h->c, (size_t)L * columns) + sum(at->w[0], size_of(&s->cell, 0));
    return total - total == 0;
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *at, const Stand *after) {
    (void)memory;
    memcpy(after->w[0], at->w[0], size_of(&s->cell, 0) * sizeof(real));
    write_tile(hand, runs[n].tokens, after->w[0]);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// to += Σ_{i>t} pairs[i,t] rows_i
static void add_later(int t, int L, int n, const real *pairs, const real *rows, real *to) {
    real scale[L];
    for (int i = t + 1; i < L; i++) scale[i] = pairs[(size_t)i * L + t];
    add_rows(L - t - 1, n, scale + t + 1, rows + (size_t)(t + 1) * n, to);
}

// From ∂c of token t, in h->of_c, to its ∂z and ∂b.
static void back_step(Hand *h, int t) {
    const real *restrict step = h->step + (size_t)t * PARTS, *restrict c = h->c + (size_t)t * h->columns, *restrict of_c = h->of_c;
    real *restrict of_z = h->of_z + (size_t)t * h->columns, *of_b = h->of_p + (size_t)t * h->columns + (PARTS - 1) * h->n;
    for (int i = 0; i < PARTS; i++, c += h->n, of_c += h->n, of_z += h->n) {
        of_b[i] = (R(1.0) - step[i]) * dot(c, of_c, part_of(h, i));
        for (int j = 0; j < part_of(h, i); j++) of_z[j] = step[i] * of_c[j];
    }
}

static void back_token(Hand *h, int t, int L, int acts, const real *x, const real *w) {
    int width = h->n, columns = h->columns;
    real *of_p = h->of_p + (size_t)t * columns, *of_z = h->of_z + (size_t)t * columns, *of_key = h->of_key + (size_t)t * width;
    real *of_asked = h->of_asked + (size_t)t * L;
    if (acts) {
        add_later(t, L, columns, h->asked, h->of_z, h->of_c);
        add_later(t, L, columns, h->seen, h->of_p, h->of_c);
        back_step(h, t);
        dots(width, columns, of_z, w, h->of_d);
        dots(t, columns, of_z, h->c, of_asked);
        add_rows(t, width, of_asked, h->key, h->of_d);
        add_later(t, L, width, h->of_asked, h->d, of_key);
        add_later(t, L, width, h->of_seen, x, of_key);
        for (int j = 0; j < width; j++) of_key[j] -= h->of_d[j];
        back_softmax(width, h->query + (size_t)t * width, h->of_d, of_p + width);
        back_softmax(width, h->key + (size_t)t * width, of_key, of_p + 2 * width);
    } else {
        memset(of_asked, 0, t * sizeof(real));
    }
    dots(t, columns, of_p, h->c, h->of_seen + (size_t)t * L);
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *at, const Stand *of) {
    Hand *h = hand;
    hold(s, h, place);
    int L = runs[n].tokens, width = h->n, columns = h->columns;
    size_t first = at_first(s, h, memory, &runs[n]);
    const real *x = s->k + first, *w = at->w[0];
    real *g = of->w[0], *of_x = s->of_k + first;
    product(L, columns, width, plain(h->c, columns), turned(g, columns), h->of_key, width, 0, h->panel);
    product(L, width, columns, plain(h->key, width), plain(g, columns), h->p, columns, 0, h->panel);
    for (int t = L - 1; t >= 0; t--) {
        h->of_c = h->p + (size_t)t * columns;
        memcpy(h->of_p + (size_t)t * columns, s->of_y + first + (size_t)t * width, width * sizeof(real));
        memset(h->of_p + (size_t)t * columns + width, 0, (columns - width) * sizeof(real));
        memset(h->of_z + (size_t)t * columns, 0, columns * sizeof(real));
        back_token(h, t, L, writes(s, memory, &runs[n], t), x, w);
    }
    for (int t = 0; t < L; t++) memset(h->of_seen + (size_t)t * L + t, 0, (L - t) * sizeof(real));
    product(L, columns, width, plain(h->of_p, columns), turned(w, columns), of_x, width, 0, h->panel);
    product(L, L, width, plain(h->of_seen, L), plain(h->key, width), of_x, width, 1, h->panel);
    product(width, L, columns, turned(h->d, width), plain(h->of_z, columns), g, columns, 1, h->panel);
    product(width, L, columns, turned(x, width), plain(h->of_p, columns), g, columns, 1, h->panel);
}

static const Engine ENGINE = {sizeof(Hand), lay, 0, make, ahead, onward, behind};

const size_t nestling_size = sizeof(Scan);

// Returns 0, or 1 if there was no room for it.
int nestling_self_referential(const Scan *s, int back) { return pass_all(s, &ENGINE, back); }
