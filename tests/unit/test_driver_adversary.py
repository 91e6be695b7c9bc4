"""The adversary of the CPU driver: right programs stay right, and a missing wait is always seen."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import CudaError

NBYTES = 64
SEEDS = range(200)


@contextmanager
def adversary(seed: int) -> Iterator[CpuDriver]:
    driver = CpuDriver(adversary=seed)
    try:
        yield driver
    finally:
        driver.close()


def slab(driver: CpuDriver, value: int) -> int:
    pointer = driver.host_alloc(NBYTES)
    ctypes.memset(pointer, value, NBYTES)
    return pointer


def content(pointer: int) -> bytes:
    return ctypes.string_at(pointer, NBYTES)


UNITS = [1, 2, 3, 4, 5, 6, 7, 8]
EXPECTED = [bytes([unit] * NBYTES) for unit in UNITS]


def streamed(seed: int | None, *, on_stream: bool, missing: str = "") -> list[bytes]:
    """What a step reads that streams `UNITS` through two slots; `missing` leaves one order out."""
    driver = CpuDriver(adversary=seed)
    slabs = [slab(driver, unit) for unit in UNITS]
    slots = [driver.device_alloc(NBYTES) for _ in range(2)]
    copied = [driver.event_create() for _ in slots]
    used = [driver.event_create() for _ in slots]
    copies = driver.stream_create()
    compute = driver.stream_create() if on_stream else 0
    seen: list[bytes] = []

    def prefetch(index: int) -> None:
        if index < len(slabs):
            slot = index % 2
            if missing != "copy waits for reader":
                driver.stream_wait_event(copies, used[slot])
            driver.copy_async(slots[slot], slabs[index], NBYTES, copies)
            if missing != "copy is recorded":
                driver.event_record(copied[slot], copies)

    prefetch(0)
    prefetch(1)
    for index in range(len(slabs)):
        slot = index % 2
        if missing != "reader waits for copy":
            driver.stream_wait_event(compute, copied[slot])
        driver.enqueue(compute, lambda slot=slot: seen.append(content(slots[slot])))
        if missing != "reader is recorded":
            driver.event_record(used[slot], compute)
        prefetch(index + 2)
    driver.stream_synchronize(compute)
    read = list(seen)  # before the end lets everything run
    driver.close()
    for pointer in slabs:
        driver.host_free(pointer)
    for pointer in slots:
        driver.device_free(pointer)
    return read


@pytest.mark.parametrize("on_stream", [False, True])
def test_a_program_with_all_its_waits_is_right_for_every_seed(on_stream: bool) -> None:
    assert streamed(None, on_stream=on_stream) == EXPECTED
    wrong = [seed for seed in SEEDS if streamed(seed, on_stream=on_stream) != EXPECTED]
    assert wrong == []


@pytest.mark.parametrize(
    ("missing", "on_stream"),
    [
        ("reader waits for copy", False),
        ("reader waits for copy", True),
        ("copy is recorded", False),
        ("copy is recorded", True),
        # A reader on stream 0 has ended when the next copy is enqueued: there no wait can be missing.
        ("copy waits for reader", True),
        ("reader is recorded", True),
    ],
)
def test_a_missing_wait_is_seen_and_always_in_the_same_way(missing: str, on_stream: bool) -> None:
    runs = [[streamed(seed, on_stream=on_stream, missing=missing) for seed in range(20)] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    seeds_that_see_it = [seed for seed, read in enumerate(runs[0]) if read != EXPECTED]
    assert len(seeds_that_see_it) >= 15  # deterministic, so no luck is needed


def test_a_copy_nobody_waits_for_may_stay_undone() -> None:
    outcomes: dict[str, int] = {"untouched": 0, "poisoned": 0, "copied": 0}
    for seed in range(40):
        with adversary(seed) as driver:
            source, destination = slab(driver, 7), slab(driver, 1)
            stream, event = driver.stream_create(), driver.event_create()
            driver.copy_async(destination, source, NBYTES, stream)
            driver.event_record(event, stream)
            found = content(destination)
            outcome = {bytes([1] * NBYTES): "untouched", bytes([7] * NBYTES): "copied"}.get(found, "poisoned")
            outcomes[outcome] += 1
            for _ in range(10):
                assert driver.event_query(event) is (outcome == "copied")  # to ask is not to wait
            assert content(destination) == found
            driver.event_synchronize(event)
            assert content(destination) == bytes([7] * NBYTES)
            assert driver.event_query(event)
    assert all(outcomes.values()), outcomes


def lazy_copy(driver: CpuDriver, stream: int) -> tuple[int, int]:
    """A copy into a fresh destination that has not run, and an event behind it; draws until it is so."""
    for value in itertools.count(1):
        source, destination = slab(driver, value % 200), slab(driver, 201)
        event = driver.event_create()
        driver.copy_async(destination, source, NBYTES, stream)
        driver.event_record(event, stream)
        if not driver.event_query(event):
            assert content(destination) != content(source)
            return destination, event
    raise AssertionError


def waits() -> Iterator[pytest.param]:  # type: ignore[valid-type]
    yield pytest.param(lambda d, s, e: d.event_synchronize(e), id="event_synchronize")
    yield pytest.param(lambda d, s, e: d.stream_wait_event(0, e), id="stream_wait_event(0)")
    yield pytest.param(lambda d, s, e: d.stream_synchronize(s), id="stream_synchronize")
    yield pytest.param(lambda d, s, e: d.synchronize(), id="synchronize")
    yield pytest.param(lambda d, s, e: d.device_free(d.device_alloc(1)), id="device_free")
    yield pytest.param(lambda d, s, e: d.host_free(d.host_alloc(1)), id="host_free")
    yield pytest.param(lambda d, s, e: d.close(), id="close")


@pytest.mark.parametrize("wait", list(waits()))
def test_every_wait_of_the_host_demands(wait: object) -> None:
    assert callable(wait)
    for seed in range(10):
        with adversary(seed) as driver:
            stream = driver.stream_create()
            destination, event = lazy_copy(driver, stream)
            wait(driver, stream, event)
            assert len(set(content(destination))) == 1
            assert content(destination)[0] < 201


def test_demand_travels_along_the_waits_and_only_there() -> None:
    for seed in range(20):
        with adversary(seed) as driver:
            first, second, third = (driver.stream_create() for _ in range(3))
            unrelated, unrelated_event = lazy_copy(driver, third)
            before = content(unrelated)
            destination, copied = lazy_copy(driver, first)
            passed = driver.event_create()
            driver.stream_wait_event(second, copied)
            driver.event_record(passed, second)
            driver.stream_wait_event(0, passed)
            assert content(destination)[0] < 201
            assert content(unrelated) == before
            assert not driver.event_query(unrelated_event)


def test_a_destroyed_stream_runs_out() -> None:
    for seed in range(10):
        with adversary(seed) as driver:
            stream = driver.stream_create()
            _, event = lazy_copy(driver, stream)
            threads = [t for t in threading.enumerate() if t.name == f"dlpoffload-stream-{stream}"]
            driver.stream_destroy(stream)
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            assert driver.event_query(event)


def test_fresh_device_memory_is_garbage() -> None:
    with adversary(3) as driver:
        assert all(len(set(content(driver.device_alloc(NBYTES)))) == 1 for _ in range(10))
        assert all(content(driver.device_alloc(NBYTES))[0] in (0xA5, 0xC3, 0x5A, 0xFF) for _ in range(10))


def test_a_copy_over_itself_is_not_poisoned() -> None:
    for seed in range(10):
        with adversary(seed) as driver:
            pointer = driver.host_alloc(NBYTES)
            ctypes.memmove(pointer, bytes(range(NBYTES)), NBYTES)
            stream = driver.stream_create()
            driver.copy_async(pointer, pointer + 16, NBYTES - 16, stream)
            driver.stream_synchronize(stream)
            assert content(pointer)[: NBYTES - 16] == bytes(range(16, NBYTES))


def test_errors_are_seen_late_but_seen() -> None:
    for seed in range(20):
        with adversary(seed) as driver:
            stream, event = driver.stream_create(), driver.event_create()
            driver.enqueue(stream, lambda: 1 // 0)
            driver.event_record(event, stream)
            with pytest.raises(CudaError, match="ZeroDivisionError"):
                driver.stream_wait_event(0, event)


def test_a_task_that_waits_for_the_host_does_not_hold_the_host() -> None:
    with adversary(0) as driver:
        stream, opened, reached = driver.stream_create(), threading.Event(), threading.Event()
        done: list[bool] = []
        while not reached.is_set():  # until one is eager
            driver.enqueue(stream, lambda: (reached.set(), opened.wait(30)))
        driver.enqueue(stream, lambda: done.append(True))
        assert done == []
        opened.set()
        driver.stream_synchronize(stream)
        assert done == [True]
