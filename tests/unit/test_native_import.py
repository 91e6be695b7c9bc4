"""Capsules as a consumer meets them: well made, odd, malformed, from producers whose deleter runs Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from foreign import NAMES, Deleter, Legacy, Tensor, Versioned, new_capsule

MEMORY = ctypes.create_string_buffer(4096)
ADDRESS = ctypes.addressof(MEMORY)


class Foreign:
    """A producer in pure ctypes that counts how often its deleter is called."""

    def __init__(
        self,
        shape: tuple[int, ...] = (4, 3),
        strides: tuple[int, ...] | None = (3, 1),
        *,
        versioned: bool = True,
        on_delete: Callable[[], None] = lambda: None,
        **fields: Any,
    ) -> None:
        self.deleted = 0

        def delete(_: int) -> None:
            self.deleted += 1
            on_delete()

        self.managed = Versioned() if versioned else Legacy()
        self.managed.deleter = Deleter(delete)
        self._shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        tensor = self.managed.tensor
        tensor.data, tensor.device_type, tensor.device_id = ADDRESS, 1, 0
        tensor.code, tensor.bits, tensor.lanes = 1, 8, 1
        tensor.ndim, tensor.shape = len(shape), self._shape
        if strides is not None:
            self._strides = (ctypes.c_int64 * max(len(strides), 1))(*strides)
            tensor.strides = self._strides
        if versioned:
            self.managed.major, self.managed.minor, self.managed.flags = 1, 1, 0
        for name, value in fields.items():
            setattr(self.managed if hasattr(self.managed, name) else tensor, name, value)
        self.name = NAMES[versioned]

    def capsule(self) -> Any:
        return new_capsule(ctypes.addressof(self.managed), self.name, None)


@pytest.fixture(params=[False, True], ids=["legacy", "versioned"])
def versioned(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_struct_sizes_are_those_of_dlpack() -> None:
    assert [ctypes.sizeof(kind) for kind in (Tensor, Legacy, Versioned)] == [48, 64, 80]


def test_everything_a_capsule_says_is_read(native: ModuleType, versioned: bool) -> None:
    more = {"flags": 5, "minor": 9} if versioned else {}
    foreign = Foreign(
        (2, 5), (7, 1), versioned=versioned, byte_offset=24, device_type=13, device_id=3, code=4, bits=16, **more
    )
    imported = native.consume(foreign.capsule())
    assert imported.pointer == ADDRESS + 24
    assert imported.device == (13, 3)
    assert imported.dtype == (4, 16, 1)
    assert (imported.shape, imported.strides) == ((2, 5), (7, 1))
    assert imported.flags == (5 if versioned else 0)
    assert imported.version == ((1, 9) if versioned else None)
    assert foreign.deleted == 0
    del imported
    assert foreign.deleted == 1


def test_strides_that_were_left_out(native: ModuleType, versioned: bool) -> None:
    assert native.consume(Foreign((4, 3), None, versioned=versioned).capsule()).strides is None
    assert native.consume(Foreign((), None, versioned=versioned).capsule()).strides == ()


def test_scalar_may_leave_shape_out(native: ModuleType, versioned: bool) -> None:
    foreign = Foreign((), None, versioned=versioned)
    foreign.managed.tensor.shape = None
    imported = native.consume(foreign.capsule())
    assert (imported.shape, imported.strides) == ((), ())


def test_negative_strides_stay_within_bounds(native: ModuleType) -> None:
    imported = native.consume(Foreign((3, 2), (-2, -1), byte_offset=5).capsule())
    assert (imported.pointer, imported.strides) == (ADDRESS + 5, (-2, -1))


def test_deleter_may_be_left_out(native: ModuleType, versioned: bool) -> None:
    foreign = Foreign(versioned=versioned, deleter=Deleter(0))
    imported = native.consume(foreign.capsule())
    del imported
    assert foreign.deleted == 0


def test_numpy_is_consumed(native: ModuleType) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2]
    for arguments, version in (({}, None), ({"max_version": (1, 0)}, (1, 0))):
        imported = native.consume(array.__dlpack__(**arguments))
        assert imported.pointer == array.ctypes.data
        assert (imported.shape, imported.strides) == ((2, 2, 4), (12, 8, 1))
        assert (imported.dtype, imported.version) == ((0, 16, 1), version)


def test_what_the_producer_changes_afterwards_is_not_seen(native: ModuleType, versioned: bool) -> None:
    foreign = Foreign((2, 5), (7, 1), versioned=versioned, byte_offset=24)
    imported = native.consume(foreign.capsule())
    tensor = foreign.managed.tensor
    foreign._shape[0] = foreign._strides[0] = -1
    tensor.data, tensor.ndim, tensor.shape, tensor.strides, tensor.device_type = 1, 64, None, None, 2
    assert (imported.pointer, imported.device) == (ADDRESS + 24, (1, 0))
    assert (imported.shape, imported.strides) == ((2, 5), (7, 1))


# ---------------------------------------------------------------------------------------------------- refusals

MALFORMED = [
    ({"shape": (4, -3)}, "negative"),
    ({"shape": (-1, 0)}, "negative"),
    ({"ndim": -1}, "dimensions"),
    ({"ndim": 65}, "dimensions"),
    ({"ndim": -(1 << 31)}, "dimensions"),
    ({"bits": 0}, "no bits"),
    ({"lanes": 0}, "no bits"),
    ({"data": None}, "NULL"),
    ({"byte_offset": (1 << 64) - 1}, "byte offset overflows"),
    ({"shape": (1 << 40, 1 << 40), "strides": None}, "elements overflows"),
    ({"shape": (1 << 62,), "strides": None}, "bytes overflows"),
    ({"shape": (1 << 31, 3), "strides": (1 << 40, 1)}, "strides overflow"),
    ({"shape": (3, 3), "strides": (1 << 62, 1)}, "strides overflow"),
    ({"shape": (2,), "strides": ((1 << 63) - 1,)}, "bytes overflows"),
    ({"shape": (3,), "strides": (-(1 << 63),)}, "strides overflow"),
    ({"shape": (2,), "strides": (-(1 << 63),)}, "bytes overflows"),
    ({"shape": (2,), "strides": (-(1 << 59),)}, "address space"),
    ({"data": (1 << 64) - 11}, "address space"),
]


@pytest.mark.parametrize(("fields", "message"), MALFORMED, ids=[str(case[0]) for case in MALFORMED])
def test_malformed_capsule_is_left_as_it_was(
    native: ModuleType, fields: dict[str, Any], message: str, versioned: bool
) -> None:
    foreign = Foreign(**fields, versioned=versioned)
    capsule = foreign.capsule()
    for _ in range(2):  # the second attempt meets the same capsule
        with pytest.raises(ValueError, match=message):
            native.consume(capsule)
    assert f'"{foreign.name.decode()}"' in repr(capsule)
    assert foreign.deleted == 0


def test_shape_that_is_missing(native: ModuleType, versioned: bool) -> None:
    foreign = Foreign(versioned=versioned)
    foreign.managed.tensor.shape = None
    with pytest.raises(ValueError, match="no shape"):
        native.consume(foreign.capsule())


def test_tensor_that_just_fits(native: ModuleType) -> None:
    # the last byte of the address space is an address
    assert native.consume(Foreign(data=(1 << 64) - 12).capsule()).pointer == (1 << 64) - 12


@pytest.mark.parametrize("major", [0, 2, 1 << 31])
def test_other_major_version_is_not_read_further(native: ModuleType, major: int) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # version, context and deleter are all that another major version promises; there is nothing behind them
    head = libc.malloc(ctypes.c_size_t(24))
    ctypes.memset(head, 0xFF, 24)
    (ctypes.c_uint32 * 2).from_address(head)[:] = [major, 3]
    capsule = new_capsule(head, b"dltensor_versioned", None)
    with pytest.raises(ValueError, match=rf"DLPack {major}\.3; this library reads 1\.x"):
        native.consume(capsule)
    assert '"dltensor_versioned"' in repr(capsule)
    libc.free(head)


@pytest.mark.parametrize("name", [b"used_dltensor", b"used_dltensor_versioned"])
def test_consumed_before(native: ModuleType, name: bytes) -> None:
    foreign = Foreign()
    with pytest.raises(ValueError, match="consumed before"):
        native.consume(new_capsule(ctypes.addressof(foreign.managed), name, None))


@pytest.mark.parametrize("thing", [None, 3, "dltensor", np.zeros(3)])
def test_no_capsule(native: ModuleType, thing: Any) -> None:
    with pytest.raises(ValueError, match="a DLPack capsule is wanted"):
        native.consume(thing)


def test_other_capsules(native: ModuleType) -> None:
    with pytest.raises(ValueError, match='"datetime" is no DLPack capsule'):
        native.consume(new_capsule(ADDRESS, b"datetime", None))
    with pytest.raises(ValueError, match='"" is no DLPack capsule'):
        native.consume(new_capsule(ADDRESS, None, None))


# ------------------------------------------------------------------------------------- deleters that run Python


def test_python_deleter_runs_once_and_keeps_the_pending_exception(native: ModuleType, versioned: bool) -> None:
    seen = []

    def on_delete() -> None:
        try:  # clears the error indicator on its way
            raise ValueError("inside the deleter")
        except ValueError:
            seen.append(len(seen))

    def fail() -> Any:
        raise LookupError("on its way")

    foreign = Foreign(versioned=versioned, on_delete=on_delete)
    with pytest.raises(LookupError, match="on its way"):
        print(native.consume(foreign.capsule()), fail())
    assert seen == [0]
    assert foreign.deleted == 1


def test_deleter_may_use_the_module(native: ModuleType, owner: Any) -> None:
    def on_delete() -> None:
        held = owner.reference()
        assert held.users == 1
        inner = Foreign()
        native.consume(inner.capsule())
        assert inner.deleted == 1
        seen.append(held.users)

    seen: list[int] = []
    native.consume(Foreign(on_delete=on_delete).capsule())
    assert seen == [1]
    assert owner.users == 0
