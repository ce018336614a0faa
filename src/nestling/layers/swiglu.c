// h = SiLU(a) ∘ b of rows z = [a | b], and the way back, which makes h again for the gradient of what reads it:
//
//     ∂a = ∂h ∘ b ∘ SiLU'(a),  ∂b = ∂h ∘ SiLU(a)

#include "activation.h"
#include "share.h"

#define BLOCK 64  // rows that a thread takes at a time

typedef struct {
    int rows, width, threads;
    const real *z;  // `[row, 2 · width]`
    real *h;        // `[row, width]`
    const real *of_h;  // null: forward
    real *of_z;
} Gate;

static void block(const void *task, int part, real *space) {
    const Gate *c = task;
    int n = c->width, first = part * BLOCK, end = first + BLOCK < c->rows ? first + BLOCK : c->rows;
    real *restrict slope = space;
    for (int row = first; row < end; row++) {
        const real *restrict a = c->z + (size_t)row * 2 * n, *restrict b = a + n;
        real *restrict h = c->h + (size_t)row * n;
        if (!c->of_h) {
            activate(SILU, n, a, h);
            for (int j = 0; j < n; j++) h[j] *= b[j];
            continue;
        }
        const real *restrict of_h = c->of_h + (size_t)row * n;
        real *restrict of_a = c->of_z + (size_t)row * 2 * n, *restrict of_b = of_a + n;
        activate_with_slope(SILU, n, a, h, slope);
        for (int j = 0; j < n; j++) {
            of_a[j] = of_h[j] * b[j] * slope[j];
            of_b[j] = of_h[j] * h[j];
            h[j] *= b[j];
        }
    }
}

const size_t nestling_size = sizeof(Gate);

// Returns 0, or 1 if there was no memory for it.
int nestling_swiglu(const Gate *c) {
    return spread(c, block, (c->rows + BLOCK - 1) / BLOCK, c->threads, (size_t)c->width);
}
