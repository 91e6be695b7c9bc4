"""CuPy, which takes kDLCUDA only: every dtype it has, over mapped host memory and device memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload.producers import view_of
from dlpoffload.view import Label

cupy = pytest.importorskip("cupy")
np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_driver")]

NAMES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip


@pytest.fixture
def buffer(rng: Any) -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(4096, device=0) as buffer:
        buffer.memoryview()[:] = rng.integers(0, 256, 4096, dtype=np.uint8).tobytes()
        yield buffer


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cupy_reads_a_device_view_bit_for_bit(buffer: dlpo.HostBuffer, name: str, shape: tuple[int, ...]) -> None:
    view = buffer.device_view(shape, name, byte_offset=64)
    if name == "bool":
        buffer.memoryview(64, view.nbytes)[:] = bytes(i % 2 for i in range(view.nbytes))
    array = cupy.from_dlpack(view)
    assert (array.dtype, array.shape, array.data.ptr) == (np.dtype(name), shape, view.device_pointer)
    assert cupy.asnumpy(array).tobytes() == bytes(buffer.memoryview(64, view.nbytes))


@pytest.mark.parametrize("label", ["cpu", "pinned"])
def test_cupy_takes_no_host_label(buffer: dlpo.HostBuffer, label: str) -> None:
    view = buffer.host_view((8,), "float32", label=label)
    with pytest.raises((TypeError, BufferError, ValueError)):
        cupy.from_dlpack(view)
    del view
    assert buffer.live_views == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_view_of_a_cupy_array_is_the_array(name: str) -> None:
    array = cupy.arange(12).reshape(3, 4).astype(name)
    view = view_of(array)
    assert (view.dtype.name, view.shape, view.label) == (name, (3, 4), Label.DEVICE)
    assert view.device_pointer == array.data.ptr
    assert view_of(array.T).strides == (1, 4)
    with dlpo.HostBuffer.copy_of(array, device=0) as copy:
        assert bytes(copy.memoryview()) == cupy.asnumpy(array).tobytes()


def test_memory_that_cupy_pinned_is_adopted() -> None:
    before = dlpo.pinned_nbytes()
    pinned = cupy.cuda.alloc_pinned_memory(4096)
    array = np.frombuffer(pinned, np.uint8, 4096)
    with dlpo.HostBuffer.register(array, device=0) as buffer:
        assert dlpo.pinned_nbytes() == before
        array[:] = 7
        assert (cupy.from_dlpack(buffer.device_view((4096,), "uint8")) == 7).all()
