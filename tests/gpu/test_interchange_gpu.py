"""One memory, two sides: kernels of torch, CuPy and JAX read what the host wrote, and the other way round."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload.producers import view_of
from dlpoffload.view import Label

np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_driver")]

COUNT = 1 << 16
NBYTES = 4 * COUNT
LONG = 200_000_000  # cycles: about a tenth of a second


@pytest.fixture
def buffer() -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(NBYTES, device=0) as buffer:
        yield buffer


def host_array(buffer: dlpo.HostBuffer) -> Any:
    return np.from_dlpack(buffer.host_view((COUNT,), "float32"))


# --------------------------------------------------------------------------------------------------- torch


def test_torch_kernels_and_the_host_share_the_bytes(torch: ModuleType, buffer: dlpo.HostBuffer) -> None:
    host = host_array(buffer)
    tensor = torch.from_dlpack(buffer.device_view((COUNT,), "float32"))
    assert (tensor.device.type, tensor.data_ptr()) == ("cuda", buffer.device_pointer)
    host[:] = np.arange(COUNT)  # after the view was made
    assert tensor.double().sum().item() == COUNT * (COUNT - 1) / 2
    tensor.mul_(2)
    torch.cuda.synchronize()
    assert np.array_equal(host, 2 * np.arange(COUNT, dtype=np.float32))
    host[:] = 1
    assert tensor.sum().item() == COUNT


def test_torch_takes_our_memory_for_pinned(torch: ModuleType, buffer: dlpo.HostBuffer) -> None:
    for label in ("cpu", "pinned_as_cpu"):
        tensor = torch.from_dlpack(buffer.host_view((COUNT,), "float32", label=label))
        assert tensor.device.type == "cpu"
        assert tensor.is_pinned()
        tensor.fill_(3)
        on_device = tensor.to("cuda", non_blocking=True)
        assert on_device.data_ptr() != buffer.device_pointer
        assert (on_device == 3).all()
    with pytest.raises(BufferError):
        torch.from_dlpack(buffer.host_view((COUNT,), "float32", label="pinned"))


def test_a_registered_tensor_is_read_where_it_is(torch: ModuleType) -> None:
    tensor = torch.arange(COUNT, dtype=torch.float32)
    with dlpo.HostBuffer.register(tensor, device=0) as buffer:
        assert tensor.is_pinned()
        mapped = torch.from_dlpack(buffer.device_view((COUNT,), "float32"))
        assert mapped.double().sum().item() == COUNT * (COUNT - 1) / 2
        mapped.add_(1)
        torch.cuda.synchronize()
        assert tensor[0].item() == 1
        del mapped
    assert not tensor.is_pinned()


def test_memory_that_torch_pinned_is_adopted(torch: ModuleType) -> None:
    before = dlpo.pinned_nbytes()
    tensor = torch.ones(COUNT, pin_memory=True)
    with dlpo.HostBuffer.register(tensor, device=0) as buffer:
        assert dlpo.pinned_nbytes() == before
        assert torch.from_dlpack(buffer.device_view((COUNT,), "float32")).sum().item() == COUNT
    assert tensor.is_pinned(), "what torch pinned was unpinned"


def test_a_view_orders_the_producers_work_before_the_next_consumers(torch: ModuleType) -> None:
    tensor = torch.zeros(COUNT, device="cuda")
    torch.cuda.synchronize()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(LONG)
        tensor.fill_(7)
        view = view_of(tensor)
    assert (view.label, view.device_pointer) == (Label.DEVICE, tensor.data_ptr())
    with torch.cuda.stream(two):
        seen = torch.from_dlpack(view).clone()
    two.synchronize()
    assert (seen == 7).all()


def test_a_copy_waits_for_the_producers_work(torch: ModuleType) -> None:
    for strided in (False, True):
        tensor = torch.zeros(COUNT, 2, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(LONG)
            tensor.fill_(7)
            source = tensor[:, 0] if strided else tensor[: COUNT // 2]
            with dlpo.HostBuffer.copy_of(source, device=0) as copy:
                assert bytes(copy.memoryview()[:400:8]) == np.full(100, 7, np.float32).tobytes()[::8]
            on_host = np.from_dlpack(view_of(source), device="cpu")
            assert (on_host == 7).all()


def test_closing_waits_for_copies_enqueued_out_of_it(torch: ModuleType) -> None:
    buffer = dlpo.HostBuffer.allocate(64 << 20, device=0)
    source = torch.from_dlpack(buffer.host_view((64 << 20,), "uint8"))
    source.fill_(5)
    target = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(LONG)
    target.copy_(source, non_blocking=True)
    del source
    buffer.close()
    assert (target == 5).all()


def test_a_mapped_file_is_read_by_kernels_from_the_page_cache(torch: ModuleType, tmp_path: Path) -> None:
    capabilities = dlpo.open_driver(0).capabilities()
    if not capabilities.read_only_host_register:
        pytest.skip("requires gpu: read-only registration")
    path = tmp_path / "weights.bin"
    path.write_bytes(np.arange(COUNT, dtype=np.float32).tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with dlpo.HostBuffer.register(mapped, device=0) as buffer:
        assert buffer.read_only
        tensor = torch.from_dlpack(buffer.device_view((COUNT,), "float32", read_only=True))
        assert tensor.double().sum().item() == COUNT * (COUNT - 1) / 2
        del tensor
    mapped.close()


def test_each_device_that_reaches_the_bytes_gets_them_without_a_copy(
    torch: ModuleType, buffer: dlpo.HostBuffer
) -> None:
    view = buffer.device_view((COUNT,), "float32")
    on_host = np.from_dlpack(view, device="cpu", copy=False)
    assert on_host.ctypes.data == buffer.host_pointer
    on_host[:] = 4
    assert torch.from_dlpack(view).sum().item() == 4 * COUNT
    copied = torch.from_dlpack(view, copy=True)
    assert copied.data_ptr() != buffer.device_pointer
    assert copied.sum().item() == 4 * COUNT


def test_device_memory_of_ours_is_a_tensor(torch: ModuleType, buffer: dlpo.HostBuffer) -> None:
    with dlpo.DeviceBuffer.allocate(NBYTES, device=0) as memory:
        tensor = torch.from_dlpack(memory.device_view((COUNT,), "float32"))
        tensor.copy_(torch.arange(COUNT))
        view = memory.device_view((COUNT,), "float32")
        with pytest.raises(BufferError, match="copy=False forbids"):
            np.from_dlpack(view, device="cpu", copy=False)
        torch.cuda.synchronize()
        assert np.array_equal(np.from_dlpack(view, device="cpu"), np.arange(COUNT, dtype=np.float32))
        buffer.copy_into(view)
        assert np.array_equal(host_array(buffer), np.arange(COUNT, dtype=np.float32))
        del tensor, view


# ---------------------------------------------------------------------------------------------------- CuPy


def test_a_raw_kernel_and_the_host_share_the_bytes(buffer: dlpo.HostBuffer) -> None:
    cupy = pytest.importorskip("cupy")
    source = """extern "C" __global__ void twice(float* x, int n) {
        int i = blockDim.x * blockIdx.x + threadIdx.x;
        if (i < n) x[i] *= 2;
    }"""
    kernel = cupy.RawKernel(source, "twice")
    host = host_array(buffer)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        array = cupy.from_dlpack(buffer.device_view((COUNT,), "float32"))
        host[:] = np.arange(COUNT)  # after the view was made
        kernel((COUNT // 256,), (256,), (array, np.int32(COUNT)))
        stream.synchronize()
        assert np.array_equal(host, 2 * np.arange(COUNT, dtype=np.float32))
        host[:] = 1
        kernel((COUNT // 256,), (256,), (array, np.int32(COUNT)))
        stream.synchronize()
        assert (host == 2).all()
        del array


# ----------------------------------------------------------------------------------------------------- JAX


@pytest.fixture
def jax_device(jax: ModuleType) -> Any:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX without CUDA: {error}")


@pytest.mark.parametrize("label", ["pinned", "pinned_as_cpu"])
def test_jax_takes_pinned_memory_as_pinned_host_without_a_copy(
    jax: ModuleType, jax_device: Any, buffer: dlpo.HostBuffer, label: str
) -> None:
    host_array(buffer)[:] = np.arange(COUNT)
    array = jax.numpy.from_dlpack(buffer.host_view((COUNT,), "float32", label=label))
    assert array.sharding.memory_kind == "pinned_host"
    assert array.unsafe_buffer_pointer() == buffer.host_pointer
    on_device = jax.device_put(array, jax.sharding.SingleDeviceSharding(jax_device, memory_kind="device"))
    assert np.array_equal(np.asarray(on_device), np.arange(COUNT, dtype=np.float32))
    del array, on_device


def test_jax_kernels_read_mapped_memory(jax: ModuleType, jax_device: Any, buffer: dlpo.HostBuffer) -> None:
    host = host_array(buffer)
    array = jax.numpy.from_dlpack(buffer.device_view((COUNT,), "float32"))
    assert array.sharding.memory_kind == "device"
    assert array.unsafe_buffer_pointer() == buffer.device_pointer
    twice = jax.jit(lambda x: 2 * x)
    for factor in (1, 3):
        host[:] = factor * np.arange(COUNT, dtype=np.float32)  # after the view was made
        result = np.asarray(twice(array).block_until_ready())
        assert np.array_equal(result, 2 * host)
    del array


def test_a_view_of_a_jax_array_is_the_array(jax: ModuleType, jax_device: Any) -> None:
    array = jax.device_put(np.arange(COUNT, dtype=np.float32), jax_device).block_until_ready()
    view = view_of(array)
    assert (view.label, view.device_pointer) == (Label.DEVICE, array.unsafe_buffer_pointer())
    with dlpo.HostBuffer.copy_of(array, device=0) as copy:
        assert bytes(copy.memoryview()) == np.arange(COUNT, dtype=np.float32).tobytes()
