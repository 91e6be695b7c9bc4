#include "gather.h"

#include <string.h>

/* One row: `n` elements, `step` bytes apart. Fixed sizes let the compiler make loads and stores of the memcpy. */
#define ROW(size)                                                    \
    case size:                                                       \
        for (int64_t i = 0; i < n; i++, to += size, from += step) memcpy(to, from, size); \
        break

static void gather_row(char *to, const char *from, size_t itemsize, int64_t n, int64_t step) {
    if (step == (int64_t)itemsize) {
        memcpy(to, from, (size_t)n * itemsize);
        return;
    }
    switch (itemsize) {
        ROW(1);
        ROW(2);
        ROW(4);
        ROW(8);
        ROW(16);
        default:
            for (int64_t i = 0; i < n; i++, to += itemsize, from += step) memcpy(to, from, itemsize);
    }
}

void dlpo_gather(void *destination, const void *source, size_t itemsize, int ndim, const int64_t *shape,
                 const int64_t *strides) {
    /* Lengths of one go, and neighbours that lie in a row become one dimension: strides in bytes from here on. */
    int64_t lengths[DLPO_MAX_NDIM], steps[DLPO_MAX_NDIM], index[DLPO_MAX_NDIM] = {0};
    int rank = 0;
    for (int d = 0; d < ndim; d++) {
        if (shape[d] == 0) return;
        if (shape[d] == 1) continue;
        int64_t step = strides[d] * (int64_t)itemsize;
        if (rank && steps[rank - 1] == shape[d] * step) {
            lengths[rank - 1] *= shape[d];
            steps[rank - 1] = step;
        } else {
            lengths[rank] = shape[d];
            steps[rank++] = step;
        }
    }
    if (rank == 0) {
        memcpy(destination, source, itemsize);
        return;
    }

    char *to = destination;
    const char *from = source;
    int inner = rank - 1;
    size_t row = (size_t)lengths[inner] * itemsize;
    for (;;) {
        gather_row(to, from, itemsize, lengths[inner], steps[inner]);
        to += row;
        int d = inner - 1;
        for (; d >= 0; d--) { /* count the outer index up, like an odometer */
            from += steps[d];
            if (++index[d] < lengths[d]) break;
            from -= steps[d] * lengths[d];
            index[d] = 0;
        }
        if (d < 0) return;
    }
}
