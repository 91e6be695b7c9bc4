"""The CPU driver: memory and its checks, streams and events, endings."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dlpoffload
from dlpoffload import _native
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import AliasError, CudaError, DeviceMemoryError, HostMemoryError, RegistrationError

PAGE = mmap.PAGESIZE
LONG_ENOUGH_S = 0.05  # for what must not happen to have happened; no test waits this long for what must


@pytest.fixture
def driver() -> Iterator[CpuDriver]:
    driver = CpuDriver()
    yield driver
    driver.close()


class Pages:
    """Ordinary memory that begins on a page's border."""

    def __init__(self, pages: int) -> None:
        self.memory = mmap.mmap(-1, pages * PAGE)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.pointer = ctypes.addressof(self.anchor)


class Gate:
    """A task that holds its stream until the gate is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()  # so that a failed test ends too


class Caller(threading.Thread):
    """Makes one blocking call on a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error

    def blocks(self) -> bool:
        self.join(LONG_ENOUGH_S)
        return self.is_alive()

    def ends(self) -> bool:
        self.join(30)
        if self.error is not None:
            raise self.error
        return not self.is_alive()


def read(pointer: int, nbytes: int) -> bytes:
    return ctypes.string_at(pointer, nbytes)


def name_of(error: BaseException | None) -> str:
    assert isinstance(error, CudaError)
    return error.name


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dlpoffload-stream")]


# ----------------------------------------------------------------------------------------------- memory


def test_what_it_says_of_itself(driver: CpuDriver) -> None:
    assert (driver.platform, driver.device, driver.device_id) == ("cpu", "cpu", 0)
    assert driver.description
    assert driver.capabilities().map_host_memory
    free, total = driver.device_memory_info()
    assert 0 < free == total
    with driver.current(), driver.relaxed():
        assert driver.capture_id(driver.stream_create()) == 0


def test_allocations_begin_on_pages_and_are_known_to_their_last_byte(driver: CpuDriver) -> None:
    host, device = driver.host_alloc(5000), driver.device_alloc(5000)
    assert host % PAGE == device % PAGE == 0
    for pointer, kind in ((host, "pinned"), (device, "device")):
        assert driver.pointer_info(pointer).kind == kind
        assert driver.pointer_info(pointer + 4999).kind == kind
        assert driver.pointer_info(pointer + 5000).kind == "pageable"
    assert driver.host_device_pointer(host + 17) == host + 17
    driver.host_free(host)
    driver.device_free(device)
    assert driver.pointer_info(host).kind == driver.pointer_info(device).kind == "pageable"


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_allocation_of_nothing_is_refused(driver: CpuDriver, nbytes: int) -> None:
    for allocate in (driver.host_alloc, driver.device_alloc):
        with pytest.raises(CudaError, match=f"asked for {nbytes} bytes") as caught:
            allocate(nbytes)
        assert caught.value.name == "CUDA_ERROR_INVALID_VALUE"


def test_the_host_limit_counts_what_is_pinned_in_either_way() -> None:
    driver = CpuDriver(host_limit_nbytes=4 * PAGE)
    pages = Pages(2)
    pointer = driver.host_alloc(2 * PAGE)
    driver.host_register(pages.pointer, 2 * PAGE)
    with pytest.raises(HostMemoryError, match="1 bytes of pinned host memory") as caught:
        driver.host_alloc(1)
    assert (caught.value.nbytes, caught.value.limit_nbytes) == (1, 4 * PAGE)
    assert caught.value.limit
    assert name_of(caught.value.__cause__) == "CUDA_ERROR_OUT_OF_MEMORY"
    driver.host_free(pointer)
    driver.host_free(driver.host_alloc(2 * PAGE))


def test_the_device_limit_says_what_was_asked_and_what_is_free() -> None:
    driver = CpuDriver(device_limit_nbytes=1000)
    pointer = driver.device_alloc(600)
    assert driver.device_memory_info() == (400, 1000)
    with pytest.raises(DeviceMemoryError, match=r"401 bytes .*400 bytes of 1000 bytes are free") as caught:
        driver.device_alloc(401)
    assert caught.value.nbytes == 401
    driver.device_alloc(400)
    driver.device_free(pointer)
    assert driver.device_memory_info() == (600, 1000)


