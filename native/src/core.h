/* What the Python side of the module shares. */
#ifndef DLPO_CORE_H
#define DLPO_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

#include "owner.h"

typedef struct {
    PyTypeObject *owner_type;
    PyTypeObject *reference_type;
    PyTypeObject *import_type;
} module_state;

static inline module_state *state_of(PyObject *module) { return PyModule_GetState(module); }

/* ISO C has no conversion from function to object pointer, and Python's slots ask for one. */
#define SLOT(function) (__extension__(void *)(function))
/* A function with keywords, as the method table takes it. */
#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

/* args.c: Python arguments to C integers. False with TypeError or OverflowError set, naming the argument. */
bool arg_unsigned(PyObject *value, const char *name, uint64_t most, uint64_t *result);
bool arg_signed(PyObject *value, const char *name, int64_t *result);
/* A tuple of at most DLPO_MAX_NDIM integers; `*ndim` is how many, or must match when it is not negative. */
bool arg_int64s(PyObject *value, const char *name, int *ndim, int64_t *result);
/* A tuple of exactly `n` integers, each from 0 to `most[i]`. */
bool arg_fields(PyObject *value, const char *name, int n, const uint64_t *most, uint64_t *result);

/* extent.c: what is wrong with a tensor's layout; NULL when nothing is. `strides` NULL means row-major. */
const char *layout_fault(uint64_t pointer, int ndim, const int64_t *shape, const int64_t *strides,
                         unsigned itembits);

extern PyType_Spec owner_spec, reference_spec, import_spec;

/* Count one more user of an Owner or Reference; NULL with an error set. */
dlpo_owner *acquire_owner(module_state *state, PyObject *owner);

extern PyMethodDef reclaim_methods[], capsule_methods[], import_methods[], memory_methods[];

#endif
