// The self-modifying memory (Nested Learning, eq. 86–91), one head of one lane after the other: at the anchors its generators make a
// tile's keys, values, step sizes and retention, and every memory its own targets; then each writes the tile (see tile.h).
//
//     k_t = norm(M_k(x_t))    v_t = [norm] M_v(x'_t)    q_t = [norm M_q](q_t)    v̂_□ = M_□(v_t)
//     η_t = η_max σ(M_η(x_t) w_η + b_η)        α_t = σ(M_α(x_t) w_α + b_α)
//
// All memories of a head share keys, gates and so the coefficients. The backward pass starts from weights kept every few tiles.

#include "back.h"
#include "runs.h"
#include "share.h"

#define MOST 5  // generators
enum { OTHERS, MAIN };
enum { LR, RETENTION };

typedef struct {
    Cell cells[2];
    Store stores[2];  // `[lane, generator, head, …]` and `[lane, head, …]`
    int generators, key, value, query, gate[2];  // which generator makes what; -1: none
    int lanes, heads, time, tiles, longest, group, apart, threads;
    int unit_values, after_decay, average;  // after_decay: ε = ηα, not η;  average: gradients enter S with (1 − μ)η
    double lr_max, step, epsilon;  // step: the rule's constant;  epsilon: of the unit norms
    const Run *runs;
    const unsigned char *fine;  // `[lane, time]`: tokens that act; null: all
    const real *q, *k, *v, *momentum;   // `[lane, head, time, dim]`; log μ `[lane, head, time]` or null
    const real *weight[2], *bias[2];    // read-outs `[head, dim]` and `[head]`
    real *y, *kept;
    int *broken;
    const real *of_y;
    real *of_q, *of_k, *of_v, *of_momentum;
    real *of_weight[2], *of_bias[2];  // `[lane, head, …]`, summed by the caller
} Scan;

// What a thread has in hand: first what is made of a tile, which the way back may find again.
typedef struct {
    Space spaces[MOST + 1];
    Trace asked[MOST], aimed[MOST + 1];  // of what the generators are asked, and of every memory's targets
    real *answers[MOST], *target[MOST + 1];
    real *key, *value, *query, *key_scale, *value_scale, *query_scale, *gram;
    real *sigmoid, *lr, *log_retention, *retention, *erase;
    Coefficients c, of_c;
    real *reads[2][DEPTH], *spoken, *meant;  // z, answers and targets that are not asked for again
    real *made;
    size_t apiece;  // numbers of `made` for each tile
    Gates gates;
    real *of_begin, *of_end;
    real *of_key, *of_value, *of_query, *of_lr, *of_log_retention, *of_erase, *of_target, *of_answer, *of_logit;
    real *of_x[2][DEPTH], *of_z, *spare, *panel;
    OfGates of_gates;
    real *states, *turned[MOST + 1][DEPTH];
} Hand;

typedef struct {
    Stand others[MOST], main;
} Memories;

static size_t numbers_of(const Scan *s) {
    return s->generators * numbers(&s->cells[OTHERS], s->apart) + numbers(&s->cells[MAIN], s->apart);
}

static int bank_of(const Scan *s, int i) { return i < s->generators ? OTHERS : MAIN; }

// Takes in hand what is made of a group's tile.
static size_t hold(const Scan *s, Hand *h, int place) {
    int L = s->longest, d = s->cells[MAIN].network.width[0];
    Room room = {h->made ? h->made + place * h->apiece : 0, 0};
    for (int i = 0; i <= s->generators; i++) {
        const Cell *cell = &s->cells[bank_of(s, i)];
        lay_made(cell, L, &h->spaces[i], &room);
        lay_trace(&cell->network, L, h->reads[bank_of(s, i)], &h->aimed[i], &room);
        h->target[i] = bends(&cell->bias) ? take(&room, (size_t)L * d) : h->meant;
    }
    for (int g = 0; g < s->generators; g++) {
        lay_trace(&s->cells[OTHERS].network, L, h->reads[OTHERS], &h->asked[g], &room);
        h->answers[g] = g == s->gate[LR] || g == s->gate[RETENTION] ? take(&room, (size_t)L * d) : h->spoken;
    }
    real **wide[] = {&h->key, &h->value, &h->query};
    real **flat[] = {&h->key_scale, &h->value_scale, &h->query_scale, &h->sigmoid, &h->lr, &h->log_retention,
                     &h->retention, &h->erase};
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) *wide[i] = take(&room, (size_t)L * d);
    for (size_t i = 0; i < sizeof flat / sizeof *flat; i++) *flat[i] = take(&room, L);
    h->gram = take(&room, (size_t)L * L);
    lay_coefficients(L, L, s->cells[MAIN].momentum, &h->c, &room);
    return room.used;
}

