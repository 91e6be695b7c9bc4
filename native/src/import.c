/* The consumer: take a capsule over, check what it says, call its deleter once.
 *
 * Everything is read once, when the capsule is taken, and what was checked is what is told from then on: the producer
 * may lie, and change its struct afterwards. It is copied out, because a lying pointer need not be aligned either.
 */
#include <dlpack/dlpack.h>
#include <string.h>

#include "core.h"
#include "gather.h"

typedef struct {
    PyObject_HEAD
    DLManagedTensor *legacy; /* one of the two; neither before the capsule is taken */
    DLManagedTensorVersioned *versioned;
    union {
        void (*legacy)(DLManagedTensor *);
        void (*versioned)(DLManagedTensorVersioned *);
    } deleter;
    DLTensor tensor; /* its shape and strides are the producer's: these are ours */
    PyObject *shape, *strides;
    DLPackVersion version;
    uint64_t flags;
} import_object;

static import_object *import_of(PyObject *self) { return (import_object *)self; }

static uint64_t first_element(const DLTensor *tensor) {
    return (uint64_t)(uintptr_t)tensor->data + tensor->byte_offset;
}

static PyObject *int64_tuple(const int64_t *numbers, int n) {
    PyObject *tuple = PyTuple_New(n);
    for (int i = 0; tuple && i < n; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (!number || PyTuple_SetItem(tuple, i, number) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* ------------------------------------------------------------------------------------------------ the type */

static void import_dealloc(PyObject *self) {
    import_object *import = import_of(self);
    PyTypeObject *type = Py_TYPE(self);
    Py_CLEAR(import->shape);
    Py_CLEAR(import->strides);
    if (import->legacy || import->versioned) {
        /* The producer's deleter may run Python, and this may happen while an exception is on its way. */
        PyObject *kind, *value, *traceback;
        PyErr_Fetch(&kind, &value, &traceback);
        if (import->legacy && import->deleter.legacy) import->deleter.legacy(import->legacy);
        if (import->versioned && import->deleter.versioned) import->deleter.versioned(import->versioned);
        if (PyErr_Occurred()) PyErr_WriteUnraisable(NULL);
        PyErr_Restore(kind, value, traceback);
    }
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *get_pointer(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(first_element(&import_of(self)->tensor));
}

static PyObject *get_device(PyObject *self, void *closure) {
    (void)closure;
    DLDevice device = import_of(self)->tensor.device;
    return Py_BuildValue("(ii)", (int)device.device_type, (int)device.device_id);
}

static PyObject *get_dtype(PyObject *self, void *closure) {
    (void)closure;
    DLDataType dtype = import_of(self)->tensor.dtype;
    return Py_BuildValue("(iii)", (int)dtype.code, (int)dtype.bits, (int)dtype.lanes);
}

static PyObject *get_shape(PyObject *self, void *closure) {
    (void)closure;
    return Py_NewRef(import_of(self)->shape);
}

static PyObject *get_strides(PyObject *self, void *closure) {
    (void)closure;
    return Py_NewRef(import_of(self)->strides);
}

static PyObject *get_flags(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(import_of(self)->flags);
}

static PyObject *get_version(PyObject *self, void *closure) {
    (void)closure;
    import_object *import = import_of(self);
    if (!import->versioned) Py_RETURN_NONE;
    return Py_BuildValue("(II)", (unsigned)import->version.major, (unsigned)import->version.minor);
}

static PyGetSetDef import_getset[] = {
    {"pointer", get_pointer, NULL, "Address of the first element: ``data`` plus ``byte_offset``.", NULL},
    {"device", get_device, NULL, "DLPack device type and number.", NULL},
    {"dtype", get_dtype, NULL, "DLPack type code, bits and lanes.", NULL},
    {"shape", get_shape, NULL, "In elements.", NULL},
    {"strides", get_strides, NULL, "In elements; None when the producer left them out (row-major).", NULL},
    {"flags", get_flags, NULL, "DLPack flag bits; 0 for a legacy capsule.", NULL},
    {"version", get_version, NULL, "DLPack version; None for a legacy capsule.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot import_slots[] = {
    {Py_tp_doc, "A consumed capsule. Its deallocation calls the producer's deleter once."},
    {Py_tp_dealloc, SLOT(import_dealloc)},
    {Py_tp_getset, import_getset},
    {0, NULL},
};

PyType_Spec import_spec = {
    .name = "dlpoffload._native.Import",
    .basicsize = sizeof(import_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = import_slots,
};

/* ----------------------------------------------------------------------------------------------- consuming */

/* Copy shape and strides out where there may be any, and check the layout. */
static const char *tensor_fault(const DLTensor *tensor, int64_t *shape, int64_t *strides) {
    if (tensor->byte_offset > UINT64_MAX - (uint64_t)(uintptr_t)tensor->data) return "the byte offset overflows";
    if (tensor->ndim > 0 && tensor->ndim <= DLPO_MAX_NDIM && tensor->shape) {
        size_t nbytes = (size_t)tensor->ndim * sizeof *shape;
        memcpy(shape, tensor->shape, nbytes);
        if (tensor->strides) memcpy(strides, tensor->strides, nbytes);
    }
    return layout_fault(first_element(tensor), tensor->ndim, tensor->shape ? shape : NULL,
                        tensor->strides ? strides : NULL, (unsigned)tensor->dtype.bits * tensor->dtype.lanes);
}

static bool refuse(const char *fault) {
    PyErr_Format(PyExc_ValueError, "the capsule describes no tensor: %s", fault);
    return false;
}

/* The name says what is in a capsule, and whether somebody was here before. */
static bool refuse_name(PyObject *capsule) {
    if (!PyCapsule_CheckExact(capsule)) {
        PyErr_Format(PyExc_ValueError, "a DLPack capsule is wanted, not %R", capsule);
    } else if (PyCapsule_IsValid(capsule, "used_dltensor") || PyCapsule_IsValid(capsule, "used_dltensor_versioned")) {
        PyErr_SetString(PyExc_ValueError, "the capsule was consumed before; ask the producer for a new one");
    } else {
        const char *name = PyCapsule_GetName(capsule);
        if (!name) PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "a capsule named \"%s\" is no DLPack capsule", name ? name : "");
    }
    return false;
}

static bool take(PyObject *capsule, import_object *import) {
    DLManagedTensor *legacy = NULL;
    DLManagedTensorVersioned *versioned = NULL;
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        legacy = PyCapsule_GetPointer(capsule, "dltensor");
        DLManagedTensor said;
        memcpy(&said, legacy, sizeof said);
        import->tensor = said.dl_tensor;
        import->deleter.legacy = said.deleter;
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        versioned = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        memcpy(&import->version, versioned, sizeof import->version);
        if (import->version.major != DLPACK_MAJOR_VERSION) { /* then nothing behind the deleter may be read */
            PyErr_Format(PyExc_ValueError, "the capsule is of DLPack %u.%u; this library reads %d.x",
                         (unsigned)import->version.major, (unsigned)import->version.minor, DLPACK_MAJOR_VERSION);
            return false;
        }
        DLManagedTensorVersioned said;
        memcpy(&said, versioned, sizeof said);
        import->tensor = said.dl_tensor;
        import->deleter.versioned = said.deleter;
        import->flags = said.flags;
    } else {
        return refuse_name(capsule);
    }
    int64_t shape[DLPO_MAX_NDIM], strides[DLPO_MAX_NDIM];
    const DLTensor *tensor = &import->tensor;
    const char *fault = tensor_fault(tensor, shape, strides);
    if (fault) return refuse(fault);
    import->shape = int64_tuple(shape, tensor->ndim);
    import->strides = tensor->ndim && !tensor->strides ? Py_NewRef(Py_None) : int64_tuple(strides, tensor->ndim);
    if (!import->shape || !import->strides) return false;
    if (PyCapsule_SetName(capsule, legacy ? "used_dltensor" : "used_dltensor_versioned")) return false;
    import->legacy = legacy;
    import->versioned = versioned;
    return true;
}

static PyObject *consume(PyObject *module, PyObject *capsule) {
    import_object *import = (import_object *)PyType_GenericAlloc(state_of(module)->import_type, 0);
    if (!import) return NULL;
    bool taken;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(capsule);
#endif
    taken = take(capsule, import);
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
    if (taken) return (PyObject *)import;
    Py_DECREF(import); /* it has taken nothing, so the error stays */
    return NULL;
}

PyMethodDef import_methods[] = {
    {"consume", consume, METH_O,
     "consume($module, capsule, /)\n--\n\nTake a capsule over: read it, check it, rename it to ``used_...``.\n\n"
     "ValueError, with the capsule left as it was, when it was consumed before, is no DLPack capsule, has another\n"
     "major version, a negative length, more than 64 dimensions, or sizes that overflow."},
    {NULL, NULL, 0, NULL},
};
