// The chunk engine for rules whose steps go along Newton–Schulz of the momentum, one memory after the other.

#include "directed.h"
#include "mapped.h"
#include "passes.h"

typedef struct {
    Scan scan;
    Iteration iteration;
    int acts;  // the flag of runs at whose end the rule acts
} Directed;

static const Directed *directed(const Scan *s) { return (const Directed *)s; }

// What a thread has in hand.
typedef struct {
    Space space;
    Gates gates;
    OfGates of_gates;
    Course c, of_c;
    real *of_c_begin, *of_c_end;
    real *turned[DEPTH];
    Schulz schulz[DEPTH];
    Stand next;     // on the way back: what stands behind a tile whose rule acts
    Trace closing;  // the answer of such a tile's last token, as it is made
    Mapped mapped;  // where features are made
    Tile tile;      // the one that was made last
} Hand;

static int rows_of(const Scan *s) { return s->longest + s->cell.window - 1; }

static int acts(const Scan *s, const Run *run) { return (run->flags & directed(s)->acts) != 0; }

// Whether the run's last token reads the weights behind it.
static int closes(const Scan *s, const Run *run) { return acts(s, run) && !s->cell.before; }

static size_t lay(const Scan *s, int backward, void *hand, real *space) {
    Hand *h = hand;
    const Cell *cell = &s->cell;
    const Network *n = &cell->network;
    size_t most = 0;
    Room room = {space, 0};
    lay_made(cell, rows_of(s), &h->space, &room);
    lay_course(s->longest, rows_of(s), &h->c, &room);
    lay_step(cell, s->longest, rows_of(s), &h->space, &room);
    for (int l = 0; l < n->depth; l++) {
        lay_schulz(&directed(s)->iteration, in_of(n, l), n->width[l + 1], backward, &h->schulz[l], &room);
        h->next.w[l] = take(&room, backward ? size_of(cell, l) : 0);
        most = size_of(cell, l) > most ? size_of(cell, l) : most;
    }
    real *momentum = take(&room, backward ? most : 0);  // one layer after the other
    for (int l = 0; l < n->depth; l++) h->next.s[l] = momentum;
    lay_trace(n, 1, 0, &h->closing, &room);
    h->of_c_begin = take(&room, 0);
    if (backward) lay_course(s->longest, rows_of(s), &h->of_c, &room);
    h->of_c_end = take(&room, 0);
    if (backward) lay_turned(cell, h->turned, &room);
    if (s->features.in) lay_mapped(s, rows_of(s), backward, &h->mapped, &room);
    return room.used;
}

// Room for the gradients of one tile alone: beside Newton–Schulz it costs little to make them again.
static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m) {
    Hand *h = hand;
    Tile t = tile_at(s, &h->gates, memory, &runs[n], begins(s->apart, runs, n, 0));
    (void)place;
    if (s->features.in) map_keys(s, &h->mapped, memory, &runs[n], &t);
    h->tile = t;
    course(t.tokens, t.rows, s->cell.window, &h->gates, &h->c);
    gradients(&s->cell, &h->space, &t, m);
}

// Weights and momentum after a tile; `to` may be `at`. keeps: what the way back through Newton–Schulz needs.
static void move(const Scan *s, Hand *h, const Tile *t, int steps, const Stand *at, const Stand *to, int keeps) {
    const Network *net = &s->cell.network;
    const Iteration *it = &directed(s)->iteration;
    Space *m = &h->space;
    int L = t->tokens, N = t->rows;
    real keep = h->c.keep[L];
    for (int l = 0; l < net->depth; l++) {
        int in = in_of(net, l), out = net->width[l + 1], narrow = in <= out;
        const real *x = m->at.x[l], *r = m->rows[l];
        scaled(N, narrow ? in : out, h->c.impulse, narrow ? x : r, m->spare);
        blended(
            in, N, out, turned(narrow ? m->spare : x, in), plain(narrow ? r : m->spare, out), to->s[l], out,
            (Blend){h->c.fade[0], 0, at->s[l], 0}, m->panel
        );
        if (steps) {
            const real *step = orthogonalize(it, &h->schulz[l], to->s[l], keeps);
            add_step(&h->schulz[l], keep, at->w[l], t->gates->lr[L - 1], step, to->w[l]);
        } else {
            for (size_t i = 0, all = size_of(&s->cell, l); i < all; i++) to->w[l][i] = keep * at->w[l][i];
        }
    }
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m) {
    const Cell *cell = &s->cell;
    const Network *net = &cell->network;
    const Run *run = &runs[n];
    Hand *h = hand;
    Tile t = h->tile;
    int behind = closes(s, run), before = t.tokens - behind;
    real *y = answers_at(s, s->y, memory, run);
    if (s->features.in) map_queries(s, &h->mapped, memory, run, &t);
    directed_answers(cell, &h->space, &t, &h->c, before, m, y);
    move(s, h, &t, acts(s, run), m, m, 0);
    if (behind) {
        trace(net, 1, t.q + (size_t)before * net->width[0], m->w, 1, &h->closing, h->space.panel);
        answer(net, 1, &h->closing, y + (size_t)before * net->width[net->depth]);
    }
    return sound(cell, &h->space, &t, m);
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after) {
    Hand *h = hand;
    (void)memory;
    move(s, h, &h->tile, acts(s, &runs[n]), m, after, 0);
}

