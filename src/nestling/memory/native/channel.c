// A matrix whose channels of the key are kept each by its own share, token by token: with the dot product's gradient −kᵀv
//
//     z = s W,  r = η v − ε z      s = k, or α ∘ k where what the channels keep is erased
//     W ← diag(α) W + kᵀ r
//     y = q W                      after this, or before
//
// (GLA; Miras, Table 1). The weights lie in a core's first cache, and one pass over them decays, writes and reads: no chunk's
// coefficients are made, so that nothing is divided by what has decayed, a share may be 0, and any token may be missing.
//
// Backward, with G the gradient of the weights behind a token and W those before it,
//
//     G += qᵀ ∂y,  ∂r = k G,  ∂z = −ε ∂r,  U = G + kᵀ ∂z     reading before: G += qᵀ ∂y comes last
//     ∂k = G r + W ∂z,  ∂α = rows' sums of G ∘ W,  G ← diag(α) G + kᵀ ∂z
//     ∂k = G r + α ∘ W ∂z,  ∂α = rows' sums of U ∘ W,  G ← diag(α) U     where what the channels keep is erased
//     ∂q = α ∘ W ∂y + (∂y·r) k                                           reading before: W ∂y
//
// from weights kept every few tokens, the rest made again. (derived)

#include "activation.h"
#include "rows.h"
#include "share.h"
#include "store.h"

#include <math.h>

enum { NOTHING, WITH_DECAY, AFTER_DECAY };  // what is erased: nothing, from what stood before the decay, from what it kept
enum { NOT, AFTER, BEFORE };                // when a token is answered

typedef struct {
    Store store;
    int lanes, heads, time, tiles, longest, group, apart, threads;
    int in, out, erases, before, logs;  // logs: the shares are given as logarithms
    const Run *runs;                    // `[lane, tiles]`, of one token each
    const unsigned char *fine;          // `[lane, time]`: tokens that act, others are only answered; null: all
    // `[memory, time, …]`, memory = lane · heads + head; null: nothing is erased, all is kept
    const real *q, *k, *v, *lr, *retention, *erase;
    real *y;
    real *kept;   // weights before each group of tokens but the first, `[group, memory, in, out]`; null: not kept
    int *broken;  // whether something was not finite, one per memory
    const real *of_y;
    real *of_q, *of_k, *of_v, *of_lr, *of_retention, *of_erase;
} Scan;

// What a thread has in hand. Rows of values and weights are padded with zeros to `wide`, whole registers.
typedef struct {
    int wide;
    size_t size;                 // numbers of padded weights
    real *states;                // weights before each token of a group
    real *alpha, *r, *z;         // α, r and z of each token of a group
    real *seen;                  // α ∘ k
    real *y, *g;                 // an answer, or its gradient;  G
    real *of_r, *of_z;
    real *spare;                 // the gradient of the anchor, where nobody asks for it
    real *parts, *sums;          // three numbers of each row, Σ ∂y W, ∂k and ∂α: registers to be summed, and the sums
} Hand;

static size_t lay(const Scan *s, int backward, Hand *h, real *space) {
    Room room = {space, 0};
    int group = backward ? s->group : 1;
    h->wide = (s->out + LANES - 1) / LANES * LANES;
    h->size = (size_t)s->in * h->wide;
    h->states = take(&room, h->size * group);
    h->alpha = take(&room, (size_t)s->in * group);
    h->r = take(&room, (size_t)h->wide * group);
    h->z = take(&room, (size_t)h->wide * group);
    h->seen = take(&room, s->in);
    h->y = take(&room, h->wide);
    h->g = take(&room, backward ? h->size : 0);
    h->spare = take(&room, backward && s->apart ? (size_t)s->in * s->out : 0);
    h->of_r = take(&room, h->wide);
    h->of_z = take(&room, h->wide);
    h->parts = take(&room, backward ? (size_t)3 * s->in * LANES : 0);
    h->sums = take(&room, backward ? (size_t)3 * s->in : 0);
    return room.used;
}

