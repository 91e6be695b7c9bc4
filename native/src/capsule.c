/* The producer: capsules whose deleter and destructor need no Python.
 *
 * Struct, shape and strides are one allocation; its context is the owner. The pairs of functions differ in the
 * struct only: DLManagedTensor has no version, no flags, and another order of members.
 */
#include <dlpack/dlpack.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "gather.h"

static const uint64_t KNOWN_FLAGS =
    DLPACK_FLAG_BITMASK_READ_ONLY | DLPACK_FLAG_BITMASK_IS_COPIED | DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED;

static void delete_legacy(DLManagedTensor *self) {
    dlpo_owner *owner = self->manager_ctx;
    free(self);
    dlpo_owner_drop(owner);
}

static void delete_versioned(DLManagedTensorVersioned *self) {
    dlpo_owner *owner = self->manager_ctx;
    free(self);
    dlpo_owner_drop(owner);
}

/* A consumer renames the capsule; one that still has its name was never consumed. PyCapsule_IsValid sets no error
 * and leaves a pending one alone. */
static void destroy_legacy(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (managed->deleter) managed->deleter(managed);
}

static void destroy_versioned(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor_versioned")) return;
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (managed->deleter) managed->deleter(managed);
}

/* Copy a tensor whose shape and strides go to `numbers`. DLPack 1.2 wants strides wherever there is a dimension. */
static void settle(DLTensor *tensor, const DLTensor *from, int64_t *numbers) {
    size_t ndim = (size_t)from->ndim;
    *tensor = *from;
    tensor->shape = tensor->strides = NULL;
    if (ndim == 0) return;
    tensor->shape = memcpy(numbers, from->shape, ndim * sizeof *numbers);
    tensor->strides = memcpy(numbers + ndim, from->strides, ndim * sizeof *numbers);
}

static PyObject *new_legacy(dlpo_owner *owner, const DLTensor *tensor) {
    DLManagedTensor *managed = malloc(sizeof *managed + 2 * sizeof(int64_t) * (size_t)tensor->ndim);
    if (!managed) return PyErr_NoMemory();
    settle(&managed->dl_tensor, tensor, (int64_t *)(managed + 1));
    managed->manager_ctx = owner;
    managed->deleter = delete_legacy;
    PyObject *capsule = PyCapsule_New(managed, "dltensor", destroy_legacy);
    if (!capsule) free(managed);
    return capsule;
}

static PyObject *new_versioned(dlpo_owner *owner, const DLTensor *tensor, uint64_t flags) {
    DLManagedTensorVersioned *managed = malloc(sizeof *managed + 2 * sizeof(int64_t) * (size_t)tensor->ndim);
    if (!managed) return PyErr_NoMemory();
    settle(&managed->dl_tensor, tensor, (int64_t *)(managed + 1));
    managed->version = (DLPackVersion){DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    managed->flags = flags;
    managed->manager_ctx = owner;
    managed->deleter = delete_versioned;
    PyObject *capsule = PyCapsule_New(managed, "dltensor_versioned", destroy_versioned);
    if (!capsule) free(managed);
    return capsule;
}

static PyObject *dlpack_capsule(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"owner", "pointer", "device", "dtype", "shape", "strides", "flags", "versioned", NULL};
    static const uint64_t device_most[] = {INT32_MAX, INT32_MAX}, dtype_most[] = {UINT8_MAX, UINT8_MAX, UINT16_MAX};
    PyObject *owner_arg, *pointer_arg, *device_arg, *dtype_arg, *shape_arg, *strides_arg, *flags_arg;
    int versioned, ndim = -1;
    uint64_t pointer, device[2], dtype[3], flags;
    int64_t shape[DLPO_MAX_NDIM], strides[DLPO_MAX_NDIM];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOOp:dlpack_capsule", names, &owner_arg, &pointer_arg,
                                     &device_arg, &dtype_arg, &shape_arg, &strides_arg, &flags_arg, &versioned) ||
        !arg_unsigned(pointer_arg, "pointer", UINTPTR_MAX, &pointer) ||
        !arg_fields(device_arg, "device", 2, device_most, device) ||
        !arg_fields(dtype_arg, "dtype", 3, dtype_most, dtype) || !arg_int64s(shape_arg, "shape", &ndim, shape) ||
        !arg_int64s(strides_arg, "strides", &ndim, strides) ||
        !arg_unsigned(flags_arg, "flags", UINT64_MAX, &flags))
        return NULL;
    if (flags & ~KNOWN_FLAGS)
        return PyErr_Format(PyExc_ValueError, "flags=%llu has bits that DLPack %d.%d does not define",
                            (unsigned long long)flags, DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    if (flags && !versioned)
        return PyErr_Format(PyExc_ValueError, "flags=%llu cannot be said by a legacy capsule; make a versioned one",
                            (unsigned long long)flags);
    const char *fault = layout_fault(pointer, ndim, shape, strides, (unsigned)(dtype[1] * dtype[2]));
    if (fault)
        return PyErr_Format(PyExc_ValueError, "no tensor has shape %R with strides %R and dtype %R: %s", shape_arg,
                            strides_arg, dtype_arg, fault);

    DLTensor tensor = {
        .data = (void *)(uintptr_t)pointer,
        .device = {(DLDeviceType)device[0], (int32_t)device[1]},
        .ndim = ndim,
        .dtype = {(uint8_t)dtype[0], (uint8_t)dtype[1], (uint16_t)dtype[2]},
        .shape = shape,
        .strides = strides,
        .byte_offset = 0,
    };
    dlpo_owner *owner = acquire_owner(state_of(module), owner_arg);
    if (!owner) return NULL;
    PyObject *capsule = versioned ? new_versioned(owner, &tensor, flags) : new_legacy(owner, &tensor);
    if (!capsule) dlpo_owner_drop(owner);
    return capsule;
}

PyMethodDef capsule_methods[] = {
    {"dlpack_capsule", WITH_KEYWORDS(dlpack_capsule), METH_VARARGS | METH_KEYWORDS,
     "dlpack_capsule($module, owner, pointer, device, dtype, shape, strides, flags, versioned)\n--\n\n"
     "Make a capsule, ``dltensor`` or ``dltensor_versioned``; struct, shape and strides are one allocation.\n\n"
     "It holds one count of `owner` until the consumer calls the deleter or the unconsumed capsule is destroyed."},
    {NULL, NULL, 0, NULL},
};