def test_what_the_system_refuses_is_a_memory_error_too() -> None:
    driver = CpuDriver(host_limit_nbytes=1 << 62, device_limit_nbytes=1 << 62)
    with pytest.raises(HostMemoryError, match="1152921504606846976 bytes"):
        driver.host_alloc(1 << 60)
    with pytest.raises(DeviceMemoryError, match="1152921504606846976 bytes"):
        driver.device_alloc(1 << 60)


def test_memory_is_freed_once_and_by_the_call_it_came_from(driver: CpuDriver) -> None:
    host, device = driver.host_alloc(PAGE), driver.device_alloc(PAGE)
    pages = Pages(1)
    driver.host_register(pages.pointer, PAGE)
    for free, pointer in (
        (driver.host_free, device),
        (driver.host_free, pages.pointer),
        (driver.host_free, host + 1),
        (driver.device_free, host),
        (driver.device_free, 0),
    ):
        with pytest.raises(CudaError, match="nothing was allocated at"):
            free(pointer)
    driver.host_free(host)
    driver.device_free(device)
    with pytest.raises(CudaError, match="nothing was allocated at"):
        driver.host_free(host)
    with pytest.raises(CudaError, match="nothing was allocated at"):
        driver.device_free(device)


# ----------------------------------------------------------------------------------------- registrations


def test_a_registration_pins_whole_pages_and_is_taken_back(driver: CpuDriver) -> None:
    pages = Pages(3)
    middle = pages.pointer + PAGE
    driver.host_register(middle + 100, 10)
    assert driver.pointer_info(middle).kind == driver.pointer_info(middle + PAGE - 1).kind == "pinned"
    assert driver.pointer_info(middle - 1).kind == driver.pointer_info(middle + PAGE).kind == "pageable"
    assert driver.host_device_pointer(middle + 105) == middle + 105
    for not_the_base in (middle, middle + 101, middle - 1):
        with pytest.raises(RegistrationError, match="no registration starts at"):
            driver.host_unregister(not_the_base)
    driver.host_unregister(middle + 100)
    assert driver.pointer_info(middle).kind == "pageable"


def test_pages_are_pinned_once(driver: CpuDriver) -> None:
    pages = Pages(3)
    driver.host_register(pages.pointer + PAGE, PAGE)
    allocated = driver.host_alloc(PAGE)
    for pointer, nbytes in (
        (pages.pointer + PAGE, 1),
        (pages.pointer + 2 * PAGE - 1, 1),
        (pages.pointer, PAGE + 1),
        (pages.pointer, 3 * PAGE),
        (allocated, 10),
    ):
        with pytest.raises(RegistrationError, match="pinned already, by another registration") as caught:
            driver.host_register(pointer, nbytes)
        assert name_of(caught.value.__cause__) == "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    driver.host_register(pages.pointer, PAGE)
    driver.host_register(pages.pointer + 2 * PAGE, PAGE)


def test_what_is_no_memory_is_not_registered(driver: CpuDriver) -> None:
    pages = Pages(1)
    for pointer, nbytes in ((pages.pointer, 0), (pages.pointer, -PAGE), (0, PAGE), (pages.pointer, 1 << 50)):
        with pytest.raises(RegistrationError, match="is empty, not mapped") as caught:
            driver.host_register(pointer, nbytes)
        assert name_of(caught.value.__cause__) == "CUDA_ERROR_INVALID_VALUE"
    assert driver.pointer_info(pages.pointer).kind == "pageable"


def test_a_registration_is_taken_back_once(driver: CpuDriver) -> None:
    pages = Pages(1)
    driver.host_register(pages.pointer, PAGE)
    driver.host_unregister(pages.pointer)
    for pointer in (pages.pointer, driver.host_alloc(1)):
        with pytest.raises(RegistrationError, match="no registration starts at") as caught:
            driver.host_unregister(pointer)
        assert name_of(caught.value.__cause__) == "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"