// Rows of `out` numbers into padded ones, and back.
static void pad(int rows, int out, int wide, const real *from, real *to) {
    for (int i = 0; i < rows; i++, from += out, to += wide) {
        memcpy(to, from, out * sizeof(real));
        memset(to + out, 0, (wide - out) * sizeof(real));
    }
}

static void unpad(int rows, int out, int wide, const real *from, real *to) {
    for (int i = 0; i < rows; i++, from += wide, to += out) memcpy(to, from, out * sizeof(real));
}

// ---- passes over the weights, some registers of columns at a time -----------------------------------------------------

#define INLINE static inline __attribute__((always_inline))
#define AT(pointer) (*(vec *)(pointer))
#define GIVEN(pointer) (*(const vec *)(pointer))
#define COLUMNS(pass, ...)                                                               \
    do {                                                                                 \
        int at = 0;                                                                      \
        for (; at + 4 * LANES <= wide; at += 4 * LANES) pass(4, at, wide, __VA_ARGS__);  \
        for (; at + 2 * LANES <= wide; at += 2 * LANES) pass(2, at, wide, __VA_ARGS__);  \
        for (; at < wide; at += LANES) pass(1, at, wide, __VA_ARGS__);                   \
    } while (0)

INLINE void recall_columns(int vectors, int at, int wide, int in, const real *x, const real *w, real *to) {
    vec total[4] = {};
    w += at;
    for (int c = 0; c < in; c++, w += wide)
        for (int j = 0; j < vectors; j++) total[j] += x[c] * GIVEN(w + j * LANES);
    for (int j = 0; j < vectors; j++) AT(to + at + j * LANES) = total[j];
}

// to = x W
static void recall(int in, int wide, const real *x, const real *w, real *to) { COLUMNS(recall_columns, in, x, w, to); }

INLINE void advance_columns(
    int vectors, int at, int wide, int in, int answers, const real *alpha, const real *k, const real *q, const real *r,
    const real *from, real *to, real *y
) {
    vec total[4] = {}, row[4];
    from += at, to += at;
    for (int j = 0; j < vectors; j++) row[j] = GIVEN(r + at + j * LANES);
    for (int c = 0; c < in; c++, from += wide, to += wide) {
        real keep = alpha[c], key = k[c], query = answers != NOT ? q[c] : 0;  // read once: `to` could lie anywhere
        for (int j = 0; j < vectors; j++) {
            vec old = GIVEN(from + j * LANES), new = keep * old + key * row[j];
            AT(to + j * LANES) = new;
            if (answers != NOT) total[j] += query * (answers == AFTER ? new : old);
        }
    }
    if (answers == NOT) return;
    for (int j = 0; j < vectors; j++) AT(y + at + j * LANES) = total[j];
}

// `to` = diag(α) W + kᵀ r, and y; `to` may be W.
static void advance(
    int in, int wide, int answers, const real *alpha, const real *k, const real *q, const real *r, const real *w, real *to,
    real *y
) {
    if (answers == AFTER) COLUMNS(advance_columns, in, AFTER, alpha, k, q, r, w, to, y);
    else if (answers == BEFORE) COLUMNS(advance_columns, in, BEFORE, alpha, k, q, r, w, to, y);
    else COLUMNS(advance_columns, in, NOT, alpha, k, q, r, w, to, y);
}

