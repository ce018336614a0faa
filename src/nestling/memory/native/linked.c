// The chunk engine where a retention links the weights to a dual variable, W = link(Z), and every token reads weights of its own:
//
//     Z_t = α_t Z_{t−1} − η_t x_tᵀ δ_t,    ẑ_t = h_t link(Z_t)
//
// with x and δ at the linked anchor, as in tile.h. No rank-one form survives a link, so a layer's Z, which a core's cache holds, is
// written and read in one pass over it per token. The link is the softmax over each output's inputs.

#include "scan.h"

// What a thread has in hand. ring: Z of a layer behind every token of a tile; top: the largest of its columns, before and behind.
typedef struct {
    Space space;
    Gates gates;
    OfGates of_gates;
    real *states, *standing[DEPTH], *turned[DEPTH], *of_standing[DEPTH];
    real *ring[DEPTH], *top[DEPTH], *share[DEPTH];
    real *alpha, *column, *row;
} Hand;

static size_t lay(const Scan *s, int backward, Hand *h, real *space) {
    const Cell *cell = &s->cell;
    const Network *n = &cell->network;
    int L = s->longest, most = widest(n);
    Room room = {space, 0};
    lay_space(cell, L, L, &h->space, &room);
    for (int l = 0; l < n->depth; l++) {
        size_t size = size_of(cell, l), rows = (size_t)(L + 1) * n->width[l + 1];
        h->standing[l] = take(&room, size);
        h->of_standing[l] = take(&room, backward ? size : 0);
        h->ring[l] = take(&room, backward ? size * L : 0);
        h->top[l] = take(&room, rows);
        h->share[l] = take(&room, rows);
    }
    h->alpha = take(&room, L);
    h->column = take(&room, 2 * most);
    h->row = take(&room, most);
    h->states = take(&room, numbers(cell, s->apart) * (backward ? s->group : 1));
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

static Tile tile_of(const Scan *s, Hand *h, int memory, const Run *run) {
    Tile t = tile_at(s, &h->gates, memory, run, 1);
    for (int i = 0; i < t.tokens; i++) h->alpha[i] = h->gates.retention ? (real)exp(h->gates.retention[i]) : 1;
    return t;
}

// ---- one token, one layer ------------------------------------------------------------------------------------------

// Z' = keep Z − lr xᵀ δ; `to` may be `from`.
static void write_token(int in, int out, real keep, real lr, const real *x, const real *restrict delta, const real *from, real *to) {
    for (int i = 0; i < in; i++) {
        real step = lr * x[i];
#pragma GCC ivdep
        for (int j = 0; j < out; j++) to[(size_t)i * out + j] = keep * from[(size_t)i * out + j] - step * delta[j];
    }
}

// The same, and z = h softmax(Z'), with before of Z. shift: about the largest of each column; top: that of Z'. share: one over
// the sums of the exponentials.
static inline void softmax_token(
    int in, int out, int before, real keep, real lr, const real *x, const real *restrict delta, const real *h, const real *from,
    real *to, const real *restrict shift, real *restrict top, real *restrict share, real *restrict z
) {
    for (int j = 0; j < out; j++) top[j] = -R(3e38), share[j] = 0, z[j] = 0;
    for (int i = 0; i < in; i++) {
        real step = lr * x[i], weight = h[i];
#pragma GCC ivdep
        for (int j = 0; j < out; j++) {
            real old = from[(size_t)i * out + j], new = keep * old - step * delta[j];
            real e = exponential((before ? old : new) - shift[j]);
            to[(size_t)i * out + j] = new;
            top[j] = new > top[j] ? new : top[j];
            share[j] += e;
            z[j] += weight * e;
        }
    }
    for (int j = 0; j < out; j++) share[j] = R(1.0) / share[j], z[j] *= share[j];
}

// z = h softmax(Z)
static void softmax_read(
    int in, int out, const real *h, const real *restrict from, const real *restrict shift, real *restrict share, real *restrict z
) {
    for (int j = 0; j < out; j++) share[j] = 0, z[j] = 0;
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) {
            real e = exponential(from[(size_t)i * out + j] - shift[j]);
            share[j] += e;
            z[j] += h[i] * e;
        }
    for (int j = 0; j < out; j++) share[j] = R(1.0) / share[j], z[j] *= share[j];
}

// ---- a tile --------------------------------------------------------------------------------------------------------

// How far a column's largest entry may move in a token before its exponentials are taken anew.
#define FAR R(40.0)

static int moved(int out, const real *shift, const real *top) {
    int far = 0;
    for (int j = 0; j < out; j++) far |= !(top[j] - shift[j] < FAR && shift[j] - top[j] < FAR);
    return far;
}