static size_t lay(const Scan *s, int backward, Hand *h, real *space) {
    int L = s->longest, d = s->cells[MAIN].network.width[0], most = L, tiles = backward ? s->group : 1;
    Room room = {space, 0};
    *h = (Hand){0};
    h->apiece = hold(s, h, 0);
    h->made = take(&room, h->apiece * tiles);
    for (int bank = 0; bank < 2; bank++) {
        const Network *n = &s->cells[bank].network;
        Space step;
        lay_reads(n, L, h->reads[bank], &room);
        lay_step(&s->cells[bank], L, L, &step, &room);
        for (int i = 0; i <= s->generators; i++)
            if (bank_of(s, i) == bank) h->spaces[i] = step;
        most = widest(n) > most ? widest(n) : most;
        for (int l = 0; l < n->depth; l++) h->of_x[bank][l] = take(&room, (size_t)L * n->width[l]);
    }
    real **wide[] = {&h->spoken, &h->meant, &h->of_answer};
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) *wide[i] = take(&room, (size_t)L * d);
    h->of_logit = take(&room, L);
    h->of_z = take(&room, (size_t)L * most);
    h->spare = take(&room, (size_t)L * most);
    h->panel = take(&room, (size_t)most * PANEL);
    h->of_begin = take(&room, 0);
    if (backward) {
        real **grads[] = {&h->of_key, &h->of_value, &h->of_query};
        real **of_flat[] = {&h->of_lr, &h->of_log_retention, &h->of_erase};
        for (size_t i = 0; i < sizeof grads / sizeof *grads; i++) *grads[i] = take(&room, (size_t)L * d);
        for (size_t i = 0; i < sizeof of_flat / sizeof *of_flat; i++) *of_flat[i] = take(&room, L);
        lay_coefficients(L, L, s->cells[MAIN].momentum, &h->of_c, &room);
    }
    h->of_end = take(&room, 0);
    h->of_target = take(&room, backward ? (size_t)L * d : 0);
    h->states = take(&room, numbers_of(s) * (backward ? s->group + 1 : 1));
    for (int i = 0; i <= s->generators && backward; i++) lay_turned(&s->cells[bank_of(s, i)], h->turned[i], &room);
    hold(s, h, 0);
    return room.used;
}

// A head's memories, of one bank after the other, with the number that each has in its store.
typedef struct {
    const Cell *cell;
    const Store *store;
    size_t number;
    int bank;
    Stand *stand;
} Member;

static int members(const Scan *s, int memory, Memories *m, Member *all) {
    int lane = memory / s->heads, head = memory % s->heads, G = s->generators;
    for (int g = 0; g < G; g++)
        all[g] = (Member){
            &s->cells[OTHERS], &s->stores[OTHERS], ((size_t)lane * G + g) * s->heads + head, OTHERS, &m->others[g]
        };
    all[G] = (Member){&s->cells[MAIN], &s->stores[MAIN], (size_t)memory, MAIN, &m->main};
    return G + 1;
}

static void stand_all(const Scan *s, const Member *all, real *at) {
    for (int i = 0; i <= s->generators; i++) at = stand(all[i].cell, s->apart, all[i].stand, at);
}

static void load_all(const Scan *s, const Member *all, int fresh) {
    for (int i = 0; i <= s->generators; i++)
        load(all[i].cell, s->apart, all[i].store, all[i].number, fresh, all[i].stand);
}

static void close_all(const Scan *s, const Member *all, int flags) {
    for (int i = 0; i <= s->generators; i++)
        if (flags & CLOSES << all[i].bank) close_chunk(all[i].cell, s->apart, all[i].stand);
}

// What of a lane's inputs generator g is asked.
static size_t asked_at(const Scan *s, int memory, const Run *run) {
    return ((size_t)memory * s->time + run->first) * s->cells[MAIN].network.width[0];
}

static const real *question(const Scan *s, int g) { return g == s->value ? s->v : g == s->query ? s->q : s->k; }

// What does not act says so by its gates.
static const unsigned char *fine_at(const Scan *s, int memory, const Run *run) {
    return s->fine ? s->fine + (size_t)(memory / s->heads) * s->time + run->first : 0;
}

static Gates gates_at(const Scan *s, const Hand *h, int memory, const Run *run) {
    return (Gates){
        h->lr, s->gate[RETENTION] < 0 ? 0 : h->log_retention,
        s->momentum ? s->momentum + (size_t)memory * s->time + run->first : 0, s->cells[MAIN].erases ? h->erase : 0, 0,
        fine_at(s, memory, run)
    };
}

