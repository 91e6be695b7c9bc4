/* Pages, buffers and copies, as Python sees them: without the GIL, OSError with errno. */
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "core.h"
#include "gather.h"
#include "pages.h"
#include "pieces.h"

#define NO_THREADS "threads=0: at least one thread has to do the work"

static PyObject *finish(int error) {
    if (!error) Py_RETURN_NONE;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static void *address_of(uint64_t number) { return (void *)(uintptr_t)number; }

static PyObject *map_anonymous(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"nbytes", "alignment", "huge_pages", NULL};
    (void)module;
    PyObject *nbytes_arg, *alignment_arg;
    int huge_pages, error;
    uint64_t nbytes, alignment;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOp:map_anonymous", names, &nbytes_arg, &alignment_arg,
                                     &huge_pages) ||
        !arg_unsigned(nbytes_arg, "nbytes", SIZE_MAX, &nbytes) ||
        !arg_unsigned(alignment_arg, "alignment", SIZE_MAX, &alignment))
        return NULL;
    if (alignment == 0 || alignment & (alignment - 1))
        return PyErr_Format(PyExc_ValueError, "alignment=%llu is no power of two", (unsigned long long)alignment);
    void *address = NULL;
    Py_BEGIN_ALLOW_THREADS
    error = dlpo_map_anonymous((size_t)nbytes, (size_t)alignment, huge_pages, &address);
    Py_END_ALLOW_THREADS
    if (error) return finish(error);
    return PyLong_FromUnsignedLongLong((uintptr_t)address);
}

static PyObject *map_hugetlb(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"nbytes", "page_nbytes", NULL};
    (void)module;
    PyObject *nbytes_arg, *page_arg;
    uint64_t nbytes, page;
    int error;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:map_hugetlb", names, &nbytes_arg, &page_arg) ||
        !arg_unsigned(nbytes_arg, "nbytes", SIZE_MAX, &nbytes) ||
        !arg_unsigned(page_arg, "page_nbytes", SIZE_MAX, &page))
        return NULL;
    unsigned shift = 0;
    while (shift < 63 && ((uint64_t)1 << shift) < page) shift++;
    if (((uint64_t)1 << shift) != page || shift > 40)
        return PyErr_Format(PyExc_ValueError, "page_nbytes=%llu is no size of a page", (unsigned long long)page);
    void *address = NULL;
    Py_BEGIN_ALLOW_THREADS
    error = dlpo_map_hugetlb((size_t)nbytes, shift, &address);
    Py_END_ALLOW_THREADS
    if (error) return finish(error);
    return PyLong_FromUnsignedLongLong((uintptr_t)address);
}

static PyObject *map_file(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"descriptor", "byte_offset", "nbytes", NULL};
    (void)module;
    PyObject *descriptor_arg, *offset_arg, *nbytes_arg;
    uint64_t descriptor, offset, nbytes;
    int error;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:map_file", names, &descriptor_arg, &offset_arg, &nbytes_arg) ||
        !arg_unsigned(descriptor_arg, "descriptor", INT_MAX, &descriptor) ||
        !arg_unsigned(offset_arg, "byte_offset", INT64_MAX, &offset) ||
        !arg_unsigned(nbytes_arg, "nbytes", SIZE_MAX, &nbytes))
        return NULL;
    void *address = NULL;
    Py_BEGIN_ALLOW_THREADS
    error = dlpo_map_file((int)descriptor, offset, (size_t)nbytes, &address);
    Py_END_ALLOW_THREADS
    if (error) return finish(error);
    return PyLong_FromUnsignedLongLong((uintptr_t)address);
}

static PyObject *prefer_node(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"address", "nbytes", "node", NULL};
    (void)module;
    PyObject *address_arg, *nbytes_arg, *node_arg;
    uint64_t address, nbytes, node;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:prefer_node", names, &address_arg, &nbytes_arg, &node_arg) ||
        !arg_unsigned(address_arg, "address", UINTPTR_MAX, &address) ||
        !arg_unsigned(nbytes_arg, "nbytes", SIZE_MAX, &nbytes) || !arg_unsigned(node_arg, "node", 1023, &node))
        return NULL;
    return finish(dlpo_prefer_node(address_of(address), (size_t)nbytes, (unsigned)node));
}