// Writes a tile's tokens and answers its queries; ring: keep Z behind each, and leave m as it is. y null: not wanted.
static void walk(const Scan *s, Hand *h, const Tile *t, const Stand *m, int ring, real *y) {
    const Cell *cell = &s->cell;
    const Network *n = &cell->network;
    Space *p = &h->space;
    int L = t->tokens, D = n->depth, last = n->width[D];
    p->h[0] = (real *)t->q;
    for (int l = 0; l < D; l++) {
        int in = n->width[l], out = n->width[l + 1];
        size_t size = (size_t)in * out;
        const real *from = m->w[l];
        tops(in, out, from, h->top[l]);
        for (int i = 0; i < L; i++) {
            real *to = ring ? h->ring[l] + i * size : m->w[l], *z = p->ahead[l] + (size_t)i * out;
            const real *x = p->at.x[l] + (size_t)i * in, *delta = p->delta[l] + (size_t)i * out, *ask = p->h[l] + (size_t)i * in;
            real keep = h->alpha[i], lr = t->gates->lr[i];
            real *shift = h->top[l] + (size_t)i * out, *top = shift + out, *share = h->share[l] + (size_t)i * out;
            if (cell->before) softmax_token(in, out, 1, keep, lr, x, delta, ask, from, to, shift, top, share, z);
            else softmax_token(in, out, 0, keep, lr, x, delta, ask, from, to, shift, top, share, z);
            if (!cell->before && moved(out, shift, top)) {
                memcpy(shift, top, out * sizeof(real));
                softmax_read(in, out, ask, to, shift, share, z);
            }
            from = to;
        }
        if (l < D - 1) activate(n->activation, L * out, p->ahead[l], p->h[l + 1]);
    }
    const real *z = p->ahead[D - 1];
    if (n->norm) {
        normalize(L, last, (real)n->epsilon, z, p->normed, p->scale);
        z = p->normed;
    }
    if (!y) return;
    memcpy(y, z, (size_t)L * last * sizeof(real));
    if (n->residual) add_part(L, last, t->q, n->width[0], y, last);
}

// What only writes.
static void write_tile(const Scan *s, Hand *h, const Tile *t, const Stand *m, const Stand *after) {
    const Network *n = &s->cell.network;
    for (int l = 0; l < n->depth; l++)
        for (int i = 0; i < t->tokens; i++)
            write_token(
                n->width[l], n->width[l + 1], h->alpha[i], t->gates->lr[i], h->space.at.x[l] + (size_t)i * n->width[l],
                h->space.delta[l] + (size_t)i * n->width[l + 1], i ? after->w[l] : m->w[l], after->w[l]
            );
}

// A token of a layer, and its gradients. of: that of Z behind it, becomes that of Z before it.
typedef struct {
    int in, out;
    real keep, lr;
    const real *x, *delta, *h, *from, *to;  // Z before and behind
    const real *shift, *u, *z;              // u: share ∘ ∂z
    real *of_delta, *of_x, *of_h, *of;
    real of_lr, of_keep;
} Token;

static inline void back_token(Token *b, int before) {
    int in = b->in, out = b->out;
    real keep = b->keep, lr = b->lr;
    const real *restrict delta = b->delta, *restrict u = b->u, *restrict z = b->z, *restrict shift = b->shift;
    real *restrict of_delta = b->of_delta;
    for (int i = 0; i < in; i++) {
        const real *restrict read = (before ? b->from : b->to) + (size_t)i * out;
        real *restrict of = b->of + (size_t)i * out;
        real along = 0, kept = 0, asked = 0, weight = b->h[i], step = lr * b->x[i];
#pragma omp simd reduction(+ : along, kept, asked)
        for (int j = 0; j < out; j++) {
            real part = exponential(read[j] - shift[j]) * u[j], through = part * (weight - z[j]), d = of[j] + (before ? 0 : through);
            asked += part;
            along += d * delta[j];
            kept += d * read[j];
            of_delta[j] -= step * d;
            of[j] = keep * d + (before ? through : 0);
        }
        b->of_h[i] = asked;
        b->of_x[i] -= lr * along;
        b->of_lr -= b->x[i] * along;
        b->of_keep += before ? keep * kept : kept + step * along;  // α Z = Z' + η xᵀ δ
    }
}

