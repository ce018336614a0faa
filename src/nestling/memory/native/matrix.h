// Small matrix products, row-major, for operands that lie in a core's cache.
//
//     C = A B,  C += A B,  C -= A B,  C = s F + t G − A B      each operand as it lies, or transposed
//
// Where A or C is a triangle, only about what lies in it is computed.
//
// B is packed into panels of PANEL columns, so that the inner loop reads it in order. Works for any size; sizes that are
// multiples of ROWS and PANEL are the fast ones.

#ifndef NESTLING_MATRIX_H
#define NESTLING_MATRIX_H

#include <stddef.h>
#include <string.h>

#ifdef DOUBLE  // to be held against the definition
typedef double real;
#else
typedef float real;
#endif
#define R(constant) ((real)(constant))

#if defined(__AVX512F__)
#define REGISTER 64  // bytes of a vector register
#define ROWS 8       // rows of C that are summed in registers at a time
#else
#define REGISTER 32
#define ROWS 4
#endif
#define LANES ((int)(REGISTER / sizeof(real)))
#define PANEL (2 * LANES)

typedef real vec __attribute__((vector_size(REGISTER), aligned(4), may_alias));

typedef struct {
    const real *at;
    ptrdiff_t row, column;  // strides
} Operand;

static inline Operand plain(const real *at, int width) { return (Operand){at, width, 1}; }
static inline Operand turned(const real *at, int width) { return (Operand){at, 1, width}; }

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

// to[i · width + j] = from[i · row + j · column], at most 8 by 8: such blocks keep both sides in few cache lines.
static inline void transpose(int rows, int columns, const real *from, ptrdiff_t row, ptrdiff_t column, real *to, ptrdiff_t width) {
#if __has_builtin(__builtin_shufflevector)  // gcc from 12 on, clang
    if (rows == 8 && columns == 8 && row == 1) {
        typedef real v8 __attribute__((vector_size(8 * sizeof(real)), aligned(4), may_alias));
        v8 r[8], t[8];
        for (int i = 0; i < 8; i++) r[i] = *(const v8 *)(from + i * column);
        for (int i = 0; i < 8; i += 2) {
            t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
            t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                v8 a = t[i + j], c = t[i + j + 2];
                r[i + j] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
                r[i + j + 2] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
            }
        for (int i = 0; i < 4; i++) {
            v8 a = r[i], c = r[i + 4];
            *(v8 *)(to + i * width) = __builtin_shufflevector(a, c, 0, 1, 2, 3, 8, 9, 10, 11);
            *(v8 *)(to + (i + 4) * width) = __builtin_shufflevector(a, c, 4, 5, 6, 7, 12, 13, 14, 15);
        }
        return;
    }
#endif
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) to[i * width + j] = from[i * row + j * column];
}

// n reals, at most PANEL: moves of known sizes, which are quicker than a call.
static inline void copy_part(int n, const real *restrict from, real *restrict to) {
    for (; n >= LANES; n -= LANES, from += LANES, to += LANES) memcpy(to, from, LANES * sizeof(real));
    if (n >= LANES / 2) {
        memcpy(to, from, LANES / 2 * sizeof(real));
        n -= LANES / 2, from += LANES / 2, to += LANES / 2;
    }
    for (int i = 0; i < n; i++) to[i] = from[i];
}

// One panel of B, `depth` rows of PANEL columns; columns from `live` on are 0.
static void pack(Operand b, int depth, int live, real *restrict panel) {
    if (b.column == 1 && live == PANEL) {
        for (int k = 0; k < depth; k++) memcpy(panel + (size_t)k * PANEL, b.at + k * b.row, PANEL * sizeof(real));
        return;
    }
    if (live < PANEL) memset(panel, 0, (size_t)depth * PANEL * sizeof(real));
    if (b.column == 1) {
        for (int k = 0; k < depth; k++) copy_part(live, b.at + k * b.row, panel + (size_t)k * PANEL);
        return;
    }
    for (int k = 0; k < depth; k += 8)
        for (int n = 0; n < live; n += 8) {
            int rows = depth - k < 8 ? depth - k : 8, columns = live - n < 8 ? live - n : 8;
            transpose(rows, columns, b.at + k * b.row + n * b.column, b.row, b.column, panel + (size_t)k * PANEL + n, PANEL);
        }
}

