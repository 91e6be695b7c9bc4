"""What numba-cuda does with any producer: `StridedMemoryView` of cuda.core, and views as arguments of kernels.

numba-cuda ships its tests (``numba.cuda.tests``), and none of them is of DLPack but one of CuPy's bfloat16: they are of
``__cuda_array_interface__``, whose cases for consumers are said here in our own words for `__dlpack__`; so are those
of cuda.core for `StridedMemoryView`, which numba-cuda passes every argument through.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from reliability import check_row, functions_of

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.errors import AliasError
from dlpoffload.producers import view_of

np = pytest.importorskip("numpy")

NAMES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip
REFUSED = ["int4", "uint4", "complex32", "float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float4_e2m1fn_x2"]
LABELS = ["cpu", "pinned", "pinned_as_cpu", pytest.param("device", marks=pytest.mark.gpu)]
NO_STREAM = pytest.mark.xfail(
    raises=AliasError, strict=True, reason="a stream for kDLCPU is refused, as the standard and NumPy have it"
)


@pytest.fixture(scope="module")
def strided_memory_view() -> Any:
    return pytest.importorskip("cuda.core.utils").StridedMemoryView


@pytest.fixture
def buffer(request: pytest.FixtureRequest, rng: Any) -> Iterator[dlpo.HostBuffer]:
    on_gpu = request.node.get_closest_marker("gpu") is not None
    with dlpo.HostBuffer.allocate(4096, device=0 if on_gpu else "cpu") as buffer:
        buffer.memoryview()[:] = rng.integers(0, 100, 4096, dtype=np.uint8).tobytes()
        yield buffer
        gc.collect()  # what a compiled kernel was called with may lie in a cycle


def labelled(buffer: dlpo.HostBuffer, label: str, shape: Any, name: str, strides: Any = None) -> dlpo.View:
    if label == "device":
        return buffer.device_view(shape, name, strides=strides)
    return buffer.host_view(shape, name, strides=strides, label=label)


# -------------------------------------------------------------------------------------- StridedMemoryView


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_strided_memory_view_of_every_dtype(
    strided_memory_view: Any, buffer: dlpo.HostBuffer, name: str, label: str
) -> None:
    view = labelled(buffer, label, (3, 4), name)
    seen = strided_memory_view.from_dlpack(view, stream_ptr=-1)
    assert (seen.ptr, seen.shape, seen.dtype, seen.readonly) == (view.pointer, (3, 4), np.dtype(name), False)
    assert seen.is_device_accessible == (label != "cpu")
    del seen, view
    lifetime.drain()
    assert buffer.live_views == 0


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_it_has_not_gives_its_memory_up(
    strided_memory_view: Any, buffer: dlpo.HostBuffer, name: str, label: str
) -> None:
    view = labelled(buffer, label, (8,), name)
    with pytest.raises((TypeError, NotImplementedError)):
        _ = strided_memory_view.from_dlpack(view, stream_ptr=-1).dtype
    del view
    lifetime.drain()
    assert buffer.live_views == 0


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), None), ((0,), None), ((2, 0, 3), None), ((3, 4), (1, 3)), ((3, 4), (9, 2)), ((2, 3), (0, 1))],
    ids=str,
)
def test_a_strided_memory_view_of_every_shape(
    strided_memory_view: Any, buffer: dlpo.HostBuffer, shape: Any, strides: Any, label: str
) -> None:
    view = labelled(buffer, label, shape, "int32", strides)
    seen = strided_memory_view.from_dlpack(view, stream_ptr=-1)
    assert (seen.ptr, seen.shape) == (view.pointer, shape)
    assert tuple(seen.strides or ()) == view.strides


@pytest.mark.parametrize(
    ("label", "stream"),
    [
        ("cpu", -1),
        ("cpu", 0),
        pytest.param("cpu", 1, marks=NO_STREAM),
        *(("pinned", stream) for stream in (None, -1, 0, 1, 2)),
        *(("pinned_as_cpu", stream) for stream in (None, -1, 0, 1, 2)),
        *(pytest.param("device", stream, marks=pytest.mark.gpu) for stream in (-1, 0, 1, 2)),
    ],
)
def test_streams_that_it_passes_on(
    strided_memory_view: Any, buffer: dlpo.HostBuffer, label: str, stream: int | None
) -> None:
    view = labelled(buffer, label, (4,), "float32")
    refused = None
    try:
        assert strided_memory_view.from_dlpack(view, stream_ptr=stream).ptr == view.pointer
    except AliasError as error:
        refused = str(error)
    del view  # the traceback of a failure would keep it, and its buffer open
    if refused is not None:
        raise AliasError(refused)


@pytest.mark.parametrize("through", ["from_dlpack", "from_any_interface"])
def test_read_only_is_seen_and_the_memory_kept(strided_memory_view: Any, through: str) -> None:
    memory = bytearray(b"some bytes")
    view = view_of(memoryview(memory).toreadonly())
    seen = getattr(strided_memory_view, through)(view, stream_ptr=-1)
    assert (seen.readonly, seen.shape) == (True, (10,))
    del view
    with pytest.raises(BufferError):
        memory.append(0)
    del seen
    lifetime.drain()
    memory.append(0)


# ------------------------------------------------------------------------------------- arguments of kernels


@pytest.fixture
def numba_cuda(cuda_driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # numba-cuda (0.30) asks for it when it first compiles, and NumPy 2.5 dropped it.
    if not hasattr(np, "row_stack"):
        monkeypatch.setattr(np, "row_stack", np.vstack, raising=False)
    numba_cuda = pytest.importorskip("numba.cuda")
    typeof = pytest.importorskip("numba.cuda.typing.typeof")
    if not hasattr(typeof, "_typeof_dlpack"):
        pytest.skip("this numba-cuda takes no DLPack as an argument of a kernel, only __cuda_array_interface__")
    return numba_cuda


@pytest.fixture
def doubled(numba_cuda: Any) -> Any:
    @numba_cuda.jit
    def doubled(x: Any) -> None:
        start = numba_cuda.grid(1)
        if start < x.size:
            x[start] *= 2

    return doubled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int32", "int64", "float32", "float64"])
def test_a_kernel_writes_through_a_view(numba_cuda: Any, doubled: Any, buffer: dlpo.HostBuffer, name: str) -> None:
    view = buffer.device_view((100,), name)
    host = np.from_dlpack(buffer.host_view((100,), name))
    host[:] = np.arange(100)
    doubled[1, 128](view)
    numba_cuda.synchronize()
    assert np.array_equal(host, 2 * np.arange(100).astype(name))


@pytest.mark.gpu
def test_a_kernel_on_a_stream_of_its_own(numba_cuda: Any, doubled: Any, buffer: dlpo.HostBuffer) -> None:
    view = buffer.device_view((100,), "float32")
    host = np.from_dlpack(buffer.host_view((100,), "float32"))
    host[:] = 1
    stream = numba_cuda.stream()
    for _ in range(3):
        doubled[1, 128, stream](view)
    stream.synchronize()
    assert (host == 8).all()


@pytest.mark.gpu
def test_a_kernel_reads_by_strides(numba_cuda: Any, buffer: dlpo.HostBuffer) -> None:
    @numba_cuda.jit
    def copied(source: Any, target: Any) -> None:
        i, j = numba_cuda.grid(2)
        if i < source.shape[0] and j < source.shape[1]:
            target[i, j] = source[i, j]

    host = np.from_dlpack(buffer.host_view((12,), "float32"))
    host[:] = np.arange(12)
    source = buffer.device_view((3, 4), "float32", strides=(1, 3))
    target = buffer.device_view((3, 4), "float32", byte_offset=256)
    copied[(1, 1), (4, 4)](source, target)
    numba_cuda.synchronize()
    found = np.from_dlpack(buffer.host_view((3, 4), "float32", byte_offset=256))
    assert np.array_equal(found, host.reshape(4, 3).T)


@pytest.mark.gpu
def test_no_launch_keeps_the_memory(numba_cuda: Any, doubled: Any) -> None:
    buffer = dlpo.HostBuffer.allocate(4096, device=0)
    doubled[1, 128](buffer.device_view((100,), "float32"))
    numba_cuda.synchronize()
    gc.collect()
    lifetime.drain()
    assert buffer.live_views == 0
    buffer.close()


CASES = functions_of(globals())


def test_the_docs_have_the_numbers() -> None:
    check_row("numba-cuda, cases of its consumers", CASES)