// W ← γW + η NS(S), S ← mS − Σ P x_iᵀ δ_i
static void back_move(const Scan *s, Hand *h, const Tile *t, int steps, const Stand *at, const Stand *of, OfTile *g) {
    int L = t->tokens;
    for (int l = 0; l < s->cell.network.depth; l++) {
        size_t n = size_of(&s->cell, l);
        real *of_w = of->w[l], *of_s = of->s[l];
        if (steps)
            g->gates->lr[L - 1] +=
                back_orthogonalize(&directed(s)->iteration, &h->schulz[l], of_w, t->gates->lr[L - 1], of_s);
        h->of_c.keep[L] += dot(of_w, at->w[l], n);
        h->of_c.fade[0] += dot(of_s, at->s[l], n);
        back_written(&s->cell, &h->space, t->rows, l, h->c.impulse, h->of_c.impulse, of_s);
        for (size_t i = 0; i < n; i++) of_w[i] *= h->c.keep[L], of_s[i] *= h->c.fade[0];
    }
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m, const Stand *g) {
    const Cell *cell = &s->cell;
    const Network *net = &cell->network;
    const Run *run = &runs[n];
    Hand *h = hand;
    Space *p = &h->space;
    Stand at = *m;
    make(s, hand, memory, runs, n, place, m);
    Tile t = h->tile;
    int last = closes(s, run), before = t.tokens - last, does = acts(s, run);
    if (run->halo + run->tokens > PANEL) turn(cell, &at, h->turned);  // few rows need no copy
    if (s->features.in) map_queries(s, &h->mapped, memory, run, &t);
    OfTile of = of_tile_at(s, &h->of_gates, memory, run);
    if (s->features.in) clear_mapped(s, &h->mapped, &t, &of);
    memset(h->of_c_begin, 0, (h->of_c_end - h->of_c_begin) * sizeof(real));
    of.quiet = n == tiles_of(s, runs) - 1 && from_nowhere(cell, s->apart, &s->store);
    of.unasked = !n && !(run->flags & FRESH) && for_nobody(cell, s->apart, &s->store);
    const real *of_y = answers_at(s, (real *)s->of_y, memory, run);
    if (does && !(of.quiet && !last)) move(s, h, &t, 1, &at, &h->next, 1);
    if (last) {
        size_t row = (size_t)before * net->width[0];
        trace(net, 1, t.q + row, h->next.w, 1, &h->closing, p->panel);
        back_answer(
            net, 1, &h->closing, h->next.w, 0, of_y + (size_t)before * net->width[net->depth], of.q + row, p->of_x, g->w, p->of_z,
            p->spare, p->panel
        );
    }
    clear_rows(cell, p, &t);
    if (!(of.quiet && !last)) back_move(s, h, &t, does, &at, g, &of);
    directed_answers(cell, p, &t, &h->c, before, &at, 0);
    Asked asked = {before, &h->c, &h->of_c, &at, g, t.begun ? at.turned : 0, of.unasked};
    back_directed_answers(cell, p, &asked, of_y, of.q);
    back_gradients(cell, p, &t, &at, g, &of);
    if (s->features.in) back_mapped(s, &h->mapped, memory, run, &t);
    back_course(t.tokens, t.rows, cell->window, &h->gates, &h->c, &h->of_c, &h->of_gates);
}

static void begin(const Scan *s, void *hand, int memory) {
    if (s->features.in) begin_mapped(s, memory, &((Hand *)hand)->mapped);
}

static const Engine ENGINE = {sizeof(Hand), lay, begin, make, ahead, onward, behind};

const size_t nestling_size = sizeof(Directed);

// Returns 0, or 1 if there was no room for it.
int nestling_directed(const Directed *s, int back) { return pass_all(&s->scan, &ENGINE, back); }
