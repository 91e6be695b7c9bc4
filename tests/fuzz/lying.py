"""Producers that lie: every field of a capsule, and every answer of the object that gives it, may be wrong.

What is told by pointers can only be told by pointers: a producer whose pointer to the struct, to shape or to strides
leads nowhere cannot be found out by any consumer. So those lead to memory that is there, ends where it must be
read no further, and is followed by a page that may not be touched. The data need not be there at all: it lies in
pages that may not be touched unless the tensor that is told fits into memory that is there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from foreign import NAMES, Deleter, Legacy, Tensor, Versioned, is_named, new_capsule
from harness import COUNTS
from hypothesis import strategies as st

from dlpoffload import _native
from dlpoffload.spec import DType, dtype, dtype_names

__all__ = [
    "ARENA",
    "ARENA_NBYTES",
    "BYTES",
    "DEVICES",
    "DTYPES",
    "INT64S",
    "PAGE",
    "SCRATCH",
    "Lie",
    "OwnError",
    "Producer",
    "gathered",
    "judged",
    "lies",
    "plain",
    "producer_of",
]  # fmt: skip

PAGE: Final = mmap.PAGESIZE
_PROT_NONE: Final = 0
_READ_ONLY, _IS_COPIED, _PADDED = (
    _native.FLAG_READ_ONLY,
    _native.FLAG_IS_COPIED,
    _native.FLAG_IS_SUBBYTE_TYPE_PADDED,
)
_CPU, _CUDA, _CUDA_HOST = 1, 2, 3

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _guarded(pages: int) -> int:
    """Address of so many pages that can be written, between two that may not be touched."""
    whole = (pages + 2) * PAGE
    base = _libc.mmap(None, whole, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value)
    assert not _libc.mprotect(base + PAGE, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    return int(base) + PAGE


ARENA_NBYTES: Final = 16 * PAGE
ARENA: Final = _guarded(16)
NOWHERE: Final = ARENA - PAGE
BYTES: Final = bytes((7 * i + i // 256) % 256 for i in range(ARENA_NBYTES))
ctypes.memmove(ARENA, BYTES, ARENA_NBYTES)
_STRUCT, _SHAPE, _STRIDES = (_guarded(1) + PAGE for _ in range(3))
"""Ends of pages."""
SCRATCH: Final = PAGE + _guarded(1)
"""The end of one that nothing lies in."""


# ------------------------------------------------------------------------------------------------------ what is told

INT64S = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([s * (1 << n) + more for n in (0, 31, 32, 47, 59, 61, 62) for s in (1, -1) for more in (-1, 0, 1)]),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
DEVICES = st.sampled_from([(_CPU, 0), (_CPU, 0), (_CPU, 0), (_CUDA_HOST, 0)]) | st.tuples(
    st.sampled_from([_CPU, _CUDA, _CUDA_HOST, 0, 4, 10, 13, -1, 1 << 30]), st.sampled_from([0, 1, 99, -1, 1 << 30])
)
KNOWN: Final = [(d.code, d.bits, d.lanes) for d in map(dtype, dtype_names())]


@dataclass
class Lie:
    """What a producer tells, field by field; as drawn, so that a failure shows it."""

    versioned: bool
    version: tuple[int, int]
    flags: int
    data: str
    byte_offset: int
    shape: tuple[int, ...] | None
    strides: tuple[int, ...] | None
    ndim: int
    element: tuple[int, int, int]
    device: tuple[int, int]
    told: Any
    name: bytes
    shift: int
    deleter: str
    manner: str

    @property
    def pointer(self) -> int:
        return {"arena": ARENA, "nowhere": NOWHERE, "null": 0, "high": (1 << 64) - 64}[self.data]


@st.composite
def _true(draw: Any) -> Lie:
    """A tensor that is there, told as it is."""
    versioned = draw(st.booleans())
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    compact = [math.prod(shape[d + 1 :]) or 1 for d in range(len(shape))]
    strides: tuple[int, ...] | None = tuple(compact)
    how = draw(st.sampled_from(["none", "row-major", "permuted", "gaps", "broadcast"]))
    if how == "none":
        strides = None
    elif how == "permuted":
        order = draw(st.permutations(range(len(shape))))
        lengths = [shape[d] for d in order]
        shape, strides = tuple(lengths), tuple(compact[d] for d in order)
    elif how in ("gaps", "broadcast"):
        factors = st.integers(1, 3) if how == "gaps" else st.integers(0, 1)
        strides = tuple(s * draw(factors) for s in compact)
    device, told = draw(st.sampled_from([((_CPU, 0), (_CPU, 0)), ((_CPU, 0), (_CUDA_HOST, 0)), ((_CUDA_HOST, 0),) * 2]))
    return Lie(
        versioned=versioned,
        version=(1, draw(st.integers(0, 9))),
        flags=draw(st.sampled_from([0, _READ_ONLY])),
        data="arena",
        byte_offset=draw(st.integers(0, 4096)),
        shape=shape,
        strides=strides,
        ndim=len(shape),
        element=draw(st.sampled_from([(1, 8, 1), (0, 32, 1), (2, 64, 1), (4, 16, 1), *KNOWN])),
        device=device,
        told=told,
        name=NAMES[versioned],
        shift=draw(st.integers(0, 7)),
        deleter=draw(st.sampled_from(["counts", "null", "raises", "consumes"])),
        manner=draw(st.sampled_from(["plain", "old", "twice"])),
    )


WRONG: Final = {
    "version": st.tuples(st.sampled_from([0, 1, 2, (1 << 32) - 1]), st.integers(0, (1 << 32) - 1)),
    "flags": st.sampled_from([_IS_COPIED, _PADDED, 7, 1 << 63, (1 << 64) - 1]),
    "data": st.sampled_from(["nowhere", "null", "high"]),
    "byte_offset": st.sampled_from([ARENA_NBYTES - 1, (1 << 63) - 1, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1),
    "ndim": st.sampled_from([-1, -(1 << 31), 65, 1 << 20, (1 << 31) - 1]),
    "element": st.tuples(st.integers(0, 20), st.integers(0, 255), st.integers(0, 4)),
    "device": DEVICES,
    "told": st.sampled_from(
        [None, (), (1,), (1, 0, 0), "cpu", ("a", "b"), (1.0, 0), (1 << 70, 0), (_CUDA, 0), (_CUDA, 1), (10, 0), (0, 0)]
    ),
    "name": st.sampled_from([b"dltensor", b"used_dltensor", b"used_dltensor_versioned", b"", b"dltensor\xff", b"x"]),
    "manner": st.sampled_from(["raises", "nothing", "bare"]),
}
"""By field, what it may be in a lie."""


@st.composite
def lies(draw: Any) -> Lie:
    """A true tensor of which a field, or up to three, are then told otherwise."""
    lie: Lie = draw(_true())
    fields = ["shape", "lengths", "strides", "both devices", "padded", *WRONG]
    count = draw(st.sampled_from([1, 1, 1, 0, 2, 3]))
    for field in draw(st.lists(st.sampled_from(fields), min_size=count, max_size=count, unique=True)):
        if field == "shape":
            lie.shape = None
        elif field == "lengths":
            ndim = draw(st.sampled_from([1, 2, 3, 12, 64]))
            lie.shape = tuple(draw(st.lists(INT64S, min_size=ndim, max_size=ndim)))
            lie.strides = draw(st.none() | st.lists(INT64S, min_size=ndim, max_size=ndim).map(tuple))
            lie.ndim = ndim
        elif field == "both devices":
            lie.device = lie.told = draw(DEVICES)
        elif field == "padded":
            lie.flags = _PADDED
            lie.element = draw(st.sampled_from([known for known in KNOWN if known[1] * known[2] % 8]))
        elif field == "strides":
            lie.strides = tuple(draw(INT64S) for _ in lie.shape or ())
        else:
            setattr(lie, field, draw(WRONG[field]))
    if lie.shape is not None and lie.ndim in range(65):
        lie.ndim = len(lie.shape)
    if lie.strides is not None and lie.shape is not None:
        lie.strides = (*lie.strides, *lie.shape)[: len(lie.shape)]
    return lie


class OwnError(Exception):
    """Raised by the producer itself; passes."""


_producers: Final[list[Producer]] = []
"""All that ever were: a failed example's traceback may call a deleter late."""


