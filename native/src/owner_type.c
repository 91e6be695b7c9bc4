/* Owner and Reference, and the reclaim list, as Python sees them. */
#include <math.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include "core.h"

/* Both types: an Owner has a pin and the owner's own count, a Reference is a user. */
typedef struct {
    PyObject_HEAD
    dlpo_owner *owner;
} holder;

static dlpo_owner *owner_of(PyObject *self) { return ((holder *)self)->owner; }

static holder *new_holder(PyTypeObject *type) { return (holder *)PyType_GenericAlloc(type, 0); }

static void free_holder(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *get_token(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(dlpo_owner_token(owner_of(self)));
}

static PyObject *get_users(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(dlpo_owner_users(owner_of(self)));
}

static PyGetSetDef holder_getset[] = {
    {"token", get_token, NULL, "The number that names the memory.", NULL},
    {"users", get_users, NULL, "References and capsules alive now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---------------------------------------------------------------------------------------------------- Owner */

static PyObject *owner_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"token", NULL};
    PyObject *argument;
    uint64_t token;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Owner", names, &argument)) return NULL;
    if (!arg_unsigned(argument, "token", UINT64_MAX, &token)) return NULL;
    holder *self = new_holder(type);
    if (!self) return NULL;
    self->owner = dlpo_owner_new(token);
    if (!self->owner) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void owner_dealloc(PyObject *self) {
    dlpo_owner *owner = owner_of(self);
    if (owner) {
        dlpo_owner_release(owner);
        dlpo_owner_unpin(owner);
    }
    free_holder(self);
}

static PyObject *refuse_released(dlpo_owner *owner) {
    PyErr_Format(PyExc_RuntimeError, "the owner of token %llu was released; nothing new can refer to its memory",
                 (unsigned long long)dlpo_owner_token(owner));
    return NULL;
}

static PyObject *owner_reference(PyObject *self, PyObject *unused) {
    (void)unused;
    module_state *state = PyType_GetModuleState(Py_TYPE(self));
    if (!state) return NULL;
    holder *reference = new_holder(state->reference_type);
    if (!reference) return NULL;
    if (!dlpo_owner_acquire(owner_of(self))) {
        Py_DECREF(reference);
        return refuse_released(owner_of(self));
    }
    reference->owner = owner_of(self);
    return (PyObject *)reference;
}

static PyObject *owner_release(PyObject *self, PyObject *unused) {
    (void)unused;
    dlpo_owner_release(owner_of(self));
    Py_RETURN_NONE;
}

/* What C code is given to call: no Python, no CUDA, on any thread. */
static void give_back(void *owner) { dlpo_owner_drop(owner); }

static PyObject *owner_lend(PyObject *self, PyObject *unused) {
    (void)unused;
    PyObject *lent = Py_BuildValue("(KK)", (unsigned long long)(uintptr_t)owner_of(self),
                                   (unsigned long long)(uintptr_t)give_back);
    if (!lent) return NULL;
    if (!dlpo_owner_acquire(owner_of(self))) {
        Py_DECREF(lent);
        return refuse_released(owner_of(self));
    }
    return lent;
}

static PyObject *owner_take_back(PyObject *self, PyObject *unused) {
    (void)unused;
    dlpo_owner_drop(owner_of(self));
    Py_RETURN_NONE;
}

static PyMethodDef owner_methods[] = {
    {"reference", owner_reference, METH_NOARGS,
     "reference($self, /)\n--\n\nCount one more user; RuntimeError after `release`."},
    {"lend", owner_lend, METH_NOARGS,
     "lend($self, /)\n--\n\n"
     "Count one more user, in C: what it passes, once, to the function whose address comes second."},
    {"take_back", owner_take_back, METH_NOARGS,
     "take_back($self, /)\n--\n\nGive up a lent count that nobody else will."},
    {"release", owner_release, METH_NOARGS, "release($self, /)\n--\n\nGive up the owner's own count. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot owner_slots[] = {
    {Py_tp_doc, "Owner(token)\n--\n\nA count of everything that uses one piece of memory, named by a token."},
    {Py_tp_new, SLOT(owner_new)},
    {Py_tp_dealloc, SLOT(owner_dealloc)},
    {Py_tp_methods, owner_methods},
    {Py_tp_getset, holder_getset},
    {0, NULL},
};

PyType_Spec owner_spec = {
    .name = "dlpoffload._native.Owner",
    .basicsize = sizeof(holder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = owner_slots,
};

/* ------------------------------------------------------------------------------------------------ Reference */

static void reference_dealloc(PyObject *self) {
    if (owner_of(self)) dlpo_owner_drop(owner_of(self));
    free_holder(self);
}

static PyType_Slot reference_slots[] = {
    {Py_tp_doc, "Holds one count of an `Owner` until it is deallocated."},
    {Py_tp_dealloc, SLOT(reference_dealloc)},
    {Py_tp_getset, holder_getset},
    {0, NULL},
};

PyType_Spec reference_spec = {
    .name = "dlpoffload._native.Reference",
    .basicsize = sizeof(holder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = reference_slots,
};

dlpo_owner *acquire_owner(module_state *state, PyObject *owner) {
    if (Py_IS_TYPE(owner, state->reference_type)) {
        /* The reference is a user itself, so the memory is alive whether or not its owner was released. */
        dlpo_owner_share(owner_of(owner));
        return owner_of(owner);
    }
    if (!Py_IS_TYPE(owner, state->owner_type)) {
        PyErr_Format(PyExc_TypeError, "owner is an Owner or a Reference, not %R", owner);
        return NULL;
    }
    if (!dlpo_owner_acquire(owner_of(owner))) {
        refuse_released(owner_of(owner));
        return NULL;
    }
    return owner_of(owner);
}

/* --------------------------------------------------------------------------------------------- reclaim list */

static PyObject *reclaim_drain(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    dlpo_owner *oldest = dlpo_reclaim_take();
    Py_ssize_t n = 0;
    for (dlpo_owner *owner = oldest; owner; owner = dlpo_reclaim_next(owner)) n++;
    PyObject *tokens = PyList_New(n);
    Py_ssize_t i = 0;
    for (dlpo_owner *owner = oldest; tokens && owner; owner = dlpo_reclaim_next(owner)) {
        PyObject *token = PyLong_FromUnsignedLongLong(dlpo_owner_token(owner));
        if (!token || PyList_SetItem(tokens, i++, token) < 0) Py_CLEAR(tokens);
    }
    if (!tokens) { /* memory is short: no token may be lost */
        dlpo_reclaim_put_back(oldest);
        return NULL;
    }
    while (oldest) {
        dlpo_owner *next = dlpo_reclaim_next(oldest);
        dlpo_owner_unpin(oldest);
        oldest = next;
    }
    return tokens;
}

static double monotonic_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static bool on_main_thread(void) {
#if defined(__linux__)
    return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
    return pthread_main_np() != 0;
#else
    return true;
#endif
}

static PyObject *reclaim_wait(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"timeout_s", NULL};
    (void)module;
    double timeout;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "d:reclaim_wait", names, &timeout)) return NULL;
    if (!(timeout >= 0)) {
        PyErr_SetString(PyExc_ValueError, "timeout_s is zero or more seconds");
        return NULL;
    }
    /* Python's signal handlers run on the main thread: there the wait looks for them now and then. */
    double slice = on_main_thread() ? 0.05 : 1e6;
    double deadline = monotonic_s() + timeout;
    for (;;) {
        double left = deadline - monotonic_s();
        bool last = left <= slice, found;
        if (left < 0) left = 0;
        Py_BEGIN_ALLOW_THREADS
        found = dlpo_reclaim_wait(last ? left : slice);
        Py_END_ALLOW_THREADS
        if (found) Py_RETURN_TRUE;
        if (PyErr_CheckSignals()) return NULL;
        if (last) Py_RETURN_FALSE;
    }
}

static PyObject *reclaim_wake(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    dlpo_reclaim_wake();
    Py_RETURN_NONE;
}

static PyObject *fork_generation(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(dlpo_fork_generation());
}

PyMethodDef reclaim_methods[] = {
    {"reclaim_drain", reclaim_drain, METH_NOARGS,
     "reclaim_drain($module, /)\n--\n\nTake every token off the reclaim list, oldest first. Never blocks."},
    {"reclaim_wait", WITH_KEYWORDS(reclaim_wait), METH_VARARGS | METH_KEYWORDS,
     "reclaim_wait($module, timeout_s)\n--\n\n"
     "Wait without the GIL until a token is on the list or `reclaim_wake` is called; False when the time ran out."},
    {"reclaim_wake", reclaim_wake, METH_NOARGS,
     "reclaim_wake($module, /)\n--\n\nEnd the wait that is under way, or the next one when there is none."},
    {"fork_generation", fork_generation, METH_NOARGS,
     "fork_generation($module, /)\n--\n\n"
     "How many forks lie between this process and the one that loaded the module."},
    {NULL, NULL, 0, NULL},
};
