"""The cases of CuPy's public suite of DLPack, for any producer, in our own words: its wheel ships no tests.

Source: ``tests/cupy_tests/core_tests/test_dlpack.py`` of CuPy: conversion, streams, versions, who frees what, capsules
that are consumed twice. What `test_cupy.py` has is not said again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reliability import check_row, functions_of

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.errors import AliasError
from dlpoffload.producers import view_of
from dlpoffload.spec import dtype_names

np = pytest.importorskip("numpy")

NAMES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip
REFUSED = sorted(set(dtype_names()) - set(NAMES) - {"bfloat16"})
"""bfloat16 is taken or not, by version."""
PRODUCTS = 100
"""Of matrices, one behind the other: time enough for a reader that does not wait to read too early."""


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture
def buffer(rng: Any) -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(4096, device=0) as buffer:
        buffer.memoryview()[:] = rng.integers(0, 100, 4096, dtype=np.uint8).tobytes()
        yield buffer


@pytest.mark.gpu
@pytest.mark.parametrize(
    "asked", [{}, {"max_version": (0, 8)}, {"max_version": (1, 0)}, {"max_version": (2, 0)}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_a_capsule_of_either_kind(cupy: Any, buffer: dlpo.HostBuffer, name: str, asked: dict[str, Any]) -> None:
    view = buffer.device_view((2, 3), name)
    if name == "bool":
        buffer.memoryview(0, view.nbytes)[:] = b"\x01\x00" * 3
    array = cupy.from_dlpack(view.__dlpack__(**asked))
    assert (array.dtype, array.shape, array.data.ptr) == (np.dtype(name), (2, 3), view.device_pointer)
    assert cupy.asnumpy(array).tobytes() == bytes(buffer.memoryview(0, view.nbytes))
    del array, view
    lifetime.drain()
    assert buffer.live_views == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_cupy_has_not_gives_its_memory_up(cupy: Any, buffer: dlpo.HostBuffer, name: str) -> None:
    view = buffer.device_view((8,), name)
    with pytest.raises((TypeError, ValueError, BufferError, NotImplementedError, RuntimeError)):
        cupy.from_dlpack(view)
    as_bytes = cupy.from_dlpack(view.view((view.nbytes,), "uint8"))
    assert cupy.asnumpy(as_bytes).tobytes() == bytes(buffer.memoryview(0, view.nbytes))
    del as_bytes, view
    lifetime.drain()
    assert buffer.live_views == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), None), ((0,), None), ((2, 0, 3), None), ((1, 1), (7, 9)), ((3, 4), (1, 3)), ((3, 4), (9, 2))],
    ids=str,
)
def test_shapes_and_strides(cupy: Any, buffer: dlpo.HostBuffer, shape: Any, strides: Any) -> None:
    view = buffer.device_view(shape, "int32", strides=strides)
    array = cupy.from_dlpack(view)
    told = [4 * s for s in view.strides]
    wanted = np.ndarray(shape, np.int32, bytes(buffer.memoryview()), strides=told)
    assert array.shape == shape
    assert np.array_equal(cupy.asnumpy(array), wanted)
    if array.size:
        assert array.data.ptr == view.device_pointer
        assert all(n == 1 or s == t for n, s, t in zip(shape, array.strides, told, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("version", [None, (1, 0)])
def test_who_frees_what(cupy: Any, version: Any, consumed: bool) -> None:
    """An unconsumed capsule frees when it goes, a consumed one leaves it to the array."""
    buffer = dlpo.HostBuffer.allocate(4096, device=0)
    capsule = buffer.device_view((10,), "float32").__dlpack__(max_version=version)
    assert buffer.live_views == 1
    array = cupy.from_dlpack(capsule) if consumed else None
    assert buffer.live_views == 1
    del capsule
    assert buffer.live_views == int(consumed)
    if array is not None:
        del array
    lifetime.drain()
    assert buffer.live_views == 0
    buffer.close()


@pytest.mark.gpu
@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_is_consumed_once(cupy: Any, buffer: dlpo.HostBuffer, version: Any) -> None:
    capsule = buffer.device_view((10,), "float32").__dlpack__(max_version=version)
    array = cupy.from_dlpack(capsule)
    with pytest.raises(ValueError, match="multiple times"):
        cupy.from_dlpack(capsule)
    assert buffer.live_views == 1
    del array, capsule


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [None, -1, 1, 2, "own"], ids=str)
def test_streams_that_a_consumer_may_name(cupy: Any, buffer: dlpo.HostBuffer, stream: Any) -> None:
    held = cupy.cuda.Stream(non_blocking=True)
    view = buffer.device_view((8,), "float32")
    capsule = view.__dlpack__(stream=held.ptr if stream == "own" else stream, max_version=(1, 0))
    assert cupy.from_dlpack(capsule).data.ptr == view.device_pointer


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [0, -2, True, "0"], ids=repr)
def test_streams_that_it_may_not(buffer: dlpo.HostBuffer, stream: Any) -> None:
    with pytest.raises(AliasError, match="stream"):
        buffer.device_view((8,), "float32").__dlpack__(stream=stream)


@pytest.mark.gpu
@pytest.mark.parametrize("consumer", ["null", "blocking", "non-blocking"])
@pytest.mark.parametrize("producer", ["null", "blocking", "non-blocking"])
def test_work_of_the_producers_stream_comes_first(cupy: Any, producer: str, consumer: str) -> None:
    """An array that is still being written is viewed, and read by another stream: what it reads is what was written."""

    def stream(kind: str) -> Any:
        return cupy.cuda.Stream.null if kind == "null" else cupy.cuda.Stream(non_blocking=kind == "non-blocking")

    one, two = stream(producer), stream(consumer)
    array, ballast = cupy.zeros(4096, "float32"), cupy.ones((512, 512), "float32")
    cupy.cuda.Device().synchronize()
    with one:
        for _ in range(PRODUCTS):
            ballast = ballast @ ballast
            ballast /= ballast.max()
        array += 7
        view = view_of(array)
    with two:
        seen = cupy.from_dlpack(view).copy()
    two.synchronize()
    assert bool((seen == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [None, False, True])
def test_copies_where_they_are_asked_for(cupy: Any, buffer: dlpo.HostBuffer, copy: bool | None) -> None:
    view = buffer.device_view((8,), "float32")
    array = cupy.from_dlpack(view, copy=copy)
    assert (array.data.ptr == view.device_pointer) == (copy is not True)
    assert cupy.asnumpy(array).tobytes() == bytes(buffer.memoryview(0, 32))


@pytest.mark.gpu
def test_the_host_is_a_device_to_export_to(buffer: dlpo.HostBuffer) -> None:
    view = buffer.device_view((8,), "float32")
    for options in ({}, {"copy": False}):
        assert np.from_dlpack(view, device="cpu", **options).ctypes.data == buffer.host_pointer
    assert np.from_dlpack(view, device="cpu", copy=True).ctypes.data != buffer.host_pointer


@pytest.mark.gpu
def test_what_is_read_only_can_only_be_said(cupy: Any) -> None:
    """The capsule says read-only. CuPy has no such arrays: it refuses, or leaves it to its user not to write."""
    memory = np.arange(1024, dtype=np.float32)
    memory.flags.writeable = False
    with dlpo.HostBuffer.register(memory, device=0) as buffer:
        assert buffer.read_only
        view = buffer.device_view((1024,), "float32", read_only=True)
        with pytest.raises(AliasError, match="legacy capsule cannot say so"):
            view.__dlpack__()
        try:
            array = cupy.from_dlpack(view)
        except BufferError:
            array = None
        assert array is None or array.data.ptr == view.device_pointer
        del array, view
        lifetime.drain()
        assert buffer.live_views == 0


@pytest.mark.gpu
def test_back_and_forth(cupy: Any, buffer: dlpo.HostBuffer) -> None:
    """Ours to CuPy, CuPy's to us: the same bytes, and each holds the one before it."""
    view = buffer.device_view((8,), "float32")
    back = view_of(cupy.from_dlpack(view))
    assert back.device_pointer == view.device_pointer
    del view
    assert buffer.live_views == 1
    again = cupy.from_dlpack(back)
    del back
    again[...] = 3
    cupy.cuda.Device().synchronize()
    assert bytes(buffer.memoryview(0, 32)) == np.full(8, 3, np.float32).tobytes()
    del again


CASES = functions_of(globals())


def test_the_docs_have_the_numbers() -> None:
    check_row("CuPy, cases of its public suite", CASES)
