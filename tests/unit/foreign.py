"""The structs of DLPack 1.x in ctypes: capsules that say whatever a test wants them to."""

from __future__ import annotations

import ctypes
from typing import Any, Final

__all__ = ["NAMES", "Deleter", "Legacy", "Tensor", "Versioned", "is_named", "new_capsule"]

NAMES: Final = {False: b"dltensor", True: b"dltensor_versioned"}
"""By whether it is versioned."""

new_capsule: Any = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
is_named: Any = ctypes.pythonapi.PyCapsule_IsValid
is_named.restype = ctypes.c_int
is_named.argtypes = [ctypes.py_object, ctypes.c_char_p]
Deleter: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )
