"""`HostBuffer` and `DeviceBuffer`: exact allocation, registration in place, copies and device memory."""

from __future__ import annotations

import gc
import itertools
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import _native, lifetime, registrations
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import (
    AliasError,
    ClosedError,
    CudaError,
    DeviceMemoryError,
    DriverNotFoundError,
    HostMemoryError,
    RegistrationError,
    SpecError,
)
from dlpoffload.producers import view_of
from dlpoffload.spec import ALIGNMENT, TensorSpec

PAGE = mmap.PAGESIZE

before: Counter[tuple[str, int]] = Counter()
pinned_before = 0


@pytest.fixture(autouse=True)
def baseline() -> None:
    """What other tests may still hold is not counted here."""
    global pinned_before
    gc.collect()
    lifetime.drain()
    before.clear()
    before.update(dlpo.live_buffers())
    pinned_before = dlpo.pinned_nbytes()


def live_buffers() -> list[tuple[str, int]]:
    return list((Counter(dlpo.live_buffers()) - before).elements())


def pinned_nbytes() -> int:
    return dlpo.pinned_nbytes() - pinned_before


class Spy(CpuDriver):
    """The CPU driver with a list of the registrations asked of it, that can refuse the n-th one."""

    def __init__(self, *, refuse_at: int | None = None, refuse_writable: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.registered: list[tuple[int, int, bool]] = []
        self.unregistered: list[int] = []
        self.refuse_at = refuse_at
        self.refuse_writable = refuse_writable

    def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
        if len(self.registered) == self.refuse_at or (self.refuse_writable and not read_only):
            raise RegistrationError("the driver refuses")
        super().host_register(pointer, nbytes, read_only=read_only)
        self.registered.append((pointer, nbytes, read_only))

    def host_unregister(self, pointer: int) -> None:
        super().host_unregister(pointer)
        self.unregistered.append(pointer)

    @property
    def held(self) -> set[tuple[int, int]]:
        return {(start, nbytes) for start, nbytes, _ in self.registered if start not in self.unregistered}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[CpuDriver], CpuDriver]:
    """Make a driver the one that every device name means."""

    def install(driver: CpuDriver) -> CpuDriver:
        monkeypatch.setattr("dlpoffload.memory.open_driver", lambda device=None: driver)
        return driver

    return install


@pytest.fixture
def spy(use: Callable[[CpuDriver], CpuDriver]) -> Spy:
    spy = Spy()
    use(spy)
    return spy


def mappings() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [(int(low, 16), int(high, 16)) for low, high in (line.split(maxsplit=1)[0].split("-") for line in lines)]