// `rows` rows of C, `vectors` registers of columns. sign 0: C = A B; 1: C += A B; -1: C -= A B.
#define KERNEL(rows, vectors)                                                                                        \
    static inline void kernel_##rows##_##vectors(                                                                    \
        const real *restrict a, ptrdiff_t row, ptrdiff_t column, const real *restrict b, ptrdiff_t stride, int depth, \
        real *restrict c, ptrdiff_t width, int sign                                                                  \
    ) {                                                                                                              \
        vec sum[rows][vectors];                                                                                      \
        for (int i = 0; i < rows; i++)                                                                               \
            for (int j = 0; j < vectors; j++) sum[i][j] = (vec){};                                                   \
        for (int k = 0; k < depth; k++, b += stride) {                                                               \
            vec part[vectors];                                                                                       \
            for (int j = 0; j < vectors; j++) part[j] = *(const vec *)(b + j * LANES);                               \
            _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++) {                                                 \
                real x = a[i * row + k * column];                                                                    \
                for (int j = 0; j < vectors; j++) sum[i][j] += x * part[j];                                          \
            }                                                                                                        \
        }                                                                                                            \
        _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++) for (int j = 0; j < vectors; j++) {                   \
            vec *to = (vec *)(c + i * width + j * LANES);                                                            \
            if (sign == 0) *to = sum[i][j];                                                                          \
            else if (sign > 0) *to += sum[i][j];                                                                     \
            else *to -= sum[i][j];                                                                                   \
        }                                                                                                            \
    }
#define KERNELS(rows) KERNEL(rows, 1) KERNEL(rows, 2)
KERNELS(1) KERNELS(2) KERNELS(3) KERNELS(4)
#if ROWS == 8
KERNELS(5) KERNELS(6) KERNELS(7) KERNELS(8)
#define kernel_full_1 kernel_8_1
#define kernel_full_2 kernel_8_2
#else
#define kernel_full_1 kernel_4_1
#define kernel_full_2 kernel_4_2
#endif

// Fewer rows than ROWS together: one by one, each sum would wait for itself.
static void few(
    int rows, int narrow, const real *a, ptrdiff_t row, ptrdiff_t column, const real *b, ptrdiff_t stride, int depth, real *c,
    ptrdiff_t width, int sign
) {
#define CASE(n)                                                                          \
    case n:                                                                              \
        if (narrow) kernel_##n##_1(a, row, column, b, stride, depth, c, width, sign);    \
        else kernel_##n##_2(a, row, column, b, stride, depth, c, width, sign);           \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3)
#if ROWS == 8
        CASE(4) CASE(5) CASE(6) CASE(7)
#endif
    }
#undef CASE
}

// The same where B lies transposed and A has few rows: Cᵀ = Bᵀ Aᵀ by ROWS columns of C, so that A alone, and C, are turned around.
static void across(
    int rows, int depth, int columns, Operand a, Operand b, real *c, int width, int sign, real *restrict scratch
) {
    int narrow = rows <= LANES;
    pack((Operand){a.at, a.column, a.row}, depth, rows, scratch);
    for (int n = 0; n < columns; n += ROWS) {
        int block = columns - n < ROWS ? columns - n : ROWS;
        const real *from = b.at + n * b.column;
        real part[ROWS * PANEL], turned[8 * 8];
        if (block == ROWS && narrow) kernel_full_1(from, b.column, b.row, scratch, PANEL, depth, part, PANEL, 0);
        else if (block == ROWS) kernel_full_2(from, b.column, b.row, scratch, PANEL, depth, part, PANEL, 0);
        else few(block, narrow, from, b.column, b.row, scratch, PANEL, depth, part, PANEL, 0);
        for (int m = 0; m < rows; m += 8) {
            int high = rows - m < 8 ? rows - m : 8;
            real *to = c + (size_t)m * width + n;
            if (!sign) {
                transpose(high, block, part + m, 1, PANEL, to, width);
                continue;
            }
            transpose(high, block, part + m, 1, PANEL, turned, 8);
            for (int i = 0; i < high; i++)
                for (int j = 0; j < block; j++) to[(size_t)i * width + j] += sign * turned[i * 8 + j];
        }
    }
}

// Which of a product's matrices is a triangle, whose row i has entries j <= i + past alone. MADE: C; above them anything may be
// left. READ: A; above them it is 0, and need not be there from column `reach` on. READ_TURNED: the same of A transposed.
typedef enum { NONE, MADE, READ, READ_TURNED } Which;
typedef struct {
    Which which;
    int past;  // whole blocks of ROWS
} Triangle;

static inline Triangle below(Which which, int past) { return (Triangle){which, (past + ROWS - 1) / ROWS * ROWS}; }

