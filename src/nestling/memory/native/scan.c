// The chunk engine for one memory after the other: its tiles in order, and backward.
//
// The backward pass starts from weights kept every few tiles and makes the rest again. A value that is not finite raises a flag;
// the caller then leaves all to `chunked`, whose guards know what to do.

#include "runs.h"
#include "share.h"

typedef struct {
    Cell cell;
    Store store;
    int lanes, heads, time, tiles, longest, group, apart, threads;
    int tail;         // rows of k and v before the call's own
    const Run *runs;            // `[lane, tiles]`
    const unsigned char *fine;  // `[lane, tail + time]`: tokens that act; null: all
    // `[memory, time, …]`, memory = lane · heads + head; q null where nothing is asked, k and v with the tail before them
    const real *q, *k, *v, *lr, *retention, *momentum, *erase, *window;
    real *y;
    real *kept;   // what stands before each group of tiles, `[group, memory, numbers]`; null: not kept
    int *broken;  // whether something was not finite, one per memory
    const real *of_y;
    real *of_q, *of_k, *of_v, *of_lr, *of_retention, *of_momentum, *of_erase, *of_window;
} Scan;

// What a thread has in hand.
typedef struct {
    Space space;
    Gates gates;
    OfGates of_gates;
    Coefficients c, of_c;
    real *of_c_begin, *of_c_end;
    real *states, *turned[DEPTH];
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
    return room.used;
}

static const real *at_token(const real *x, size_t token, int width) { return x ? x + token * width : 0; }
static real *of_token(real *x, size_t token, int width) { return x ? x + token * width : 0; }

// The tile of a run, with its coefficients.
static Tile tile_of(const Scan *s, Hand *h, int memory, const Run *run, int begun) {
    const Cell *cell = &s->cell;
    const int *width = cell->network.width;
    size_t token = (size_t)memory * s->time + run->first;
    size_t all = s->tail + s->time, place = s->tail + run->first - run->halo, row = memory * all + place;
    Tile t = {.tokens = run->tokens, .rows = run->halo + run->tokens, .begun = begun, .gates = &h->gates, .c = &h->c};
    t.q = at_token(s->q, token, width[0]);
    t.k = at_token(s->k, row, width[0]);
    t.v = at_token(s->v, row, width[cell->network.depth] + reads_threshold(&cell->bias));
    h->gates = (Gates){
        at_token(s->lr, token, 1),
        at_token(s->retention, token, 1),
        at_token(s->momentum, token, 1),
        at_token(s->erase, token, 1),
        at_token(s->window, token, cell->window),
        s->fine ? s->fine + memory / s->heads * all + place : 0,
    };
    coefficients(t.tokens, t.rows, cell->window, cell->erases, &h->gates, &h->c);
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
    size_t size = numbers(cell, s->apart), width = cell->network.width[cell->network.depth];
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    int memories = s->lanes * s->heads;
    for (int n = 0; n < s->tiles && runs[n].tokens; n++) {
        if (s->kept && n % s->group == 0)
            memcpy(s->kept + ((size_t)(n / s->group) * memories + memory) * size, h.states, size * sizeof(real));
        if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
        Tile t = tile_of(s, &h, memory, &runs[n], begins(s->apart, runs, n, 0));
        gradients(cell, &h.space, &t, &m);
        if (t.q) answers(cell, &h.space, &t, &m, s->y + ((size_t)memory * s->time + runs[n].first) * width);
        advance(cell, &h.space, &t, &m, &m);
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
    const int *width = cell->network.width;
    Hand h;
    lay(s, 1, &h, space);
    Stand m, after, g;
    gradients_of(cell, s->apart, &s->store, memory, &g);
    size_t size = numbers(cell, s->apart), out = width[cell->network.depth];
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    int count = 0, memories = s->lanes * s->heads;
    while (count < s->tiles && runs[count].tokens) count++;
    for (int first = (count - 1) / s->group * s->group; first >= 0 && count; first -= s->group) {
        int end = first + s->group < count ? first + s->group : count;
        memcpy(h.states, s->kept + ((size_t)(first / s->group) * memories + memory) * size, size * sizeof(real));
        for (int n = first; n < end; n++) {  // what stands before each tile of the group
            real *state = h.states + (n - first) * size;
            stand(cell, s->apart, &m, state);
            if (runs[n].flags & FRESH) load(cell, s->apart, &s->store, memory, 1, &m);
            if (n == end - 1) break;
            stand(cell, s->apart, &after, state + size);
            Tile t = tile_of(s, &h, memory, &runs[n], begins(s->apart, runs, n, 0));
            gradients(cell, &h.space, &t, &m);
            advance(cell, &h.space, &t, &m, &after);
            if (s->apart && runs[n].flags & CLOSES) close_chunk(cell, s->apart, &after);
            else if (s->apart)
                for (int l = 0; l < cell->network.depth; l++) memcpy(after.a[l], m.a[l], size_of(cell, l) * sizeof(real));
        }
        for (int n = end - 1; n >= first; n--) {
            stand(cell, s->apart, &m, h.states + (n - first) * size);
            turn(cell, &m, h.turned);
            Tile t = tile_of(s, &h, memory, &runs[n], begins(s->apart, runs, n, 0));
            gradients(cell, &h.space, &t, &m);
            if (t.q) answers(cell, &h.space, &t, &m, 0);
            if (runs[n].flags & CLOSES) back_close(cell, s->apart, &g);
            size_t token = (size_t)memory * s->time + runs[n].first;
            size_t row = (size_t)memory * (s->tail + s->time) + s->tail + runs[n].first - runs[n].halo;
            h.of_gates = (OfGates){
                of_token(s->of_lr, token, 1),
                of_token(s->of_retention, token, 1),
                of_token(s->of_momentum, token, 1),
                of_token(s->of_erase, token, 1),
                of_token(s->of_window, token, cell->window),
            };
            OfTile of = {
                of_token(s->of_q, token, width[0]), of_token(s->of_k, row, width[0]), of_token(s->of_v, row, (int)out + reads_threshold(&cell->bias)),
                &h.of_c, &h.of_gates
            };
            memset(h.of_c_begin, 0, (h.of_c_end - h.of_c_begin) * sizeof(real));
            back_tile(cell, &h.space, &t, &m, s->of_y + token * out, &g, &of);
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
