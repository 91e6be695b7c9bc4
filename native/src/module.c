/* The module: types, functions, constants; multi-phase, with its state in the module. */
#include <dlpack/dlpack.h>
#include <errno.h>

#include "core.h"

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec) {
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, type) < 0) Py_CLEAR(type);
    return type;
}

static int add_constants(PyObject *module) {
    PyObject *version = Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    int failed = !version || PyModule_AddObjectRef(module, "DLPACK_VERSION", version) < 0;
    Py_XDECREF(version);
    return failed || PyModule_AddIntConstant(module, "FLAG_READ_ONLY", DLPACK_FLAG_BITMASK_READ_ONLY) < 0 ||
           PyModule_AddIntConstant(module, "FLAG_IS_COPIED", DLPACK_FLAG_BITMASK_IS_COPIED) < 0 ||
           PyModule_AddIntConstant(module, "FLAG_IS_SUBBYTE_TYPE_PADDED",
                                   DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED) < 0;
}

static int execute(PyObject *module) {
    int error = dlpo_owner_setup();
    if (error) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    module_state *state = state_of(module);
    if (!(state->owner_type = add_type(module, &owner_spec)) ||
        !(state->reference_type = add_type(module, &reference_spec)) ||
        !(state->import_type = add_type(module, &import_spec)) || add_constants(module) ||
        PyModule_AddFunctions(module, reclaim_methods) < 0 || PyModule_AddFunctions(module, capsule_methods) < 0 ||
        PyModule_AddFunctions(module, import_methods) < 0 || PyModule_AddFunctions(module, memory_methods) < 0)
        return -1;
    return 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = state_of(module);
    if (!state) return 0;
    Py_VISIT(state->owner_type);
    Py_VISIT(state->reference_type);
    Py_VISIT(state->import_type);
    return 0;
}

static int clear(PyObject *module) {
    module_state *state = state_of(module);
    if (!state) return 0;
    Py_CLEAR(state->owner_type);
    Py_CLEAR(state->reference_type);
    Py_CLEAR(state->import_type);
    return 0;
}

static void free_state(void *module) { clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, SLOT(execute)},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "dlpoffload._native",
    .m_doc = "The native core: DLPack capsules, owners counted without Python, anonymous mappings without the GIL.",
    .m_size = sizeof(module_state),
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_state,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
