// The chunk engine where a retention links the weights to a dual variable, W = link(Z), and every token reads weights of its own:
//
//     Z_t = α_t Z_{t−1} − η_t x_tᵀ δ_t,    ẑ_t = h_t link(Z_t)
//
// with x and δ at the linked anchor, as in tile.h. No rank-one form survives a link, so a layer's Z, which a core's cache holds, is
// written and read in one pass over it per token. The link is the softmax over each output's inputs.

#include "passes.h"

// What a thread has in hand. walked: Z as it goes on; the rest by layer, of every token.
typedef struct {
    Space space;
    Gates gates;
    OfGates of_gates;
    real *made;
    size_t apiece;  // numbers of `made` for each tile
    Tile tile;      // the one that was made last
    real *standing[DEPTH], *turned[DEPTH], *of_standing[DEPTH];
    real *top[DEPTH], *share[DEPTH], *e[DEPTH], *zs[DEPTH], *walked;
    real *alpha, *column, *row;
} Hand;

// Takes in hand what is made of a group's tile.
static size_t hold(const Scan *s, Hand *h, int place) {
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    lay_made(&s->cell, s->longest, &h->space, &room);
    h->alpha = take(&room, s->longest);
    return room.used;
}

static size_t lay(const Scan *s, int backward, void *hand, real *space) {
    Hand *h = hand;
    const Cell *cell = &s->cell;
    const Network *n = &cell->network;
    int L = s->longest, most = widest(n);
    Room room = {space, 0};
    h->made = 0;
    h->apiece = hold(s, h, 0);
    h->made = take(&room, h->apiece * (backward ? s->group : 1));
    lay_step(cell, L, L, &h->space, &room);
    for (int l = 0; l < n->depth; l++) {
        size_t size = size_of(cell, l), rows = (size_t)(L + 1) * n->width[l + 1];
        h->standing[l] = take(&room, size);
        h->of_standing[l] = take(&room, backward ? size : 0);
        h->e[l] = take(&room, backward ? size * L : 0);
        h->zs[l] = take(&room, backward ? 2 * rows : 0);
        h->top[l] = take(&room, rows);
        h->share[l] = take(&room, rows);
    }
    h->walked = take(&room, backward ? numbers(cell, s->apart) : 0);
    h->column = take(&room, 2 * (most > L ? most : L));
    h->row = take(&room, most);
    if (backward) lay_turned(cell, h->turned, &room);
    return room.used;
}

// ---- the link ------------------------------------------------------------------------------------------------------

// The largest of each column.
static void tops(int in, int out, const real *restrict z, real *restrict top) {
    memcpy(top, z, out * sizeof(real));
    for (int i = 1; i < in; i++)
        for (int j = 0; j < out; j++) top[j] = z[(size_t)i * out + j] > top[j] ? z[(size_t)i * out + j] : top[j];
}

// Weights of a layer. spare: 2 · out
static void linked(int in, int out, const real *restrict z, real *restrict w, real *restrict spare) {
    real *restrict top = spare, *restrict total = spare + out;
    tops(in, out, z, top);
    memset(total, 0, out * sizeof(real));
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) {
            real e = exponential(z[(size_t)i * out + j] - top[j]);
            w[(size_t)i * out + j] = e;
            total[j] += e;
        }
    for (int j = 0; j < out; j++) total[j] = R(1.0) / total[j];
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) w[(size_t)i * out + j] *= total[j];
}

// From the gradient of the weights to that of Z, which is added to. spare: out
static void back_linked(int in, int out, const real *restrict w, const real *restrict of_w, real *restrict of_z, real *restrict spare) {
    memset(spare, 0, out * sizeof(real));
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) spare[j] += w[(size_t)i * out + j] * of_w[(size_t)i * out + j];
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) of_z[(size_t)i * out + j] += w[(size_t)i * out + j] * (of_w[(size_t)i * out + j] - spare[j]);
}

