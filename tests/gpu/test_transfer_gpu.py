"""The slot ring on a real device: eager work, and real captured graphs.

A reader is a copy out of the slot, enqueued on the compute stream: what it brings must be the unit's bytes.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dlpoffload.driver import Driver
from dlpoffload.errors import CudaError, SlotError
from dlpoffload.memory import DeviceBuffer, HostBuffer
from dlpoffload.spec import TensorSpec
from dlpoffload.store import HostStore
from dlpoffload.transfer import Prefetcher, SlotRing, measure_link

pytestmark = pytest.mark.gpu

NBYTES = 4 << 20
READS = 96


class Bench:
    """A ring over random units, compute streams, and what readers brought."""

    def __init__(self, driver: Driver, seed: int, *, units: int = 5, slots: int = 2, borrow: Any = None) -> None:
        self.driver = driver
        self.random = random.Random(seed)
        self.names = [f"u{index}" for index in range(units)]
        specs = {name: TensorSpec((NBYTES - 64 * index,), "uint8") for index, name in enumerate(self.names)}
        self.store = HostStore.allocate(specs, units={name: (name,) for name in self.names}, device=driver.device)
        self.slabs = {name: self.store.slab(name) for name in self.names}
        self.truth: dict[str, bytes] = {}
        for name in self.names:
            self.write(name)
        self.ring = SlotRing(self.slabs, slots=slots, device=driver.device, allocate=borrow)
        self.prefetcher = Prefetcher(self.ring)
        self.brought = HostBuffer.allocate(READS * NBYTES, device=driver.device)
        self.expected: list[tuple[int, bytes]] = []
        self.places = iter(range(READS))

    def place(self) -> int:
        return self.brought.host_pointer + next(self.places) * NBYTES

    def write(self, unit: str) -> None:
        self.truth[unit] = self.random.randbytes(self.slabs[unit].nbytes)
        ctypes.memmove(self.slabs[unit].host_pointer, self.truth[unit], self.slabs[unit].nbytes)

    def update(self, unit: str) -> None:
        self.ring.before_host_write(unit)
        self.write(unit)
        self.ring.changed(unit)

    def bring(self, source: int, unit: str, stream: int) -> None:
        place = self.place()
        self.driver.copy_async(place, source, self.slabs[unit].nbytes, stream)
        self.expected.append((place, self.truth[unit]))

    def use(self, unit: str, stream: int, read: Callable[[int, str, int], None] | None = None) -> None:
        lease = self.prefetcher.enter(unit, stream=stream)
        try:
            (read or self.bring)(lease.views[unit].pointer, unit, stream)
        finally:
            self.prefetcher.leave(lease)

    def step(self, stream: int, units: list[str] | None = None) -> None:
        self.prefetcher.begin_step(stream=stream)
        for unit in units or self.names:
            self.use(unit, stream)
        self.prefetcher.end_step(stream=stream)

    def check(self) -> None:
        self.driver.synchronize()
        assert self.expected, "nothing was read"
        wrong = [i for i, (place, bytes_) in enumerate(self.expected) if ctypes.string_at(place, len(bytes_)) != bytes_]
        assert not wrong, f"readers {wrong} of {len(self.expected)} brought other bytes"


class Graph:
    """A captured step. Its readers bring to places of their own, from where each replay's bytes are taken away."""

    def __init__(self, bench: Bench, stream: int, units: list[str], mode: str = "GLOBAL") -> None:
        from cuda.bindings import driver as bindings

        self.bench, self.bindings = bench, bindings
        self.places = {unit: bench.place() for unit in units}
        modes = bindings.CUstreamCaptureMode
        self.call("cuStreamBeginCapture", stream, getattr(modes, f"CU_STREAM_CAPTURE_MODE_{mode}"))
        try:
            bench.prefetcher.begin_step(stream=stream)
            for unit in units:
                bench.use(unit, stream, self.bring)
            bench.prefetcher.end_step(stream=stream)
        finally:
            self.graph = self.call("cuStreamEndCapture", stream)
        self.made = self.call("cuGraphInstantiate", self.graph, 0)

    def call(self, name: str, *arguments: Any) -> Any:
        result, *values = getattr(self.bindings, name)(*arguments)
        assert result == self.bindings.CUresult.CUDA_SUCCESS, f"{name}: {result!r}"
        return values[0] if values else None

    def bring(self, source: int, unit: str, stream: int) -> None:
        self.bench.driver.copy_async(self.places[unit], source, self.bench.slabs[unit].nbytes, stream)

    def replay(self, stream: int) -> None:
        self.call("cuGraphLaunch", self.made, stream)
        for unit, place in self.places.items():
            self.bench.bring(place, unit, stream)

    def close(self) -> None:
        self.call("cuGraphExecDestroy", self.made)
        self.call("cuGraphDestroy", self.graph)