class Pages:
    """Every anonymous mapping that was made for us, by the address that the native core gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, int]] = []
        self.map_anonymous = _native.map_anonymous
        monkeypatch.setattr(_native, "map_anonymous", self)

    def __call__(self, nbytes: int, alignment: int, huge_pages: bool) -> int:
        pointer = self.map_anonymous(nbytes, alignment, huge_pages)
        self.made.append((pointer, pointer + nbytes))
        return pointer

    def left(self) -> list[tuple[int, int]]:
        now = mappings()
        return [(start, end) for start, end in self.made if any(low < end and start < high for low, high in now)]


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Pages:
    return Pages(monkeypatch)


# ------------------------------------------------------------------------------------------------ allocate


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 3_000_000, "5MiB", (64 << 20) + 123])
def test_exactly_what_was_asked_for_is_pinned_and_accounted(device: str, nbytes: int | str) -> None:
    count = dlpo.parse_nbytes(nbytes)
    with dlpo.HostBuffer.allocate(nbytes, device=device) as buffer:
        assert buffer.nbytes == count
        pages = -(-count // PAGE) * PAGE
        start = buffer.host_pointer
        assert start % PAGE == 0
        assert pinned_nbytes() == pages
        assert live_buffers() == [("pinned", count)]
        assert any(low <= start and start + pages <= high for low, high in mappings())
    assert pinned_nbytes() == 0
    assert [(low, high) for low, high in mappings() if low < start + pages and start < high] == []


@pytest.mark.parametrize(("nbytes", "pages"), [(1, 1), (PAGE, 1), (40 * PAGE + 7, 41), ((2 << 20) + 1, 513)])
def test_a_mapping_is_rounded_to_a_page_and_no_further(nbytes: int, pages: int) -> None:
    def measured() -> int:
        before = sum(end - start for start, end in mappings())
        with dlpo.HostBuffer.allocate(nbytes, device="cpu"):
            return sum(end - start for start, end in mappings()) - before

    # The interpreter maps memory of its own now and then; one quiet try shows what is ours.
    assert pages * PAGE in {measured() for _ in range(10)}


def test_allocated_bytes_are_zero_and_pinned(device: str) -> None:
    with dlpo.HostBuffer.allocate(10_000, device=device) as buffer:
        assert bytes(buffer.memoryview()) == bytes(10_000)
        driver = dlpo.open_driver(device)
        assert driver.pointer_info(buffer.host_pointer).kind == "pinned"
        assert driver.pointer_info(buffer.host_pointer + 9_999).kind == "pinned"
        assert buffer.device == driver.device
        assert buffer.device_pointer == driver.host_device_pointer(buffer.host_pointer)
        assert not buffer.read_only


def test_allocating_through_huge_pages_is_aligned_to_them() -> None:
    with dlpo.HostBuffer.allocate("2MiB", device="cpu") as buffer:
        assert buffer.host_pointer % (2 << 20) == 0


@pytest.mark.parametrize("nbytes", [0, "0", -1, "-1", "lots", 1.5, None, True])
@pytest.mark.parametrize("kind", [dlpo.HostBuffer, dlpo.DeviceBuffer])
def test_a_size_that_means_nothing_is_refused(kind: Any, nbytes: Any) -> None:
    with pytest.raises(SpecError, match="nbytes="):
        kind.allocate(nbytes, device="cpu")


@pytest.mark.parametrize("kind", [dlpo.HostBuffer, dlpo.DeviceBuffer])
def test_a_device_that_means_nothing_or_is_not_there(kind: Any) -> None:
    for device in ("tpu", "cuda:x", "CPU", "", True, 1.0):
        with pytest.raises(SpecError, match="is no device name"):
            kind.allocate(1, device=device)
    with pytest.raises(DriverNotFoundError):
        kind.allocate(1, device="cuda:99")
    with pytest.raises((DriverNotFoundError, SpecError)):
        kind.allocate(1, device=-1)


def test_more_than_the_machine_has_is_refused_before_anything_is_mapped(mapped: Pages) -> None:
    with pytest.raises(HostMemoryError) as caught:
        dlpo.HostBuffer.allocate("1000TiB", device="cpu")
    assert caught.value.nbytes == 1000 << 40
    assert caught.value.limit
    assert caught.value.limit_nbytes is not None
    assert caught.value.limit_nbytes < 1000 << 40
    assert isinstance(caught.value, MemoryError)
    assert mapped.made == []
    assert live_buffers() == []


@pytest.mark.parametrize(
    ("call", "error"),
    [("map_anonymous", OSError(12, "Cannot allocate memory")), ("populate", OSError(14, "Bad address"))],
)
def test_what_the_system_refuses_leaves_nothing(
    mapped: Pages, monkeypatch: pytest.MonkeyPatch, call: str, error: OSError
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(_native, call, refuse)
    with pytest.raises(HostMemoryError, match=rf"100 bytes of host memory: {error.strerror}; ask for less") as caught:
        dlpo.HostBuffer.allocate(100, device="cpu")
    assert caught.value.nbytes == 100
    assert len(mapped.made) == (call == "populate")
    assert mapped.left() == []
    assert live_buffers() == []
    assert pinned_nbytes() == 0


def test_what_the_driver_refuses_leaves_nothing(mapped: Pages, use: Callable[[CpuDriver], CpuDriver]) -> None:
    use(CpuDriver(host_limit_nbytes=10 * PAGE))
    with dlpo.HostBuffer.allocate(8 * PAGE):
        (first,) = mapped.left()
        with pytest.raises(HostMemoryError):
            dlpo.HostBuffer.allocate(4 * PAGE)
        assert len(mapped.made) == 2
        assert mapped.left() == [first]
        assert live_buffers() == [("pinned", 8 * PAGE)]
        assert pinned_nbytes() == 8 * PAGE


def test_a_driver_that_gives_no_device_pointer_leaves_nothing(mapped: Pages, spy: Spy) -> None:
    def fail(pointer: int) -> int:
        raise CudaError("cuMemHostGetDevicePointer", 1, "CUDA_ERROR_INVALID_VALUE")

    spy.host_device_pointer = fail  # type: ignore[method-assign]
    with pytest.raises(CudaError):
        dlpo.HostBuffer.allocate(PAGE)
    assert len(mapped.made) == 1
    assert mapped.left() == []
    assert spy.held == set()
    assert live_buffers() == []


def test_memory_that_is_not_pinned_is_accounted_as_such(mapped: Pages) -> None:
    with dlpo.HostBuffer.allocate(10_000, device="cpu", pinned=False) as buffer:
        assert live_buffers() == [("pageable", 10_000)]
        assert pinned_nbytes() == 0
        assert bytes(buffer.memoryview()) == bytes(10_000)
        with pytest.raises(AliasError, match="is not pinned, so these bytes have no device address"):
            buffer.device_view((4,), "int8")
        for label in ("pinned", "pinned_as_cpu"):
            with pytest.raises(AliasError, match=f'is not pinned, so its views cannot be labelled "{label}"'):
                buffer.host_view((4,), "int8", label=label)
    assert mapped.left() == []


def test_a_device_that_cannot_map_host_memory_has_no_device_view(use: Callable[[CpuDriver], CpuDriver]) -> None:
    use(CpuDriver(map_host_memory=False))
    with dlpo.HostBuffer.allocate(PAGE) as buffer:
        with pytest.raises(AliasError, match="cannot map host memory"):
            _ = buffer.device_pointer
        with pytest.raises(AliasError, match="copy them instead"):
            buffer.device_view((4,), "int8")
        assert buffer.host_view((4,), "int8").device_pointer is None


def test_a_large_allocation_is_cut_into_registrations(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrations, "MAX_REGISTRATION", 4 * PAGE)
    with dlpo.HostBuffer.allocate(10 * PAGE + 1) as buffer:
        start = buffer.host_pointer
        assert [(p - start, n) for p, n, _ in spy.registered] == [
            (0, 4 * PAGE),
            (4 * PAGE, 4 * PAGE),
            (8 * PAGE, 3 * PAGE),
        ]
        assert pinned_nbytes() == 11 * PAGE
    assert spy.held == set()


@pytest.mark.parametrize("refuse_at", [0, 1, 2])
def test_a_refused_registration_takes_the_others_back(
    mapped: Pages, use: Callable[[CpuDriver], CpuDriver], monkeypatch: pytest.MonkeyPatch, refuse_at: int
) -> None:
    monkeypatch.setattr(registrations, "MAX_REGISTRATION", 4 * PAGE)
    spy = Spy(refuse_at=refuse_at)
    use(spy)
    with pytest.raises(HostMemoryError, match="the driver refuses"):
        dlpo.HostBuffer.allocate(10 * PAGE)
    assert len(spy.registered) == refuse_at
    assert spy.held == set()
    assert spy.unregistered == [start for start, _, _ in reversed(spy.registered)]  # in reverse order
    assert mapped.left() == []
    assert pinned_nbytes() == 0


def test_device_addresses_that_are_not_adjacent_are_refused(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrations, "MAX_REGISTRATION", 4 * PAGE)
    spy.host_device_pointer = lambda pointer: pointer * 2  # type: ignore[method-assign]
    with pytest.raises(RegistrationError, match="not adjacent"):
        dlpo.HostBuffer.allocate(10 * PAGE)
    assert spy.held == set()
    with dlpo.HostBuffer.allocate(4 * PAGE) as buffer:  # in one registration they are
        assert buffer.device_pointer == buffer.host_pointer * 2
        view = buffer.device_view((4,), "int8", byte_offset=8)
        assert view.device_pointer == buffer.device_pointer + 8
        del view


# --------------------------------------------------------------------------------------------------- carve


def test_carved_tensors_are_aligned_and_share_nothing(device: str) -> None:
    specs = {
        "a": TensorSpec((3,), "float32"),
        "b": TensorSpec((5, 7), "bfloat16"),
        "scalar": TensorSpec((), "int64"),
        "empty": TensorSpec((0, 3), "int64"),
        "c": TensorSpec((300,), "uint8"),
        "strided": TensorSpec((4, 4), "float32", (1, 4)),
        "last": TensorSpec((1,), "uint8"),
    }
    nbytes = dlpo.lay_out(specs).nbytes
    with dlpo.HostBuffer.allocate(nbytes, device=device) as buffer:
        views = buffer.carve(specs)
        assert list(views) == list(specs)
        assert {name: view.spec for name, view in views.items()} == specs
        assert all(view.pointer % ALIGNMENT == 0 for view in views.values())
        for i, view in enumerate(views.values()):
            view.memoryview()[:] = bytes([i + 1]) * view.nbytes
        for i, view in enumerate(views.values()):
            assert bytes(view.memoryview()) == bytes([i + 1]) * view.nbytes
        del views, view


def test_carving_more_than_there_is_gives_nothing_out() -> None:
    with dlpo.HostBuffer.allocate(1000, device="cpu") as buffer:
        specs = {"a": TensorSpec((500,), "uint8"), "b": TensorSpec((500,), "uint8")}
        with pytest.raises(AliasError, match="2 tensors need 1012 bytes from byte 0 on"):
            buffer.carve(specs)
        with pytest.raises(AliasError, match="multiple of 256"):
            buffer.carve({"a": TensorSpec((4,), "uint8")}, byte_offset=100)
        with pytest.raises(SpecError, match="is no label"):
            buffer.carve(specs, label="gpu")
        assert buffer.live_views == 0
        carved = buffer.carve({"a": TensorSpec((4,), "uint8")}, byte_offset=512, label="pinned")
        assert carved["a"].pointer == buffer.host_pointer + 512
        assert carved["a"].__dlpack_device__() == (3, 0)
        del carved
        assert buffer.carve({}) == {}


# ------------------------------------------------------------------------------------------------ register


def pages(count: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(i % 251 for i in range(count * PAGE))
    return memory, _native.buffer_pointer(memory)


def part(memory: mmap.mmap, start: int, stop: int) -> memoryview:
    return memoryview(memory)[start:stop]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(i % 251 for i in range(3 * PAGE)))
    return path


def test_registered_memory_is_pinned_in_place(spy: Spy) -> None:
    memory, pointer = pages(4)
    with dlpo.HostBuffer.register(part(memory, PAGE + 10, 2 * PAGE + 20)) as buffer:
        assert (buffer.host_pointer, buffer.nbytes) == (pointer + PAGE + 10, PAGE + 10)
        assert spy.registered == [(pointer + PAGE, 2 * PAGE, False)]
        assert pinned_nbytes() == 2 * PAGE
        assert live_buffers() == [("pinned", PAGE + 10)]
        buffer.memoryview()[:2] = b"xy"
        assert memory[PAGE + 10 : PAGE + 12] == b"xy"
        memory[PAGE + 10 : PAGE + 12] = b"zw"
        assert bytes(buffer.memoryview()[:2]) == b"zw"
    assert spy.unregistered == [pointer + PAGE]
    memory.close()  # nothing is exported any more


def test_the_producer_is_kept_until_the_last_view_is_gone(spy: Spy) -> None:
    memory = bytearray(PAGE)
    buffer = dlpo.HostBuffer.register(memory)
    view = buffer.host_view((4,), "uint8")
    del buffer
    with pytest.raises(BufferError):
        memory.extend(b"more")
    view.memoryview()[:] = b"good"
    assert memory[:4] == b"good"
    del view
    lifetime.drain()
    memory.extend(b"more")
    assert spy.held == set()


@pytest.mark.parametrize(
    ("flags", "protection", "read_only"),
    [
        (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, False),
        (mmap.MAP_SHARED, mmap.PROT_READ, True),
        (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, False),
    ],
    ids=["shared rw", "shared r", "private rw"],
)
def test_a_mapped_file_is_registered_as_it_is_mapped(
    spy: Spy, file: Path, flags: int, protection: int, read_only: bool
) -> None:
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=flags, prot=protection)
    with dlpo.HostBuffer.register(mapped) as buffer:
        assert spy.registered == [(buffer.host_pointer, 3 * PAGE, read_only)]
        assert buffer.read_only is read_only
        view = buffer.host_view((4,), "uint8", byte_offset=4)
        assert view.read_only is read_only
        assert bytes(view.memoryview()) == bytes([4, 5, 6, 7])
        if not read_only:
            view.memoryview()[:] = b"new!"
            assert file.read_bytes()[4:8] == (b"new!" if flags == mmap.MAP_SHARED else bytes([4, 5, 6, 7]))
        del view
    mapped.close()


def test_a_private_read_only_mapping_never_reaches_the_driver(spy: Spy, file: Path) -> None:
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    with pytest.raises(RegistrationError, match=r'private, read-only mapping of ".*weights.bin".*HostBuffer.copy_of'):
        dlpo.HostBuffer.register(mapped)
    assert spy.registered == []
    lifetime.drain()
    mapped.close()


def test_a_shared_file_that_is_pinned_for_reading_only_gives_a_read_only_buffer(
    use: Callable[[CpuDriver], CpuDriver], file: Path
) -> None:
    """What most file systems allow, through a writable mapping too."""
    spy = Spy(refuse_writable=True)
    use(spy)
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED)
    with dlpo.HostBuffer.register(mapped) as buffer:
        assert spy.registered == [(buffer.host_pointer, 3 * PAGE, True)]
        assert buffer.read_only
    assert spy.held == set()
    mapped.close()
    memory, _ = pages(1)  # but never other memory: a private mapping hangs the driver
    with pytest.raises(RegistrationError, match="the driver refuses"):
        dlpo.HostBuffer.register(memory)
    assert len(spy.registered) == 1


def test_what_cannot_be_registered(spy: Spy) -> None:
    with pytest.raises(RegistrationError, match="a bytearray of no bytes"):
        dlpo.HostBuffer.register(bytearray())
    with dlpo.DeviceBuffer.allocate(16) as device_memory:
        view = device_memory.device_view((16,), "uint8")
        with pytest.raises(RegistrationError, match="is device memory"):
            dlpo.HostBuffer.register(view)
        del view
    with pytest.raises(SpecError, match="neither __dlpack__ nor the buffer protocol"):
        dlpo.HostBuffer.register(object())
    with pytest.raises(AliasError, match="gaps"):
        dlpo.HostBuffer.register(memoryview(bytearray(10))[::2])
    assert spy.registered == []


def test_a_device_that_cannot_pin_in_place_says_so(use: Callable[[CpuDriver], CpuDriver]) -> None:
    use(Spy(host_register=False))
    with pytest.raises(RegistrationError, match="cannot pin that kind of memory"):
        dlpo.HostBuffer.register(bytearray(100))
    assert live_buffers() == []


# ------------------------------------------------------------- registrations that share pages are counted


def test_two_ranges_in_one_page_share_its_registration(spy: Spy) -> None:
    memory, pointer = pages(1)
    one = dlpo.HostBuffer.register(part(memory, 0, 100))
    two = dlpo.HostBuffer.register(part(memory, 100, 200))
    assert spy.registered == [(pointer, PAGE, False)]
    one.close()
    assert spy.held == {(pointer, PAGE)}
    two.memoryview()[:] = bytes(100)
    two.close()
    assert spy.held == set()
    memory.close()


@pytest.mark.parametrize("made", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("closed", list(itertools.permutations(range(3))), ids=str)
def test_partial_overlaps_in_every_order(spy: Spy, made: tuple[int, ...], closed: tuple[int, ...]) -> None:
    memory, pointer = pages(8)
    spans = [(0, 3 * PAGE + 5), (3 * PAGE + 100, 5 * PAGE), (2 * PAGE + 7, 8 * PAGE)]
    buffers: dict[int, dlpo.HostBuffer] = {}

    def pinned() -> set[int]:
        held = [((start - pointer) // PAGE, nbytes // PAGE) for start, nbytes in spy.held]
        return {page for first, count in held for page in range(first, first + count)}

    def covered() -> set[int]:
        return {p for i in buffers for p in range(spans[i][0] // PAGE, -(-spans[i][1] // PAGE))}

    for i in made:
        buffers[i] = dlpo.HostBuffer.register(part(memory, *spans[i]))
        assert pinned() == covered(), "every page that is used is pinned, and no other"
        assert pinned_nbytes() == len(covered()) * PAGE
    for i in closed:
        buffers.pop(i).close()
        assert pinned() >= covered(), "a page that is still used was unpinned"
    assert spy.held == set()
    assert pinned_nbytes() == 0
    memory.close()


def test_many_registrations_are_looked_up_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0

    def start(registration: Any) -> int:
        nonlocal looked
        looked += 1
        return int(registration.start)

    monkeypatch.setattr(registrations, "_start", start)
    before = pinned_nbytes()
    buffers = [dlpo.HostBuffer.allocate(PAGE, device="cpu") for _ in range(1000)]
    assert pinned_nbytes() - before == 1000 * PAGE
    for buffer in buffers:
        buffer.close()
    assert pinned_nbytes() == before
    assert looked < 1000 * 60


def test_views_of_our_own_buffers_register_without_the_driver(spy: Spy) -> None:
    outer = dlpo.HostBuffer.allocate(2 * PAGE)
    inner = dlpo.HostBuffer.register(outer.host_view((100,), "uint8", byte_offset=PAGE - 50))
    assert len(spy.registered) == 1
    assert inner.device_pointer == outer.device_pointer + PAGE - 50
    with pytest.raises(ClosedError, match="1 live view"):
        outer.close()
    inner.memoryview()[:3] = b"abc"
    assert bytes(outer.memoryview(PAGE - 50, 3)) == b"abc"
    inner.close()
    outer.close()
    assert spy.held == set()


def test_memory_that_others_pinned_is_adopted(spy: Spy) -> None:
    memory, pointer = pages(2)
    spy.host_register(pointer, 2 * PAGE)
    spy.registered.clear()
    buffer = dlpo.HostBuffer.register(part(memory, 10, PAGE + 10))
    assert spy.registered == []
    assert pinned_nbytes() == 0
    assert buffer.device_pointer == pointer + 10
    buffer.close()
    assert spy.unregistered == [], "what others pinned was unpinned"
    spy.host_unregister(pointer)


def test_memory_that_others_pinned_in_part_is_refused(spy: Spy) -> None:
    memory, pointer = pages(3)
    spy.host_register(pointer + PAGE, PAGE)
    for span in ((0, 2 * PAGE), (0, 3 * PAGE), (PAGE, 3 * PAGE)):
        with pytest.raises(RegistrationError, match="pinned already"):
            dlpo.HostBuffer.register(part(memory, *span))
    assert spy.registered == [(pointer + PAGE, PAGE, False)]
    assert live_buffers() == []
    spy.host_unregister(pointer + PAGE)


def test_a_refused_registration_leaves_what_it_shared_as_it_was(use: Callable[[CpuDriver], CpuDriver]) -> None:
    spy = Spy(refuse_at=2)
    use(spy)
    memory, pointer = pages(5)
    middle = dlpo.HostBuffer.register(part(memory, 2 * PAGE, 3 * PAGE))
    with pytest.raises(RegistrationError, match="the driver refuses"):
        dlpo.HostBuffer.register(memory)  # the gap before is registered, the one behind is refused
    assert spy.held == {(pointer + 2 * PAGE, PAGE)}
    assert live_buffers() == [("pinned", PAGE)]
    middle.close()
    assert spy.held == set()
    memory.close()


def test_writable_memory_cannot_lie_on_pages_registered_read_only(spy: Spy, file: Path) -> None:
    with file.open("r+b") as opened:
        readable = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with dlpo.HostBuffer.register(readable) as first:
        again = dlpo.HostBuffer.register(readable)  # read-only as well: shared
        assert len(spy.registered) == 1
        again.close()
        used = registrations.registrations
        with pytest.raises(RegistrationError, match="registered read-only already"):
            used.acquire(first.host_pointer, first.host_pointer + 10, spy, read_only=False)
    assert spy.held == set()
    readable.close()


def test_threads_that_register_the_same_pages_share_one_registration(spy: Spy) -> None:
    memory, _ = pages(4)
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(offset: int) -> None:
        barrier.wait()
        try:
            for _ in range(50):
                with dlpo.HostBuffer.register(part(memory, offset, 3 * PAGE + offset)) as buffer:
                    assert registrations.registrations.touching(buffer.host_pointer, buffer.host_pointer + 1, spy)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 8, PAGE - 8, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert spy.held == set()
    assert pinned_nbytes() == 0


def test_a_thread_that_registers_waits_for_one_that_is_at_it(use: Callable[[CpuDriver], CpuDriver]) -> None:
    class Slow(Spy):
        inside = threading.Event()

        def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
            self.inside.set()
            time.sleep(0.1)  # long enough for the other thread to come this far, if nothing held it
            super().host_register(pointer, nbytes, read_only=read_only)

    spy = Slow()
    use(spy)
    memory, pointer = pages(1)
    buffers: list[dlpo.HostBuffer] = []
    first = threading.Thread(target=lambda: buffers.append(dlpo.HostBuffer.register(part(memory, 0, 100))))
    first.start()
    assert spy.inside.wait(10)
    buffers.append(dlpo.HostBuffer.register(part(memory, 50, 150)))
    first.join()
    assert spy.registered == [(pointer, PAGE, False)]
    assert [buffer.nbytes for buffer in buffers] == [100, 100]
    buffers.pop().close()
    assert spy.held == {(pointer, PAGE)}
    buffers.pop().close()
    assert spy.held == set()


# -------------------------------------------------------------------------------------------------- copies


def test_copy_of_takes_exactly_the_elements(device: str) -> None:
    memory = bytearray(range(200))
    with dlpo.HostBuffer.copy_of(memory, device=device) as copy:
        assert (copy.nbytes, bytes(copy.memoryview())) == (200, bytes(range(200)))
        view = copy.host_view((3, 4), "uint8", strides=(1, 10), byte_offset=5)
        with dlpo.HostBuffer.copy_of(view, device=device) as packed:
            wanted = bytes(5 + i + 10 * j for i in range(3) for j in range(4))
            assert bytes(packed.memoryview()) == wanted
        repeated = copy.host_view((100, 2), "uint8", strides=(0, 1))
        with dlpo.HostBuffer.copy_of(repeated, device=device) as packed:
            assert bytes(packed.memoryview()) == bytes([0, 1]) * 100
        del view, repeated


def test_copy_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="nbytes=0"):
        dlpo.HostBuffer.copy_of(bytearray(), device="cpu")


def test_copy_of_device_memory(device: str) -> None:
    driver = dlpo.open_driver(device)
    with dlpo.DeviceBuffer.allocate(100, device=device) as source:
        stream = driver.stream_create()
        driver.fill_async(source.device_pointer, 9, 100, stream)
        driver.stream_synchronize(stream)
        driver.stream_destroy(stream)
        view = source.device_view((2, 5), "uint8", strides=(10, 2))
        with dlpo.HostBuffer.copy_of(view, device=device) as copy:
            assert bytes(copy.memoryview()) == bytes([9]) * 19
        with dlpo.HostBuffer.allocate(30, device=device) as target:
            target.copy_into(view, byte_offset=1)
            assert bytes(target.memoryview()) == bytes(1) + bytes([9]) * 19 + bytes(10)
        del view


def test_copy_into_writes_where_it_was_told_and_nowhere_else(device: str) -> None:
    with dlpo.HostBuffer.allocate(20, device=device) as buffer:
        buffer.copy_into(b"abc", byte_offset=5)
        buffer.copy_into(b"z", byte_offset=19)
        buffer.copy_into(b"", byte_offset=20)
        assert bytes(buffer.memoryview()) == bytes(5) + b"abc" + bytes(11) + b"z"
        assert buffer.live_views == 0


@pytest.mark.parametrize(
    ("source", "offset", "error"),
    [
        (b"x" * 21, 0, AliasError),
        (b"x", 20, AliasError),
        (b"x", -1, SpecError),
        (object(), 0, SpecError),
        (memoryview(bytearray(10))[::2], 0, AliasError),
    ],
)
def test_copy_into_refuses_what_does_not_fit(source: Any, offset: int, error: type[Exception]) -> None:
    with dlpo.HostBuffer.allocate(20, device="cpu") as buffer:
        with pytest.raises(error):
            buffer.copy_into(source, byte_offset=offset)
        assert bytes(buffer.memoryview()) == bytes(20)


def test_copies_within_one_buffer(device: str) -> None:
    with dlpo.HostBuffer.allocate(64, device=device) as buffer:
        buffer.memoryview()[:] = bytes(range(64))
        buffer.copy_into(buffer.host_view((32,), "uint8"), byte_offset=8)  # overlapping, as memmove
        assert bytes(buffer.memoryview(8, 32)) == bytes(range(32))
        with pytest.raises(AliasError, match="overlaps the bytes"):
            buffer.copy_into(buffer.host_view((4, 4), "uint8", strides=(1, 4)))


# ------------------------------------------------------------------------------------------ device memory


def test_device_memory_is_exact_accounted_and_freed(device: str) -> None:
    driver = dlpo.open_driver(device)
    with dlpo.DeviceBuffer.allocate("1MiB", device=device) as buffer:
        assert (buffer.nbytes, buffer.device) == (1 << 20, driver.device)
        assert driver.pointer_info(buffer.device_pointer).kind == "device"
        assert live_buffers() == [("device", 1 << 20)]
        view = buffer.device_view((8,), "float32", byte_offset=64)
        assert (view.device_pointer, view.host_pointer) == (buffer.device_pointer + 64, None)
        with pytest.raises(ClosedError, match=r"1 live view .* this device buffer of 1048576 bytes"):
            buffer.close()
        with pytest.raises(AliasError, match="this device buffer has 1048576 bytes"):
            buffer.device_view(((1 << 20) + 1,), "uint8")
        del view
    assert live_buffers() == []


def test_device_memory_that_is_not_there_is_refused(use: Callable[[CpuDriver], CpuDriver]) -> None:
    use(CpuDriver(device_limit_nbytes=1000))
    with dlpo.DeviceBuffer.allocate(600):
        with pytest.raises(DeviceMemoryError) as caught:
            dlpo.DeviceBuffer.allocate(600)
        assert caught.value.nbytes == 600
        assert live_buffers() == [("device", 600)]


def test_a_devices_memory_is_registered_without_a_copy() -> None:
    memory = bytearray(100)
    with dlpo.DeviceBuffer.register(memory, device="cpu") as buffer:
        assert (buffer.nbytes, buffer.device_pointer) == (100, view_of(memory).pointer)
        with pytest.raises(BufferError):
            memory.extend(b"more")
    lifetime.drain()
    memory.extend(b"more")
    with dlpo.DeviceBuffer.allocate(64, device="cpu") as outer:
        inner = dlpo.DeviceBuffer.register(outer.device_view((8,), "uint8", byte_offset=8), device="cpu")
        assert inner.device_pointer == outer.device_pointer + 8
        inner.close()


def test_device_memory_keeps_what_the_producer_said_of_it() -> None:
    with dlpo.DeviceBuffer.register(b"read only", device="cpu") as buffer:
        assert buffer.device_view((4,), "uint8").read_only
    with pytest.raises(SpecError, match="of no bytes"):
        dlpo.DeviceBuffer.register(b"", device="cpu")


def test_memory_of_another_device_is_not_registered_as_this_ones() -> None:
    with dlpo.HostBuffer.allocate(16, device="cpu") as buffer:
        pinned = buffer.host_view((4,), "uint8", label="pinned")
        with pytest.raises(AliasError, match="does not lie on cpu"):
            dlpo.DeviceBuffer.register(pinned, device="cpu")
        del pinned