// Keys, values, queries, gates and coefficients of a run. Returns whether all of them are finite.
static int make(const Scan *s, Hand *h, int memory, const Run *run, const Memories *m) {
    const Network *n = &s->cells[OTHERS].network;
    int L = run->tokens, d = n->width[0], head = memory % s->heads;
    size_t at = asked_at(s, memory, run);
    real total = 0;
    for (int g = 0; g < s->generators; g++) {
        real *made = g == s->key ? h->key : g == s->value ? h->value : g == s->query ? h->query : 0;
        real *scale = g == s->key ? h->key_scale : g == s->value ? h->value_scale : h->query_scale;
        trace(n, L, question(s, g) + at, m->others[g].a, 1, &h->asked[g], h->panel);
        answer(n, L, &h->asked[g], h->answers[g]);
        if (!made) continue;
        if (g != s->value || s->unit_values) {
            unit_rows(L, d, (real)s->epsilon, h->answers[g], made, scale);
            for (int i = 0; i < L; i++) total += R(1.0) / scale[i];
        } else {
            memcpy(made, h->answers[g], (size_t)L * d * sizeof(real));
            total += sum(made, (size_t)L * d);
        }
    }
    if (s->query < 0) memcpy(h->query, s->q + at, (size_t)L * d * sizeof(real));
    for (int gate = 0; gate < 2; gate++) {
        if (s->gate[gate] < 0) continue;
        const real *rows = h->answers[s->gate[gate]];
        for (int i = 0; i < L; i++) {
            real logit = dot(rows + (size_t)i * d, s->weight[gate] + (size_t)head * d, d) + s->bias[gate][head];
            total += logit;
            if (gate == LR) {
                h->sigmoid[i] = R(1.0) / (R(1.0) + (real)exp(-logit));
                h->lr[i] = (real)(s->lr_max * s->step) * h->sigmoid[i];
                h->erase[i] = (real)s->lr_max * h->sigmoid[i];
            } else {  // log σ(x), whichever its sign
                h->log_retention[i] = (logit < 0 ? logit : 0) - (real)log1p(exp(logit < 0 ? logit : -logit));
                h->retention[i] = (real)exp(h->log_retention[i]);
                if (s->after_decay) h->erase[i] *= h->retention[i];
            }
        }
    }
    const real *log_mu = s->average ? s->momentum + (size_t)memory * s->time + run->first : 0;
    for (int i = 0; i < L && log_mu; i++) h->lr[i] *= -(real)expm1(log_mu[i]);
    const unsigned char *fine = fine_at(s, memory, run);
    for (int i = 0; i < L && fine; i++)
        if (!fine[i]) h->sigmoid[i] = h->lr[i] = h->erase[i] = h->log_retention[i] = 0, h->retention[i] = 1;
    int erases = s->cells[MAIN].erases;
    h->gates = gates_at(s, h, memory, run);
    coefficients(L, L, 1, erases, &h->gates, &h->c);
    if (erases) triangular(below(MADE, 0), L, d, L, plain(h->key, d), turned(h->key, d), h->gram, L, 0, h->panel);
    return total - total == 0;
}

// Keys, gates and the targets of memory number i, as its tile.
static Tile tile_of(Hand *h, const Member *member, int i, const Run *run, int begun) {
    const Cell *cell = member->cell;
    return (Tile){
        .tokens = run->tokens, .rows = run->tokens, .begun = begun, .q = member->bank == MAIN ? h->query : 0, .k = h->key,
        .v = h->target[i], .gram = cell->erases ? h->gram : 0, .gates = &h->gates, .c = &h->c
    };
}

// The same with its targets and gradients made.
static Tile write_of(Hand *h, const Member *member, int i, const Run *run, int begun) {
    const Cell *cell = member->cell;
    Tile t = tile_of(h, member, i, run, begun);
    trace(&cell->network, run->tokens, h->value, member->stand->a, 1, &h->aimed[i], h->panel);
    answer(&cell->network, run->tokens, &h->aimed[i], h->target[i]);
    gradients(cell, &h->spaces[i], &t, member->stand);
    return t;
}