// From the gradients of a tile's answers and of Z behind it to those of all it was given. m: what stands before, with its gradients
// and answers made, and the ring; of: comes in as of the end, and leaves as of the start.
static void back_walk(
    const Scan *s, Hand *h, const Tile *t, const Stand *m, const Stand *at, const real *of_y, const Stand *of, OfTile *g
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
        size_t size = (size_t)in * out;
        for (int i = L - 1; i >= 0; i--) {
            const real *here = h->ring[l] + i * size, *share = h->share[l] + (size_t)i * out, *of_row = of_z + (size_t)i * out;
            for (int j = 0; j < out; j++) h->row[j] = share[j] * of_row[j];
            Token b = {
                .in = in, .out = out, .keep = h->alpha[i], .lr = t->gates->lr[i], .x = p->at.x[l] + (size_t)i * in,
                .delta = p->delta[l] + (size_t)i * out, .h = p->h[l] + (size_t)i * in, .from = i ? here - size : m->w[l],
                .to = here, .shift = h->top[l] + (size_t)i * out, .u = h->row, .z = p->ahead[l] + (size_t)i * out,
                .of_delta = p->of_delta[l] + (size_t)i * out, .of_x = p->of_x[l] + (size_t)i * in,
                .of_h = of_h + (size_t)i * in, .of = of->w[l],
            };
            if (cell->before) back_token(&b, 1);
            else back_token(&b, 0);
            g->gates->lr[i] += b.of_lr;
            if (t->gates->retention) g->gates->retention[i] += b.of_keep;
        }
        if (l) {
            back_through(n->activation, L * in, p->ahead[l - 1], of_h);
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

static void forward(const void *task, int memory, real *space) {
    const Scan *s = task;
    const Cell *cell = &s->cell;
    Hand h;
    Stand m;
    lay(s, 0, &h, space);
    stand(cell, s->apart, &m, h.states);
    load(cell, s->apart, &s->store, memory, 0, &m);
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    for (int n = 0; n < s->tiles && runs[n].tokens; n++) {
        if (s->kept && n % s->group == 0)
            memcpy(kept_at(s, n, memory), h.states, numbers(cell, s->apart) * sizeof(real));
        if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
        Tile t = tile_of(s, &h, memory, &runs[n]);
        Stand at = standing(s, &h, &m, 0);
        gradients(cell, &h.space, &t, &at);
        walk(s, &h, &t, &m, 0, answers_at(s, s->y, memory, &runs[n]));
        if (!sound(cell, &h.space, &t, &m)) {
            s->broken[memory] = 1;
            return;
        }
        if (runs[n].flags & CLOSES) close_chunk(cell, s->apart, &m);
    }
    unload(cell, s->apart, &s->store, memory, &m);
}

static void backward(const void *task, int memory, real *space) {
    const Scan *s = task;
    const Cell *cell = &s->cell;
    Hand h;
    lay(s, 1, &h, space);
    Stand m, after, g;
    gradients_of(cell, s->apart, &s->store, memory, &g);
    size_t size = numbers(cell, s->apart);
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    int count = tiles_of(s, runs);
    for (int first = (count - 1) / s->group * s->group; first >= 0 && count; first -= s->group) {
        int end = first + s->group < count ? first + s->group : count;
        memcpy(h.states, kept_at(s, first, memory), size * sizeof(real));
        for (int n = first; n < end; n++) {  // what stands before each tile of the group
            stand(cell, s->apart, &m, h.states + (n - first) * size);
            if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
            if (n == end - 1) break;
            stand(cell, s->apart, &after, h.states + (n - first + 1) * size);
            Tile t = tile_of(s, &h, memory, &runs[n]);
            Stand at = standing(s, &h, &m, 0);
            gradients(cell, &h.space, &t, &at);
            write_tile(s, &h, &t, &m, &after);
            next_anchor(cell, s->apart, runs[n].flags & CLOSES, &m, &after);
        }
        for (int n = end - 1; n >= first; n--) {
            stand(cell, s->apart, &m, h.states + (n - first) * size);
            Tile t = tile_of(s, &h, memory, &runs[n]);
            Stand at = standing(s, &h, &m, 1);
            gradients(cell, &h.space, &t, &at);
            walk(s, &h, &t, &m, 1, 0);
            if (runs[n].flags & CLOSES) back_close(cell, s->apart, &g);
            OfTile of = of_tile_at(s, &h.of_gates, memory, &runs[n]);
            back_walk(s, &h, &t, &m, &at, answers_at(s, (real *)s->of_y, memory, &runs[n]), &g, &of);
            if (runs[n].flags & FRESH) back_fresh(cell, s->apart, &s->store, memory, &g);
        }
    }
}

// Returns 0, or 1 if there was no memory for it.
int nestling_linked(const Scan *s, int back) {
    Hand h;
    return spread(s, back ? backward : forward, s->lanes * s->heads, s->threads, lay(s, back, &h, 0));
}
