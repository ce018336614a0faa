// Independent parts over threads.

#ifndef NESTLING_SHARE_H
#define NESTLING_SHARE_H

#include "matrix.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define MOST_THREADS 64

// Not 0, for tests: every space is filled with NaN before a part begins, so that a cell which the part did not write shows.
int nestling_poison = 0;

// Does part `part` of a task in a space of its thread's own.
typedef void (*Work)(const void *task, int part, real *space);

typedef struct {
    const void *task;
    Work work;
    int parts, *next;
    size_t reals;
} Share;

static void *do_share(void *given) {
    Share *s = given;
    size_t bytes = (s->reals * sizeof(real) + 63) / 64 * 64;
    real *space = aligned_alloc(64, bytes);
    if (!space) return 0;  // the others do its parts
    for (int part; (part = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->parts;) {
        if (nestling_poison) memset(space, 0xff, bytes);
        s->work(s->task, part, space);
    }
    free(space);
    return 0;
}

// Returns 0, or 1 if there was memory for no thread's space.
static int spread(const void *task, Work work, int parts, int threads, size_t reals) {
    Share shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    int started[MOST_THREADS] = {0}, next = 0;
    for (int n = 0; n < threads; n++) shares[n] = (Share){task, work, parts, &next, reals};
    for (int n = 1; n < threads; n++) started[n] = !pthread_create(&ids[n], 0, do_share, &shares[n]);
    do_share(&shares[0]);
    for (int n = 1; n < threads; n++)
        if (started[n]) pthread_join(ids[n], 0);
    return next < parts;
}

#endif