INLINE void back_columns(
    int vectors, int at, int wide, int in, int erases, int before, const real *alpha, const real *k, const real *q,
    const real *restrict w, const real *r, const real *of_y, const real *of_z, real *restrict g, real *restrict parts
) {
    vec row[4], of_answer[4], of_read[4];
    size_t next = (size_t)in * LANES;
    for (int j = 0; j < vectors; j++) {
        row[j] = GIVEN(r + at + j * LANES);
        of_answer[j] = GIVEN(of_y + at + j * LANES);
        of_read[j] = GIVEN(of_z + at + j * LANES);
    }
    w += at, g += at;
    for (int c = 0; c < in; c++, w += wide, g += wide, parts += LANES) {
        vec answer = {}, of_k = {}, of_alpha = {};
        real keep = alpha[c], key = k[c], query = q[c];
        for (int j = 0; j < vectors; j++) {
            vec old = GIVEN(w + j * LANES), of = GIVEN(g + j * LANES);
            if (!before) of += query * of_answer[j];
            answer += of_answer[j] * old;
            of_k += of * row[j];
            if (erases == AFTER_DECAY) {
                of += key * of_read[j];
                of_k += keep * old * of_read[j];
            } else if (erases == WITH_DECAY) {
                of_k += old * of_read[j];
            }
            of_alpha += of * old;
            of *= keep;
            if (erases == WITH_DECAY) of += key * of_read[j];
            if (before) of += query * of_answer[j];
            AT(g + j * LANES) = of;
        }
        if (at) answer += AT(parts), of_k += AT(parts + next), of_alpha += AT(parts + 2 * next);
        AT(parts) = answer, AT(parts + next) = of_k, AT(parts + 2 * next) = of_alpha;
    }
}

// Moves G back over a token.
static void back_advance(
    const Scan *s, const Hand *h, const real *alpha, const real *k, const real *q, const real *w, const real *r
) {
    int in = s->in, wide = h->wide;
#define BACK(erases, before) \
    COLUMNS(back_columns, in, erases, before, alpha, k, q, w, r, h->y, h->of_z, h->g, h->parts)
    if (s->erases == NOTHING && s->before) BACK(NOTHING, 1);
    else if (s->erases == NOTHING) BACK(NOTHING, 0);
    else if (s->erases == WITH_DECAY && s->before) BACK(WITH_DECAY, 1);
    else if (s->erases == WITH_DECAY) BACK(WITH_DECAY, 0);
    else if (s->before) BACK(AFTER_DECAY, 1);
    else BACK(AFTER_DECAY, 0);
#undef BACK
}

