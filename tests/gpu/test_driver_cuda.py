"""The CUDA driver on a real device."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dlpoffload import lifetime
from dlpoffload.driver import Driver, cuda, open_driver
from dlpoffload.errors import (
    AliasError,
    CudaError,
    DeviceMemoryError,
    DriverNotFoundError,
    HostMemoryError,
    RegistrationError,
)

pytestmark = pytest.mark.gpu

PAGE = mmap.PAGESIZE
MIB = 1 << 20


class Pages:
    """Anonymous memory that begins on a page's border."""

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.pointer = ctypes.addressof(self.anchor)


@contextmanager
def host(driver: Driver, nbytes: int) -> Iterator[int]:
    pointer = driver.host_alloc(nbytes)
    try:
        yield pointer
    finally:
        driver.host_free(pointer)


@contextmanager
def device(driver: Driver, nbytes: int) -> Iterator[int]:
    pointer = driver.device_alloc(nbytes)
    try:
        yield pointer
    finally:
        driver.device_free(pointer)


@contextmanager
def stream(driver: Driver) -> Iterator[int]:
    handle = driver.stream_create()
    try:
        yield handle
    finally:
        driver.stream_destroy(handle)


def on_thread(call: Callable[[], Any]) -> Any:
    """The value of a call made on a thread that CUDA has not seen."""
    values: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return values[0]


