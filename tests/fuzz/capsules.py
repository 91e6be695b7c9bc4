"""A fuzzer of the consumer: lying producers, and the native calls under any arguments. See `lying`."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any, Final

from hypothesis import assume, given
from hypothesis import strategies as st

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]

from harness import COUNTS, main
from lying import (
    ARENA,
    ARENA_NBYTES,
    BYTES,
    DEVICES,
    DTYPES,
    INT64S,
    PAGE,
    SCRATCH,
    Lie,
    OwnError,
    Producer,
    gathered,
    judged,
    lies,
    plain,
    producer_of,
)

import dlpoffload as dlpo
from dlpoffload import HostBuffer, HostStore, _native, lifetime
from dlpoffload.errors import AliasError, CudaError, HostMemoryError, RegistrationError, SpecError
from dlpoffload.producers import view_of
from dlpoffload.spec import dtype

REFUSALS: Final = (AliasError, SpecError, CudaError)
"""What a lie may be refused with."""


def _settled(source: Producer) -> None:
    """After everything is dropped: the deleter has run once for each capsule that was taken."""
    wanted = source.consumed() if source.lie.deleter != "null" else 0
    lifetime.drain()
    if source.deleted != wanted:
        gc.collect()
        lifetime.drain()
    assert source.deleted == wanted, (source.deleted, wanted)


def _looked_at(view: dlpo.View) -> None:
    """All that a view does without its bytes."""
    repr(view)
    assert view.nbytes >= 0
    assert view.pointer is not None
    inner = view.memoryview()
    assert inner.nbytes == view.nbytes
    again = view_of(view.view((view.nbytes,), "uint8"))
    exported = again.__dlpack__(max_version=(1, 3))
    assert _native.consume(exported).pointer == view.pointer


@given(lies())
def view_of_a_lie(lie: Lie) -> None:
    """A view that says what was told, or a typed error; no byte that is not there is touched."""
    liar = producer_of(lie)
    source: Producer = liar.source
    verdict = judged(lie)
    element = DTYPES.get(lie.element)
    try:
        view = view_of(liar)
    except OwnError:
        assert lie.manner == "raises"
        ending = "the producer's own error"
    except REFUSALS:
        assert verdict != "true", "a true tensor was refused"
        ending = "refused"
    else:
        assert verdict != "refused", "a lie was believed"
        assert element is not None
        ending = "viewed"
        assert (view.shape, view.dtype) == (lie.shape or (), element)
        assert view.pointer == lie.pointer + lie.byte_offset
        assert view.read_only == bool(lie.versioned and lie.flags & _native.FLAG_READ_ONLY)
        _looked_at(view)
        if lie.manner == "twice":
            try:
                view_of(liar)
            except AliasError:
                pass
            else:
                raise AssertionError("a capsule was taken twice")
        if verdict == "true":
            ending = "read"
            wanted = gathered(lie, element)
            if wanted:
                with HostBuffer.copy_of(view, device="cpu") as copy:
                    assert bytes(copy.memoryview()) == wanted
        del view
    COUNTS[ending] += 1
    _settled(source)
    assert ctypes.string_at(ARENA, ARENA_NBYTES) == BYTES


WAYS: Final = {
    "copy_of": lambda liar: HostBuffer.copy_of(liar, device="cpu"),
    "register": lambda liar: HostBuffer.register(liar, device="cpu"),
    "store": lambda liar: HostStore.copy_of({"x": liar}, device="cpu"),
}


@given(lies(), st.sampled_from(sorted(WAYS)))
def the_other_ways_in(lie: Lie, way: str) -> None:
    """`copy_of`, `register` and a store: right bytes or a typed error. What is told elsewhere is never read."""
    liar = producer_of(lie)
    source: Producer = liar.source
    verdict = judged(lie)
    element = DTYPES.get(lie.element)
    # Bytes that are told to be elsewhere would be read here, as whoever tells them asked for.
    assume(verdict != "elsewhere")
    try:
        made = WAYS[way](liar)
    except OwnError:
        assert lie.manner == "raises"
    except (*REFUSALS, RegistrationError):
        empty = element is not None and not math.prod(lie.shape or ())
        assert verdict != "true" or empty or (way, lie.manner) == ("store", "twice")
        COUNTS[f"{way}: refused"] += 1
    else:
        assert verdict == "true", "a lie was believed"
        assert element is not None
        COUNTS[f"{way}: made"] += 1
        with made:
            if way == "register":
                assert made.host_pointer == lie.pointer + lie.byte_offset
                assert bytes(made.memoryview()) == BYTES[lie.byte_offset : lie.byte_offset + made.nbytes]
            elif way == "copy_of":
                assert bytes(made.memoryview()) == gathered(lie, element)
            else:
                assert bytes(made.host_view("x").memoryview()) == gathered(lie, element)
        del made
    _settled(source)
    assert ctypes.string_at(ARENA, ARENA_NBYTES) == BYTES


@given(st.integers(40, 62), st.sampled_from(["uint8", "float64"]))
def a_broadcast_of_few_bytes_to_many(bits: int, name: str) -> None:
    """A stride of zero makes terabytes of one element, truly: a view takes none of them, a copy is refused."""
    element = dtype(name)
    lie = plain(element, (1 << bits,), (0,))
    liar = producer_of(lie)
    view = view_of(liar)
    assert view.nbytes == element.itemsize
    try:
        HostBuffer.copy_of(view, device="cpu")
    except HostMemoryError:
        COUNTS["copy refused"] += 1
    else:
        raise AssertionError("terabytes were copied")
    del view
    _settled(liar.source)


# ------------------------------------------------------------------------------------------------- the native calls

_ANY: Final = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), INT64S, st.integers(-1, 1 << 70))


@st.composite
def _capsule_arguments(draw: Any) -> dict[str, Any]:
    """What makes a capsule, up to two arguments replaced by anything."""
    sides = draw(st.lists(st.tuples(st.integers(0, 5) | INT64S, st.integers(-5, 5) | INT64S), max_size=4))
    versioned = draw(st.booleans())
    arguments: dict[str, Any] = {
        "pointer": draw(st.sampled_from([ARENA, 0, (1 << 64) - 1])),
        "device": draw(DEVICES),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "shape": tuple(n for n, _ in sides),
        "strides": tuple(s for _, s in sides),
        "flags": draw(st.integers(0, 8)) if versioned else 0,
        "versioned": versioned,
    }
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2)):
        arguments[name] = draw(_ANY | st.lists(_ANY, max_size=70).map(tuple))
    return arguments


@given(_capsule_arguments())
def capsules_of_anything(arguments: dict[str, Any]) -> None:
    """The native producer: a capsule that our consumer reads back as it was told, or an error of Python's."""
    owner = _native.Owner(1 << 63)
    try:
        capsule = _native.dlpack_capsule(owner, **arguments)
    except (TypeError, ValueError, OverflowError):
        COUNTS["no capsule"] += 1
    else:
        COUNTS["capsule"] += 1
        back = _native.consume(capsule)
        told = {name: arguments[name] for name in ("pointer", "device", "dtype", "shape", "strides", "flags")}
        assert {name: getattr(back, name) for name in told} == told
        del back, capsule
    assert owner.users == 0
    owner.release()
    lifetime.drain()


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-40, 40)), max_size=5),
    st.sampled_from([1, 2, 3, 4, 8, 16, 24]),
)
def gathers_of_anything(sides: list[tuple[int, int]], itemsize: int) -> None:
    """The native gather, negative strides included, against one by the book; it ends where its memory ends."""
    shape, strides = tuple(n for n, _ in sides), tuple(s for _, s in sides)
    reach = [(n - 1) * s for n, s in sides if n]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + 1
    assume((high - low) * itemsize <= ARENA_NBYTES)
    # The span ends where the arena ends, and the result where a page that may not be touched begins.
    start = ARENA_NBYTES - high * itemsize
    numel = math.prod(shape)
    target = SCRATCH - numel * itemsize
    assume(numel * itemsize <= PAGE)
    _native.copy_strided(target, ARENA + start, itemsize, shape, strides)
    wanted = b"".join(
        BYTES[at : at + itemsize]
        for index in product(*map(range, shape))
        for at in [start + itemsize * sum(i * s for i, s in zip(index, strides, strict=True))]
    )
    assert ctypes.string_at(target, numel * itemsize) == wanted


def _warm_up() -> None:
    liar = producer_of(plain(dtype("uint8"), (4,)))
    with HostBuffer.copy_of(view_of(liar), device="cpu") as copy:
        assert bytes(copy.memoryview()) == BYTES[:4]
    with HostStore.copy_of({"x": b"some"}, device="cpu"):
        pass


if __name__ == "__main__":
    raised: list[str] = []
    # What a deleter of ctypes raises nobody can catch: it is meant to, and to be the only thing that does.
    sys.unraisablehook = lambda unraisable: raised.append(type(unraisable.exc_value).__name__)
    main(
        _warm_up,
        view_of_a_lie,
        the_other_ways_in,
        a_broadcast_of_few_bytes_to_many,
        capsules_of_anything,
        gathers_of_anything,
    )
    assert set(raised) <= {"OwnError"}, set(raised)