// to[i] = the sum of the LANES numbers of row i
static void sums(int rows, const real *from, real *to) {
    int i = 0;
#if __has_builtin(__builtin_shufflevector)  // gcc from 12 on, clang
    typedef real v8 __attribute__((vector_size(8 * sizeof(real)), aligned(4), may_alias));
#define ADDED(a, b, ...) (__builtin_shufflevector(a, b, __VA_ARGS__))
    if (LANES % 8 == 0)
        for (; i + 8 <= rows; i += 8, from += 8 * LANES) {
            v8 r[8];
            for (int j = 0; j < 8; j++) {
                r[j] = *(const v8 *)(from + j * LANES);
                for (int n = 8; n < LANES; n += 8) r[j] += *(const v8 *)(from + j * LANES + n);
            }
            for (int j = 0; j < 8; j += 2)
                r[j] = ADDED(r[j], r[j + 1], 0, 9, 2, 11, 4, 13, 6, 15) + ADDED(r[j], r[j + 1], 1, 8, 3, 10, 5, 12, 7, 14);
            for (int j = 0; j < 8; j += 4)
                r[j] = ADDED(r[j], r[j + 2], 0, 1, 10, 11, 4, 5, 14, 15) + ADDED(r[j], r[j + 2], 2, 3, 8, 9, 6, 7, 12, 13);
            *(v8 *)(to + i) = ADDED(r[0], r[4], 0, 1, 2, 3, 12, 13, 14, 15) + ADDED(r[0], r[4], 4, 5, 6, 7, 8, 9, 10, 11);
        }
#undef ADDED
#endif
    for (; i < rows; i++, from += LANES) to[i] = sum(from, LANES);
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

// A token of a memory; those that do not act keep everything and write nothing.
typedef struct {
    size_t at;
    int acts;
    const real *q, *k, *v;
    real lr, erase;
} Token;

static Token token_of(const Scan *s, int memory, int place) {
    size_t at = (size_t)memory * s->time + place;
    Token t = {.at = at, .acts = !s->fine || s->fine[(size_t)(memory / s->heads) * s->time + place]};
    t.q = s->q + at * s->in, t.k = s->k + at * s->in, t.v = s->v + at * s->out;
    t.lr = t.acts ? s->lr[at] : 0;
    t.erase = t.acts && s->erases ? s->erase[at] : 0;
    return t;
}

// Its α.
static void shares(const Scan *s, const Token *t, real *restrict alpha) {
    const real *restrict given = t->acts && s->retention ? s->retention + t->at * s->in : 0;
    if (!given)
        for (int c = 0; c < s->in; c++) alpha[c] = 1;
    else if (s->logs)
        for (int c = 0; c < s->in; c++) alpha[c] = given[c] > R(88.0) ? R(INFINITY) : exponential(given[c]);
    else memcpy(alpha, given, s->in * sizeof(real));
}

// What a token writes, r, and what it read for that, z.
static void written(
    const Scan *s, const Hand *h, const Token *t, const real *restrict alpha, const real *w, real *restrict r, real *restrict z
) {
    if (s->erases == AFTER_DECAY)
        for (int c = 0; c < s->in; c++) h->seen[c] = alpha[c] * t->k[c];
    if (s->erases) recall(s->in, h->wide, s->erases == AFTER_DECAY ? h->seen : t->k, w, z);
    for (int j = 0; j < s->out; j++) r[j] = t->lr * t->v[j] - (s->erases ? t->erase * z[j] : 0);
    for (int j = s->out; j < h->wide; j++) r[j] = 0;
}

static void forward(const void *task, int memory, real *space) {
    const Scan *s = task;
    Hand h;
    lay(s, 0, &h, space);
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    size_t size = (size_t)s->in * s->out, own = memory * size, memories = (size_t)s->lanes * s->heads;
    real *w = h.states, *anchor = s->apart ? s->store.a_end[0] + own : 0, total = 0;
    pad(s->in, s->out, h.wide, s->store.w[0] + own, w);
    if (anchor) memcpy(anchor, s->store.a[0] + own, size * sizeof(real));
    for (int n = 0; n < s->tiles && runs[n].tokens; n++) {
        if (s->kept && n && n % s->group == 0)
            unpad(s->in, s->out, h.wide, w, s->kept + ((n / s->group - 1) * memories + memory) * size);
        if (runs[n].flags & FRESH) {
            const real *start = s->store.start[0] + own;
            total += sum(w, h.size);  // what was not finite stays so until here
            pad(s->in, s->out, h.wide, start, w);
            if (anchor) memcpy(anchor, start, size * sizeof(real));
        }
        Token t = token_of(s, memory, runs[n].first);
        shares(s, &t, h.alpha);
        written(s, &h, &t, h.alpha, w, h.r, h.z);
        advance(s->in, h.wide, s->before ? BEFORE : AFTER, h.alpha, t.k, t.q, h.r, w, w, h.y);
        memcpy(s->y + t.at * s->out, h.y, s->out * sizeof(real));
        if (anchor && runs[n].flags & CLOSES) unpad(s->in, s->out, h.wide, w, anchor);
    }
    total += sum(w, h.size);
    s->broken[memory] = total - total != 0;
    unpad(s->in, s->out, h.wide, w, s->store.w_end[0] + own);
}

// From G behind a token to G before it, and to the gradients of what the token brought.
static void back_token(
    const Scan *s, const Hand *h, const Token *t, const real *restrict alpha, const real *w, const real *r, const real *z
) {
    int in = s->in, out = s->out, wide = h->wide;
    const real *restrict k = t->k, *restrict answer = h->sums, *restrict of_key = answer + in, *restrict of_alpha = of_key + in;
    pad(1, out, wide, s->of_y + t->at * out, h->y);
    recall(in, wide, k, h->g, h->of_r);
    real along = s->before ? 0 : dot(k, t->q, in), answered = s->before ? 0 : dot(h->y, r, wide);
    for (int j = 0; j < wide; j++) h->of_r[j] += along * h->y[j], h->of_z[j] = -t->erase * h->of_r[j];
    back_advance(s, h, alpha, k, t->q, w, r);
    sums(3 * in, h->parts, h->sums);
    real *restrict of_q = s->of_q + t->at * in;
    for (int c = 0; c < in; c++) of_q[c] = s->before ? answer[c] : alpha[c] * answer[c] + k[c] * answered;
    if (!t->acts) return;
    memcpy(s->of_k + t->at * in, of_key, in * sizeof(real));
    if (s->retention) {
        real *restrict to = s->of_retention + t->at * in;
        for (int c = 0; c < in; c++) to[c] = s->logs ? alpha[c] * of_alpha[c] : of_alpha[c];
    }
    for (int j = 0; j < out; j++) s->of_v[t->at * out + j] = t->lr * h->of_r[j];
    s->of_lr[t->at] = dot(t->v, h->of_r, out);
    if (s->erases) s->of_erase[t->at] = -dot(z, h->of_r, out);
}

// to += padded from, which is 0 then.
static void hand_on(const Scan *s, const Hand *h, real *from, real *to) {
    for (int c = 0; c < s->in; c++) add(s->out, from + (size_t)c * h->wide, to + (size_t)c * s->out);
    memset(from, 0, h->size * sizeof(real));
}

static void backward(const void *task, int memory, real *space) {
    const Scan *s = task;
    Hand h;
    lay(s, 1, &h, space);
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    size_t size = (size_t)s->in * s->out, own = memory * size, memories = (size_t)s->lanes * s->heads;
    const Store *store = &s->store;
    real *of_a = !s->apart ? 0 : store->of_a[0] ? store->of_a[0] + own : h.spare;
    int count = 0;
    while (count < s->tiles && runs[count].tokens) count++;
    if (store->from_w[0]) pad(s->in, s->out, h.wide, store->from_w[0] + own, h.g);
    else memset(h.g, 0, h.size * sizeof(real));
    if (of_a && store->from_a[0]) memcpy(of_a, store->from_a[0] + own, size * sizeof(real));
    else if (of_a) memset(of_a, 0, size * sizeof(real));
    for (int first = (count - 1) / s->group * s->group; first >= 0 && count; first -= s->group) {
        int end = first + s->group < count ? first + s->group : count;
        const real *before = first ? s->kept + ((first / s->group - 1) * memories + memory) * size : store->w[0] + own;
        pad(s->in, s->out, h.wide, before, h.states);
        for (int n = first; n < end; n++) {  // what stands before each token of the group
            size_t row = (size_t)(n - first) * h.wide;
            real *w = h.states + (n - first) * h.size, *alpha = h.alpha + (size_t)(n - first) * s->in;
            if (runs[n].flags & FRESH) pad(s->in, s->out, h.wide, store->start[0] + own, w);
            Token t = token_of(s, memory, runs[n].first);
            shares(s, &t, alpha);
            written(s, &h, &t, alpha, w, h.r + row, h.z + row);
            if (n < end - 1) advance(s->in, h.wide, NOT, alpha, t.k, 0, h.r + row, w, w + h.size, 0);
        }
        for (int n = end - 1; n >= first; n--) {
            size_t row = (size_t)(n - first) * h.wide;
            if (of_a && runs[n].flags & CLOSES) {
                for (int c = 0; c < s->in; c++) add(s->out, of_a + (size_t)c * s->out, h.g + (size_t)c * h.wide);
                memset(of_a, 0, size * sizeof(real));
            }
            Token t = token_of(s, memory, runs[n].first);
            const real *alpha = h.alpha + (size_t)(n - first) * s->in;
            back_token(s, &h, &t, alpha, h.states + (n - first) * h.size, h.r + row, h.z + row);
            if (runs[n].flags & FRESH) {
                hand_on(s, &h, h.g, store->of_start[0] + own);
                if (of_a) {
                    add(size, of_a, store->of_start[0] + own);
                    memset(of_a, 0, size * sizeof(real));
                }
            }
        }
    }
    if (store->of_w[0]) unpad(s->in, s->out, h.wide, h.g, store->of_w[0] + own);
}

const size_t nestling_size = sizeof(Scan);

// Returns 0, or 1 if there was no memory for it.
int nestling_channel(const Scan *s, int back) {
    Hand h;
    return spread(s, back ? backward : forward, s->lanes * s->heads, s->threads, lay(s, back, &h, 0));
}
