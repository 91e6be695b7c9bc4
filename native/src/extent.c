/* Whether a shape with its strides describes memory that can exist. */
#include "core.h"
#include "gather.h"

const char *layout_fault(uint64_t pointer, int ndim, const int64_t *shape, const int64_t *strides,
                         unsigned itembits) {
    if (ndim < 0 || ndim > DLPO_MAX_NDIM) return "the number of dimensions is not from 0 to 64";
    if (ndim > 0 && !shape) return "there is no shape";
    if (itembits == 0) return "an element has no bits";
    bool empty = false;
    for (int d = 0; d < ndim; d++) {
        if (shape[d] < 0) return "a length in the shape is negative";
        empty |= shape[d] == 0;
    }
    if (empty) return NULL; /* no byte of it is ever touched */
    if (pointer == 0) return "the data pointer is NULL although there are elements";

    /* Offsets of the lowest and the highest element from the first one, in elements. */
    int64_t numel = 1, low = 0, high = 0;
    for (int d = 0; d < ndim; d++)
        if (__builtin_mul_overflow(numel, shape[d], &numel)) return "the number of elements overflows";
    if (!strides) high = numel - 1;
    for (int d = 0; strides && d < ndim; d++) {
        int64_t reach;
        int64_t *side = strides[d] < 0 ? &low : &high;
        if (__builtin_mul_overflow(strides[d], shape[d] - 1, &reach) || __builtin_add_overflow(*side, reach, side))
            return "the strides overflow";
    }
    int64_t bits_up, bits_down;
    if (high == INT64_MAX || __builtin_mul_overflow(high + 1, (int64_t)itembits, &bits_up) ||
        __builtin_mul_overflow(low, (int64_t)itembits, &bits_down))
        return "the number of bytes overflows";
    uint64_t up = (uint64_t)bits_up / 8 + (bits_up % 8 != 0), down = -(uint64_t)bits_down / 8;
    if (up - 1 > UINT64_MAX - pointer || down > pointer) return "the tensor leaves the address space";
    return NULL;
}
