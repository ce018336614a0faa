// The chunk engine for one memory after the other.

#include "passes.h"
#include "scaled.h"

// What a thread has in hand.
typedef struct {
    Space space;
    Gates gates;
    OfGates of_gates;
    Coefficients c, of_c;
    real *of_c_begin, *of_c_end;
    real *states, *turned[DEPTH];
    Scaled scaled;  // where there is a link
} Hand;

static size_t lay(const Scan *s, int backward, Hand *h, real *space) {
    const Cell *cell = &s->cell;
    int rows = s->longest + cell->window - 1;
    Room room = {space, 0};
    lay_space(cell, s->longest, rows, &h->space, &room);
    lay_coefficients(s->longest, rows, cell->momentum, &h->c, &room);
    h->of_c_begin = take(&room, 0);
    if (backward) lay_coefficients(s->longest, rows, cell->momentum, &h->of_c, &room);
    h->of_c_end = take(&room, 0);
    h->states = take(&room, numbers(cell, s->apart) * (backward ? s->group : 1));
    if (backward) lay_turned(cell, h->turned, &room);
    if (s->link.kind) lay_scaled(cell, s->longest, backward, &h->scaled, &room);
    return room.used;
}

// The tile of a run, with its coefficients.
static Tile tile_of(const Scan *s, Hand *h, int memory, const Run *run, int begun) {
    Tile t = tile_at(s, &h->gates, memory, run, begun);
    t.c = &h->c;
    coefficients(t.tokens, t.rows, s->cell.window, s->cell.erases, &h->gates, &h->c);
    return t;
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m) {
    const Cell *cell = &s->cell;
    Hand *h = hand;
    Tile t = tile_of(s, h, memory, &runs[n], begins(s->apart, runs, n, 0));
    Stand at = s->link.kind ? standing(s, &h->scaled, m) : *m;
    gradients(cell, &h->space, &t, &at);
    if (s->link.kind) write_scaled(s, &h->scaled, &h->space, &t, &at, &runs[n]);
    if (t.q) answers(cell, &h->space, &t, &at, answers_at(s, s->y, memory, &runs[n]));
    if (s->link.kind)
        for (int l = 0; l < cell->network.depth; l++) memcpy(m->w[l], h->scaled.after[l], size_of(cell, l) * sizeof(real));
    else advance(cell, &h->space, &t, m, m);
    return sound(cell, &h->space, &t, m);
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after) {
    Hand *h = hand;
    Tile t = tile_of(s, h, memory, &runs[n], begins(s->apart, runs, n, 0));
    Stand at = s->link.kind ? standing(s, &h->scaled, m) : *m;
    gradients(&s->cell, &h->space, &t, &at);
    advance(&s->cell, &h->space, &t, &at, after);
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *g) {
    const Cell *cell = &s->cell;
    const Run *run = &runs[n];
    Hand *h = hand;
    Stand at = s->link.kind ? standing(s, &h->scaled, m) : *m;
    turn(cell, &at, h->turned);
    // Where the anchor's weights are not those that are read, no tile is begun.
    Tile t = tile_of(s, h, memory, run, !s->link.kind && begins(s->apart, runs, n, 0));
    gradients(cell, &h->space, &t, &at);
    if (s->link.kind) write_scaled(s, &h->scaled, &h->space, &t, &at, run);
    if (t.q) answers(cell, &h->space, &t, &at, 0);
    OfTile of = of_tile_at(s, &h->of_gates, memory, run);
    of.c = &h->of_c;
    memset(h->of_c_begin, 0, (h->of_c_end - h->of_c_begin) * sizeof(real));
    const real *of_y = answers_at(s, (real *)s->of_y, memory, run);
    if (s->link.kind) back_scaled(s, &h->scaled, &h->space, &t, m, &at, run, of_y, g, &of);
    else back_tile(cell, &h->space, &t, &at, of_y, g, &of);
    back_coefficients(t.tokens, t.rows, cell->window, cell->erases, &h->gates, &h->c, &h->of_c, &h->of_gates);
}

static const Engine ENGINE = {ahead, onward, behind};

static void forward(const void *task, int memory, real *space) {
    Hand h;
    lay(task, 0, &h, space);
    go_ahead(task, memory, ENGINE, &h, h.states);
}

static void backward(const void *task, int memory, real *space) {
    Hand h;
    lay(task, 1, &h, space);
    go_back(task, memory, ENGINE, &h, h.states);
}

// Returns 0, or 1 if there was no memory for it.
int nestling_scan(const Scan *s, int back) {
    Hand h;
    return spread(s, back ? backward : forward, s->lanes * s->heads, s->threads, lay(s, back, &h, 0));
}