static PyObject *populate(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"address", "nbytes", "threads", "write", NULL};
    (void)module;
    PyObject *address_arg, *nbytes_arg, *threads_arg;
    uint64_t address, nbytes, threads;
    int write = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|p:populate", names, &address_arg, &nbytes_arg, &threads_arg,
                                     &write) ||
        !arg_unsigned(address_arg, "address", UINTPTR_MAX, &address) ||
        !arg_unsigned(nbytes_arg, "nbytes", SIZE_MAX, &nbytes) ||
        !arg_unsigned(threads_arg, "threads", INT32_MAX, &threads))
        return NULL;
    if (threads == 0) return PyErr_Format(PyExc_ValueError, NO_THREADS);
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = dlpo_populate(address_of(address), (size_t)nbytes, (unsigned)threads, write);
    Py_END_ALLOW_THREADS
    return finish(error);
}

static PyObject *on_range(PyObject *args, PyObject *kwargs, const char *format, int (*function)(void *, size_t)) {
    static char *names[] = {"address", "nbytes", NULL};
    PyObject *address_arg, *nbytes_arg;
    uint64_t address, nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &address_arg, &nbytes_arg) ||
        !arg_unsigned(address_arg, "address", UINTPTR_MAX, &address) ||
        !arg_unsigned(nbytes_arg, "nbytes", SIZE_MAX, &nbytes))
        return NULL;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = function(address_of(address), (size_t)nbytes);
    Py_END_ALLOW_THREADS
    return finish(error);
}

static PyObject *unmap(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return on_range(args, kwargs, "OO:unmap", dlpo_unmap);
}

static PyObject *dont_fork(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return on_range(args, kwargs, "OO:dont_fork", dlpo_dont_fork);
}

static PyObject *buffer_pointer(PyObject *module, PyObject *buffer) {
    (void)module;
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_ANY_CONTIGUOUS)) return NULL;
    uintptr_t address = view.len ? (uintptr_t)view.buf : 0;
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(address);
}

/* Small enough that a weight of some ten MiB is shared out, large enough to be worth a thread. */
static const size_t COPY_PIECE = (size_t)4 << 20;

typedef struct {
    char *destination;
    const char *source;
} copying;

static int copy_piece(const void *context, size_t at, size_t length) {
    const copying *range = context;
    memcpy(range->destination + at, range->source + at, length);
    return 0;
}

