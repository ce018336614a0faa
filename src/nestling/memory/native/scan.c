// The chunk engine for one memory after the other.

#include "mapped.h"
#include "passes.h"
#include "scaled.h"

// What a thread has in hand.
typedef struct {
    Space space;
    Gates gates;
    OfGates of_gates;
    Coefficients c, of_c;
    real *made, *of_c_begin, *of_c_end;
    size_t apiece;  // numbers of `made` for each tile
    real *turned[DEPTH];
    Scaled scaled;  // where there is a link
    Mapped mapped;  // where features are made
    Tile tile;      // the one that was made last
    Stand at;       // and what it was made at
} Hand;

static int rows_of(const Scan *s) { return s->longest + s->cell.window - 1; }

// Takes in hand what is made of a group's tile.
static size_t hold(const Scan *s, Hand *h, int place) {
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    lay_made(&s->cell, rows_of(s), &h->space, &room);
    lay_coefficients(s->longest, rows_of(s), s->cell.momentum, &h->c, &room);
    return room.used;
}

static size_t lay(const Scan *s, int backward, void *hand, real *space) {
    Hand *h = hand;
    const Cell *cell = &s->cell;
    int tiles = backward ? s->group : 1;
    Room room = {space, 0};
    h->made = 0;
    h->apiece = hold(s, h, 0);
    h->made = take(&room, h->apiece * tiles);
    lay_step(cell, s->longest, rows_of(s), &h->space, &room);
    h->of_c_begin = take(&room, 0);
    if (backward) lay_coefficients(s->longest, rows_of(s), cell->momentum, &h->of_c, &room);
    h->of_c_end = take(&room, 0);
    if (backward) lay_turned(cell, h->turned, &room);
    if (s->link.kind) lay_scaled(cell, s->longest, backward, &h->scaled, &room);
    if (s->features.in) lay_mapped(s, rows_of(s), backward, &h->mapped, &room);
    return room.used;
}

// The tile of a run, and in h->at what its gradients are taken at. Where those are not the weights that are read, no tile is begun.
static Tile tile_of(const Scan *s, Hand *h, int memory, const Run *runs, int n, const Stand *m) {
    Tile t = tile_at(s, &h->gates, memory, &runs[n], !s->link.kind && begins(s->apart, runs, n, 0));
    if (s->features.in) map_keys(s, &h->mapped, memory, &runs[n], &t);
    t.c = &h->c;
    h->at = s->link.kind ? standing(s, &h->scaled, m) : *m;
    return t;
}

static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m) {
    Hand *h = hand;
    hold(s, h, place);
    Tile t = h->tile = tile_of(s, h, memory, runs, n, m);
    coefficients(t.tokens, t.rows, s->cell.window, s->cell.erases, &h->gates, &h->c);
    gradients(&s->cell, &h->space, &t, &h->at);
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m) {
    const Cell *cell = &s->cell;
    Hand *h = hand;
    Tile t = h->tile;
    if (s->link.kind) write_scaled(s, &h->scaled, &h->space, &t, &h->at, &runs[n]);
    if (s->features.in) map_queries(s, &h->mapped, memory, &runs[n], &t);
    if (t.q) answers(cell, &h->space, &t, &h->at, answers_at(s, s->y, memory, &runs[n]));
    if (s->link.kind)
        for (int l = 0; l < cell->network.depth; l++) memcpy(m->w[l], h->scaled.after[l], size_of(cell, l) * sizeof(real));
    else advance(cell, &h->space, &t, m, m);
    return sound(cell, &h->space, &t, m);
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after) {
    Hand *h = hand;
    advance(&s->cell, &h->space, &h->tile, &h->at, after);
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m, const Stand *g) {
    const Cell *cell = &s->cell;
    const Run *run = &runs[n];
    Hand *h = hand;
    hold(s, h, place);
    Tile t = tile_of(s, h, memory, runs, n, m);
    h->space.at.x[0] = (real *)t.k;
    if (run->halo + run->tokens > PANEL) turn(cell, &h->at, h->turned);  // few rows need no copy
    if (s->link.kind) write_scaled(s, &h->scaled, &h->space, &t, &h->at, run);
    if (s->features.in) map_queries(s, &h->mapped, memory, run, &t);
    if (t.q) answers(cell, &h->space, &t, &h->at, 0);
    OfTile of = of_tile_at(s, &h->of_gates, memory, run);
    if (s->features.in) clear_mapped(s, &h->mapped, &t, &of);
    of.c = &h->of_c;
    memset(h->of_c_begin, 0, (h->of_c_end - h->of_c_begin) * sizeof(real));
    const real *of_y = answers_at(s, (real *)s->of_y, memory, run);
    if (!s->link.kind) {
        of.quiet = n == tiles_of(s, runs) - 1 && from_nowhere(cell, s->apart, &s->store);
        of.unasked = !n && !(run->flags & FRESH) && for_nobody(cell, s->apart, &s->store);
    }
    if (s->link.kind) back_scaled(s, &h->scaled, &h->space, &t, m, &h->at, run, of_y, g, &of);
    else back_tile(cell, &h->space, &t, &h->at, of_y, g, &of);
    if (s->features.in) back_mapped(s, &h->mapped, memory, run, &t);
    back_coefficients(t.tokens, t.rows, cell->window, cell->erases, &h->gates, &h->c, &h->of_c, &h->of_gates);
}

static void begin(const Scan *s, void *hand, int memory) {
    if (s->features.in) begin_mapped(s, memory, &((Hand *)hand)->mapped);
}

static const Engine ENGINE = {sizeof(Hand), lay, begin, make, ahead, onward, behind};

const size_t nestling_size = sizeof(Scan);

// Returns 0, or 1 if there was no room for it.
int nestling_scan(const Scan *s, int back) { return pass_all(s, &ENGINE, back); }