def test_a_device_that_cannot_register_says_so() -> None:
    pages = Pages(1)
    driver = CpuDriver(host_register=False)
    with pytest.raises(RegistrationError, match="cannot pin that kind") as caught:
        driver.host_register(pages.pointer, PAGE)
    assert name_of(caught.value.__cause__) == "CUDA_ERROR_NOT_SUPPORTED"
    with pytest.raises(RegistrationError, match="cannot pin that kind"):
        driver.host_register(pages.pointer, PAGE, read_only=True)
    driver = CpuDriver(read_only_host_register=False)
    with pytest.raises(RegistrationError, match="cannot pin that kind"):
        driver.host_register(pages.pointer, PAGE, read_only=True)
    driver.host_register(pages.pointer, PAGE)
    driver = CpuDriver(host_limit_nbytes=PAGE - 1)
    with pytest.raises(RegistrationError, match="not enough memory that can be pinned"):
        driver.host_register(pages.pointer, PAGE)
    with pytest.raises(TypeError, match="no_such_field"):
        CpuDriver(no_such_field=True)


def test_only_mapped_memory_has_a_device_pointer() -> None:
    pages = Pages(1)
    driver = CpuDriver()
    with pytest.raises(AliasError, match="is not pinned"):
        driver.host_device_pointer(pages.pointer)
    with pytest.raises(AliasError, match="is not pinned"):
        driver.host_device_pointer(driver.device_alloc(10))
    driver = CpuDriver(map_host_memory=False)
    with pytest.raises(AliasError, match="cannot map host memory"):
        driver.host_device_pointer(driver.host_alloc(10))
    assert not driver.capabilities().map_host_memory


# ------------------------------------------------------------------------------------------------ copies


def test_copies_and_fills_move_the_bytes(driver: CpuDriver) -> None:
    host, device, back = driver.host_alloc(1000), driver.device_alloc(1000), driver.host_alloc(1000)
    data = bytes(i % 251 for i in range(1000))
    ctypes.memmove(host, data, 1000)
    driver.copy(device, host, 1000)
    assert read(device, 1000) == data
    stream = driver.stream_create()
    driver.fill_async(device, 9, 10, stream)
    driver.copy_async(back, device, 1000, stream)
    driver.copy_async(back, device, 0, stream)
    driver.stream_synchronize(stream)
    assert read(back, 1000) == bytes([9] * 10) + data[10:]
    driver.copy_async(back + 500, host, 100, 0)
    assert read(back + 500, 100) == data[:100]


def test_copies_past_the_end_of_what_is_known_are_refused(driver: CpuDriver) -> None:
    host, device = driver.host_alloc(100), driver.device_alloc(100)
    pages = Pages(3)
    driver.host_register(pages.pointer, PAGE)
    stream = driver.stream_create()
    for destination, source, nbytes in (
        (device, host, 101),
        (device + 50, host, 51),
        (device, host + 1, 100),
        (device, 0, 1),
        (0, host, 1),
        (device, host, -1),
        (device, pages.pointer + PAGE - 1, 2),
    ):
        with pytest.raises(CudaError, match=r"no memory|cross the end") as caught:
            driver.copy_async(destination, source, nbytes, stream)
        assert (caught.value.call, caught.value.code) == ("cuMemcpyAsync", 1)
        with pytest.raises(CudaError, match=r"no memory|cross the end"):
            driver.copy(destination, source, nbytes)
    with pytest.raises(CudaError, match="cross the end"):
        driver.fill_async(device, 0, 101, stream)
    with pytest.raises(CudaError, match="256 is no byte"):
        driver.fill_async(device, 256, 1, stream)
    driver.host_register(pages.pointer + PAGE, PAGE)  # a copy across two registrations is refused all the same
    with pytest.raises(CudaError, match="cross the end"):
        driver.copy(device, pages.pointer + PAGE - 1, 2)
    driver.copy(device, pages.pointer + PAGE - 1, 1)


