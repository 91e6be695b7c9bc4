"""Capsules as a producer makes them: what they say, and that their memory is given up exactly once."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dlpoffload.spec import dtype, dtype_names

CPU = (1, 0)
UINT8 = (1, 8, 1)
FLOAT32 = (2, 32, 1)
MEMORY = ctypes.create_string_buffer(bytes(range(256)) * 16, 4096)
ADDRESS = ctypes.addressof(MEMORY)

get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype = ctypes.c_void_p
get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
set_name = ctypes.pythonapi.PyCapsule_SetName
set_name.restype = ctypes.c_int
set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]

# Read by their offsets in dlpack.h, so that the layout itself is tested: (deleter, strides)
OFFSETS = {False: (56, 32), True: (16, 64)}
NAMES = {False: b"dltensor", True: b"dltensor_versioned"}
USED_NAMES = {False: b"used_dltensor", True: b"used_dltensor_versioned"}


class Producer:
    """Hands a capsule to NumPy."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule


def make(
    native: ModuleType,
    owner: Any,
    *,
    pointer: int = ADDRESS,
    device: Any = CPU,
    dtype: Any = UINT8,
    shape: Any = (4, 3),
    strides: Any = (3, 1),
    flags: int = 0,
    versioned: bool = True,
) -> Any:
    return native.dlpack_capsule(owner, pointer, device, dtype, shape, strides, flags, versioned)


@pytest.fixture(params=[False, True], ids=["legacy", "versioned"])
def versioned(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", dtype_names())
def test_every_dtype_round_trips(native: ModuleType, owner: Any, name: str, versioned: bool) -> None:
    element = dtype(name)
    code = (element.code, element.bits, element.lanes)
    imported = native.consume(make(native, owner, dtype=code, versioned=versioned))
    assert imported.dtype == code
    assert imported.pointer == ADDRESS
    assert (imported.shape, imported.strides) == ((4, 3), (3, 1))
    assert imported.version == (native.DLPACK_VERSION if versioned else None)
    assert imported.flags == 0


NUMPY_DTYPES = [
    "bool",
    *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64", "complex64", "complex128"),
]


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_reads_the_same_bytes(native: ModuleType, owner: Any, name: str, versioned: bool) -> None:
    element = dtype(name)
    code = (element.code, element.bits, element.lanes)
    array = np.from_dlpack(Producer(make(native, owner, dtype=code, versioned=versioned)))
    expected = np.frombuffer(MEMORY, dtype=name, count=12).reshape(4, 3)
    assert array.dtype == np.dtype(name)
    assert array.__array_interface__["data"][0] == ADDRESS
    assert array.tobytes() == expected.tobytes()
    assert owner.users == 1
    del array
    assert owner.users == 0


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((), ()),
        ((0,), (1,)),
        ((3, 0, 2), (0, 2, 1)),
        ((1 << 62, 1 << 62, 0), (0, 0, 1)),
        ((5,), (7,)),
        ((2, 3, 4), (1, 2, 6)),
        ((4, 4), (0, 1)),
        ((1,) * 64, (1,) * 64),
    ],
)
def test_shapes_and_strides_round_trip(
    native: ModuleType, owner: Any, shape: tuple[int, ...], strides: tuple[int, ...], versioned: bool
) -> None:
    imported = native.consume(make(native, owner, shape=shape, strides=strides, versioned=versioned))
    assert (imported.shape, imported.strides) == (shape, strides)
    assert imported.pointer == ADDRESS


def test_numpy_reads_scalars_empty_and_strided_tensors(native: ModuleType, owner: Any, versioned: bool) -> None:
    def array(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int = ADDRESS) -> Any:
        capsule = make(native, owner, shape=shape, strides=strides, pointer=pointer, versioned=versioned)
        return np.from_dlpack(Producer(capsule))

    scalar = array((), (), ADDRESS + 77)
    assert (scalar.shape, scalar.item()) == ((), 77)
    assert array((3, 0), (1, 1), 0).shape == (3, 0)
    assert array((2, 3), (1, 10)).tolist() == [[0, 10, 20], [1, 11, 21]]
    assert array((2, 2), (-2, -1), ADDRESS + 9).tolist() == [[9, 8], [7, 6]]


@pytest.mark.parametrize("device", [(1, 0), (2, 3), (3, 7), (13, 0), (18, (1 << 31) - 1)])
def test_every_label_round_trips(native: ModuleType, owner: Any, device: tuple[int, int], versioned: bool) -> None:
    assert native.consume(make(native, owner, device=device, versioned=versioned)).device == device


def test_flags_round_trip_and_numpy_heeds_read_only(native: ModuleType, owner: Any) -> None:
    both = native.FLAG_READ_ONLY | native.FLAG_IS_COPIED
    assert both == 3
    assert native.consume(make(native, owner, flags=both)).flags == both
    assert not np.from_dlpack(Producer(make(native, owner, flags=native.FLAG_READ_ONLY))).flags.writeable