static void forward(const void *task, int memory, real *space) {
    const Scan *s = task;
    Hand h;
    Memories m;
    Member all[MOST + 1];
    lay(s, 0, &h, space);
    int count = members(s, memory, &m, all), memories = s->lanes * s->heads;
    stand_all(s, all, h.states);
    load_all(s, all, 0);
    size_t size = numbers_of(s);
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    for (int n = 0; n < s->tiles && runs[n].tokens; n++) {
        if (s->kept && n && n % s->group == 0)
            memcpy(s->kept + ((size_t)(n / s->group - 1) * memories + memory) * size, h.states, size * sizeof(real));
        if (runs[n].flags & FRESH) load_all(s, all, 1);
        int fine = make(s, &h, memory, &runs[n], &m);
        for (int i = 0; i < count && fine; i++) {
            const Member *one = &all[i];
            Space *room = &h.spaces[i];
            Tile t = write_of(&h, one, i, &runs[n], begins(s->apart, runs, n, one->bank));
            if (t.q) answers(one->cell, room, &t, one->stand, s->y + asked_at(s, memory, &runs[n]));
            advance(one->cell, room, &t, one->stand, one->stand);
            fine = sound(one->cell, room, &t, one->stand);
        }
        if (!fine) {
            s->broken[memory] = 1;
            return;
        }
        close_all(s, all, runs[n].flags);
    }
    for (int i = 0; i < count; i++) unload(all[i].cell, s->apart, all[i].store, all[i].number, all[i].stand);
}

// From the gradients of what a run's generators made to those of their weights and of what they were asked.
static void back_make(const Scan *s, Hand *h, int memory, const Run *run, const Memories *m, const Stand *g, int unasked) {
    const Network *net = &s->cells[OTHERS].network;
    int L = run->tokens, d = net->width[0], head = memory % s->heads, erases = s->cells[MAIN].erases;
    size_t at = asked_at(s, memory, run), size = (size_t)L * d;
    back_coefficients(L, L, 1, erases, &h->gates, &h->c, &h->of_c, &h->of_gates);
    back_unit_rows(L, d, h->key, h->key_scale, h->of_key);
    if (s->unit_values) back_unit_rows(L, d, h->value, h->value_scale, h->of_value);
    if (s->query >= 0) back_unit_rows(L, d, h->query, h->query_scale, h->of_query);
    else add(size, h->of_query, s->of_q + at);
    for (int i = 0; i < L; i++) {
        h->of_lr[i] *= (real)s->step;
        if (s->average) {
            real log_mu = h->gates.momentum[i];
            h->of_gates.momentum[i] -= h->of_lr[i] * (real)s->lr_max * h->sigmoid[i] * (real)exp(log_mu);
            h->of_lr[i] *= -(real)expm1(log_mu);
        }
        if (s->after_decay && s->gate[RETENTION] >= 0) {
            h->of_log_retention[i] += h->of_erase[i] * h->erase[i];
            h->of_lr[i] += h->of_erase[i] * h->retention[i];
        } else {
            h->of_lr[i] += h->of_erase[i];
        }
    }
    for (int one = 0; one < s->generators; one++) {
        h->asked[one].x[0] = (real *)question(s, one) + at;
        const real *of_answer = one == s->key ? h->of_key : one == s->value ? h->of_value : h->of_query;
        for (int gate = 0; gate < 2; gate++) {
            if (one != s->gate[gate]) continue;
            const real *w = s->weight[gate] + (size_t)head * d;
            real *of_w = s->of_weight[gate] + (size_t)memory * d;
            for (int i = 0; i < L; i++) {
                real p = gate == LR ? h->sigmoid[i] : 0;
                real of = gate == LR ? h->of_lr[i] * (real)s->lr_max * p * (R(1.0) - p)
                                     : -h->of_log_retention[i] * (real)expm1(h->log_retention[i]);
                s->of_bias[gate][memory] += of;
                const real *row = h->answers[one] + (size_t)i * d;
                for (int j = 0; j < d; j++) of_w[j] += of * row[j], h->of_answer[(size_t)i * d + j] = of * w[j];
            }
            of_answer = h->of_answer;
        }
        real *of_question = one == s->value ? s->of_v : one == s->query ? s->of_q : s->of_k;
        back_answer(
            net, L, &h->asked[one], m->others[one].a, m->others[one].turned, of_answer, of_question + at, h->of_x[OTHERS],
            unasked ? 0 : g[one].a, h->of_z, h->spare, h->panel
        );
    }
}