class Producer:
    """Tells a lie."""

    def __init__(self, lie: Lie) -> None:
        self.lie, self.deleted, self.asked = lie, 0, 0
        _producers.append(self)
        kind = Versioned if lie.versioned else Legacy
        self.address = _STRUCT - ctypes.sizeof(kind) - lie.shift
        ctypes.memset(_STRUCT - PAGE, 0xA5, PAGE)
        managed = kind.from_address(self.address)
        if lie.versioned:
            managed.major, managed.minor = lie.version
            managed.flags = lie.flags
        self._callback = Deleter(self._delete) if lie.deleter != "null" else Deleter(0)
        managed.deleter = self._callback
        tensor: Tensor = managed.tensor
        tensor.data, tensor.byte_offset = lie.pointer, lie.byte_offset
        tensor.device_type, tensor.device_id = lie.device
        tensor.code, tensor.bits, tensor.lanes = lie.element
        tensor.ndim = lie.ndim
        tensor.shape = self._placed(lie.shape, _SHAPE)
        tensor.strides = self._placed(lie.strides, _STRIDES)
        self.capsules: list[Any] = []

    def capsule(self) -> Any:
        """A new one at each time, as the standard wants it, unless the lie is to give the same one."""
        if not self.capsules or self.lie.manner != "twice":
            self.capsules.append(new_capsule(self.address, self.lie.name or None, None))
        return self.capsules[-1]

    def _placed(self, numbers: tuple[int, ...] | None, end: int) -> Any:
        if numbers is None:
            return None
        start = end - 8 * len(numbers) - self.lie.shift
        if numbers:
            ctypes.memmove(start, (ctypes.c_int64 * len(numbers))(*numbers), 8 * len(numbers))
        return ctypes.cast(start, ctypes.POINTER(ctypes.c_int64))

    def _delete(self, _: int) -> None:
        self.deleted += 1
        if self.lie.deleter == "raises":
            raise OwnError("in the deleter")
        if self.lie.deleter == "consumes":
            try:
                _native.consume(self.capsules[-1])
            except ValueError:
                COUNTS["consumed in its own deleter"] += 1

    def consumed(self) -> int:
        """How many capsules were taken: their names tell."""
        if self.lie.name.startswith(b"used_"):
            return 0
        return sum(any(is_named(one, b"used_" + name) for name in NAMES.values()) for one in self.capsules)


