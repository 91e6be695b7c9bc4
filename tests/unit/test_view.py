"""`View` as producer and consumer: ``__dlpack__`` and ``__dlpack_device__`` by the letter of the array API standard.

What a capsule says is read with the native consumer; no framework takes part. Frameworks are in tests/interchange.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import _native
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import AliasError, ClosedError, DriverNotFoundError, SpecError
from dlpoffload.producers import view_of
from dlpoffload.view import Label, View

CPU, CUDA, CUDA_HOST, ROCM = 1, 2, 3, 10
READ_ONLY, IS_COPIED = _native.FLAG_READ_ONLY, _native.FLAG_IS_COPIED
HANDLE = 0x7FAB00


class FakeCuda(CpuDriver):
    """Ordinary memory that says it is ``cuda:0``, and writes down what is asked about order."""

    platform = "cuda"
    device = "cuda:0"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def event_record(self, event: int, stream: int) -> None:
        self.asked.append(("event on stream", stream))

    def stream_wait_event(self, stream: int, event: int) -> None:
        self.asked.append(("stream waits for event", stream, event))

    def event_synchronize(self, event: int) -> None:
        self.asked.append(("host waits for event", event))

    def stream_synchronize(self, stream: int) -> None:
        self.asked.append(("host waits for stream", stream))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    driver = FakeCuda()

    def open_driver(device: str | int | None = None) -> FakeCuda:
        if device in (None, 0, "cuda:0", "cuda"):
            return driver
        raise DriverNotFoundError("cuDeviceGet", 101, "CUDA_ERROR_INVALID_DEVICE", f"no {device}")

    monkeypatch.setattr("dlpoffload.view.open_driver", open_driver)
    monkeypatch.setattr("dlpoffload.producers.open_driver", open_driver)
    monkeypatch.setattr("dlpoffload.memory.open_driver", open_driver)
    return driver


@pytest.fixture
def buffer() -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(4096, device="cpu") as buffer:
        buffer.memoryview()[:] = bytes(i % 251 for i in range(4096))
        yield buffer


@pytest.fixture
def cuda_buffer(cuda: FakeCuda) -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(4096, device=0) as buffer:
        buffer.memoryview()[:] = bytes(i % 251 for i in range(4096))
        yield buffer


class Producer:
    """Somebody else's tensor: exports a view, and remembers what it was asked."""

    def __init__(self, view: View, **forced: Any) -> None:
        self.view, self.forced, self.asked = view, forced, {}

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = asked
        return self.view.__dlpack__(**{**asked, **self.forced})

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.view.__dlpack_device__()


def name_of(capsule: Any) -> str:
    found = re.search(r'"(\w+)"', repr(capsule))
    assert found is not None
    return found.group(1)


def read(capsule: Any) -> _native.Import:
    return _native.consume(capsule)


def bytes_at(imported: _native.Import, nbytes: int) -> bytes:
    return ctypes.string_at(imported.pointer, nbytes)


# ---------------------------------------------------------------------------------------- what a capsule says


def test_a_capsule_says_what_the_view_is(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((3, 5), "bfloat16", strides=(7, 1), byte_offset=64)
    found = read(view.__dlpack__(max_version=(1, 0)))
    assert found.pointer == buffer.host_pointer + 64 == view.pointer == view.host_pointer
    assert (found.device, found.dtype) == ((CPU, 0), (4, 16, 1))
    assert (found.shape, found.strides) == ((3, 5), (7, 1))
    assert (found.flags, found.version) == (0, _native.DLPACK_VERSION)
    assert view.__dlpack_device__() == (CPU, 0)


@pytest.mark.parametrize("name", dlpo.spec.dtype_names())
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0, 3), (2, 8)], ids=str)
def test_every_dtype_and_shape_goes_out_and_comes_back(
    buffer: dlpo.HostBuffer, name: str, shape: tuple[int, ...]
) -> None:
    view = buffer.host_view(shape, name, byte_offset=256)
    back = view_of(Producer(view))
    assert back is not view
    assert back.spec == view.spec
    assert bytes(back.memoryview()) == bytes(view.memoryview()) == bytes(buffer.memoryview(256, view.nbytes))


