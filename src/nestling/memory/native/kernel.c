// Memories over exponential features, one after the other; what is done at a tile is in kernel.h.

#include "kernel.h"

// ---- a memory whose pairs grow -------------------------------------------------------------------------------------

static real *at_place(const Kernel *k, real *of_all, int place) { return of_all + (size_t)place * k->room; }

static void make(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m) {
    const Kernel *k = (const Kernel *)s;
    Hand *h = hand;
    hold(k, h, place);
    if (h->starts && n % s->group == 0) {
        real *from = h->starts + (size_t)2 * (n / s->group) * k->room;
        memcpy(h->a, from, k->room * sizeof(real));
        memcpy(h->still, from + k->room, k->room * sizeof(real));
    }
    make_tile(k, h, memory, runs, n, m, at_place(k, h->a, place), at_place(k, h->still, place));
}

static int ahead(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m) {
    const Kernel *k = (const Kernel *)s;
    const Network *net = &s->cell.network;
    Hand *h = hand;
    size_t rows = (size_t)runs[n].halo + runs[n].tokens;
    answer_tile(k, h, &runs[n], m, answers_at(s, s->y, memory, &runs[n]));
    put_keys(k, memory, runs, n, h->keys);
    put_rows(k, runs, n, net->width[1], h->u, h->writes);
    move_weights(k, h, &runs[n], m, m);
    move_pairs(k, &h->c, runs, n, h->a, h->still);
    Stand at = behind_first(m);
    real total = sum(h->u, rows * net->width[1]) + sum(h->a, before(k, runs, n + 1)) + sum(m->w[0], size_of(&s->cell, 0));
    return sound(&h->inner, &h->space, &h->tile, &at) && total - total == 0;
}

static void onward(const Scan *s, void *hand, int memory, const Run *runs, int n, const Stand *m, const Stand *after) {
    const Kernel *k = (const Kernel *)s;
    Hand *h = hand;
    int place = n % s->group;
    move_weights(k, h, &runs[n], m, after);
    memcpy(at_place(k, h->a, place + 1), at_place(k, h->a, place), k->room * sizeof(real));
    memcpy(at_place(k, h->still, place + 1), at_place(k, h->still, place), k->room * sizeof(real));
    move_pairs(k, &h->c, runs, n, at_place(k, h->a, place + 1), at_place(k, h->still, place + 1));
}

// What a memory's pairs have as given.
static void load_pairs(const Kernel *k, int memory, real *a, real *still) {
    size_t from = (size_t)memory * k->count, bytes = k->count * sizeof(real);
    memcpy(a, k->weight + from, bytes);
    memcpy(still, k->still + from, bytes);
}

// All keys, and a and ȧ before every group.
static void find_starts(const Kernel *k, int memory, Hand *h) {
    const Run *runs = runs_of(&k->scan, memory);
    hold(k, h, 0);
    load_pairs(k, memory, h->a, h->still);
    for (int n = 0; n < tiles_of(&k->scan, runs); n++) {
        if (n % k->scan.group == 0) {
            real *to = h->starts + (size_t)2 * (n / k->scan.group) * k->room;
            memcpy(to, h->a, k->room * sizeof(real));
            memcpy(to + k->room, h->still, k->room * sizeof(real));
        }
        put_keys(k, memory, runs, n, h->keys);
        tile_of(k, h, memory, &runs[n]);
        coefficients(runs[n].tokens, runs[n].halo + runs[n].tokens, k->scan.cell.window, 0, &h->gates, &h->c);
        move_pairs(k, &h->c, runs, n, h->a, h->still);
    }
}

static void begin(const Scan *s, void *hand, int memory) {
    const Kernel *k = (const Kernel *)s;
    const Network *net = &s->cell.network;
    Hand *h = hand;
    size_t in = net->width[0], out = net->width[1], room = k->room, from = (size_t)memory * k->count, to = memory * room;
    h->memory = memory;
    h->writes = k->write_end + to * out;
    if (h->starts) {
        memcpy(h->keys, k->key + from * in, k->count * in * sizeof(real));
        find_starts(k, memory, h);
        come(room, k->from_weight, memory, h->of_a);
        come(room, k->from_still, memory, h->of_still);
        come(room * in, k->from_key, memory, h->of_pair_key);
        come(room * out, k->from_write, memory, h->of_pair_write);
        return;
    }
    h->a = k->weight_end + to, h->still = k->still_end + to;  // they move in place
    load_pairs(k, memory, h->a, h->still);
    h->keys = k->key_end + to * in;
    memcpy(h->keys, k->key + from * in, k->count * in * sizeof(real));
    memcpy(h->writes, k->write + from * out, k->count * out * sizeof(real));
}