@pytest.mark.parametrize(
    ("flags", "prot", "read_only", "taken"),
    [
        (mmap.MAP_SHARED, mmap.PROT_READ, True, True),
        (mmap.MAP_SHARED, mmap.PROT_READ, False, False),
        (mmap.MAP_PRIVATE, mmap.PROT_READ, True, False),
        (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, True, False),
        (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, False, True),
    ],
)
def test_files_are_registered_as_cuda_takes_them(
    driver: CpuDriver, tmp_path: Path, flags: int, prot: int, read_only: bool, taken: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0, flags=flags, prot=prot) as mapping:
        pointer = _native.buffer_pointer(mapping)
        if taken:
            driver.host_register(pointer, 2 * PAGE, read_only=read_only)
            driver.host_unregister(pointer)
            return
        with pytest.raises(RegistrationError, match="may not be written"):
            driver.host_register(pointer, 2 * PAGE, read_only=read_only)


def test_memory_registered_read_only_is_no_destination(driver: CpuDriver) -> None:
    pages = Pages(1)
    device = driver.device_alloc(10)
    driver.host_register(pages.pointer, PAGE, read_only=True)
    driver.copy(device, pages.pointer, 10)
    with pytest.raises(CudaError, match="registered read-only"):
        driver.copy(pages.pointer, device, 10)
    with pytest.raises(CudaError, match="registered read-only"):
        driver.fill_async(pages.pointer, 0, 1, 0)


@pytest.mark.parametrize("destroyed", [False, True])
@pytest.mark.parametrize("call", ["host_free", "host_unregister", "device_free", "close", "synchronize"])
def test_freeing_waits_for_what_is_enqueued(driver: CpuDriver, gate: Gate, call: str, destroyed: bool) -> None:
    pages = Pages(1)
    driver.host_register(pages.pointer, PAGE)
    host, device = driver.host_alloc(64), driver.device_alloc(64)
    destination = driver.host_alloc(64)
    ctypes.memset(device, 5, 64)
    stream = driver.stream_create()
    driver.enqueue(stream, gate)
    driver.copy_async(destination, device, 64, stream)
    if destroyed:
        driver.stream_destroy(stream)
    argument = {"host_free": (host,), "host_unregister": (pages.pointer,), "device_free": (device,)}
    caller = Caller(lambda: getattr(driver, call)(*argument.get(call, ())))
    assert caller.blocks()
    gate.opened.set()
    assert caller.ends()
    assert read(destination, 64) == bytes([5] * 64)


# ------------------------------------------------------------------------------------- streams and events


def test_a_stream_keeps_its_order_and_does_not_hold_the_caller(driver: CpuDriver, gate: Gate) -> None:
    stream, other = driver.stream_create(), driver.stream_create()
    done: list[int] = []
    driver.enqueue(stream, gate)
    for i in range(100):
        driver.enqueue(stream, lambda i=i: done.append(i))
    driver.enqueue(other, lambda: done.append(-1))
    driver.stream_synchronize(other)
    assert done == [-1]
    gate.opened.set()
    driver.stream_synchronize(stream)
    assert done == [-1, *range(100)]