def producer_of(lie: Lie) -> Any:
    """An object with the methods that the lie's manner gives it."""
    source = Producer(lie)

    def dlpack(self: Any, **asked: Any) -> Any:
        source.asked += 1
        if lie.manner == "old" and set(asked) - {"stream"}:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        if lie.manner == "raises":
            raise (OwnError, BufferError, ValueError, RuntimeError)[source.asked % 4]("by the producer")
        return None if lie.manner == "nothing" else source.capsule()

    methods: dict[str, Any] = {"__dlpack__": dlpack, "source": source}
    if lie.manner != "bare":
        methods["__dlpack_device__"] = lambda self: lie.told
    return type("Liar", (), methods)()


# --------------------------------------------------------------------------------------------------- what must hold


def _agrees(told: Any, device: tuple[int, int]) -> bool:
    if not (isinstance(told, tuple | list) and len(told) == 2 and all(isinstance(part, int) for part in told)):
        return False
    if told[0] == _CUDA_HOST:
        return True
    return tuple(told) == device or {told[0], device[0]} <= {_CPU, _CUDA_HOST}


def _span(lie: Lie, itembits: int) -> tuple[int, int] | None:
    """Lowest and highest byte offset of the tensor from its first element; None where it has none."""
    shape = lie.shape or ()
    if not all(shape):
        return None
    strides = lie.strides if lie.strides is not None else tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    high = (sum(r for r in reach if r > 0) + 1) * itembits
    return sum(r for r in reach if r < 0) * itembits // 8, -(-high // 8)


def judged(lie: Lie) -> str:
    """Whether what is told is ``"true"``: a tensor in memory that is there; ``"refused"``; or ``"elsewhere"``."""
    element = DTYPES.get(lie.element)
    if (
        lie.name not in NAMES.values()
        or lie.name != NAMES[lie.versioned]
        or lie.manner in ("nothing", "raises")
        or (lie.versioned and (lie.version[0] != 1 or lie.flags & _IS_COPIED))
        or not 0 <= lie.ndim <= 64
        or (lie.ndim and lie.shape is None)
        or element is None
        or (lie.versioned and lie.flags & _PADDED and element.itembits % 8)
        or not _agrees((_CPU, 0) if lie.manner == "bare" else lie.told, lie.device)
        or lie.device[0] not in (_CPU, _CUDA_HOST)
        or lie.pointer + lie.byte_offset >= 1 << 64
        or any(n < 0 for n in lie.shape or ())
    ):
        return "refused"
    span = _span(lie, element.itembits)
    if span is None:
        return "elsewhere"
    effective = [s for n, s in zip(lie.shape or (), lie.strides or (), strict=False) if n != 1]
    if any(s < 0 for s in effective):
        return "refused"
    start = lie.pointer + lie.byte_offset
    if start == 0 or start + span[1] > 1 << 64 or span[1] >= 1 << 60:
        return "refused"
    inside = lie.data == "arena" and start + span[1] <= ARENA + ARENA_NBYTES
    # Packed elements of which a view would start or end between bytes, and lengths that multiply over 2^63.
    plain = element.itembits % 8 == 0 or lie.strides is None
    return "true" if inside and plain and math.prod(lie.shape or ()) < 1 << 20 else "elsewhere"


DTYPES: Final[dict[tuple[int, int, int], DType]] = {key: dtype(key) for key in KNOWN}


def gathered(lie: Lie, element: DType) -> bytes:
    """The elements in row-major order, by the book."""
    start = lie.byte_offset
    if lie.strides is None:
        return BYTES[start : start + -(-math.prod(lie.shape or ()) * element.itembits // 8)]
    places = (
        start + element.itemsize * sum(i * s for i, s in zip(index, lie.strides, strict=True))
        for index in product(*map(range, lie.shape or ()))
    )
    return b"".join(BYTES[at : at + element.itemsize] for at in places)


def plain(element: DType, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, byte_offset: int = 0) -> Lie:
    """No lie at all."""
    told = (element.code, element.bits, element.lanes)
    return Lie(
        True, (1, 3), 0, "arena", byte_offset, shape, strides, len(shape), told, (_CPU, 0), (_CPU, 0), NAMES[True], 0,
        "counts", "plain",
    )  # fmt: skip
