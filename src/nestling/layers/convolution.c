// y = SiLU(z), z_t = Σ_j w_j ∘ x_{t−j}, for each channel: forward and backward in one pass over the tokens, as nothing but the
// products' own operands then passes through the cache.

#include "activation.h"

#include <pthread.h>

#define WIDTH 8      // taps, at most
#define CHANNELS 1024  // at a time, at most: rows long enough to be fetched ahead

typedef struct {
    int lanes, time, channels, width, threads;
    const real *x, *tail, *weight;  // `[lane, time, channel]`, `[lane, width − 1, channel]` before it, `[width, channel]`
    real *y;
    const real *of_y;  // null: forward
    real *of_x, *of_tail, *of_weight;  // of_weight `[lane, width, channel]`, summed by the caller; null: not asked for
} Convolution;

// The token `back` before t, which may lie in the tail.
static inline const real *before(const Convolution *c, int lane, int t, int first) {
    return t >= 0 ? c->x + ((size_t)lane * c->time + t) * c->channels + first
                  : c->tail + ((size_t)lane * (c->width - 1) + c->width - 1 + t) * c->channels + first;
}

static inline real *place(const Convolution *c, int lane, int t, int first) {
    return t >= 0 ? c->of_x + ((size_t)lane * c->time + t) * c->channels + first
                  : c->of_tail + ((size_t)lane * (c->width - 1) + c->width - 1 + t) * c->channels + first;
}

static void taps(const Convolution *c, int lane, int t, int first, int n, real *restrict z) {
    const real *w = c->weight + first;
    const real *restrict x = before(c, lane, t, first);
    for (int i = 0; i < n; i++) z[i] = w[i] * x[i];
    for (int j = 1; j < c->width; j++) {
        const real *restrict earlier = before(c, lane, t - j, first);
        const real *restrict tap = w + (size_t)j * c->channels;
        for (int i = 0; i < n; i++) z[i] += tap[i] * earlier[i];
    }
}

static void forward(const Convolution *c, int lane, int first, int n) {
    real z[CHANNELS];
    for (int t = 0; t < c->time; t++) {
        taps(c, lane, t, first, n, z);
        activate(SILU, n, z, c->y + ((size_t)lane * c->time + t) * c->channels + first);
    }
}

static void backward(const Convolution *c, int lane, int first, int n) {
    real z[CHANNELS], of_z[CHANNELS], of_weight[WIDTH][CHANNELS] = {0};
    for (int t = 1 - c->width; t < c->time; t++) memset(place(c, lane, t, first), 0, n * sizeof(real));
    for (int t = 0; t < c->time; t++) {
        taps(c, lane, t, first, n, z);
        memcpy(of_z, c->of_y + ((size_t)lane * c->time + t) * c->channels + first, n * sizeof(real));
        back_through(SILU, n, z, of_z);
        for (int j = 0; j < c->width; j++) {
            const real *restrict x = before(c, lane, t - j, first), *restrict w = c->weight + (size_t)j * c->channels + first;
            real *restrict of_x = place(c, lane, t - j, first), *restrict of_w = of_weight[j];
            if (c->of_weight)
                for (int i = 0; i < n; i++) of_w[i] += of_z[i] * x[i], of_x[i] += of_z[i] * w[i];
            else
                for (int i = 0; i < n; i++) of_x[i] += of_z[i] * w[i];
        }
    }
    for (int j = 0; j < c->width && c->of_weight; j++)
        memcpy(c->of_weight + ((size_t)lane * c->width + j) * c->channels + first, of_weight[j], n * sizeof(real));
}

typedef struct {
    const Convolution *convolution;
    int first;
} Share;

static void *work(void *given) {
    const Share *share = given;
    const Convolution *c = share->convolution;
    int columns = (c->channels + CHANNELS - 1) / CHANNELS;
    while (c->lanes * columns < c->threads && columns * 64 < c->channels) columns++;
    int most = (c->channels + columns - 1) / columns;
    for (int part = share->first; part < c->lanes * columns; part += c->threads) {
        int first = part % columns * most, n = c->channels - first < most ? c->channels - first : most;
        if (n <= 0) continue;
        if (c->of_y) backward(c, part / columns, first, n);
        else forward(c, part / columns, first, n);
    }
    return 0;
}

void nestling_convolution(const Convolution *c) {
    Share shares[64];
    pthread_t threads[64];
    int started[64] = {0};
    for (int n = 0; n < c->threads; n++) shares[n] = (Share){c, n};
    for (int n = 1; n < c->threads; n++) started[n] = !pthread_create(&threads[n], 0, work, &shares[n]);
    work(&shares[0]);
    for (int n = 1; n < c->threads; n++)
        if (started[n]) pthread_join(threads[n], 0);
        else work(&shares[n]);
}