def test_stream_0_is_the_calling_thread(driver: CpuDriver) -> None:
    threads: list[int] = []
    driver.enqueue(0, lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]
    event = driver.event_create()
    driver.event_record(event, 0)
    assert driver.event_query(event)
    driver.stream_synchronize(0)
    with pytest.raises(ZeroDivisionError):
        driver.enqueue(0, lambda: 1 // 0)


def test_a_wait_takes_the_record_that_was_last_when_it_was_made(driver: CpuDriver, gate: Gate) -> None:
    first, second, reader = (driver.stream_create() for _ in range(3))
    event = driver.event_create()
    done: list[str] = []
    driver.enqueue(first, lambda: done.append("first"))
    driver.event_record(event, first)
    driver.stream_wait_event(reader, event)
    driver.enqueue(reader, lambda: done.append("reader"))
    driver.enqueue(second, gate)
    driver.event_record(event, second)  # the wait above does not see this one
    driver.stream_synchronize(reader)
    assert done == ["first", "reader"]
    assert not driver.event_query(event)  # but a question does
    driver.stream_wait_event(reader, event)
    driver.enqueue(reader, lambda: done.append("again"))
    later = Caller(lambda: driver.stream_synchronize(reader))
    assert later.blocks()
    gate.opened.set()
    assert later.ends()
    assert done == ["first", "reader", "again"]
    assert driver.event_query(event)


def test_an_event_never_recorded_is_no_wait(driver: CpuDriver) -> None:
    stream, event = driver.stream_create(), driver.event_create()
    driver.stream_wait_event(stream, event)
    driver.stream_wait_event(0, event)
    driver.event_synchronize(event)
    driver.stream_synchronize(stream)
    assert driver.event_query(event)


def test_only_what_lies_before_a_record_is_waited_for(driver: CpuDriver, gate: Gate) -> None:
    stream, event = driver.stream_create(), driver.event_create()
    done: list[str] = []
    driver.enqueue(stream, lambda: done.append("before"))
    driver.event_record(event, stream)
    driver.enqueue(stream, gate)
    driver.event_synchronize(event)
    driver.stream_wait_event(0, event)
    assert done == ["before"]


def test_the_readers_wait_blocks_the_host_and_is_counted(driver: CpuDriver, gate: Gate) -> None:
    stream, event = driver.stream_create(), driver.event_create()
    driver.enqueue(stream, gate)
    driver.event_record(event, stream)
    caller = Caller(lambda: driver.stream_wait_event(0, event))
    assert caller.blocks()
    assert driver.stats.reader_waits == 1
    gate.opened.set()
    assert caller.ends()
    driver.stream_wait_event(0, event)  # reached already: it blocks nobody
    assert (driver.stats.reader_waits, driver.stats.host_waits, driver.stats.drains) == (1, 0, 0)
    driver.event_synchronize(event)
    driver.stream_synchronize(stream)
    assert (driver.stats.reader_waits, driver.stats.host_waits) == (1, 2)
    driver.device_free(driver.device_alloc(1))
    assert driver.stats.drains == 1


def test_streams_and_events_may_go_while_work_is_pending(driver: CpuDriver, gate: Gate) -> None:
    stream, reader, event = driver.stream_create(), driver.stream_create(), driver.event_create()
    done: list[str] = []
    driver.enqueue(stream, gate)
    driver.enqueue(stream, lambda: done.append("copy"))
    driver.event_record(event, stream)
    driver.stream_wait_event(reader, event)
    driver.enqueue(reader, lambda: done.append("reader"))
    threads = stream_threads()
    driver.event_destroy(event)
    driver.stream_destroy(stream)
    with pytest.raises(CudaError, match="is no stream"):
        driver.stream_synchronize(stream)
    gate.opened.set()
    driver.stream_synchronize(reader)
    assert done == ["copy", "reader"]
    driver.stream_destroy(reader)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "call",
    [
        lambda d, s, e: d.stream_synchronize(e),
        lambda d, s, e: d.stream_destroy(0),
        lambda d, s, e: d.stream_wait_event(s, 12345),
        lambda d, s, e: d.stream_wait_event(12345, e),
        lambda d, s, e: d.event_record(s, s),
        lambda d, s, e: d.event_record(e, e),
        lambda d, s, e: d.event_query(s),
        lambda d, s, e: d.event_synchronize(s),
        lambda d, s, e: d.event_destroy(s),
        lambda d, s, e: d.copy_async(1, 1, 0, e),
        lambda d, s, e: d.enqueue(e, print),
        lambda d, s, e: d.event_elapsed_ms(e, e),
    ],
)
def test_handles_are_checked(driver: CpuDriver, call: Callable[[CpuDriver, int, int], object]) -> None:
    with pytest.raises(CudaError, match=r"no stream|no event|timing=True") as caught:
        call(driver, driver.stream_create(), driver.event_create())
    assert caught.value.name == "CUDA_ERROR_INVALID_HANDLE"


