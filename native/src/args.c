/* Python arguments to C integers. */
#include "core.h"
#include "gather.h"

bool arg_unsigned(PyObject *value, const char *name, uint64_t most, uint64_t *result) {
    PyObject *index = PyNumber_Index(value);
    if (!index) return false;
    unsigned long long number = PyLong_AsUnsignedLongLong(index);
    bool fits = !(number == (unsigned long long)-1 && PyErr_Occurred());
    if (!fits && !PyErr_ExceptionMatches(PyExc_OverflowError)) {
        Py_DECREF(index);
        return false;
    }
    if (!fits || number > most) {
        PyErr_Clear();
        PyErr_Format(PyExc_OverflowError, "%s=%S does not fit; it is a whole number from 0 to %llu", name, index,
                     (unsigned long long)most);
        Py_DECREF(index);
        return false;
    }
    Py_DECREF(index);
    *result = number;
    return true;
}

bool arg_signed(PyObject *value, const char *name, int64_t *result) {
    PyObject *index = PyNumber_Index(value);
    if (!index) return false;
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(index, &overflow);
    if (overflow) PyErr_Format(PyExc_OverflowError, "%S in %s does not fit into 64 bits", index, name);
    Py_DECREF(index);
    if (overflow || (number == -1 && PyErr_Occurred())) return false;
    *result = number;
    return true;
}

static bool check_tuple(PyObject *value, const char *name) {
    if (PyTuple_Check(value)) return true;
    PyErr_Format(PyExc_TypeError, "%s is a tuple of whole numbers, not %R", name, value);
    return false;
}

bool arg_int64s(PyObject *value, const char *name, int *ndim, int64_t *result) {
    if (!check_tuple(value, name)) return false;
    Py_ssize_t n = PyTuple_Size(value);
    if (n > DLPO_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s has %zd dimensions; at most %d are possible", name, n, DLPO_MAX_NDIM);
        return false;
    }
    if (*ndim >= 0 && n != *ndim) {
        PyErr_Format(PyExc_ValueError, "%s has %zd entries for a shape of %d dimensions", name, n, *ndim);
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (!arg_signed(PyTuple_GetItem(value, i), name, &result[i])) return false;
    *ndim = (int)n;
    return true;
}

bool arg_fields(PyObject *value, const char *name, int n, const uint64_t *most, uint64_t *result) {
    if (!check_tuple(value, name)) return false;
    if (PyTuple_Size(value) != n) {
        PyErr_Format(PyExc_ValueError, "%s has %d entries, not %zd", name, n, PyTuple_Size(value));
        return false;
    }
    for (int i = 0; i < n; i++)
        if (!arg_unsigned(PyTuple_GetItem(value, i), name, most[i], &result[i])) return false;
    return true;
}
