// z = RMSNorm(y) ∘ SiLU(g), row by row, and the way back: with n = s y, s = 1/√(mean y² + ε), and u = ∂z ∘ SiLU(g) ∘ w
//
//     z = w ∘ n ∘ SiLU(g)      ∂y = s (u − n mean(u ∘ n)),  ∂g = ∂z ∘ w ∘ n ∘ SiLU'(g),  ∂w = Σ ∂z ∘ SiLU(g) ∘ n
//
// Without a gate, RMSNorm alone: 1 in the place of SiLU(g).

#include "activation.h"
#include "rows.h"
#include "share.h"

#define BLOCK 64  // tokens that a thread takes at a time

typedef struct {
    int lanes, heads, time, dim, threads;
    double epsilon;
    const real *y, *weight, *gate;  // `[lane, head, time, dim]`, `[dim]`, `[lane, time, head, dim]` or null
    real *z;
    const real *of_z;  // null: forward
    real *of_y, *of_weight, *of_gate;  // of_weight `[lane, block, dim]`, summed by the caller; null: not asked for
} Gated;

static void block(const void *task, int part, real *space) {
    const Gated *c = task;
    int blocks = (c->time + BLOCK - 1) / BLOCK, lane = part / blocks, first = part % blocks * BLOCK, dim = c->dim;
    int end = first + BLOCK < c->time ? first + BLOCK : c->time;
    real *restrict value = space, *restrict slope = space + dim, *restrict unasked = space + 2 * dim;
    real *restrict of_weight = c->of_z && c->of_weight ? c->of_weight + (size_t)part * dim : unasked;
    const real *restrict w = c->weight;
    memset(of_weight, 0, dim * sizeof(real));
    for (int j = 0; j < dim; j++) value[j] = R(1.0);
    for (int t = first; t < end; t++)
        for (int head = 0; head < c->heads; head++) {
            size_t from = (((size_t)lane * c->heads + head) * c->time + t) * dim, to = (((size_t)lane * c->time + t) * c->heads + head) * dim;
            const real *restrict y = c->y + from;
            real scale = R(1.0) / (real)sqrt(dot(y, y, dim) / dim + (real)c->epsilon);
            if (!c->of_z) {
                real *restrict z = c->z + to;
                if (c->gate) activate(SILU, dim, c->gate + to, value);
                for (int j = 0; j < dim; j++) z[j] = value[j] * (scale * y[j] * w[j]);
                continue;
            }
            const real *restrict of_z = c->of_z + to;
            real *restrict of_y = c->of_y + from, along = 0;
            if (c->gate) {
                real *restrict of_gate = c->of_gate + to;
                activate_with_slope(SILU, dim, c->gate + to, value, slope);
                for (int j = 0; j < dim; j++) of_gate[j] = of_z[j] * (scale * y[j]) * w[j] * slope[j];
            }
#pragma omp simd reduction(+ : along)
            for (int j = 0; j < dim; j++) {
                real n = scale * y[j], of = of_z[j] * value[j];
                of_weight[j] += of * n;
                of_y[j] = of * w[j];
                along += of_y[j] * n;
            }
            along *= scale / dim;
            for (int j = 0; j < dim; j++) of_y[j] = scale * (of_y[j] - along * y[j]);
        }
}

const size_t nestling_size = sizeof(Gated);

// Returns 0, or 1 if there was no memory for it.
int nestling_gated_norm(const Gated *c) {
    int blocks = (c->time + BLOCK - 1) / BLOCK;
    return spread(c, block, c->lanes * blocks, c->threads, 3 * (size_t)c->dim);
}