@pytest.mark.parametrize(
    ("max_version", "name", "version"),
    [
        (None, "dltensor", None),
        ((0, 5), "dltensor", None),
        ((0, 99), "dltensor", None),
        ((1, 0), "dltensor_versioned", _native.DLPACK_VERSION),
        ((1, 99), "dltensor_versioned", _native.DLPACK_VERSION),
        ((2, 0), "dltensor_versioned", _native.DLPACK_VERSION),
        ([1, 3], "dltensor_versioned", _native.DLPACK_VERSION),
    ],
    ids=str,
)
def test_the_capsule_is_the_newest_that_both_sides_know(
    buffer: dlpo.HostBuffer, max_version: Any, name: str, version: tuple[int, int] | None
) -> None:
    capsule = buffer.host_view((4,), "int8").__dlpack__(max_version=max_version)
    assert name_of(capsule) == name
    assert read(capsule).version == version
    assert name_of(capsule) == f"used_{name}"


def test_our_version_is_a_dlpack_1() -> None:
    assert _native.DLPACK_VERSION[0] == 1


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_is_consumed_once(buffer: dlpo.HostBuffer, version: Any) -> None:
    capsule = buffer.host_view((4,), "int8").__dlpack__(max_version=version)
    first = read(capsule)
    with pytest.raises(ValueError, match="consumed before"):
        read(capsule)
    assert buffer.live_views == 1
    del first
    assert buffer.live_views == 0