static void backward(const void *task, int memory, real *space) {
    const Scan *s = task;
    Hand h;
    Memories m, ahead;
    Member all[MOST + 1], next[MOST + 1];
    Stand g[MOST + 1];
    lay(s, 1, &h, space);
    int count = members(s, memory, &m, all), memories = s->lanes * s->heads, tiles = 0;
    members(s, memory, &ahead, next);
    size_t size = numbers_of(s);
    real *spare = h.states + s->group * size;
    for (int i = 0; i < count; i++)
        spare = gradients_of(all[i].cell, s->apart, all[i].store, all[i].number, spare, &g[i]);
    const Run *runs = s->runs + (size_t)(memory / s->heads) * s->tiles;
    while (tiles < s->tiles && runs[tiles].tokens) tiles++;
    int quiet[2], unasked[2];
    for (int bank = 0; bank < 2; bank++) {
        quiet[bank] = from_nowhere(&s->cells[bank], s->apart, &s->stores[bank]);
        unasked[bank] = for_nobody(&s->cells[bank], s->apart, &s->stores[bank]);
    }
    for (int first = (tiles - 1) / s->group * s->group; first >= 0 && tiles; first -= s->group) {
        int end = first + s->group < tiles ? first + s->group : tiles;
        stand_all(s, all, h.states);
        if (first)
            memcpy(h.states, s->kept + ((size_t)(first / s->group - 1) * memories + memory) * size, size * sizeof(real));
        else load_all(s, all, 0);
        for (int n = first; n < end; n++) {  // what stands before each tile of the group
            stand_all(s, all, h.states + (n - first) * size);
            if (runs[n].flags & FRESH) load_all(s, all, 1);
            hold(s, &h, n - first);
            make(s, &h, memory, &runs[n], &m);
            if (n < end - 1) stand_all(s, next, h.states + (n - first + 1) * size);
            for (int i = 0; i < count; i++) {
                if (n == tiles - 1 && quiet[OTHERS] && all[i].bank != MAIN) continue;  // nobody reads what a generator writes last
                Tile t = write_of(&h, &all[i], i, &runs[n], begins(s->apart, runs, n, all[i].bank));
                if (n == end - 1) continue;
                advance(all[i].cell, &h.spaces[i], &t, all[i].stand, next[i].stand);
                next_anchor(all[i].cell, s->apart, runs[n].flags & CLOSES << all[i].bank, all[i].stand, next[i].stand);
            }
        }
        for (int n = end - 1; n >= first; n--) {
            const Run *run = &runs[n];
            stand_all(s, all, h.states + (n - first) * size);
            for (int i = 0; i < count; i++) turn(all[i].cell, all[i].stand, h.turned[i]);
            hold(s, &h, n - first);
            h.gates = gates_at(s, &h, memory, run);
            memset(h.of_begin, 0, (h.of_end - h.of_begin) * sizeof(real));
            size_t token = (size_t)memory * s->time + run->first;
            h.of_gates = (OfGates){
                h.of_lr, s->gate[RETENTION] < 0 ? 0 : h.of_log_retention, s->momentum ? s->of_momentum + token : 0,
                h.of_erase, 0
            };
            for (int i = 0; i < count; i++) {
                const Member *one = &all[i];
                const Network *net = &one->cell->network;
                Space *room = &h.spaces[i];
                int last = n == tiles - 1 && quiet[one->bank], still = !n && !(run->flags & FRESH) && unasked[one->bank];
                if (last && one->bank != MAIN) continue;
                Tile t = tile_of(&h, one, i, run, begins(s->apart, runs, n, one->bank));
                room->at.x[0] = h.key, h.aimed[i].x[0] = h.value;
                if (t.q) answers(one->cell, room, &t, one->stand, 0);
                if (run->flags & CLOSES << one->bank) back_close(one->cell, s->apart, &g[i]);
                memset(h.of_target, 0, (size_t)t.tokens * net->width[0] * sizeof(real));
                OfTile of = {h.of_query, h.of_key, h.of_target, &h.of_c, &h.of_gates, 0, last, still};
                back_tile(one->cell, room, &t, one->stand, s->of_y + asked_at(s, memory, run), &g[i], &of);
                back_answer(
                    net, t.tokens, &h.aimed[i], one->stand->a, one->stand->turned, h.of_target, h.of_value, h.of_x[one->bank],
                    still ? 0 : g[i].a, h.of_z, h.spare, h.panel
                );
            }
            back_make(s, &h, memory, run, &m, g, !n && !(run->flags & FRESH) && unasked[OTHERS]);
            if (run->flags & FRESH)
                for (int i = 0; i < count; i++) back_fresh(all[i].cell, s->apart, all[i].store, all[i].number, &g[i]);
        }
    }
}

const size_t nestling_size = sizeof(Scan);

// Returns 0, or 1 if there was no memory for it.
int nestling_self_modifying(const Scan *s, int back) {
    Hand h;
    return spread(s, back ? backward : forward, s->lanes * s->heads, s->threads, lay(s, back, &h, 0));
}