// What gradients are taken at.
static Stand standing(const Scan *s, Hand *h, const Stand *m, int with_turned) {
    const Network *n = &s->cell.network;
    Stand at = {0};
    for (int l = 0; l < n->depth; l++) {
        linked(n->width[l], n->width[l + 1], m->a[l], h->standing[l], h->column);
        at.w[l] = at.a[l] = h->standing[l];
    }
    if (with_turned) turn(&s->cell, &at, h->turned);
    return at;
}

// ---- one token, one layer ------------------------------------------------------------------------------------------

// A token of a layer.
typedef struct {
    int in, out;
    real keep, lr;
    const real *x, *delta, *h;
    real *shift;  // about the largest of each column
    real *share;  // one over the sums of the exponentials
    real *z;      // h W
    real *e;      // the exponentials, `[in, out]`, kept on the way back
    real *zs;     // there too: h (W ∘ Z) and 1 (W ∘ Z), one behind the other
} Token;

// Z' = keep Z − lr xᵀ δ in place, and z = h softmax(Z'), with before of Z. top: the largest of Z' in each column. write: not only read.
static inline void read_token(const Token *t, real *restrict at, real *restrict top, int write, int before, int keeps) {
    int in = t->in, out = t->out;
    const real *restrict delta = t->delta, *restrict shift = t->shift;
    real *restrict share = t->share, *restrict z = t->z, *restrict asked = t->zs, *restrict all = t->zs + out;
    for (int j = 0; j < out; j++) share[j] = 0, z[j] = 0;
    if (keeps) memset(t->zs, 0, 2 * out * sizeof(real));
    if (write)
        for (int j = 0; j < out; j++) top[j] = -(real)INFINITY;
    for (int i = 0; i < in; i++) {
        real step = t->lr * t->x[i], weight = t->h[i], keep = t->keep, *restrict row = at + (size_t)i * out;
        real *restrict kept = t->e + (size_t)i * out;
#pragma omp simd
        for (int j = 0; j < out; j++) {
            real old = row[j], new = write ? keep * old - step * delta[j] : old, used = before ? old : new;
            real e = exponential(used - shift[j]);
            if (write) row[j] = new, top[j] = new > top[j] ? new : top[j];
            share[j] += e;
            z[j] += weight * e;
            if (keeps) kept[j] = e, asked[j] += weight * e * used, all[j] += e * used;
        }
    }
    for (int j = 0; j < out; j++) share[j] = R(1.0) / share[j], z[j] *= share[j];
    if (keeps)
        for (int j = 0; j < out; j++) asked[j] *= share[j], all[j] *= share[j];
}

static void any_token(const Token *t, real *at, real *top, int write, int before, int keeps) {
    if (!write) read_token(t, at, top, 0, before, keeps);
    else if (before && keeps) read_token(t, at, top, 1, 1, 1);
    else if (before) read_token(t, at, top, 1, 1, 0);
    else if (keeps) read_token(t, at, top, 1, 0, 1);
    else read_token(t, at, top, 1, 0, 0);
}

// ---- a tile --------------------------------------------------------------------------------------------------------

// How far a column's largest entry may move in a token before its exponentials are taken anew.
#define FAR R(40.0)

static int moved(int out, const real *shift, const real *top) {
    int far = 0;
    for (int j = 0; j < out; j++) far |= !(top[j] - shift[j] < FAR && shift[j] - top[j] < FAR);
    return far;
}

static Token token_of(const Scan *s, const Hand *h, const Tile *t, int l, int i) {
    const Space *p = &h->space;
    int in = s->cell.network.width[l], out = s->cell.network.width[l + 1];
    size_t row = (size_t)i * out, column = (size_t)i * in;
    return (Token){
        in, out, h->alpha[i], t->gates->lr[i], p->at.x[l] + column, p->delta[l] + row, p->h[l] + column, h->top[l] + row,
        h->share[l] + row, p->ahead[l] + row, h->e[l] + column * out, h->zs[l] + 2 * row
    };
}