// What is left of the gradients of pairs, behind the way back, are those of the ones given.
static void leave(const Kernel *k, const Hand *h, size_t memory) {
    size_t in = k->scan.cell.network.width[0], out = k->scan.cell.network.width[1], count = k->count;
    memcpy(k->of_weight + memory * count, h->of_a, count * sizeof(real));
    memcpy(k->of_still + memory * count, h->of_still, count * sizeof(real));
    memcpy(k->of_key + memory * count * in, h->of_pair_key, count * in * sizeof(real));
    memcpy(k->of_write + memory * count * out, h->of_pair_write, count * out * sizeof(real));
}

static void behind(const Scan *s, void *hand, int memory, const Run *runs, int n, int place, const Stand *m, const Stand *g) {
    const Kernel *k = (const Kernel *)s;
    Hand *h = hand;
    hold(k, h, place);
    int end = before(k, runs, n + 1);
    if (runs[n].flags & CLOSES) {
        add(end, h->of_still, h->of_a);
        memset(h->of_still, 0, end * sizeof(real));
    }
    back_tile_of(k, h, memory, runs, n, m, g, at_place(k, h->a, place), at_place(k, h->still, place));
    if (!n) leave(k, h, memory);
}

static const Engine ENGINE = {sizeof(Hand), lay, begin, make, ahead, onward, behind};

// ---- a memory of a span --------------------------------------------------------------------------------------------

static void read_span(const Kernel *k, int memory, Hand *h) {
    const Scan *s = &k->scan;
    const Run *runs = runs_of(s, memory);
    Stand m;
    stand(&s->cell, 0, &m, h->states);
    load(&s->cell, 0, &s->store, memory, 0, &m);
    hold(k, h, 0);
    for (int n = 0; n < tiles_of(s, runs); n++) {
        make_tile(k, h, memory, runs, n, &m, 0, 0);
        answer_tile(k, h, &runs[n], &m, answers_at(s, s->y, memory, &runs[n]));
        size_t rows = (size_t)runs[n].halo + runs[n].tokens;
        real total = sum(h->u, rows * s->cell.network.width[1]);
        Stand at = behind_first(&m);
        if (!sound(&h->inner, &h->space, &h->tile, &at) || total - total != 0) s->broken[memory] = 1;
    }
    unload(&s->cell, 0, &s->store, memory, &m);
}

static void back_span(const Kernel *k, int memory, Hand *h) {
    const Scan *s = &k->scan;
    const Run *runs = runs_of(s, memory);
    Stand m, g;
    stand(&s->cell, 0, &m, h->states);
    load(&s->cell, 0, &s->store, memory, 0, &m);
    gradients_of(&s->cell, 0, &s->store, memory, h->states + numbers(&s->cell, 0), &g);
    hold(k, h, 0);
    for (int n = tiles_of(s, runs) - 1; n >= 0; n--) {
        make_tile(k, h, memory, runs, n, &m, 0, 0);
        back_tile_of(k, h, memory, runs, n, &m, &g, 0, 0);
    }
}

static void read_one(const void *task, int memory, real *space) {
    Hand h;
    lay(task, 0, &h, space);
    h.memory = memory;
    read_span(task, memory, &h);
}

static void back_one(const void *task, int memory, real *space) {
    Hand h;
    lay(task, 1, &h, space);
    back_span(task, memory, &h);
}

const size_t nestling_size = sizeof(Kernel);

// Returns 0, or 1 if there was no room for it.
int nestling_kernel(const Kernel *k, int back) {
    const Scan *s = &k->scan;
    Hand h;
    if (!k->span) return pass_all(s, &ENGINE, back);
    return spread(k, back ? back_one : read_one, s->lanes * s->heads, s->threads, lay(s, back, &h, 0));
}