def pattern(nbytes: int, seed: int = 0) -> bytes:
    return bytes((i * 7 + seed) % 251 for i in range(251)) * (nbytes // 251 + 1)


def read_device(driver: Driver, pointer: int, nbytes: int) -> bytes:
    with host(driver, nbytes) as back:
        driver.copy(back, pointer, nbytes)
        return ctypes.string_at(back, nbytes)


def test_what_it_says_of_itself(cuda_driver: Driver) -> None:
    assert (cuda_driver.platform, cuda_driver.device, cuda_driver.device_id) == ("cuda", "cuda:0", 0)
    assert cuda_driver.description
    assert "\0" not in cuda_driver.description
    free, total = cuda_driver.device_memory_info()
    assert 0 < free <= total
    capabilities = cuda_driver.capabilities()
    assert capabilities.map_host_memory
    assert capabilities.host_register
    count = cuda.device_count()
    with pytest.raises(DriverNotFoundError, match=f"of {count} devices found"):
        open_driver(count)


def test_host_memory_is_pinned_and_mapped_to_its_last_byte(cuda_driver: Driver) -> None:
    with host(cuda_driver, 3 * PAGE + 5) as pointer:
        last = pointer + 3 * PAGE + 4
        assert cuda_driver.pointer_info(pointer).kind == cuda_driver.pointer_info(last).kind == "pinned"
        first = cuda_driver.host_device_pointer(pointer)
        assert cuda_driver.host_device_pointer(last) - first == last - pointer
        ctypes.memset(pointer, 0x5C, 3 * PAGE + 5)
        # through the device's address, so by the device
        assert read_device(cuda_driver, first + PAGE - 1, 2 * PAGE) == bytes([0x5C]) * 2 * PAGE
    assert cuda_driver.pointer_info(pointer).kind == "pageable"
    with device(cuda_driver, 100) as pointer:
        info = cuda_driver.pointer_info(pointer + 99)
        assert (info.kind, info.device_id) == ("device", 0)


def test_memory_is_registered_in_place(cuda_driver: Driver) -> None:
    pages = Pages(4 * PAGE)
    data = pattern(4 * PAGE)[: 4 * PAGE]
    ctypes.memmove(pages.pointer, data, 4 * PAGE)
    cuda_driver.host_register(pages.pointer, 4 * PAGE)
    try:
        assert cuda_driver.pointer_info(pages.pointer + PAGE + 3).kind == "pinned"
        middle = cuda_driver.host_device_pointer(pages.pointer + PAGE)
        assert read_device(cuda_driver, middle, PAGE) == data[PAGE : 2 * PAGE]
        with pytest.raises(RegistrationError, match="pinned already"):
            cuda_driver.host_register(pages.pointer + PAGE, PAGE)
    finally:
        cuda_driver.host_unregister(pages.pointer)
    assert cuda_driver.pointer_info(pages.pointer).kind == "pageable"
    assert ctypes.string_at(pages.pointer, 4 * PAGE) == data
    with pytest.raises(RegistrationError, match="cannot be unregistered"):
        cuda_driver.host_unregister(pages.pointer)


def test_registrations_that_are_refused(cuda_driver: Driver) -> None:
    pages = Pages(PAGE)
    for nbytes in (0, -1):
        with pytest.raises(RegistrationError, match="cannot be pinned in place"):
            cuda_driver.host_register(pages.pointer, nbytes)
    cuda_driver.host_register(pages.pointer, PAGE)
    with pytest.raises(RegistrationError, match="pinned already"):
        cuda_driver.host_register(pages.pointer, PAGE)
    cuda_driver.host_unregister(pages.pointer)
    # Driver 580 says INVALID_VALUE of memory of its own allocator, not ALREADY_REGISTERED.
    with host(cuda_driver, PAGE) as pointer, pytest.raises(RegistrationError, match="cannot be pinned in place"):
        cuda_driver.host_register(pointer, PAGE)


def test_memory_that_is_not_there(cuda_driver: Driver) -> None:
    with pytest.raises(DeviceMemoryError, match="are free") as device_refused:
        cuda_driver.device_alloc(1 << 46)
    assert device_refused.value.nbytes == 1 << 46
    with pytest.raises(HostMemoryError) as host_refused:
        cuda_driver.host_alloc(1 << 50)
    assert host_refused.value.nbytes == 1 << 50
    for allocate in (cuda_driver.device_alloc, cuda_driver.host_alloc):
        with pytest.raises(CudaError, match="asked for 0 bytes"):
            allocate(0)
    with device(cuda_driver, PAGE) as pointer:  # nothing above broke the context
        assert cuda_driver.pointer_info(pointer).kind == "device"


def test_pageable_memory_has_no_device_pointer(cuda_driver: Driver) -> None:
    pages = Pages(PAGE)
    if cuda_driver.capabilities().pageable_memory_access:
        pytest.skip("this device reaches pageable memory")
    with pytest.raises(AliasError, match="register it first"):
        cuda_driver.host_device_pointer(pages.pointer)


def test_copies_are_ordered_by_events(cuda_driver: Driver) -> None:
    nbytes = 64 * MIB
    with (
        host(cuda_driver, nbytes) as source,
        host(cuda_driver, nbytes) as back,
        device(cuda_driver, nbytes) as slot,
        stream(cuda_driver) as up,
        stream(cuda_driver) as down,
    ):
        copied, used = cuda_driver.event_create(), cuda_driver.event_create()
        for round_ in range(5):
            cuda_driver.event_synchronize(used)
            ctypes.memset(source, round_ + 1, nbytes)
            ctypes.memset(back, 0, nbytes)
            cuda_driver.stream_wait_event(up, used)
            cuda_driver.copy_async(slot, source, nbytes, up)
            cuda_driver.event_record(copied, up)
            cuda_driver.stream_wait_event(down, copied)
            cuda_driver.copy_async(back, slot, nbytes, down)
            cuda_driver.event_record(used, down)
            assert cuda_driver.event_query(used) in (True, False)
            cuda_driver.event_synchronize(used)
            assert cuda_driver.event_query(used)
            assert cuda_driver.event_query(copied)
            assert ctypes.string_at(back, nbytes) == bytes([round_ + 1]) * nbytes
        cuda_driver.event_destroy(copied)
        cuda_driver.event_destroy(used)


def test_a_query_says_no_while_work_is_enqueued(cuda_driver: Driver) -> None:
    nbytes = 256 * MIB
    with host(cuda_driver, nbytes) as source, device(cuda_driver, nbytes) as slot:
        copies = cuda_driver.stream_create()
        event = cuda_driver.event_create()
        assert cuda_driver.event_query(event)
        for _ in range(8):
            cuda_driver.copy_async(slot, source, nbytes, copies)
        cuda_driver.event_record(event, copies)
        assert not cuda_driver.event_query(event)
        cuda_driver.stream_destroy(copies)  # what is enqueued still runs
        cuda_driver.event_synchronize(event)
        assert cuda_driver.event_query(event)
        cuda_driver.event_destroy(event)


def test_timing_events_measure_a_copy(cuda_driver: Driver) -> None:
    nbytes = 64 * MIB
    with (
        host(cuda_driver, nbytes) as source,
        device(cuda_driver, nbytes) as slot,
        stream(cuda_driver) as copies,
    ):
        start, end = cuda_driver.event_create(timing=True), cuda_driver.event_create(timing=True)
        plain = cuda_driver.event_create()
        cuda_driver.event_record(start, copies)
        cuda_driver.copy_async(slot, source, nbytes, copies)
        cuda_driver.event_record(end, copies)
        cuda_driver.event_record(plain, copies)
        cuda_driver.stream_synchronize(copies)
        assert cuda_driver.event_elapsed_ms(start, end) > 0
        with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_HANDLE"):
            cuda_driver.event_elapsed_ms(start, plain)
        for event in (start, end, plain):
            cuda_driver.event_destroy(event)


def test_fills_and_synchronous_copies(cuda_driver: Driver) -> None:
    nbytes = 8 * MIB
    data = pattern(nbytes, 3)[:nbytes]
    pageable = ctypes.create_string_buffer(data, nbytes)
    with device(cuda_driver, nbytes) as first, device(cuda_driver, nbytes) as second:
        cuda_driver.copy(first, ctypes.addressof(pageable), nbytes)
        cuda_driver.copy(second, first, nbytes)
        with stream(cuda_driver) as fills:  # it does not wait for the legacy stream, so the copies must be over
            cuda_driver.fill_async(first, 0xEE, nbytes // 2, fills)
            cuda_driver.stream_synchronize(fills)
        half = nbytes // 2
        assert read_device(cuda_driver, first, nbytes) == bytes([0xEE]) * half + data[half:]
        assert read_device(cuda_driver, second, nbytes) == data
        cuda_driver.fill_async(second, 1, nbytes, 0)
        cuda_driver.synchronize()
        assert read_device(cuda_driver, second, nbytes) == bytes([1]) * nbytes


def test_calls_from_any_thread_leave_its_context_as_it_was(cuda_driver: Driver) -> None:
    from cuda.bindings import driver as bindings

    def current() -> int:
        return int(bindings.cuCtxGetCurrent()[1])

    def calls() -> list[int]:
        contexts = [current()]
        with host(cuda_driver, PAGE) as pointer, stream(cuda_driver) as side:
            contexts.append(current())
            cuda_driver.fill_async(pointer, 7, PAGE, side)
            cuda_driver.stream_synchronize(side)
            assert ctypes.string_at(pointer, PAGE) == bytes([7]) * PAGE
            with pytest.raises(DeviceMemoryError):
                cuda_driver.device_alloc(1 << 46)
            contexts.append(current())
        with cuda_driver.current():
            assert current() != 0
        return [*contexts, current()]

    assert on_thread(calls) == [0, 0, 0, 0]


@contextmanager
def capture(handle: int) -> Iterator[None]:
    from cuda.bindings import driver as bindings

    mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    assert bindings.cuStreamBeginCapture(handle, mode)[0] == 0
    graph = None
    try:
        yield
    finally:
        result, graph = bindings.cuStreamEndCapture(handle)
        if result == 0:
            bindings.cuGraphDestroy(graph)
    assert result == 0, f"the capture was broken: {result!r}"


def test_a_capture_has_a_number_and_takes_in_the_streams_that_join_it(cuda_driver: Driver) -> None:
    with cuda_driver.current(), stream(cuda_driver) as main, stream(cuda_driver) as side:
        assert cuda_driver.capture_id(main) == cuda_driver.capture_id(0) == 0
        fork, join = cuda_driver.event_create(), cuda_driver.event_create()
        numbers = []
        for _ in range(2):
            with capture(main):
                numbers.append(cuda_driver.capture_id(main))
                assert cuda_driver.capture_id(side) == 0
                cuda_driver.event_record(fork, main)
                cuda_driver.stream_wait_event(side, fork)
                assert cuda_driver.capture_id(side) == numbers[-1]
                cuda_driver.event_record(join, side)
                cuda_driver.stream_wait_event(main, join)
            assert cuda_driver.capture_id(main) == cuda_driver.capture_id(side) == 0
        assert 0 not in numbers
        assert numbers[0] != numbers[1]
        cuda_driver.event_destroy(fork)
        cuda_driver.event_destroy(join)


def test_a_graph_counts_who_can_replay_it(cuda_driver: Driver) -> None:
    from cuda.bindings import driver as bindings

    owner = lifetime.own("graph", 0, lambda: None)
    with cuda_driver.current(), stream(cuda_driver) as main:
        handle = bindings.CUstream(main)
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        assert bindings.cuStreamBeginCapture(handle, mode)[0] == 0
        cuda_driver.capture_hold(main, *owner.lend())
        result, graph = bindings.cuStreamEndCapture(handle)
        assert result == 0
        assert owner.users == 1
        result, executable = bindings.cuGraphInstantiate(graph, 0)
        assert result == 0
        assert bindings.cuGraphDestroy(graph)[0] == 0
        assert bindings.cuGraphLaunch(executable, handle)[0] == 0
        cuda_driver.stream_synchronize(main)
        assert owner.users == 1
        assert bindings.cuGraphExecDestroy(executable)[0] == 0
        deadline = time.monotonic() + 10
        while owner.users and time.monotonic() < deadline:
            time.sleep(0.001)
        assert owner.users == 0
    owner.release()


def test_calls_in_the_background_leave_a_capture_whole(cuda_driver: Driver) -> None:
    pages = Pages(PAGE)

    def background() -> bool:
        cuda_driver.host_register(pages.pointer, PAGE)
        cuda_driver.host_unregister(pages.pointer)
        cuda_driver.host_free(cuda_driver.host_alloc(PAGE))
        cuda_driver.device_free(cuda_driver.device_alloc(PAGE))
        with cuda_driver.relaxed():
            return cuda_driver.event_query(outside)

    with cuda_driver.current(), stream(cuda_driver) as main:
        outside = cuda_driver.event_create()
        cuda_driver.event_record(outside, 0)
        cuda_driver.event_synchronize(outside)
        with capture(main):
            assert on_thread(background)
        cuda_driver.event_destroy(outside)


def test_a_broken_capture_is_named(cuda_driver: Driver) -> None:
    from cuda.bindings import driver as bindings

    with cuda_driver.current(), stream(cuda_driver) as main:
        outside = cuda_driver.event_create()
        cuda_driver.event_record(outside, 0)
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        assert bindings.cuStreamBeginCapture(main, mode)[0] == 0
        try:
            with pytest.raises(CudaError, match="CAPTURE"):
                cuda_driver.stream_wait_event(main, outside)  # recorded before the capture
            with pytest.raises(CudaError, match="end it and capture again"):
                cuda_driver.capture_id(main)
        finally:
            bindings.cuStreamEndCapture(main)
        assert cuda_driver.capture_id(main) == 0
        cuda_driver.event_destroy(outside)
