// The chunk engine for one memory after the other: its tiles in order, and backward.
//
// The backward pass starts from weights kept every few tiles and makes the rest again. A value that is not finite raises a flag;
// the caller then leaves all to `chunked`, whose guards know what to do.

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
        Tile t = tile_of(s, &h, memory, &runs[n], begins(s->apart, runs, n, 0));
        Stand at = s->link.kind ? standing(s, &h.scaled, &m) : m;
        gradients(cell, &h.space, &t, &at);
        if (s->link.kind) write_scaled(s, &h.scaled, &h.space, &t, &at, &runs[n]);
        if (t.q) answers(cell, &h.space, &t, &at, answers_at(s, s->y, memory, &runs[n]));
        if (s->link.kind)
            for (int l = 0; l < cell->network.depth; l++) memcpy(m.w[l], h.scaled.after[l], size_of(cell, l) * sizeof(real));
        else advance(cell, &h.space, &t, &m, &m);
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
            real *state = h.states + (n - first) * size;
            stand(cell, s->apart, &m, state);
            if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
            if (n == end - 1) break;
            stand(cell, s->apart, &after, state + size);
            Tile t = tile_of(s, &h, memory, &runs[n], begins(s->apart, runs, n, 0));
            Stand at = s->link.kind ? standing(s, &h.scaled, &m) : m;
            gradients(cell, &h.space, &t, &at);
            advance(cell, &h.space, &t, &at, &after);
            next_anchor(cell, s->apart, runs[n].flags & CLOSES, &m, &after);
        }
        for (int n = end - 1; n >= first; n--) {
            stand(cell, s->apart, &m, h.states + (n - first) * size);
            Stand at = s->link.kind ? standing(s, &h.scaled, &m) : m;
            turn(cell, &at, h.turned);
            // Where the anchor's weights are not those that are read, no tile is begun.
            Tile t = tile_of(s, &h, memory, &runs[n], !s->link.kind && begins(s->apart, runs, n, 0));
            gradients(cell, &h.space, &t, &at);
            if (s->link.kind) write_scaled(s, &h.scaled, &h.space, &t, &at, &runs[n]);
            if (t.q) answers(cell, &h.space, &t, &at, 0);
            if (runs[n].flags & CLOSES) back_close(cell, s->apart, &g);
            OfTile of = of_tile_at(s, &h.of_gates, memory, &runs[n]);
            of.c = &h.of_c;
            memset(h.of_c_begin, 0, (h.of_c_end - h.of_c_begin) * sizeof(real));
            const real *of_y = answers_at(s, (real *)s->of_y, memory, &runs[n]);
            if (s->link.kind) back_scaled(s, &h.scaled, &h.space, &t, &m, &at, &runs[n], of_y, &g, &of);
            else back_tile(cell, &h.space, &t, &at, of_y, &g, &of);
            back_coefficients(t.tokens, t.rows, cell->window, cell->erases, &h.gates, &h.c, &h.of_c, &h.of_gates);
            if (runs[n].flags & FRESH) back_fresh(cell, s->apart, &s->store, memory, &g);
        }
    }
}

// Returns 0, or 1 if there was no memory for it.
int nestling_scan(const Scan *s, int back) {
    Hand h;
    return spread(s, back ? backward : forward, s->lanes * s->heads, s->threads, lay(s, back, &h, 0));
}
