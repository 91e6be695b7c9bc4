/* Devices, the primary context, and each thread's stack of contexts. */
#include "fake.h"

#include <stdio.h>
#include <string.h>

#define DEPTH 64
#define ATTRIBUTES 256

static int initialised;
static long retained;
static char primary; /* its address is the context */
static int attributes[ATTRIBUTES] = {
    [19] = 1,  /* CAN_MAP_HOST_MEMORY */
    [91] = 1,  /* CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM */
    [99] = 1,  /* HOST_REGISTER_SUPPORTED */
    [113] = 1, /* READ_ONLY_HOST_REGISTER_SUPPORTED */
};
static __thread void *stack[DEPTH];
static __thread int depth;
static __thread int mode; /* of captures: 0 global, 1 thread-local, 2 relaxed */

int has_context(void)
{
    return depth > 0 && stack[depth - 1] != NULL;
}

int is_relaxed(void)
{
    return mode == 2;
}

API int cuInit(unsigned flags)
{
    ENTER(cuInit);
    initialised = 1;
    return leave(flags ? INVALID_VALUE : SUCCESS);
}

API int cuDriverGetVersion(int *version)
{
    ENTER(cuDriverGetVersion);
    *version = 13000;
    return leave(SUCCESS);
}

API int cuDeviceGetCount(int *count)
{
    ENTER(cuDeviceGetCount);
    *count = 1;
    return leave(initialised ? SUCCESS : NOT_INITIALIZED);
}

API int cuDeviceGet(int *device, int ordinal)
{
    ENTER(cuDeviceGet);
    *device = ordinal;
    return leave(!initialised ? NOT_INITIALIZED : ordinal ? INVALID_DEVICE : SUCCESS);
}

API int cuDeviceGetName(char *name, int length, int device)
{
    ENTER(cuDeviceGetName);
    snprintf(name, (size_t)length, "Fake GPU");
    return leave(device ? INVALID_DEVICE : SUCCESS);
}

API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER(cuDeviceGetAttribute);
    if (device || attribute < 0 || attribute >= ATTRIBUTES)
        return leave(device ? INVALID_DEVICE : INVALID_VALUE);
    *value = attributes[attribute];
    return leave(SUCCESS);
}

API int cuDeviceGetPCIBusId(char *id, int length, int device)
{
    ENTER(cuDeviceGetPCIBusId);
    snprintf(id, (size_t)length, "ffff:ff:1f.0");
    return leave(device ? INVALID_DEVICE : SUCCESS);
}

API int cuDevicePrimaryCtxRetain(void **context, int device)
{
    ENTER(cuDevicePrimaryCtxRetain);
    if (device)
        return leave(INVALID_DEVICE);
    retained++;
    *context = &primary;
    return leave(SUCCESS);
}

API int cuDevicePrimaryCtxRelease(int device)
{
    ENTER(cuDevicePrimaryCtxRelease);
    if (device || !retained)
        return leave(INVALID_CONTEXT);
    retained--;
    return leave(SUCCESS);
}

API int cuCtxGetCurrent(void **context)
{
    ENTER(cuCtxGetCurrent);
    *context = depth ? stack[depth - 1] : NULL;
    return leave(SUCCESS);
}

API int cuCtxPushCurrent(void *context)
{
    ENTER(cuCtxPushCurrent);
    if (context != &primary || depth == DEPTH)
        return leave(INVALID_CONTEXT);
    stack[depth++] = context;
    return leave(SUCCESS);
}

API int cuCtxPopCurrent(void **context)
{
    ENTER(cuCtxPopCurrent);
    if (!depth)
        return leave(INVALID_CONTEXT);
    depth--;
    if (context)
        *context = stack[depth];
    return leave(SUCCESS);
}

API int cuThreadExchangeStreamCaptureMode(int *exchanged)
{
    ENTER(cuThreadExchangeStreamCaptureMode);
    int former = mode;
    mode = *exchanged;
    *exchanged = former;
    return leave(SUCCESS);
}

/* ---------------------------------------------------------------------------------------------- what tests use */
API long fake_contexts_retained(void)
{
    return retained;
}

/* How many contexts lie on this thread's stack. */
API int fake_context_depth(void)
{
    return depth;
}

API int fake_capture_mode(void)
{
    return mode;
}

/* Put this thread back to where it was, when a failure to do so was what was tested. */
API void fake_reset_thread(int to_depth)
{
    depth = to_depth;
    mode = 0;
}

API void fake_set_attribute(int attribute, int value)
{
    attributes[attribute] = value;
}