def test_strides_are_never_left_out(native: ModuleType, owner: Any, versioned: bool) -> None:
    # DLPack 1.2 requires them; shape and strides lie right behind the struct
    capsule = make(native, owner, versioned=versioned)
    managed = get_pointer(capsule, NAMES[versioned])
    strides = ctypes.c_void_p.from_address(managed + OFFSETS[versioned][1]).value
    assert strides is not None
    assert strides - managed == (80 if versioned else 64) + 2 * 8
    assert list((ctypes.c_int64 * 2).from_address(strides)) == [3, 1]


# ----------------------------------------------------------------------------------------------- exactly once


def test_unconsumed_capsule_gives_up_once(native: ModuleType, owner: Any, versioned: bool) -> None:
    capsule = make(native, owner, versioned=versioned)
    assert owner.users == 1
    del capsule
    assert owner.users == 0


def test_consumed_capsule_gives_up_with_its_import(native: ModuleType, owner: Any, versioned: bool) -> None:
    capsule = make(native, owner, versioned=versioned)
    imported = native.consume(capsule)
    assert f'"{USED_NAMES[versioned].decode()}"' in repr(capsule)
    with pytest.raises(ValueError, match="consumed before"):
        native.consume(capsule)
    del capsule
    assert owner.users == 1
    assert imported.shape == (4, 3)
    del imported
    assert owner.users == 0


def test_renamed_capsule_is_the_consumers_to_delete(native: ModuleType, owner: Any, versioned: bool) -> None:
    capsule = make(native, owner, versioned=versioned)
    managed = get_pointer(capsule, NAMES[versioned])
    assert set_name(capsule, USED_NAMES[versioned]) == 0
    del capsule
    assert owner.users == 1
    deleter = ctypes.c_void_p.from_address(managed + OFFSETS[versioned][0]).value
    assert deleter is not None
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)(managed)
    assert owner.users == 0


def test_deleter_on_a_thread_that_python_never_saw(native: ModuleType, versioned: bool) -> None:
    libc = ctypes.CDLL(None)
    native.reclaim_drain()
    owner = native.Owner(11)
    capsule = make(native, owner, versioned=versioned)
    owner.release()
    managed = get_pointer(capsule, NAMES[versioned])
    set_name(capsule, USED_NAMES[versioned])
    deleter = ctypes.c_void_p.from_address(managed + OFFSETS[versioned][0])
    thread = ctypes.c_void_p()
    # the deleter is the thread's start routine; the GIL is held by nobody who waits for it
    assert libc.pthread_create(ctypes.byref(thread), None, deleter, ctypes.c_void_p(managed)) == 0
    assert native.reclaim_wait(30.0) is True
    assert libc.pthread_join(thread, None) == 0
    assert native.reclaim_drain() == [11]
    assert owner.users == 0


def fail() -> Any:
    raise LookupError("on its way")


@pytest.mark.parametrize("kind", ["capsule", "import", "reference"])
def test_destructors_keep_a_pending_exception(native: ModuleType, owner: Any, kind: str, versioned: bool) -> None:
    def thing() -> Any:
        if kind == "reference":
            return owner.reference()
        capsule = make(native, owner, versioned=versioned)
        return native.consume(capsule) if kind == "import" else capsule

    with pytest.raises(LookupError, match="on its way"):
        # the interpreter drops the first argument from its stack while the exception of the second is pending
        print(thing(), fail())
    assert owner.users == 0


def test_capsules_alive_at_interpreter_exit() -> None:
    script = """
        import ctypes, sys, threading
        import numpy as np
        from dlpoffload import _native

        memory = ctypes.create_string_buffer(4096)
        class Producer:
            def __init__(self, capsule): self.capsule = capsule
            def __dlpack_device__(self): return (1, 0)
            def __dlpack__(self, **_): return self.capsule
        def make(versioned):
            owner = _native.Owner(1)
            shape = (16, 16)
            return _native.dlpack_capsule(
                owner, ctypes.addressof(memory), (1, 0), (1, 8, 1), shape, (16, 1), 0, versioned)

        capsules = [make(v) for v in (False, True)]
        imports = [_native.consume(make(v)) for v in (False, True)]
        arrays = [np.from_dlpack(Producer(make(v))) for v in (False, True)]
        reimported = _native.consume(np.from_dlpack(Producer(make(True))).__dlpack__())
        owner = _native.Owner(2)
        references = [owner.reference()]
        cycle = [make(True)]; cycle.append(cycle)
        class Late:
            def __init__(self): self.things = [make(True), _native.consume(make(False)), owner.reference()]
            def __del__(self): self.things.clear()
        late = Late()
        sys.modules["kept beyond the module"] = Late()
        threading.Thread(target=_native.reclaim_wait, args=(3600.0,), daemon=True).start()
        print("end")
    """
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# -------------------------------------------------------------------------------------------------- bad input

