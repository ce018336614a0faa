// A memory's network, M(x) = [x +] [LN](z_D) with z_l = x_l W_l and x_{l+1} = σ(z_l): its answers, and the way back through them.
// A gated one has three layers, of which the second reads the input too: x_2 = x_1 and x_3 = σ(z_1) ∘ z_2.

#ifndef NESTLING_NETWORK_H
#define NESTLING_NETWORK_H

#include "activation.h"
#include "rows.h"

#define DEPTH 4

typedef struct {
    int depth;
    int width[DEPTH + 1];  // of the layers' inputs, and of the last one's output
    int activation, residual, norm, gated;  // residual: the first inputs, as many as there are outputs
    double epsilon;  // of the norm
} Network;

// What an answer is made of. x[0] is the input as it lies; slope is σ'(z), of all layers but the last; the second of a gated
// network is σ(z_1).
typedef struct {
    real *x[DEPTH], *z[DEPTH], *slope[DEPTH], *normed, *scale;
} Trace;

// Of a layer.
static int in_of(const Network *n, int l) { return n->width[n->gated && l == 1 ? 0 : l]; }

static size_t weights_of(const Network *n) {
    size_t count = 0;
    for (int l = 0; l < n->depth; l++) count += (size_t)in_of(n, l) * n->width[l + 1];
    return count;
}

static int widest(const Network *n) {
    int most = 0;
    for (int l = 0; l <= n->depth; l++) most = n->width[l] > most ? n->width[l] : most;
    return most;
}

static void lay_reads(const Network *n, int rows, real **z, Room *room) {
    for (int l = 0; l < n->depth; l++) z[l] = take(room, (size_t)rows * n->width[l + 1]);
}

// z: room for it where no more is asked of it than the answer, or null: its own.
static void lay_trace(const Network *n, int rows, real *const *z, Trace *t, Room *room) {
    if (!z) lay_reads(n, rows, t->z, room);
    for (int l = 0; l < n->depth; l++) {
        int inner = l < n->depth - 1;
        if (z) t->z[l] = z[l];
        t->x[l] = take(room, l > n->gated ? (size_t)rows * n->width[l] : 0);
        t->slope[l] = take(room, inner ? (size_t)rows * n->width[l + 1] : 0);
    }
    t->normed = take(room, n->norm ? (size_t)rows * n->width[n->depth] : 0);
    t->scale = take(room, n->norm ? rows : 0);
}

// σ(z_1) ∘ z_2, with σ(z_1) and σ'(z_1)
static void open_gate(const Network *n, int size, real *const *z, real *restrict gate, real *slope, real *restrict x) {
    const real *restrict passed = z[1];
    activate_with_slope(n->activation, size, z[0], gate, slope);
    for (int i = 0; i < size; i++) x[i] = gate[i] * passed[i];
}

// The trace of x at weights w. last: whether z_D and what comes behind it is wanted.
static void trace(const Network *n, int rows, const real *x, real *const *w, int last, Trace *t, real *panel) {
    int D = n->depth;
    t->x[0] = (real *)x;
    if (n->gated) t->x[1] = t->x[0];
    for (int l = 0; l < D - !last; l++) {
        int in = in_of(n, l), out = n->width[l + 1];
        product(rows, in, out, plain(t->x[l], in), plain(w[l], out), t->z[l], out, 0, panel);
        if (n->gated && l == 1) open_gate(n, rows * out, t->z, t->slope[1], t->slope[0], t->x[2]);
        else if (!n->gated && l < D - 1) activate_with_slope(n->activation, rows * out, t->z[l], t->x[l + 1], t->slope[l]);
    }
    if (n->norm && last) normalize(rows, n->width[D], (real)n->epsilon, t->z[D - 1], t->normed, t->scale);
}

// M(x) from its trace.
static void answer(const Network *n, int rows, const Trace *t, real *restrict y) {
    size_t size = (size_t)rows * n->width[n->depth];
    memcpy(y, n->norm ? t->normed : t->z[n->depth - 1], size * sizeof(real));
    if (n->residual) add_part(rows, n->width[n->depth], t->x[0], n->width[0], y, n->width[n->depth]);
}

// W_lᵀ as an operand. across: transposed copies, which cost less to read, or null.
static Operand transposed(real *const *w, real *const *across, int l, int in, int out) {
    return across && across[l] ? plain(across[l], in) : turned(w[l], out);
}