@pytest.fixture
def streams(cuda_driver: Driver) -> Iterator[list[int]]:
    with cuda_driver.current():
        made = [cuda_driver.stream_create() for _ in range(3)]
        yield made
        cuda_driver.synchronize()
        for stream in made:
            cuda_driver.stream_destroy(stream)


@contextmanager
def opened(driver: Driver, seed: int, **options: Any) -> Iterator[Bench]:
    bench = Bench(driver, seed, **options)
    yield bench
    bench.check()
    bench.ring.close()
    bench.store.close()
    bench.brought.close()


@pytest.mark.parametrize(("units", "slots"), [(1, 2), (5, 1), (5, 2), (7, 3)])
@pytest.mark.parametrize("legacy", [False, True], ids=["stream", "legacy stream"])
def test_steps(cuda_driver: Driver, streams: list[int], seed: int, units: int, slots: int, legacy: bool) -> None:
    with opened(cuda_driver, seed, units=units, slots=slots) as bench:
        for _ in range(3):
            bench.step(0 if legacy else streams[0])
        stats = bench.ring.stats
        assert stats.copies >= units
        assert (stats.late_copies, stats.mapped_runs, stats.host_waits) == (1, 0, 0)
        cuda_driver.synchronize()
        assert bench.ring.read_stats().timed_copies == stats.copies
        assert stats.copy_gb_per_second is not None


def test_any_order_on_any_stream(cuda_driver: Driver, streams: list[int], seed: int) -> None:
    with opened(cuda_driver, seed) as bench:
        for _ in range(60):
            bench.use(bench.random.choice(bench.names), bench.random.choice([0, *streams]))
            if bench.random.random() < 0.1:
                bench.update(bench.random.choice(bench.names))


def test_a_full_ring_runs_from_mapped_memory(cuda_driver: Driver, streams: list[int], seed: int) -> None:
    with opened(cuda_driver, seed, slots=1) as bench:
        outer = bench.prefetcher.enter("u0", stream=streams[0])
        bench.use("u1", streams[0])
        bench.prefetcher.leave(outer)
        bench.update("u1")
        bench.use("u1", streams[1])
        assert bench.ring.stats.mapped_runs == 1


def test_device_writes(cuda_driver: Driver, streams: list[int], seed: int) -> None:
    writer, reader, _ = streams
    with opened(cuda_driver, seed) as bench:
        source = HostBuffer.allocate(NBYTES, device=cuda_driver.device)
        content = bench.random.randbytes(NBYTES)
        source.memoryview()[:] = content
        for unit in bench.names:
            slab = bench.slabs[unit]
            bench.truth[unit] = content[: slab.nbytes]
            cuda_driver.copy_async(slab.host_pointer, source.host_pointer, slab.nbytes, writer)
            bench.ring.changed_on_stream(unit, stream=writer)
            with (lease := bench.ring.prefetch(unit, stream=reader)) as views:
                bench.bring(views[unit].pointer, unit, reader)
            assert lease.slot is not None
        cuda_driver.synchronize()
        source.close()