BAD = [
    ({"pointer": -1}, OverflowError, "pointer=-1"),
    ({"pointer": 1 << 64}, OverflowError, "pointer=18446744073709551616"),
    ({"pointer": "0"}, TypeError, "integer"),
    ({"pointer": 0}, ValueError, "NULL"),
    ({"pointer": (1 << 64) - 4}, ValueError, "address space"),
    ({"device": (1,)}, ValueError, "device has 2 entries, not 1"),
    ({"device": [1, 0]}, TypeError, "device is a tuple"),
    ({"device": (1 << 31, 0)}, OverflowError, "device"),
    ({"device": (1, -1)}, OverflowError, "device=-1"),
    ({"dtype": (1, 8)}, ValueError, "dtype has 3 entries"),
    ({"dtype": (256, 8, 1)}, OverflowError, "dtype=256"),
    ({"dtype": (1, 256, 1)}, OverflowError, "dtype=256"),
    ({"dtype": (1, 8, 65536)}, OverflowError, "dtype=65536"),
    ({"dtype": (1, 0, 1)}, ValueError, "no bits"),
    ({"dtype": (1, 8, 0)}, ValueError, "no bits"),
    ({"dtype": "uint8"}, TypeError, "dtype is a tuple"),
    ({"shape": [4, 3]}, TypeError, "shape is a tuple"),
    ({"shape": (4, 3.0)}, TypeError, "integer"),
    ({"shape": (4, -3)}, ValueError, "negative"),
    ({"shape": (4, 1 << 63)}, OverflowError, "64 bits"),
    ({"shape": (1 << 32, 1 << 31), "strides": (0, 0)}, ValueError, "number of elements overflows"),
    ({"shape": (1 << 62, 1), "strides": (1, 1)}, ValueError, "number of bytes overflows"),
    ({"shape": (3, 3), "strides": (1 << 62, 1)}, ValueError, "strides overflow"),
    ({"shape": (2, 2), "strides": (1 << 62, 1 << 62)}, ValueError, "strides overflow"),
    ({"shape": (3,), "strides": (-(1 << 58),)}, ValueError, "address space"),
    ({"shape": (4, 3, 1)}, ValueError, "strides has 2 entries for a shape of 3"),
    ({"strides": (3,)}, ValueError, "strides has 1 entries for a shape of 2"),
    ({"strides": None}, TypeError, "strides is a tuple"),
    ({"shape": (1,) * 65, "strides": (1,) * 65}, ValueError, "65 dimensions"),
    ({"flags": 8}, ValueError, "flags=8"),
    ({"flags": -1}, OverflowError, "flags=-1"),
    ({"flags": 1, "versioned": False}, ValueError, "legacy"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(bad[0])[:48] for bad in BAD])
def test_arguments_that_describe_no_tensor(
    native: ModuleType, owner: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(native, owner, **arguments)
    assert owner.users == 0


def test_owner_must_be_one(native: ModuleType, owner: Any) -> None:
    for wrong in (None, 1, make(native, owner)):
        with pytest.raises(TypeError, match="owner is an Owner or a Reference"):
            make(native, wrong)


def test_an_index_that_raises_is_heard(native: ModuleType, owner: Any) -> None:
    class Bad:
        def __index__(self) -> int:
            raise LookupError("from __index__")

    for arguments in ({"pointer": Bad()}, {"shape": (4, Bad())}, {"device": (Bad(), 0)}, {"flags": Bad()}):
        with pytest.raises(LookupError, match="from __index__"):
            make(native, owner, **arguments)
    assert owner.users == 0


class Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def test_nothing_leaks(native: ModuleType, owner: Any) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not count its allocations")
    libc.mallinfo2.restype = Mallinfo

    def round_trips(count: int) -> tuple[int, int, int]:
        for i in range(count):
            # fresh integers: a leaked reference to a constant would not show
            pointer, shape, nothing = ADDRESS + i % 2, (300 + i % 2, 1), (1 << 64) + i
            native.consume(make(native, owner, pointer=pointer, shape=shape, versioned=bool(i % 2)))
            make(native, owner.reference(), pointer=pointer, versioned=bool(i % 2))
            native.Owner(1000 + i)
            native.reclaim_drain()
            for wrong in ({"pointer": nothing}, {"shape": (nothing, 1)}):
                with pytest.raises(OverflowError):
                    make(native, owner, **wrong)
            for arguments, error, _ in BAD[i % 7 :: 7]:
                with pytest.raises(error):
                    make(native, owner, **arguments)
        gc.collect()
        types = sum(map(sys.getrefcount, (native.Owner, native.Reference, native.Import)))
        return int(libc.mallinfo2().uordblks), sys.getallocatedblocks(), types

    malloced, blocks, references = round_trips(200)
    if malloced == 0:
        pytest.skip("a sanitizer has taken malloc's place and counts leaks itself")
    count = 4000
    malloced_after, blocks_after, references_after = round_trips(count)
    assert malloced_after - malloced < 16 * count  # the smallest allocation is 24 bytes
    assert blocks_after - blocks < count // 7  # the rarest case runs count / 7 times
    assert references_after == references