// Writes a tile's tokens and answers its queries; keeps: what the way back needs. y null: not wanted.
static void walk(const Scan *s, Hand *h, const Tile *t, const Stand *m, int keeps, real *y) {
    const Cell *cell = &s->cell;
    const Network *n = &cell->network;
    Space *p = &h->space;
    int L = t->tokens;
    p->h[0] = (real *)t->q;
    for (int l = 0; l < n->depth; l++) {
        int out = n->width[l + 1];
        tops(n->width[l], out, m->w[l], h->top[l]);
        for (int i = 0; i < L; i++) {
            Token token = token_of(s, h, t, l, i);
            real *top = token.shift + out;
            any_token(&token, m->w[l], top, 1, cell->before, keeps);
            if (!cell->before && moved(out, token.shift, top)) {
                memcpy(token.shift, top, out * sizeof(real));
                any_token(&token, m->w[l], top, 0, 0, keeps);
            }
        }
        activate_asked(n, p, L, l, keeps);
    }
    finish(n, p, t, y);
}

// What only writes: Z_L = γ Z_0 − Xᵀ diag(η γ_L/γ) Δ.
static void write_tile(const Scan *s, Hand *h, const Tile *t, const Stand *m, const Stand *after) {
    const Network *n = &s->cell.network;
    Space *p = &h->space;
    int L = t->tokens;
    real keep = 1;
    for (int i = L - 1; i >= 0; i--) h->column[i] = keep * t->gates->lr[i], keep *= h->alpha[i];
    for (int l = 0; l < n->depth; l++) {
        int in = n->width[l], out = n->width[l + 1];
        Blend kept = {keep, 0, m->w[l], 0};
        scaled(L, in, h->column, p->at.x[l], p->spare);
        blended(in, L, out, turned(p->spare, in), plain(p->delta[l], out), after->w[l], out, kept, p->panel);
    }
}

// Gradients of a token's layer. of: that of Z behind it, becomes that of Z before it. u: share ∘ ∂z; behind: room for a row. Returns that
// of η, with its sign turned.
static inline real back_token(
    const Token *t, const real *restrict u, real *of, real *of_x, real *restrict of_delta, real *of_h,
    real *restrict behind, int before
) {
    int in = t->in, out = t->out;
    real keep = t->keep, lr = t->lr, of_lr = 0;
    const real *restrict delta = t->delta, *restrict z = t->z;
    for (int i = 0; i < in; i++) {
        const real *restrict e = t->e + (size_t)i * out;
        real *restrict row = of + (size_t)i * out;
        real weight = t->h[i], step = lr * t->x[i];
#pragma GCC ivdep
        for (int j = 0; j < out; j++) {
            real through = e[j] * u[j] * (weight - z[j]), d = row[j] + (before ? 0 : through);
            of_delta[j] -= step * d;
            row[j] = keep * d + (before ? through : 0);
            behind[j] = d;
        }
        real along = dot(behind, delta, out);
        of_h[i] = dot(e, u, out);
        of_x[i] -= lr * along;
        of_lr += t->x[i] * along;
    }
    return of_lr;
}