// Makes those copies.
static void turn_around(const Network *n, real *const *w, real *const *across) {
    for (int l = 0; l < n->depth; l++) {
        int in = in_of(n, l), out = n->width[l + 1];
        for (int i = 0; i < out; i += 8)
            for (int j = 0; j < in; j += 8)
                transpose(
                    out - i < 8 ? out - i : 8, in - j < 8 ? in - j : 8, w[l] + (size_t)j * out + i, 1, out,
                    across[l] + (size_t)i * in + j, in
                );
    }
}

// The gradients of x and of a layer's weights from that of z, both added to. of_w null: not asked for.
static void back_layer(
    const Network *n, int rows, const Trace *t, real *const *w, real *const *across, const real *of_z, real *of_x,
    real *const *of_w, int l, real *panel
) {
    int in = in_of(n, l), out = n->width[l + 1];
    product(rows, out, in, plain(of_z, out), transposed(w, across, l, in, out), of_x, in, 1, panel);
    if (of_w) product(in, rows, out, turned(t->x[l], in), plain(of_z, out), of_w[l], out, 1, panel);
}

// `back_layers` of a gated network; of_slope: of σ'(z_1) and of σ(z_1), of_more: of z_2 alone.
static void back_gated(
    const Network *n, int rows, const Trace *t, real *const *w, real *const *across, real *of_z, real *const *of_x,
    real *const *of_slope, real *const *of_more, real *const *of_w, int last, real *spare, real *panel
) {
    int size = rows * n->width[1];
    const real *restrict gate = t->slope[1], *restrict passed = t->z[1], *restrict of = of_x[2];
    if (last) back_layer(n, rows, t, w, across, of_z, of_x[2], of_w, 2, panel);
    real *restrict first = of_z, *restrict second = spare;
    for (int i = 0; i < size; i++) first[i] = of[i] * passed[i], second[i] = of[i] * gate[i];
    if (of_slope) {
        add(size, of_slope[1], of_z);
        add(size, of_more[1], spare);
        back_through_both(n->activation, size, t->z[0], t->slope[0], of_slope[0], of_z);
    } else {
        for (int i = 0; i < size; i++) first[i] *= t->slope[0][i];
    }
    back_layer(n, rows, t, w, across, of_z, of_x[0], of_w, 0, panel);
    back_layer(n, rows, t, w, across, spare, of_x[0], of_w, 1, panel);
    add((size_t)rows * n->width[0], of_x[1], of_x[0]);
}

// From the gradient of z_D, in of_z, to those of the weights, which are added to, and of every x_l, which too are added to.
// of_slope: gradients of the slopes, of_more: more gradients of every z_l, or null; of_w null: not asked for. What of_z and spare hold is lost.
static void back_layers(
    const Network *n, int rows, const Trace *t, real *const *w, real *const *across, real *of_z, real *const *of_x,
    real *const *of_slope, real *const *of_more, real *const *of_w, int last, real *spare, real *panel
) {
    if (n->gated) {
        back_gated(n, rows, t, w, across, of_z, of_x, of_slope, of_more, of_w, last, spare, panel);
        return;
    }
    for (int l = n->depth - 1; l >= 0; l--) {
        int in = n->width[l], out = n->width[l + 1];
        if (of_more) add((size_t)rows * out, of_more[l], of_z);
        if (l < n->depth - 1 || last) back_layer(n, rows, t, w, across, of_z, of_x[l], of_w, l, panel);
        if (!l) break;
        size_t size = (size_t)rows * in;
        if (of_slope) {
            memcpy(spare, of_x[l], size * sizeof(real));
            back_through_both(n->activation, (int)size, t->z[l - 1], t->slope[l - 1], of_slope[l - 1], spare);
        } else {
            for (size_t i = 0; i < size; i++) spare[i] = of_x[l][i] * t->slope[l - 1][i];
        }
        real *swap = of_z;
        of_z = spare, spare = swap;
    }
}

// From the gradient of M(x) to those of the weights and of x, which are added to. of_x: room for the layers' inputs.
static void back_answer(
    const Network *n, int rows, const Trace *t, real *const *w, real *const *across, const real *of_y, real *of_input,
    real *const *of_x, real *const *of_w, real *of_z, real *spare, real *panel
) {
    int last = n->width[n->depth];
    size_t size = (size_t)rows * last;
    memcpy(of_z, of_y, size * sizeof(real));
    if (n->norm) denormalize(rows, last, t->normed, t->scale, of_z, of_z);
    for (int l = 0; l < n->depth; l++) memset(of_x[l], 0, (size_t)rows * in_of(n, l) * sizeof(real));
    back_layers(n, rows, t, w, across, of_z, of_x, 0, 0, of_w, 1, spare, panel);
    add((size_t)rows * n->width[0], of_x[0], of_input);
    if (n->residual) add_part(rows, last, of_y, last, of_input, n->width[0]);
}

#endif
