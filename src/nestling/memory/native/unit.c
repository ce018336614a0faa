// y = x / √(‖x‖² + ε²), row by row, and the way back: ∂x = s (∂y − y (y·∂y)) with the scale s = 1/√(‖x‖² + ε²).

#include "rows.h"
#include "share.h"

#define BLOCK 64  // tokens that a thread takes at a time

typedef struct {
    int lanes, heads, time, dim, threads;
    ptrdiff_t lane, head, token;  // strides of x, backward of of_x, whose rows lie whole; all else is `[lane, head, time, …]` in order
    double epsilon;
    const real *x;
    real *y, *scale;
    const real *of_y;  // null: forward
    real *of_x;
} Unit;

static void block(const void *task, int part, real *space) {
    const Unit *u = task;
    int blocks = (u->time + BLOCK - 1) / BLOCK, lane = part / blocks, first = part % blocks * BLOCK, dim = u->dim;
    int end = first + BLOCK < u->time ? first + BLOCK : u->time;
    (void)space;
    for (int t = first; t < end; t++)
        for (int head = 0; head < u->heads; head++) {
            size_t row = ((size_t)lane * u->heads + head) * u->time + t;
            ptrdiff_t at = lane * u->lane + head * u->head + t * u->token;
            real *restrict y = u->y + row * dim;
            if (u->of_y) {
                const real *restrict of_y = u->of_y + row * dim;
                real *restrict of_x = u->of_x + at, along = dot(of_y, y, dim), scale = u->scale[row];
                for (int j = 0; j < dim; j++) of_x[j] = scale * (of_y[j] - y[j] * along);
            } else {
                unit_rows(1, dim, (real)u->epsilon, u->x + at, y, u->scale + row);
            }
        }
}

const size_t nestling_size = sizeof(Unit);

// Returns 0, or 1 if there was no memory for it.
int nestling_unit(const Unit *u) {
    int blocks = (u->time + BLOCK - 1) / BLOCK;
    return spread(u, block, u->lanes * blocks, u->threads, LANES);
}
