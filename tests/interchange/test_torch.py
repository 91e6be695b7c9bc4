"""PyTorch in both directions: every dtype it has, labels, gradients, lifetime across threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.errors import AliasError
from dlpoffload.producers import view_of
from dlpoffload.spec import dtype, dtype_names
from dlpoffload.view import Label

torch = pytest.importorskip("torch")

NAMES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip
REFUSED = sorted(set(dtype_names()) - set(NAMES))
SHAPES = [(), (0,), (5,), (2, 0, 3), (3, 4)]


@pytest.fixture
def buffer() -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(4096, device="cpu") as buffer:
        buffer.memoryview()[:] = bytes(torch.randint(0, 256, (4096,), dtype=torch.uint8).tolist())
        yield buffer


def bits(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def random_tensor(name: str, shape: tuple[int, ...]) -> Any:
    count = int(torch.Size(shape).numel()) * dtype(name).itemsize
    data = torch.randint(0, 2 if name == "bool" else 256, (count,), dtype=torch.uint8)
    return data.view(getattr(torch, name)).reshape(shape)


# ------------------------------------------------------------------------------------------ views to tensors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_a_view_bit_for_bit_and_writes_through(
    buffer: dlpo.HostBuffer, name: str, shape: tuple[int, ...]
) -> None:
    view = buffer.host_view(shape, name, byte_offset=64)
    if name == "bool":
        view.memoryview()[:] = bytes(i % 2 for i in range(view.nbytes))
    tensor = torch.from_dlpack(view)
    assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, name), shape)
    assert bits(tensor) == bytes(view.memoryview())
    if tensor.numel():
        assert tensor.data_ptr() == view.pointer
        tensor.reshape(-1).view(torch.uint8).fill_(1)
        assert bytes(view.memoryview()) == b"\x01" * view.nbytes


@pytest.mark.parametrize("name", REFUSED)
def test_dtypes_that_torch_has_not_are_refused_by_torch_and_come_as_bytes(buffer: dlpo.HostBuffer, name: str) -> None:
    view = buffer.host_view((8,), name)
    with pytest.raises(BufferError, match="Unsupported"):
        torch.from_dlpack(view)
    tensor = torch.from_dlpack(view.view((view.nbytes,), "uint8"))
    assert bits(tensor) == bytes(view.memoryview())
    del tensor, view
    assert buffer.live_views == 0, "a refused capsule gave its memory up"


def test_strides_come_through(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((3, 4), "float32", strides=(1, 5))
    tensor = torch.from_dlpack(view)
    assert tensor.stride() == (1, 5)
    flat = torch.from_dlpack(view.view((view.nbytes // 4,), "float32"))
    assert bits(tensor) == bits(torch.stack([flat[i : i + 16 : 5] for i in range(3)]))


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"copy": False}], ids=str)
@pytest.mark.parametrize("label", ["cpu", "pinned_as_cpu"])
def test_torch_takes_labels_whose_capsule_says_cpu(buffer: dlpo.HostBuffer, label: str, options: Any) -> None:
    view = buffer.host_view((8,), "float32", label=label)
    assert torch.from_dlpack(view, **options).data_ptr() == buffer.host_pointer
    assert torch.utils.dlpack.from_dlpack(view.__dlpack__()).data_ptr() == buffer.host_pointer
    copied = torch.from_dlpack(view, copy=True)
    assert copied.data_ptr() != buffer.host_pointer
    assert bits(copied) == bytes(view.memoryview())


def test_torch_refuses_the_pinned_label(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((8,), "float32", label="pinned")
    with pytest.raises(BufferError, match="Unsupported device_type: 3"):
        torch.from_dlpack(view)
    del view
    assert buffer.live_views == 0


def test_a_device_view_is_a_tensor_of_the_device(buffer: dlpo.HostBuffer) -> None:
    tensor = torch.from_dlpack(buffer.device_view((8,), "float32"))  # of the CPU driver: the CPU
    assert (tensor.device.type, tensor.data_ptr()) == ("cpu", buffer.device_pointer)


def test_torch_ignores_read_only() -> None:
    """Why read-only memory is never handed out as a parameter."""
    memory = bytearray(b"read only")
    tensor = torch.from_dlpack(view_of(memoryview(memory).toreadonly()))
    tensor[0] = ord("R")
    assert memory == b"Read only"


def test_a_tensor_keeps_the_memory(buffer: dlpo.HostBuffer) -> None:
    tensor = torch.from_dlpack(buffer.host_view((8,), "uint8"))
    wanted = bits(tensor)
    part = tensor[2:].view(2, 3)
    del buffer, tensor
    lifetime.drain()
    assert bits(part) == wanted[2:]


def test_a_tensor_may_die_on_another_thread(buffer: dlpo.HostBuffer) -> None:
    held = [torch.from_dlpack(buffer.host_view((8,), "uint8")) for _ in range(100)]
    threads = [threading.Thread(target=lambda: [held.pop() for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, buffer.live_views) == ([], 0)


def test_autograd_and_optimizers_work_on_our_memory(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((4,), "float32")
    view.memoryview()[:] = bytes(16)
    parameter = torch.nn.Parameter(torch.from_dlpack(view))
    (parameter * torch.arange(4.0)).sum().backward()
    torch.optim.SGD([parameter], lr=1.0).step()
    assert torch.frombuffer(view.memoryview(), dtype=torch.float32).tolist() == [0.0, -1.0, -2.0, -3.0]


# ------------------------------------------------------------------------------------------ tensors to views


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_view_of_a_tensor_is_the_tensor(name: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(name, shape)
    view = view_of(tensor)
    assert (view.dtype.name, view.shape, view.label, view.read_only) == (name, shape, Label.CPU, False)
    assert bytes(view.memoryview()) == bits(tensor)
    if tensor.numel():
        assert view.pointer == tensor.data_ptr()
        view.memoryview()[:] = bytes(view.nbytes)
        assert bits(tensor) == bytes(view.nbytes)


def test_strided_tensors_keep_their_strides() -> None:
    tensor = torch.zeros(4, 6)
    assert view_of(tensor.t()).strides == (1, 6)
    assert view_of(tensor[::2, 1::3]).strides == (12, 3)
    assert view_of(tensor[::2, 1::3]).pointer == tensor.data_ptr() + 4
    assert view_of(tensor[0].expand(9, 6)).strides == (0, 1)


@pytest.mark.parametrize("call", [view_of, dlpo.HostBuffer.register, dlpo.HostBuffer.copy_of])
def test_a_tensor_that_requires_a_gradient_is_refused_with_the_remedy(call: Any) -> None:
    tensor = torch.ones(3, requires_grad=True)
    with pytest.raises(AliasError, match=r"require gradient.*detach"):
        call(tensor)
    with dlpo.HostBuffer.register(tensor.detach(), device="cpu") as buffer:
        assert buffer.host_pointer == tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3).to_sparse(), "strided"),
        (torch.ones(3, dtype=torch.complex64).conj(), "conjugate"),
        (torch.ones(3, device="meta"), "meta"),
    ],
    ids=["sparse", "conjugate", "meta"],
)
def test_a_tensor_without_plain_memory_is_refused(tensor: Any, message: str) -> None:
    with pytest.raises(AliasError, match=f"a Tensor gives no view of its memory: .*{message}"):
        view_of(tensor)


def test_register_pins_a_tensor_where_it_is(device: str) -> None:
    tensor = random_tensor("bfloat16", (100, 30))
    with dlpo.HostBuffer.register(tensor, device=device) as buffer:
        assert (buffer.host_pointer, buffer.nbytes) == (tensor.data_ptr(), 6000)
        same = torch.from_dlpack(buffer.host_view((100, 30), "bfloat16"))
        same.fill_(2.5)
        assert (tensor == 2.5).all()
        tensor[3, 4] = -1
        assert same[3, 4] == -1
        del same


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2", "bool"])
def test_copies_are_row_major_and_apart(name: str, device: str) -> None:
    tensor = random_tensor(name, (4, 6))
    for source in (tensor, tensor.t(), tensor[::2, ::3], tensor[1].expand(5, 6), tensor[1, 1]):
        with dlpo.HostBuffer.copy_of(source, device=device) as copy:
            assert bytes(copy.memoryview()) == bits(source)