def test_timing_events_measure_between_records(driver: CpuDriver, gate: Gate) -> None:
    stream = driver.stream_create()
    start, end = driver.event_create(timing=True), driver.event_create(timing=True)
    with pytest.raises(CudaError, match="never recorded"):
        driver.event_elapsed_ms(start, end)
    driver.event_record(start, stream)
    driver.enqueue(stream, gate)
    driver.event_record(end, stream)
    with pytest.raises(CudaError, match="CUDA_ERROR_NOT_READY"):
        driver.event_elapsed_ms(start, end)
    gate.reached.wait(30)
    threading.Event().wait(0.01)
    gate.opened.set()
    driver.stream_synchronize(stream)
    assert driver.event_elapsed_ms(start, end) >= 10.0
    assert driver.event_elapsed_ms(end, start) == -driver.event_elapsed_ms(start, end)


# ------------------------------------------------------------------------------------------------- errors


def fail() -> None:
    raise ValueError("the kernel is broken")


def test_the_error_of_a_task_is_raised_at_every_wait_of_its_stream(driver: CpuDriver) -> None:
    stream, other = driver.stream_create(), driver.stream_create()
    before, behind = driver.event_create(), driver.event_create()
    ran: list[str] = []
    driver.event_record(before, stream)
    driver.enqueue(stream, fail)
    driver.enqueue(stream, lambda: ran.append("behind"))
    driver.event_record(behind, stream)
    driver.enqueue(other, lambda: ran.append("other"))
    for wait in (
        lambda: driver.stream_synchronize(stream),
        lambda: driver.event_synchronize(behind),
        lambda: driver.event_query(behind),
        lambda: driver.stream_wait_event(0, behind),
        lambda: driver.synchronize(),
        lambda: driver.stream_synchronize(stream),
    ):
        with pytest.raises(CudaError, match="ValueError: the kernel is broken") as caught:
            wait()
        assert (caught.value.code, caught.value.name) == (719, "CUDA_ERROR_LAUNCH_FAILED")
        assert isinstance(caught.value.__cause__, ValueError)
    driver.event_synchronize(before)
    driver.stream_synchronize(other)
    assert ran == ["other"]  # what lies behind an error has nothing right to work on
    driver.device_free(driver.device_alloc(1))  # memory can be given back all the same


def test_an_error_follows_the_waits(driver: CpuDriver) -> None:
    stream, reader, event = driver.stream_create(), driver.stream_create(), driver.event_create()
    ran: list[str] = []
    driver.enqueue(stream, fail)
    driver.event_record(event, stream)
    driver.stream_wait_event(reader, event)
    driver.enqueue(reader, lambda: ran.append("reader"))
    with pytest.raises(CudaError, match="the kernel is broken"):
        driver.stream_synchronize(reader)
    assert ran == []


def test_an_error_that_nobody_asked_for_goes_to_the_thread_hook(
    driver: CpuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(arguments.exc_value))
    told, untold = driver.stream_create(), driver.stream_create()
    for stream in (told, untold):
        driver.enqueue(stream, fail)
    with pytest.raises(CudaError):
        driver.stream_synchronize(told)
    threads = stream_threads()
    driver.stream_destroy(told)
    driver.stream_destroy(untold)
    for thread in threads:
        thread.join(30)
    assert [str(error) for error in seen] == ["the kernel is broken"]


def test_not_even_an_exit_ends_a_worker(driver: CpuDriver) -> None:
    stream = driver.stream_create()
    driver.enqueue(stream, sys.exit)
    for _ in range(2):
        with pytest.raises(CudaError, match="SystemExit"):
            driver.stream_synchronize(stream)


