// How a lane is cut into runs of tokens, and where a memory's weights lie outside.

#ifndef NESTLING_STORE_H
#define NESTLING_STORE_H

#include "network.h"

enum { FRESH = 1, CLOSES = 2 };  // the lane begins anew before the run; with it a chunk closes (of a second period: twice that)

// Tokens that follow one another, with those of the window before them.  tokens 0: the lane has no such run.
typedef struct {
    int first, halo, tokens, flags;
} Run;

// Of all memories, each `[memory, in, out]` by layer; as given, as they end, and gradients: those of the end come in, those of
// the start leave. start: what a lane begins anew with.  Null: not there; of `from`, it is 0; of `of_w`, `of_s` and `of_a`, nobody
// asks for it.
typedef struct {
    const real *w[DEPTH], *s[DEPTH], *a[DEPTH], *start[DEPTH];
    real *w_end[DEPTH], *s_end[DEPTH], *a_end[DEPTH];
    const real *from_w[DEPTH], *from_s[DEPTH], *from_a[DEPTH];
    real *of_w[DEPTH], *of_s[DEPTH], *of_a[DEPTH], *of_start[DEPTH];
} Store;

#endif
