// y = SiLU(z), z_t = Σ_j w_j ∘ x_{t−j}, for each channel: forward and backward in one pass over the tokens, as nothing but the
// products' own operands then passes through the cache. The result comes in parts, each of its own source among x's channels.

#include "activation.h"

#include <pthread.h>

#define WIDTH 8        // taps, at most
#define PARTS 4        // at most
#define CHANNELS 1024  // of all parts at a time, at most: rows long enough to be fetched ahead

typedef struct {
    int lanes, time, width, threads;
    int channels, sources, parts;   // of a part or source; how many
    int source[PARTS];              // of each part
    const real *x, *tail, *weight;  // `[lane, time, source, channel]`, `[lane, width − 1, part, channel]`, `[width, part, channel]`
    real *y[PARTS];                 // `[lane, time, channel]`
    const real *of_y[PARTS];        // null: forward
    real *of_x, *of_tail, *of_weight;  // of_weight `[lane, width, part, channel]`, summed by the caller; null: not asked for
} Convolution;

// Where a part has the token `back` before t, which may lie in the tail.
static inline size_t in_x(const Convolution *c, int lane, int t, int part) {
    return (((size_t)lane * c->time + t) * c->sources + c->source[part]) * c->channels;
}

static inline size_t in_tail(const Convolution *c, int lane, int t, int part) {
    return (((size_t)lane * (c->width - 1) + c->width - 1 + t) * c->parts + part) * c->channels;
}

static inline const real *before(const Convolution *c, int lane, int t, int part, int first) {
    return (t >= 0 ? c->x + in_x(c, lane, t, part) : c->tail + in_tail(c, lane, t, part)) + first;
}

static inline real *place(const Convolution *c, int lane, int t, int part, int first) {
    return (t >= 0 ? c->of_x + in_x(c, lane, t, part) : c->of_tail + in_tail(c, lane, t, part)) + first;
}

static inline size_t in_weight(const Convolution *c, int j, int part, int first) {
    return ((size_t)j * c->parts + part) * c->channels + first;
}

static inline size_t in_y(const Convolution *c, int lane, int t, int first) {
    return ((size_t)lane * c->time + t) * c->channels + first;
}

static void taps(const Convolution *c, int lane, int t, int part, int first, int n, real *restrict z) {
    const real *restrict w = c->weight + in_weight(c, 0, part, first);
    const real *restrict x = before(c, lane, t, part, first);
    for (int i = 0; i < n; i++) z[i] = w[i] * x[i];
    for (int j = 1; j < c->width; j++) {
        const real *restrict earlier = before(c, lane, t - j, part, first);
        const real *restrict tap = c->weight + in_weight(c, j, part, first);
        for (int i = 0; i < n; i++) z[i] += tap[i] * earlier[i];
    }
}

static void forward(const Convolution *c, int lane, int first, int n) {
    real z[CHANNELS];
    for (int t = 0; t < c->time; t++)
        for (int part = 0; part < c->parts; part++) {
            taps(c, lane, t, part, first, n, z);
            activate(SILU, n, z, c->y[part] + in_y(c, lane, t, first));
        }
}

static void backward(const Convolution *c, int lane, int first, int n) {
    real z[CHANNELS], of_z[CHANNELS], of_weight[WIDTH * CHANNELS];
    memset(of_weight, 0, (size_t)c->width * c->parts * n * sizeof(real));
    for (int t = 1 - c->width; t < c->time; t++)
        for (int part = 0; part < c->parts; part++) memset(place(c, lane, t, part, first), 0, n * sizeof(real));
    for (int t = 0; t < c->time; t++)
        for (int part = 0; part < c->parts; part++) {
            taps(c, lane, t, part, first, n, z);
            memcpy(of_z, c->of_y[part] + in_y(c, lane, t, first), n * sizeof(real));
            back_through(SILU, n, z, of_z);
            for (int j = 0; j < c->width; j++) {
                const real *restrict x = before(c, lane, t - j, part, first);
                const real *restrict w = c->weight + in_weight(c, j, part, first);
                real *restrict of_x = place(c, lane, t - j, part, first);
                real *restrict of_w = of_weight + ((size_t)j * c->parts + part) * n;
                if (c->of_weight)
                    for (int i = 0; i < n; i++) of_w[i] += of_z[i] * x[i], of_x[i] += of_z[i] * w[i];
                else
                    for (int i = 0; i < n; i++) of_x[i] += of_z[i] * w[i];
            }
        }
    for (int j = 0; j < c->width && c->of_weight; j++)
        for (int part = 0; part < c->parts; part++) {
            real *to = c->of_weight + (size_t)lane * c->width * c->parts * c->channels + in_weight(c, j, part, first);
            memcpy(to, of_weight + ((size_t)j * c->parts + part) * n, n * sizeof(real));
        }
}

typedef struct {
    const Convolution *convolution;
    int first;
} Share;

static void *work(void *given) {
    const Share *share = given;
    const Convolution *c = share->convolution;
    int room = CHANNELS / c->parts, columns = (c->channels + room - 1) / room;
    while (c->lanes * columns < c->threads && columns * 64 < c->channels) columns++;
    int most = (c->channels + columns - 1) / columns;
    for (int part = share->first; part < c->lanes * columns; part += c->threads) {
        int first = part % columns * most, n = c->channels - first < most ? c->channels - first : most;
        if (n <= 0) continue;
        if (c->of_y[0]) backward(c, part / columns, first, n);
        else forward(c, part / columns, first, n);
    }
    return 0;
}

const size_t nestling_size = sizeof(Convolution);

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