// From the gradients of a tile's answers and of Z behind it to those of all it was given. end: what stands behind it, as `walk`
// left it; at: its linked anchor; of: comes in as of the end, and leaves as of the start.
//
// ⟨∂Z_t, Z_t⟩ goes along, as of every token's log α it is the gradient: ⟨∂Z_t, α Z_{t−1}⟩ = ⟨∂Z_t, Z_t⟩ + η ⟨∂Z_t, xᵀ δ⟩, and what a
// read adds to it, ⟨∂Z, Z⟩ = Σ_j ∂z_j (Σ_i h_i W_ij Z_ij − z_j Σ_i W_ij Z_ij), the read left ready.
static void back_walk(
    const Scan *s, Hand *h, const Tile *t, const Stand *end, const Stand *at, const real *of_y, const Stand *of, OfTile *g
) {
    const Cell *cell = &s->cell;
    const Network *n = &cell->network;
    Space *p = &h->space;
    int L = t->tokens, D = n->depth, last = n->width[D];
    real *of_z = p->of_z, *of_h = p->of_h;
    clear_rows(cell, p, t);
    memcpy(of_z, of_y, (size_t)L * last * sizeof(real));
    if (n->norm) denormalize(L, last, p->normed, p->scale, of_y, of_z);
    for (int l = D - 1; l >= 0; l--) {
        int in = n->width[l], out = n->width[l + 1];
        real along = dot(of->w[l], end->w[l], (size_t)in * out);
        for (int i = L - 1; i >= 0; i--) {
            Token token = token_of(s, h, t, l, i);
            const real *of_row = of_z + (size_t)i * out;
            real *of_x = p->of_x[l] + (size_t)i * in, *of_delta = p->of_delta[l] + (size_t)i * out, *of_ask = of_h + (size_t)i * in;
            real read = 0;
            for (int j = 0; j < out; j++) {
                h->row[j] = token.share[j] * of_row[j];
                read += of_row[j] * (token.zs[j] - token.z[j] * token.zs[out + j]);
            }
            if (!cell->before) along += read;
            real of_lr = cell->before ? back_token(&token, h->row, of->w[l], of_x, of_delta, of_ask, h->column, 1)
                                      : back_token(&token, h->row, of->w[l], of_x, of_delta, of_ask, h->column, 0);
            along += token.lr * of_lr;
            g->gates->lr[i] -= of_lr;
            if (t->gates->retention) g->gates->retention[i] += along;
            if (cell->before) along += read;
        }
        if (l) {
            for (int i = 0; i < L * in; i++) of_h[i] *= p->rise[l - 1][i];
            real *swap = of_z;
            of_z = of_h, of_h = swap;
        }
    }
    add((size_t)L * n->width[0], of_h, g->q);
    if (n->residual) add_part(L, last, of_y, last, g->q, n->width[0]);
    Stand of_standing = {0};
    for (int l = 0; l < D; l++) {
        of_standing.a[l] = h->of_standing[l];
        memset(h->of_standing[l], 0, size_of(cell, l) * sizeof(real));
    }
    back_gradients(cell, p, t, at, &of_standing, g);
    for (int l = 0; l < D; l++)
        back_linked(n->width[l], n->width[l + 1], at->a[l], h->of_standing[l], of->a[l], h->column);
}

// ---- a memory ------------------------------------------------------------------------------------------------------

static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m) {
    Hand *h = hand;
    hold(s, h, place);
    Tile t = h->tile = tile_at(s, &h->gates, memory, &runs[n], 1);
    for (int i = 0; i < t.tokens; i++) h->alpha[i] = h->gates.retention ? (real)exp(h->gates.retention[i]) : 1;
    Stand at = standing(s, h, m, 0);
    gradients(&s->cell, &h->space, &t, &at);
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m) {
    Hand *h = hand;
    walk(s, h, &h->tile, m, 0, answers_at(s, s->y, memory, &runs[n]));
    return sound(&s->cell, &h->space, &h->tile, m);
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after) {
    Hand *h = hand;
    write_tile(s, h, &h->tile, m, after);
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m, const Stand *g) {
    const Cell *cell = &s->cell;
    Hand *h = hand;
    hold(s, h, place);
    Tile t = tile_at(s, &h->gates, memory, &runs[n], 1);
    h->space.at.x[0] = (real *)t.k;
    Stand at = standing(s, h, m, 1), after;
    stand(cell, s->apart, &after, h->walked);
    for (int l = 0; l < cell->network.depth; l++) memcpy(after.w[l], m->w[l], size_of(cell, l) * sizeof(real));
    walk(s, h, &t, &after, 1, 0);
    OfTile of = of_tile_at(s, &h->of_gates, memory, &runs[n]);
    back_walk(s, h, &t, &after, &at, answers_at(s, (real *)s->of_y, memory, &runs[n]), g, &of);
}

static const Engine ENGINE = {sizeof(Hand), lay, 0, make, ahead, onward, behind};

const size_t nestling_size = sizeof(Scan);

// Returns 0, or 1 if there was no room for it.
int nestling_linked(const Scan *s, int back) { return pass_all(s, &ENGINE, back); }
