/* Gather a strided tensor into row-major order: plain C. */
#ifndef DLPO_GATHER_H
#define DLPO_GATHER_H

#include <stddef.h>
#include <stdint.h>

/* Most dimensions that a tensor may have here: NumPy's and the array API's limit. */
enum { DLPO_MAX_NDIM = 64 };

/* No length is negative, nothing overflows, destination and source do not overlap. */
void dlpo_gather(void *destination, const void *source, size_t itemsize, int ndim, const int64_t *shape,
                 const int64_t *strides);

#endif