// Where row i of a triangle ends for those that read it.
static inline int reach(Triangle t, int i, int columns) {
    int end = i / ROWS * ROWS + ROWS + t.past;
    return end < columns ? end : columns;
}

// C `[rows, columns]` of row length `width` from A `[rows, depth]` and B `[depth, columns]`. scratch: depth · PANEL reals.
static void triangular(
    Triangle t, int rows, int depth, int columns, Operand a, Operand b, real *c, int width, int sign, real *restrict scratch
) {
    if (b.column != 1 && rows <= PANEL && columns > PANEL) {
        across(rows, depth, columns, a, b, c, width, sign, scratch);
        return;
    }
    for (int n = 0; n < columns; n += PANEL) {
        int live = columns - n < PANEL ? columns - n : PANEL, narrow = live <= LANES, whole = live == LANES || live == PANEL;
        Operand part = {b.at + n * b.column, b.row, b.column};
        const real *panel = part.at;
        ptrdiff_t stride = part.row;
        if (part.column != 1 || !whole || rows > 2 * ROWS) {  // for few rows what lies in order already is read as it lies
            pack(part, depth, live, scratch);
            panel = scratch, stride = PANEL;
        }
        real edge[ROWS * PANEL];
        int top = t.which == MADE && n > t.past ? n - t.past : 0;
        for (int m = top; m < rows; m += ROWS) {
            int block = rows - m < ROWS ? rows - m : ROWS, left = t.which == READ_TURNED && m > t.past ? m - t.past : 0;
            int deep = (t.which == READ ? reach(t, m, depth) : depth) - left;
            real *to = c + (size_t)m * width + n;
            ptrdiff_t step = width;
            if (!whole) {  // sum beside, then copy what there is room for
                to = edge, step = PANEL;
                if (sign)
                    for (int i = 0; i < block; i++)
                        copy_part(live, c + (size_t)(m + i) * width + n, edge + i * PANEL);
            }
            const real *from = a.at + m * a.row + left * a.column, *by = panel + left * stride;
            if (block == ROWS && narrow) kernel_full_1(from, a.row, a.column, by, stride, deep, to, step, sign);
            else if (block == ROWS) kernel_full_2(from, a.row, a.column, by, stride, deep, to, step, sign);
            else few(block, narrow, from, a.row, a.column, by, stride, deep, to, step, sign);
            if (!whole)
                for (int i = 0; i < block; i++)
                    copy_part(live, edge + i * PANEL, c + (size_t)(m + i) * width + n);
        }
    }
}

static inline void product(
    int rows, int depth, int columns, Operand a, Operand b, real *c, int width, int sign, real *restrict scratch
) {
    triangular(below(NONE, 0), rows, depth, columns, a, b, c, width, sign, scratch);
}

// s F + t G, which lie as C does; F may be C, and G null.
typedef struct {
    real s, t;
    const real *f, *g;
} Blend;

// C = blend − A B, for depths so small that to read and write C is a good part of the work.
static void blended(
    int rows, int depth, int columns, Operand a, Operand b, real *c, int width, Blend blend, real *restrict scratch
) {
    int whole = columns % PANEL == 0 && b.column == 1 ? rows / ROWS * ROWS : 0;
    for (int n = 0; n < columns && whole; n += PANEL) {
        pack((Operand){b.at + n, b.row, 1}, depth, PANEL, scratch);
        for (int m = 0; m < whole; m += ROWS) {
            size_t at = (size_t)m * width + n;
            real part[ROWS * PANEL];
            kernel_full_2(a.at + m * a.row, a.row, a.column, scratch, PANEL, depth, part, PANEL, 0);
            for (int i = 0; i < ROWS; i++, at += width)
                for (int j = 0; j < 2; j++) {
                    vec old = blend.s * *(const vec *)(blend.f + at + j * LANES);
                    if (blend.g) old += blend.t * *(const vec *)(blend.g + at + j * LANES);
                    *(vec *)(c + at + j * LANES) = old - *(const vec *)(part + i * PANEL + j * LANES);
                }
        }
    }
    for (int m = whole; m < rows; m++)
        for (int j = 0; j < columns; j++) {
            size_t at = (size_t)m * width + j;
            c[at] = blend.s * blend.f[at] + (blend.g ? blend.t * blend.g[at] : 0);
        }
    a.at += whole * a.row;
    product(rows - whole, depth, columns, a, b, c + (size_t)whole * width, width, -1, scratch);
}

#endif