@pytest.mark.parametrize("mode", ["GLOBAL", "THREAD_LOCAL", "RELAXED"])
def test_replays_eager_steps_and_updates_in_turn(cuda_driver: Driver, streams: list[int], seed: int, mode: str) -> None:
    first, second, third = streams
    with opened(cuda_driver, seed, units=4) as bench:
        bench.step(third)  # under way, with copies ahead of the next step, when the capture begins
        graph = Graph(bench, first, bench.names, mode)
        graph.replay(second)
        graph.replay(second)
        bench.step(second)
        bench.update("u1")
        graph.replay(second)
        bench.step(second, ["u2", "u0"])
        graph.replay(second)
        other = Graph(bench, first, bench.names[::-1], mode)
        other.replay(second)
        bench.update("u3")
        graph.replay(second)
        other.replay(second)
        bench.step(second)
        bench.check()
        for made in (graph, other):
            made.close()
        assert bench.ring.stats.mapped_runs == 0


def test_a_lease_does_not_cross_the_border_of_a_capture(cuda_driver: Driver, streams: list[int], seed: int) -> None:
    stream = streams[0]
    with opened(cuda_driver, seed) as bench:
        lease = bench.ring.prefetch("u0", stream=stream)

        class Refused(Graph):
            def bring(self, source: int, unit: str, stream: int) -> None:
                super().bring(source, unit, stream)
                for use in (lease.wait, lease.release):
                    with pytest.raises(SlotError, match="outside a graph capture"):
                        use()

        graph = Refused(bench, stream, bench.names)  # the refusals did not break it
        lease.release()
        graph.replay(stream)
        bench.check()
        graph.close()


def test_host_bytes_are_not_written_in_a_capture(cuda_driver: Driver, streams: list[int], seed: int) -> None:
    from cuda.bindings import driver as bindings

    stream = streams[0]
    with opened(cuda_driver, seed) as bench:
        graph = Graph(bench, stream, bench.names)
        graph.replay(stream)
        bench.check()
        graph.call("cuStreamBeginCapture", stream, bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        with pytest.raises(CudaError):
            bench.ring.before_host_write("u0")
        bindings.cuStreamEndCapture(stream)  # broken or not
        bench.update("u0")
        bench.step(stream)
        graph.close()


def test_closed_with_work_under_way(cuda_driver: Driver, streams: list[int], seed: int) -> None:
    """Slots that a framework owns are its own again after the close: nothing of ours touches them."""
    with cuda_driver.current(), DeviceBuffer.allocate(2 * NBYTES, device=cuda_driver.device) as owned:
        parts = [owned.device_view((NBYTES,), "uint8", byte_offset=i * NBYTES) for i in range(2)]

        def borrow(nbytes: int) -> DeviceBuffer:
            assert nbytes == NBYTES
            return DeviceBuffer.register(parts.pop(), device=cuda_driver.device)

        with opened(cuda_driver, seed, borrow=borrow) as bench:
            for _ in range(3):
                bench.step(streams[0])
            bench.ring.close()
            cuda_driver.fill_async(owned.device_pointer, 0x5A, 2 * NBYTES, streams[1])
            cuda_driver.synchronize()
            with HostBuffer.allocate(2 * NBYTES, device=cuda_driver.device) as back:
                cuda_driver.copy(back.host_pointer, owned.device_pointer, 2 * NBYTES)
                assert ctypes.string_at(back.host_pointer, 2 * NBYTES) == b"\x5a" * (2 * NBYTES)


def test_cupy_owns_the_slots_and_reads_them(cuda_driver: Driver, seed: int) -> None:
    cupy = pytest.importorskip("cupy")

    def borrow(nbytes: int) -> DeviceBuffer:
        return DeviceBuffer.register(cupy.empty(nbytes, cupy.uint8), device=cuda_driver.device)

    with cupy.cuda.Device(0), opened(cuda_driver, seed, borrow=borrow) as bench:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            for unit in bench.names * 2:
                with bench.ring.prefetch(unit, stream=stream.ptr) as views:
                    read = cupy.from_dlpack(views[unit]).copy()
                    bench.bring(read.data.ptr, unit, stream.ptr)
        stream.synchronize()


def test_link(cuda_driver: Driver) -> None:
    link = measure_link(cuda_driver, nbytes="64MiB", repeat=3)
    assert link.host_to_device > 0
    assert link.device_to_host > 0