def test_an_unconsumed_capsule_gives_the_memory_up(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((4,), "int8")
    capsules = [view.__dlpack__(), view.__dlpack__(max_version=(1, 0))]
    assert buffer.live_views == 3
    del capsules, view
    assert buffer.live_views == 0


# --------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("stream", [1, 2, HANDLE, -1, 0])
def test_the_cpu_has_no_streams(buffer: dlpo.HostBuffer, stream: int) -> None:
    for view in (buffer.host_view((4,), "int8"), buffer.device_view((4,), "int8")):
        with pytest.raises(AliasError, match=r"\(kDLCPU, 0\), which has no streams"):
            view.__dlpack__(stream=stream)
        assert read(view.__dlpack__(stream=None)).device == (CPU, 0)


@pytest.mark.parametrize("stream", [True, "1", 1.0, -2, (1,)])
def test_a_stream_that_is_none_is_refused(cuda_buffer: dlpo.HostBuffer, stream: Any) -> None:
    for view in (cuda_buffer.device_view((4,), "int8"), cuda_buffer.host_view((4,), "int8", label="pinned")):
        with pytest.raises(AliasError, match="stream="):
            view.__dlpack__(stream=stream)


def test_stream_0_is_ambiguous_on_cuda(cuda_buffer: dlpo.HostBuffer) -> None:
    view = cuda_buffer.device_view((4,), "int8")
    for copy in (None, False, True):
        with pytest.raises(BufferError, match="stream=0 is ambiguous"):
            view.__dlpack__(stream=0, copy=copy)
    with pytest.raises(BufferError, match="stream=0 is ambiguous"):
        cuda_buffer.host_view((4,), "int8").__dlpack__(stream=0, dl_device=(CUDA, 0))


def filled_by(view: View, event: int) -> View:
    return View(
        view._reference,
        view.spec,
        label=view.label,
        driver=view._block_driver,
        host_pointer=view.host_pointer,
        device_pointer=view.device_pointer,
        ready=event,
    )


@pytest.mark.parametrize(
    ("stream", "waits"),
    [(None, 1), (1, 1), (2, 2), (HANDLE, HANDLE), (-1, None)],
)
def test_the_consumers_stream_waits_for_what_fills_the_bytes(
    cuda: FakeCuda, cuda_buffer: dlpo.HostBuffer, stream: int | None, waits: int | None
) -> None:
    view = filled_by(cuda_buffer.device_view((4,), "int8"), event=77)
    cuda.asked.clear()
    view.__dlpack__(stream=stream)
    assert cuda.asked == ([] if waits is None else [("stream waits for event", waits, 77)])


@pytest.mark.parametrize("device", [None, (CPU, 0), (CUDA_HOST, 0)])
def test_the_host_waits_where_there_is_no_stream_to_wait(
    cuda: FakeCuda, cuda_buffer: dlpo.HostBuffer, device: tuple[int, int] | None
) -> None:
    view = filled_by(cuda_buffer.host_view((4,), "int8"), event=77)
    view.__dlpack__(dl_device=device)
    assert cuda.asked == [("host waits for event", 77)]


def test_nothing_is_waited_for_when_nothing_is_under_way(cuda: FakeCuda, cuda_buffer: dlpo.HostBuffer) -> None:
    cuda_buffer.device_view((4,), "int8").__dlpack__(stream=HANDLE)
    cuda_buffer.host_view((4,), "int8").__dlpack__()
    assert cuda.asked == []


@pytest.mark.parametrize(("stream", "waits"), [(None, 0), (1, 1), (HANDLE, HANDLE), (-1, None)])
def test_a_copy_is_made_behind_the_work_on_the_consumers_stream(
    cuda: FakeCuda, cuda_buffer: dlpo.HostBuffer, stream: int | None, waits: int | None
) -> None:
    """The standard: "the copy must be performed over stream"."""
    view = filled_by(cuda_buffer.device_view((4,), "int8"), event=77)
    view.__dlpack__(stream=stream, copy=True)
    wanted = [] if waits is None else [("host waits for event", 77), ("host waits for stream", waits)]
    assert cuda.asked == wanted


def test_pinned_memory_takes_the_stream_that_some_consumers_pass(cuda_buffer: dlpo.HostBuffer) -> None:
    for label in ("pinned", "pinned_as_cpu"):
        view = cuda_buffer.host_view((4,), "int8", label=label)
        for stream in (None, 1, 2, HANDLE, -1):
            assert read(view.__dlpack__(stream=stream)).pointer == view.pointer


# ---------------------------------------------------------------------------------------- devices and labels


@pytest.mark.parametrize(
    ("label", "says", "capsule"),
    [
        ("cpu", (CPU, 0), (CPU, 0)),
        ("pinned", (CUDA_HOST, 0), (CUDA_HOST, 0)),
        ("pinned_as_cpu", (CUDA_HOST, 0), (CPU, 0)),
    ],
)
def test_each_label_says_what_it_promises(
    cuda_buffer: dlpo.HostBuffer, label: str, says: tuple[int, int], capsule: tuple[int, int]
) -> None:
    for chosen in (label, Label(label)):
        view = cuda_buffer.host_view((4,), "int8", label=chosen)
        assert view.__dlpack_device__() == says
        assert read(view.__dlpack__()).device == capsule
        assert read(view.__dlpack__(copy=True)).device == capsule


def test_a_device_view_is_cuda_over_the_mapped_pointer(cuda_buffer: dlpo.HostBuffer) -> None:
    view = cuda_buffer.device_view((4,), "int8", byte_offset=8)
    assert view.__dlpack_device__() == (CUDA, 0)
    found = read(view.__dlpack__())
    assert (found.device, found.pointer) == ((CUDA, 0), cuda_buffer.device_pointer + 8)


LABELS = ["cpu", "pinned", "pinned_as_cpu", "device"]


def labelled(buffer: dlpo.HostBuffer, label: str, *shape: int) -> View:
    if label == "device":
        return buffer.device_view(shape, "uint8")
    return buffer.host_view(shape, "uint8", label=label)


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("device", [(CPU, 0), (CUDA, 0), (CUDA_HOST, 0)], ids=str)
@pytest.mark.parametrize("label", LABELS)
def test_mapped_memory_is_exported_for_each_device_that_reaches_it(
    cuda_buffer: dlpo.HostBuffer, label: str, device: tuple[int, int], copy: bool | None, version: Any
) -> None:
    view = labelled(cuda_buffer, label, 64)
    found = read(view.__dlpack__(dl_device=device, copy=copy, max_version=version))
    assert found.device == device, "asked for by name, the capsule says exactly that"
    assert (found.pointer == cuda_buffer.host_pointer) is not bool(copy)
    assert found.flags == (IS_COPIED if copy and version else 0)
    assert bytes_at(found, 64) == bytes(range(64))
    # and the bytes are shared, or are not
    cuda_buffer.memoryview()[:1] = b"\xff"
    assert bytes_at(found, 1) == (b"\x00" if copy else b"\xff")


@pytest.mark.parametrize("copy", [None, False, True])
def test_device_memory_reaches_the_cpu_by_a_copy_only(cuda: FakeCuda, copy: bool | None) -> None:
    with dlpo.DeviceBuffer.allocate(64, device=0) as buffer:
        cuda.fill_async(buffer.device_pointer, 5, 64, 0)
        view = buffer.device_view((64,), "uint8")
        for device in ((CPU, 0), (CUDA_HOST, 0)):
            if copy is False:
                with pytest.raises(BufferError, match="copy=False forbids a copy"):
                    view.__dlpack__(dl_device=device, copy=copy)
                continue
            found = read(view.__dlpack__(dl_device=device, copy=copy, max_version=(1, 0)))
            assert (found.device, found.flags) == (device, IS_COPIED)
            assert bytes_at(found, 64) == b"\x05" * 64
            assert ("host waits for stream", 0) in cuda.asked
            del found
        del view


@pytest.mark.parametrize("copy", [None, True])
def test_ordinary_memory_reaches_the_device_by_a_copy(cuda: FakeCuda, copy: bool | None) -> None:
    memory = bytearray(b"device" * 10)
    view = view_of(memory)
    for device in ((CUDA, 0), (CUDA_HOST, 0)):
        found = read(view.__dlpack__(dl_device=device, copy=copy, max_version=(1, 0)))
        assert (found.device, found.flags) == (device, IS_COPIED)
        assert bytes_at(found, 60) == b"device" * 10
        with pytest.raises(BufferError, match="copy=False forbids"):
            view.__dlpack__(dl_device=device, copy=False)


@pytest.mark.parametrize("copy", [None, True])
@pytest.mark.parametrize("device", [(CUDA, 0), (CUDA, 3), (CUDA_HOST, 0)], ids=str)
def test_a_device_that_is_not_there_is_a_buffer_error(
    buffer: dlpo.HostBuffer, monkeypatch: pytest.MonkeyPatch, device: tuple[int, int], copy: bool | None
) -> None:
    def open_driver(device: str) -> Any:
        raise DriverNotFoundError("cuInit", 100, "CUDA_ERROR_NO_DEVICE", f"no {device}")

    monkeypatch.setattr("dlpoffload.view.open_driver", open_driver)
    monkeypatch.setattr("dlpoffload.producers.open_driver", open_driver)
    view = buffer.host_view((4,), "int8")
    with pytest.raises(BufferError, match="cannot be copied to"):
        view.__dlpack__(dl_device=device, copy=copy)
    with pytest.raises(BufferError, match="copy=False forbids"):
        view.__dlpack__(dl_device=device, copy=False)
    assert buffer.live_views == 1


@pytest.mark.parametrize("device", [(ROCM, 0), (0, 0), (CPU, 1), (CUDA_HOST, 1), (CUDA, -1), (-1, 0)], ids=str)
@pytest.mark.parametrize("copy", [None, False, True])
def test_a_foreign_device_is_refused(buffer: dlpo.HostBuffer, device: tuple[int, int], copy: bool | None) -> None:
    with pytest.raises(BufferError, match="is no device of this library"):
        buffer.host_view((4,), "int8").__dlpack__(dl_device=device, copy=copy)


@pytest.mark.parametrize("copy", ["yes", 2, (), "False"])
def test_copy_is_true_false_or_none(buffer: dlpo.HostBuffer, copy: Any) -> None:
    with pytest.raises(AliasError, match="True, False and None"):
        buffer.host_view((4,), "int8").__dlpack__(copy=copy)


def test_a_view_on_a_second_device_says_so(monkeypatch: pytest.MonkeyPatch, cuda_buffer: dlpo.HostBuffer) -> None:
    second = FakeCuda()
    second.device_id, second.device = 1, "cuda:1"
    second.host_device_pointer = lambda pointer: pointer  # type: ignore[method-assign]  # UVA
    monkeypatch.setattr("dlpoffload.memory.open_driver", lambda device: second)
    view = cuda_buffer.device_view((4,), "int8", device=1)
    assert view.__dlpack_device__() == (CUDA, 1)
    assert read(view.__dlpack__()).device == (CUDA, 1)
    assert read(view.__dlpack__(dl_device=(CPU, 0))).pointer == view.pointer


# --------------------------------------------------------------------------------------------- copies, exactly


def test_a_copy_of_a_strided_view_is_packed(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((3, 4), "uint8", strides=(1, 10))
    found = read(view.__dlpack__(copy=True, max_version=(1, 0)))
    assert (found.shape, found.strides, found.flags) == ((3, 4), (4, 1), IS_COPIED)
    assert bytes_at(found, 12) == bytes(i + 10 * j for i in range(3) for j in range(4))


def test_a_copy_of_a_broadcast_view_is_as_large_as_its_elements(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((500, 4), "uint8", strides=(0, 1), byte_offset=4)
    assert view.nbytes == 4
    capsule = view.__dlpack__(copy=True)
    assert ("pageable", 2000) in dlpo.live_buffers()
    found = read(capsule)
    assert (found.strides, bytes_at(found, 2000)) == ((4, 1), bytes([4, 5, 6, 7]) * 500)


def test_a_copy_of_a_strided_view_for_the_device_keeps_its_strides(
    cuda: FakeCuda, cuda_buffer: dlpo.HostBuffer
) -> None:
    with dlpo.DeviceBuffer.allocate(100, device=0) as device_memory:
        cuda.copy(device_memory.device_pointer, cuda_buffer.host_pointer, 100)
        view = device_memory.device_view((3, 4), "uint8", strides=(1, 10))
        found = read(view.__dlpack__(dl_device=(CPU, 0)))
        assert found.strides == (1, 10)
        assert bytes_at(found, view.nbytes) == bytes(range(33))
        del view, found


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_a_copy_of_nothing_or_of_one_element(buffer: dlpo.HostBuffer, shape: tuple[int, ...]) -> None:
    found = read(buffer.host_view(shape, "int32").__dlpack__(copy=True, max_version=(1, 0)))
    assert (found.shape, found.flags) == (shape, IS_COPIED)


def test_copies_are_freed_when_their_consumer_is_done(buffer: dlpo.HostBuffer) -> None:
    before = dlpo.live_buffers()
    found = read(buffer.host_view((4,), "int8").__dlpack__(copy=True))
    assert dlpo.live_buffers() == [*before, ("pageable", 4)]
    assert buffer.live_views == 0
    del found
    dlpo.lifetime.drain()
    assert dlpo.live_buffers() == before


# ------------------------------------------------------------------------------------------------- read-only


def test_read_only_needs_a_capsule_that_can_say_so() -> None:
    view = view_of(b"read only")
    assert view.read_only
    for version in (None, (0, 8)):
        with pytest.raises(BufferError, match="a legacy capsule cannot say so"):
            view.__dlpack__(max_version=version)
    assert read(view.__dlpack__(max_version=(1, 0))).flags == READ_ONLY
    assert "read-only" in repr(view)


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_copy_of_read_only_memory_may_be_written(version: Any) -> None:
    found = read(view_of(b"read only").__dlpack__(copy=True, max_version=version))
    assert found.flags == (IS_COPIED if version else 0)
    assert bytes_at(found, 9) == b"read only"


def test_read_only_stays_read_only() -> None:
    memory = b"0123456789abcdef" * 16
    view = view_of(memory)
    assert view.view((4,), "uint8", byte_offset=4).read_only
    assert view_of(Producer(view)).read_only
    with pytest.raises(TypeError, match="cannot modify read-only"):
        view.memoryview()[0] = 1
    with dlpo.HostBuffer.register(memory, device="cpu") as buffer:
        assert buffer.read_only
        assert buffer.host_view((4,), "uint8").read_only
        assert buffer.device_view((4,), "uint8", read_only=True).read_only
        with pytest.raises(AliasError, match="say read_only=True"):
            buffer.device_view((4,), "uint8")
        with pytest.raises(AliasError, match="read-only"):
            buffer.copy_into(b"x")
        with pytest.raises(TypeError, match="cannot modify read-only"):
            buffer.memoryview()[0] = 1


# ----------------------------------------------------------------------------------- making views of a buffer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda b: b.host_view((4097,), "uint8"), AliasError, "ends at byte 4097, but this host buffer has 4096"),
        (lambda b: b.host_view((1025,), "float32"), AliasError, "ends at byte 4100"),
        (lambda b: b.host_view((2,), "uint8", strides=(4096,)), AliasError, "ends at byte 4097"),
        (lambda b: b.host_view((1,), "uint8", byte_offset=4096), AliasError, "ends at byte 4097"),
        (lambda b: b.host_view((), "uint8", byte_offset="1GiB"), AliasError, "use a smaller shape"),
        (lambda b: b.host_view((1 << 62,), "uint8"), AliasError, "ends at byte 4611686018427387904"),
        (lambda b: b.host_view((1,), "float32", byte_offset=2), AliasError, "not aligned to the 4 bytes of a float32"),
        (lambda b: b.host_view((1,), "complex128", byte_offset=8), AliasError, "not aligned to the 16 bytes"),
        (lambda b: b.device_view((1,), "int16", byte_offset=1), AliasError, "not aligned to the 2 bytes"),
        (lambda b: b.host_view((-1,), "uint8"), SpecError, "negative"),
        (lambda b: b.host_view((1,), "uint8", byte_offset=-4), SpecError, "byte_offset=-4 is negative"),
        (lambda b: b.host_view((1,), "uint8", byte_offset=1.5), SpecError, "byte_offset=1.5"),
        (lambda b: b.host_view((4,), "float31"), SpecError, 'unknown dtype "float31"'),
        (lambda b: b.host_view((4,), "uint8", label="gpu"), SpecError, "label='gpu' is no label; known are 'cpu'"),
        (lambda b: b.host_view((4,), "uint8", label=None), SpecError, "label=None is no label"),
        (lambda b: b.host_view((4,), "uint8", label="device"), SpecError, "is what device_view gives"),
        (lambda b: b.device_view((4,), "uint8", device="tpu"), SpecError, "device='tpu' is no device name"),
        (lambda b: b.device_view((4,), "uint8", device="cuda:99"), DriverNotFoundError, "cu"),
    ],
)
def test_a_view_that_cannot_be_is_refused(
    buffer: dlpo.HostBuffer, make: Callable[[dlpo.HostBuffer], View], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(buffer)
    assert buffer.live_views == 0


def test_a_view_may_end_with_the_buffer(buffer: dlpo.HostBuffer) -> None:
    assert buffer.host_view((4096,), "uint8").nbytes == 4096
    assert buffer.host_view((0,), "float32", byte_offset=4096).nbytes == 0
    assert buffer.host_view((3, 4), "float4_e2m1fn", byte_offset=4090).nbytes == 6


def test_alignment_is_that_of_the_address(buffer: dlpo.HostBuffer) -> None:
    """Registered memory may start anywhere."""
    memory = bytearray(64)
    odd = view_of(memoryview(memory)[1:])
    with dlpo.HostBuffer.register(odd, device="cpu") as registered:
        with pytest.raises(AliasError, match="not aligned to the 4 bytes"):
            registered.host_view((1,), "float32")
        start = -registered.host_pointer % 4
        assert registered.host_view((1,), "float32", byte_offset=start).pointer % 4 == 0
    del odd


def test_a_view_of_a_view_lies_inside_it(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((64,), "uint8", byte_offset=16)
    part = view.view((2, 2), "int16", byte_offset=8, strides=(1, 2))
    assert part.pointer == buffer.host_pointer + 24
    assert (part.spec.shape, part.strides, part.dtype.name) == ((2, 2), (1, 2), "int16")
    assert bytes(part.memoryview()) == bytes(range(24, 32))
    with pytest.raises(AliasError, match="this view has 64 bytes"):
        view.view((65,), "uint8")
    with pytest.raises(AliasError, match="not aligned"):
        view.view((1,), "int16", byte_offset=1)
    del view
    assert buffer.live_views == 1
    del part


def test_a_memoryview_keeps_the_memory_alive(buffer: dlpo.HostBuffer) -> None:
    raw = buffer.memoryview(8, 4)
    assert (raw.format, raw.shape, raw.readonly, bytes(raw)) == ("B", (4,), False, bytes([8, 9, 10, 11]))
    with pytest.raises(ClosedError, match="1 live view"):
        buffer.close()
    part = raw[1:2]
    raw.release()
    assert buffer.live_views == 1
    part.release()
    del raw, part
    assert buffer.live_views == 0
    assert bytes(buffer.memoryview(4090)) == bytes(i % 251 for i in range(4090, 4096))
    assert len(buffer.memoryview(4096)) == 0
    with pytest.raises(AliasError):
        buffer.memoryview(4097)


def test_device_memory_has_no_memoryview() -> None:
    with dlpo.DeviceBuffer.allocate(16, device="cpu") as buffer:
        view = buffer.device_view((4,), "int8")
        with pytest.raises(AliasError, match=r"HostBuffer\.copy_of"):
            view.memoryview()
        del view


def test_a_view_tells_what_it_is(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((2, 3), "float32", label="pinned")
    assert repr(view) == f"View(float32[2, 3], pinned at {buffer.host_pointer:#x})"
    assert (view.shape, view.strides, view.dtype.name, view.nbytes) == ((2, 3), (3, 1), "float32", 24)


# ----------------------------------------------------------------------------------------------- the consumer


def test_view_of_a_view_is_that_view(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((4,), "int8")
    assert view_of(view) is view


def test_the_newest_capsule_is_asked_for_and_never_a_copy(buffer: dlpo.HostBuffer) -> None:
    producer = Producer(buffer.host_view((4,), "int8"))
    view_of(producer)
    assert producer.asked == {"max_version": _native.DLPACK_VERSION, "copy": False}


def test_a_producer_from_before_dlpack_1_is_asked_in_its_own_words(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((4,), "int8")

    class Old(Producer):
        def __dlpack__(self, stream: None = None) -> Any:
            return self.view.__dlpack__()

    back = view_of(Old(view))
    assert (back.pointer, back.read_only) == (view.pointer, False)


@pytest.mark.parametrize("told", [None, (), (1,), (1, 0, 0), "cpu", (1.0, 0), 1])
def test_a_device_that_is_none_is_refused(buffer: dlpo.HostBuffer, told: Any) -> None:
    class Garbled(Producer):
        def __dlpack_device__(self) -> Any:
            return told

    with pytest.raises(AliasError, match=r"__dlpack_device__ gives a .* that is no pair of whole numbers"):
        view_of(Garbled(buffer.host_view((4,), "int8")))


@pytest.mark.parametrize("told", [(CUDA, 0), (ROCM, 0), (0, 0)])
def test_a_device_that_is_not_the_capsules_is_refused(buffer: dlpo.HostBuffer, told: Any) -> None:
    """Its producer ordered its work for another stream than ours, or for none."""

    class Two(Producer):
        def __dlpack__(self, **asked: Any) -> Any:
            return self.view.__dlpack__(**{**asked, "stream": None})

        def __dlpack_device__(self) -> Any:
            return told

    with pytest.raises(AliasError, match=re.escape(f"says {told}, but its capsule (1, 0)")):
        view_of(Two(buffer.host_view((4,), "int8")))


def test_page_locked_memory_may_be_called_cpu_in_the_capsule(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((4,), "int8", label="pinned_as_cpu")
    assert view_of(Producer(view)).pointer == view.pointer


@pytest.mark.parametrize(("name", "refused"), [("int4", True), ("float4_e2m1fn_x2", False), ("int8", False)])
def test_elements_that_are_padded_to_bytes_are_not_read_as_packed_ones(
    buffer: dlpo.HostBuffer, name: str, refused: bool
) -> None:
    view = buffer.host_view((4,), name)

    class Padded(Producer):
        def __dlpack__(self, **_: Any) -> Any:
            made, spec = self.view, self.view.spec
            told = (spec.dtype.code, spec.dtype.bits, spec.dtype.lanes)
            padded = _native.FLAG_IS_SUBBYTE_TYPE_PADDED
            return _native.dlpack_capsule(
                made._reference, made.pointer, (CPU, 0), told, spec.shape, spec.strides, padded, True
            )

    if not refused:
        assert view_of(Padded(view)).spec == view.spec
        return
    with pytest.raises(AliasError, match="padded to whole bytes"):
        view_of(Padded(view))


def test_a_buffer_that_is_closed_gives_no_view() -> None:
    mapped = mmap.mmap(-1, 4096)
    mapped.close()
    released = memoryview(b"some bytes")
    released.release()
    for gone in (mapped, released):
        with pytest.raises(AliasError, match="gives no view of its memory"):
            view_of(gone)


def test_a_type_error_of_the_producer_itself_is_not_hidden() -> None:
    class Broken:
        def __dlpack__(self, **asked: Any) -> Any:
            raise TypeError("broken inside")

    with pytest.raises(TypeError, match="broken inside"):
        view_of(Broken())


def test_a_copy_is_no_view(buffer: dlpo.HostBuffer) -> None:
    producer = Producer(buffer.host_view((4,), "int8"), copy=True)
    before = dlpo.live_buffers()
    with pytest.raises(AliasError, match=r"copied although a view was asked for; use HostBuffer.copy_of"):
        view_of(producer)
    dlpo.lifetime.drain()
    assert dlpo.live_buffers() == before


def test_a_producer_that_refuses_is_quoted_with_the_remedy() -> None:
    class Refusing:
        def __dlpack__(self, **asked: Any) -> Any:
            raise BufferError("my strides are secret")

    with pytest.raises(AliasError, match=r"a Refusing gives no view .*my strides are secret; .*copy it first") as e:
        view_of(Refusing())
    assert isinstance(e.value.__cause__, BufferError)


@pytest.mark.parametrize("capsule", [None, 1, object()])
def test_a_producer_that_gives_no_capsule_is_refused(capsule: Any) -> None:
    class Strange:
        def __dlpack__(self, **asked: Any) -> Any:
            return capsule

    with pytest.raises((AliasError, TypeError)):
        view_of(Strange())


@pytest.mark.parametrize("what", [1, None, object(), "text", [1, 2]])
def test_what_is_no_producer_is_refused(what: Any) -> None:
    with pytest.raises(SpecError, match=f"a {type(what).__name__} has neither __dlpack__ nor the buffer protocol"):
        view_of(what)


def test_what_is_closed_stays_closed() -> None:
    class Closed:
        def __dlpack__(self, **asked: Any) -> Any:
            raise ClosedError("closed before")

    with pytest.raises(ClosedError, match="closed before"):
        view_of(Closed())


@pytest.mark.parametrize(
    ("producer", "nbytes", "read_only"),
    [
        (bytearray(10), 10, False),
        (b"0123456789", 10, True),
        (memoryview(bytearray(10))[2:5], 3, False),
        (array.array("d", [1.0, 2.0]), 16, False),
        (mmap.mmap(-1, 100), 100, False),
        ((ctypes.c_int * 5)(), 20, False),
        (memoryview(bytearray(12)).cast("i", (3,)), 12, False),
        (bytearray(), 0, False),
    ],
)
def test_the_buffer_protocol_gives_bytes(producer: Any, nbytes: int, read_only: bool) -> None:
    view = view_of(producer)
    assert (view.shape, view.dtype.name, view.read_only) == ((nbytes,), "uint8", read_only)
    assert view.label is Label.CPU
    if nbytes and not read_only:
        view.memoryview()[nbytes - 1] = 7
        assert bytes(memoryview(producer).cast("B"))[-1] == 7 if nbytes != 20 else producer[4] != 0


def test_a_buffer_with_gaps_is_refused() -> None:
    with pytest.raises(AliasError, match="gaps"):
        view_of(memoryview(bytearray(10))[::2])


def test_a_view_keeps_its_producer_alive_and_exported() -> None:
    memory = bytearray(10)
    view = view_of(memory)
    with pytest.raises(BufferError):
        memory.extend(b"more")
    del view
    dlpo.lifetime.drain()
    memory.extend(b"more")


def test_ordering_of_an_import_reaches_the_next_consumer(cuda: FakeCuda, cuda_buffer: dlpo.HostBuffer) -> None:
    """The producer orders its work before our stream, and whoever takes it from us waits for that."""
    producer = Producer(cuda_buffer.device_view((4,), "int8"))
    view = view_of(producer)
    assert producer.asked["stream"] is None
    assert (view.label, view.device_pointer, view.host_pointer) == (Label.DEVICE, cuda_buffer.device_pointer, None)
    assert cuda.asked == [("event on stream", 0)]
    view.__dlpack__(stream=HANDLE)
    (what, stream, event) = cuda.asked.pop()
    assert (what, stream) == ("stream waits for event", HANDLE)
    assert event
    view_of(producer, stream=HANDLE)
    assert producer.asked["stream"] == HANDLE
    assert cuda.asked.pop() == ("event on stream", HANDLE)
    unordered = view_of(producer, stream=-1)
    assert producer.asked["stream"] == -1
    cuda.asked.clear()
    unordered.__dlpack__(stream=HANDLE)
    assert cuda.asked == []
    destroyed: list[int] = []
    cuda.event_destroy = destroyed.append  # type: ignore[method-assign]
    del view
    dlpo.lifetime.drain()
    assert event in destroyed


def test_a_registered_device_buffer_begins_where_its_producer_ended(cuda: FakeCuda) -> None:
    with dlpo.DeviceBuffer.allocate(64, device=0) as memory:
        producer = Producer(memory.device_view((64,), "uint8"))
        with dlpo.DeviceBuffer.register(producer, device=0) as buffer:
            assert buffer.device_pointer == memory.device_pointer
            assert producer.asked["stream"] is None
            assert ("host waits for stream", 0) in cuda.asked
        del producer


def test_a_producer_on_the_cpu_is_asked_for_no_stream(buffer: dlpo.HostBuffer) -> None:
    producer = Producer(buffer.host_view((4,), "int8"))
    view_of(producer, stream=5)
    assert "stream" not in producer.asked


def test_pinned_memory_of_others_keeps_its_label(cuda_buffer: dlpo.HostBuffer) -> None:
    view = view_of(Producer(cuda_buffer.host_view((4,), "int8", label="pinned")))
    assert (view.label, view.host_pointer) == (Label.PINNED, cuda_buffer.host_pointer)
    assert view.__dlpack_device__() == (CUDA_HOST, 0)
    assert bytes(view.memoryview()) == bytes(range(4))
