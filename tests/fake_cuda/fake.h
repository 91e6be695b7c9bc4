/* A fake libcuda.so.1: device memory is host memory, streams are queues, and any call fails when it is told to.
 *
 * What it stands for is the part of the driver API that dlpoffload uses, with its checks, order and errors; it has
 * no kernels. `gate.c` counts calls and fails them, `context.c` has devices and contexts, `memory.c` allocations and
 * registrations, `streams.c` streams, events and captures. Tests drive it through the functions named fake_*.
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

/* CUresult, as far as it is used here. */
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    DEINITIALIZED = 4,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    UNKNOWN = 999,
};

/* What a call is subject to. */
enum {
    FREE_STANDING = 0, /* needs no context, and works after one is lost */
    IN_CONTEXT = 1,    /* needs a current context; after a sticky error it fails with that */
    UNSAFE = 2,        /* breaks a capture on another thread unless this one is in relaxed mode */
};

/* Every call, and what it is subject to. The name is the one that cuGetProcAddress is asked for. */
#define CALLS(X)                                          \
    X(cuInit, FREE_STANDING)                              \
    X(cuDriverGetVersion, FREE_STANDING)                  \
    X(cuDeviceGetCount, FREE_STANDING)                    \
    X(cuDeviceGet, FREE_STANDING)                         \
    X(cuDeviceGetName, FREE_STANDING)                     \
    X(cuDeviceGetAttribute, FREE_STANDING)                \
    X(cuDeviceGetPCIBusId, FREE_STANDING)                 \
    X(cuDevicePrimaryCtxRetain, FREE_STANDING)            \
    X(cuDevicePrimaryCtxRelease, FREE_STANDING)           \
    X(cuCtxGetCurrent, FREE_STANDING)                     \
    X(cuCtxPushCurrent, FREE_STANDING)                    \
    X(cuCtxPopCurrent, FREE_STANDING)                     \
    X(cuThreadExchangeStreamCaptureMode, FREE_STANDING)   \
    X(cuCtxSynchronize, IN_CONTEXT)                       \
    X(cuMemGetInfo, IN_CONTEXT)                           \
    X(cuMemHostAlloc, IN_CONTEXT | UNSAFE)                \
    X(cuMemFreeHost, IN_CONTEXT | UNSAFE)                 \
    X(cuMemHostRegister, IN_CONTEXT | UNSAFE)             \
    X(cuMemHostUnregister, IN_CONTEXT | UNSAFE)           \
    X(cuMemHostGetDevicePointer, IN_CONTEXT)              \
    X(cuPointerGetAttribute, IN_CONTEXT)                  \
    X(cuMemAlloc, IN_CONTEXT | UNSAFE)                    \
    X(cuMemFree, IN_CONTEXT | UNSAFE)                     \
    X(cuMemcpyAsync, IN_CONTEXT)                          \
    X(cuMemcpy, IN_CONTEXT | UNSAFE)                      \
    X(cuMemsetD8Async, IN_CONTEXT)                        \
    X(cuStreamCreate, IN_CONTEXT)                         \
    X(cuStreamDestroy, IN_CONTEXT)                        \
    X(cuStreamSynchronize, IN_CONTEXT | UNSAFE)           \
    X(cuStreamWaitEvent, IN_CONTEXT)                      \
    X(cuStreamIsCapturing, IN_CONTEXT)                    \
    X(cuStreamGetCaptureInfo, IN_CONTEXT)                 \
    X(cuEventCreate, IN_CONTEXT)                          \
    X(cuEventDestroy, IN_CONTEXT)                         \
    X(cuEventRecord, IN_CONTEXT)                          \
    X(cuEventQuery, IN_CONTEXT | UNSAFE)                  \
    X(cuEventSynchronize, IN_CONTEXT | UNSAFE)            \
    X(cuEventElapsedTime, IN_CONTEXT)                     \
    X(cuUserObjectCreate, IN_CONTEXT)                     \
    X(cuUserObjectRelease, IN_CONTEXT)                    \
    X(cuGraphRetainUserObject, IN_CONTEXT)

#define X(name, subject) CALL_##name,
enum call { CALLS(X) CALL_COUNT };
#undef X

/* Held over every call. */
extern pthread_mutex_t fake_lock;

/* Count a call; what it is to fail with, or SUCCESS. Under the lock. */
int gate(enum call call);

/* Begin and end an entry point: takes the lock, and returns when the gate says so. */
#define ENTER(name)                         \
    pthread_mutex_lock(&fake_lock);         \
    do {                                    \
        int refused_ = gate(CALL_##name);   \
        if (refused_)                       \
            return leave(refused_);         \
    } while (0)

static inline int leave(int result)
{
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* Remember a use that no correct program makes; tests read them. Under the lock. */
void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* context.c */
int has_context(void);
int is_relaxed(void);

/* memory.c. Zero, or what the copy is refused with. */
int check_range(uintptr_t start, size_t nbytes, int writes);
int is_pageable(uintptr_t start);
void move_bytes(uintptr_t destination, uintptr_t source, size_t nbytes);
void fill_bytes(uintptr_t destination, int value, size_t nbytes);

/* streams.c */
void run_everything(void);
int captures_under_way(void);

#endif