def test_a_task_may_enqueue_but_not_wait(driver: CpuDriver) -> None:
    stream, other = driver.stream_create(), driver.stream_create()
    done: list[str] = []
    driver.enqueue(stream, lambda: driver.enqueue(other, lambda: done.append("enqueued")))
    driver.stream_synchronize(stream)
    driver.stream_synchronize(other)
    assert done == ["enqueued"]
    driver.enqueue(stream, lambda: driver.stream_synchronize(stream))
    with pytest.raises(CudaError, match="may not wait for streams") as caught:
        driver.stream_synchronize(stream)
    assert name_of(caught.value.__cause__) == "CUDA_ERROR_NOT_PERMITTED"


# ------------------------------------------------------------------------------------------------ endings


def test_threads_end_with_their_streams_and_with_the_driver() -> None:
    before = set(stream_threads())
    for end in (lambda driver, streams: [driver.stream_destroy(s) for s in streams], lambda d, _: d.close()):
        driver = CpuDriver()
        streams = [driver.stream_create() for _ in range(5)]
        threads = set(stream_threads()) - before
        assert len(threads) == 5
        end(driver, streams)
        for thread in threads:
            thread.join(30)
        assert set(stream_threads()) <= before
    driver = CpuDriver()
    done: list[int] = []
    stream = driver.stream_create()
    driver.enqueue(stream, lambda: done.append(1))
    threads = set(stream_threads()) - before
    del driver
    gc.collect()
    for thread in threads:
        thread.join(30)
    assert set(stream_threads()) <= before
    assert done == [1]


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_interpreter_ends_with_work_pending_and_running() -> None:
    result = run_script(
        """
        import threading
        from dlpoffload.driver.cpu import CpuDriver
        driver = CpuDriver()
        never = threading.Event()
        reached = threading.Event()
        stuck, idle, busy = (driver.stream_create() for _ in range(3))
        driver.enqueue(stuck, lambda: (reached.set(), never.wait()))
        driver.enqueue(stuck, lambda: print("this does not run any more"))
        pointer = driver.device_alloc(1 << 26)
        for _ in range(100):
            driver.fill_async(pointer, 1, 1 << 26, busy)
        reached.wait()
        print("end")
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_streams_are_closed_once_the_interpreter_ends() -> None:
    result = run_script(
        """
        import atexit
        def late():
            try:
                driver.enqueue(stream, print)
            except Exception as error:
                print(type(error).__name__, error.name)
            driver.device_free(pointer)
            driver.stream_destroy(stream)
            print("freed")
        atexit.register(late)  # so it runs after what the driver registers
        from dlpoffload.driver.cpu import CpuDriver
        driver = CpuDriver()
        stream = driver.stream_create()
        pointer = driver.device_alloc(10)
        """
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "CudaError CUDA_ERROR_DEINITIALIZED\nfreed\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_child_starts_anew_with_the_tables_it_had() -> None:
    result = run_script(
        """
        import os, threading
        from dlpoffload.driver.cpu import CpuDriver
        driver = CpuDriver()
        gate, reached = threading.Event(), threading.Event()
        stream, event = driver.stream_create(), driver.event_create()
        pointer = driver.device_alloc(10)
        driver.enqueue(stream, lambda: (reached.set(), gate.wait()))
        driver.enqueue(stream, lambda: os.write(1, b"parent's work "))
        driver.event_record(event, stream)
        reached.wait()
        child = os.fork()
        if child == 0:
            assert driver.event_query(event)  # the child has nothing to do that is the parent's
            driver.event_synchronize(event)
            driver.fill_async(pointer, 3, 10, stream)
            driver.enqueue(stream, lambda: os.write(1, b"child's work "))
            driver.event_record(event, stream)
            driver.stream_wait_event(0, event)
            assert driver.pointer_info(pointer).kind == "device"
            driver.device_free(pointer)
            driver.stream_destroy(stream)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert not driver.event_query(event)
        gate.set()
        driver.stream_synchronize(stream)
        driver.device_free(pointer)
        """
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "child's work parent's work "