static PyObject *copy(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"destination", "source", "nbytes", "threads", NULL};
    (void)module;
    PyObject *destination_arg, *source_arg, *nbytes_arg, *threads_arg = NULL;
    uint64_t destination, source, nbytes, threads = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|O:copy", names, &destination_arg, &source_arg, &nbytes_arg,
                                     &threads_arg) ||
        !arg_unsigned(destination_arg, "destination", UINTPTR_MAX, &destination) ||
        !arg_unsigned(source_arg, "source", UINTPTR_MAX, &source) ||
        !arg_unsigned(nbytes_arg, "nbytes", PTRDIFF_MAX, &nbytes) ||
        (threads_arg && !arg_unsigned(threads_arg, "threads", INT32_MAX, &threads)))
        return NULL;
    if (threads == 0) return PyErr_Format(PyExc_ValueError, NO_THREADS);
    if (nbytes == 0) Py_RETURN_NONE;
    if (!destination || !source) return finish(EFAULT);
    bool overlap = source < destination ? destination - source < nbytes : source - destination < nbytes;
    copying range = {address_of(destination), address_of(source)};
    Py_BEGIN_ALLOW_THREADS
    if (overlap) memmove(range.destination, range.source, (size_t)nbytes);
    else dlpo_in_pieces((size_t)nbytes, COPY_PIECE, (unsigned)threads, copy_piece, &range);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *copy_strided(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"destination", "source", "itemsize", "shape", "source_strides", NULL};
    (void)module;
    PyObject *destination_arg, *source_arg, *itemsize_arg, *shape_arg, *strides_arg;
    uint64_t destination, source, itemsize;
    int ndim = -1;
    int64_t shape[DLPO_MAX_NDIM], strides[DLPO_MAX_NDIM];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO:copy_strided", names, &destination_arg, &source_arg,
                                     &itemsize_arg, &shape_arg, &strides_arg) ||
        !arg_unsigned(destination_arg, "destination", UINTPTR_MAX, &destination) ||
        !arg_unsigned(source_arg, "source", UINTPTR_MAX, &source) ||
        !arg_unsigned(itemsize_arg, "itemsize", UINT16_MAX, &itemsize) ||
        !arg_int64s(shape_arg, "shape", &ndim, shape) || !arg_int64s(strides_arg, "source_strides", &ndim, strides))
        return NULL;
    const char *fault = layout_fault(source, ndim, shape, strides, (unsigned)itemsize * 8);
    if (!fault) fault = layout_fault(destination, ndim, shape, NULL, (unsigned)itemsize * 8);
    if (fault)
        return PyErr_Format(PyExc_ValueError, "no copy of shape %R with strides %R and itemsize %llu: %s", shape_arg,
                            strides_arg, (unsigned long long)itemsize, fault);
    Py_BEGIN_ALLOW_THREADS
    dlpo_gather(address_of(destination), address_of(source), (size_t)itemsize, ndim, shape, strides);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyMethodDef memory_methods[] = {
    {"map_anonymous", WITH_KEYWORDS(map_anonymous), METH_VARARGS | METH_KEYWORDS,
     "map_anonymous($module, nbytes, alignment, huge_pages)\n--\n\n"
     "Map private anonymous memory, aligned, zero, not yet populated."},
    {"populate", WITH_KEYWORDS(populate), METH_VARARGS | METH_KEYWORDS,
     "populate($module, address, nbytes, threads, write=True)\n--\n\n"
     "Fault every page in, for writing or only for reading, on up to `threads` threads."},
    {"map_hugetlb", WITH_KEYWORDS(map_hugetlb), METH_VARARGS | METH_KEYWORDS,
     "map_hugetlb($module, nbytes, page_nbytes)\n--\n\nMap memory from the pool of reserved huge pages."},
    {"map_file", WITH_KEYWORDS(map_file), METH_VARARGS | METH_KEYWORDS,
     "map_file($module, descriptor, byte_offset, nbytes)\n--\n\nMap a range of a file, shared and read-only."},
    {"prefer_node", WITH_KEYWORDS(prefer_node), METH_VARARGS | METH_KEYWORDS,
     "prefer_node($module, address, nbytes, node)\n--\n\nTake pages that are not there yet from one NUMA node."},
    {"unmap", WITH_KEYWORDS(unmap), METH_VARARGS | METH_KEYWORDS,
     "unmap($module, address, nbytes)\n--\n\nGive mapped memory back to the system."},
    {"dont_fork", WITH_KEYWORDS(dont_fork), METH_VARARGS | METH_KEYWORDS,
     "dont_fork($module, address, nbytes)\n--\n\nLeave these pages out of forked children."},
    {"buffer_pointer", buffer_pointer, METH_O,
     "buffer_pointer($module, buffer, /)\n--\n\nAddress of the memory behind a contiguous buffer; 0 when it is empty."},
    {"copy", WITH_KEYWORDS(copy), METH_VARARGS | METH_KEYWORDS,
     "copy($module, destination, source, nbytes, threads=1)\n--\n\n"
     "memmove without the GIL, on up to `threads` threads where nothing overlaps."},
    {"copy_strided", WITH_KEYWORDS(copy_strided), METH_VARARGS | METH_KEYWORDS,
     "copy_strided($module, destination, source, itemsize, shape, source_strides)\n--\n\n"
     "Gather a strided tensor into row-major order; strides in elements, may be negative."},
    {NULL, NULL, 0, NULL},
};
