"""`SlotRing` and `Lease`: what is counted, what is refused, and what is left when a call fails."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from transfer_graphs import GraphDriver
from transfer_scenarios import Workbench, workbench

from dlpoffload import lifetime, transfer
from dlpoffload.driver import installed
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import ClosedError, CudaError, DeviceMemoryError, SlotError, SpecError
from dlpoffload.memory import DeviceBuffer, live_buffers
from dlpoffload.spec import TensorSpec
from dlpoffload.store import HostStore
from dlpoffload.transfer import Prefetcher, SlotRing


class FaultyDriver(GraphDriver):
    """Fails at the `fuse`th call from now that enqueues or makes something, and counts what is alive."""

    def __init__(self) -> None:
        super().__init__(adversary=1)
        self.fuse: int | None = None
        self.events: set[int] = set()
        self.created: set[int] = set()

    def _burn(self, call: str) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise CudaError(call, 999, "CUDA_ERROR_UNKNOWN")

    def event_create(self, *, timing: bool = False) -> int:
        self._burn("cuEventCreate")
        event = super().event_create(timing=timing)
        self.events.add(event)
        return event

    def event_destroy(self, event: int) -> None:
        super().event_destroy(event)
        self.events.remove(event)

    def stream_create(self) -> int:
        self._burn("cuStreamCreate")
        stream = super().stream_create()
        self.created.add(stream)
        return stream

    def stream_destroy(self, stream: int) -> None:
        super().stream_destroy(stream)
        self.created.remove(stream)

    def event_record(self, event: int, stream: int) -> None:
        self._burn("cuEventRecord")
        super().event_record(event, stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        self._burn("cuStreamWaitEvent")
        super().stream_wait_event(stream, event)

    def copy_async(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        self._burn("cuMemcpyAsync")
        super().copy_async(destination, source, nbytes, stream)


def leases(ring: SlotRing) -> int:
    return sum(timeline.leases for timeline in ring._timelines.all())


@pytest.fixture
def bench(seed: int) -> Iterator[Workbench]:
    with workbench(transfer, seed) as made:
        yield made


@pytest.fixture
def store() -> Iterator[HostStore]:
    specs = {f"t{index}": TensorSpec((100,), "float32") for index in range(4)}
    with HostStore.allocate(specs, units={f"u{i}": (f"t{i}",) for i in range(4)}, device="cpu") as made:
        yield made


def slabs(store: HostStore) -> dict[str, Any]:
    return {unit: store.slab(unit) for unit in store.units}


# ------------------------------------------------------------------------------------------------ counts
@pytest.mark.parametrize("reader", ["calling thread", "stream"])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_steps_in_order_copy_each_unit_once_and_ahead(slots: int, reader: str) -> None:
    for units in range(1, 14):
        with workbench(transfer, units, units=units, slots=slots) as bench:
            stream = bench.streams[0] if reader == "stream" else 0
            for _ in range(3):
                bench.step(stream)
            stats = bench.ring.stats
            assert stats.late_copies == 1
            assert stats.hits == 3 * units - 1
            if units <= slots:
                assert stats.copies == units
            else:
                assert 3 * units <= stats.copies <= 3 * units + slots
            assert (stats.mapped_runs, stats.host_waits, stats.invalidations) == (0, 0, 0)
            assert bench.driver.stats.host_waits == 0
            assert reader == "calling thread" or bench.driver.stats.reader_waits == 0


def test_a_byte_flipped_in_a_slot_is_seen(bench: Workbench) -> None:
    stream = bench.streams[0]
    lease = bench.prefetcher.enter("u0", stream=stream)
    at = lease.slot.device_pointer

    def flip() -> None:
        byte = ctypes.c_ubyte.from_address(at)
        byte.value ^= 1

    bench.driver.enqueue(stream, flip)
    bench.read(lease)
    bench.prefetcher.leave(lease)
    with pytest.raises(AssertionError, match="1 of 1 readers saw other bytes"):
        bench.check()
    bench.wrong.clear()


def test_times_are_read_from_what_has_passed(bench: Workbench) -> None:
    for _ in range(2):
        bench.step(bench.streams[0])
    bench.settle()
    stats = bench.ring.read_stats()
    assert stats.timed_copies == stats.copies
    assert stats.timed_nbytes == stats.copied_nbytes
    assert stats.copy_gb_per_second is not None
    assert stats.copy_gb_per_second > 0


def test_unread_times_do_not_pile_up(store: HostStore) -> None:
    driver = FaultyDriver()
    with installed(driver), SlotRing(slabs(store), device="cpu") as ring:
        stream = driver.stream_create()
        for _ in range(300):
            ring.prefetch("u0", stream=stream).release()
            ring.prefetch("u1", stream=stream).release()
            ring.prefetch("u2", stream=stream).release()
        assert len(driver.events) < 600
    assert not driver.events


def test_events_do_not_grow_with_the_streams_that_read(store: HostStore) -> None:
    driver = FaultyDriver()
    with installed(driver), SlotRing(slabs(store), device="cpu") as ring:
        ring._stopwatch.limit = 0
        counts = []
        for round_ in range(40):
            stream, unit = driver.stream_create(), f"u{round_ % 4}"
            with ring.prefetch(unit, stream=stream):
                pass
            ring.changed_on_stream(unit, stream=stream)
            ring.before_host_write(unit)
            counts.append(len(driver.events))
            driver.stream_synchronize(stream)
            driver.stream_destroy(stream)
        assert counts[-1] == counts[4]


# ------------------------------------------------------------------------------------- what is refused
def test_arguments_that_mean_nothing(store: HostStore) -> None:
    with pytest.raises(SlotError, match="at least one unit"):
        SlotRing({}, device="cpu")
    with pytest.raises(SlotError, match="slots=0"):
        SlotRing(slabs(store), slots=0, device="cpu")
    with pytest.raises(SpecError, match="when_full='wait'"):
        SlotRing(slabs(store), device="cpu", when_full="wait")  # type: ignore[arg-type]
    with SlotRing(slabs(store), device="cpu") as ring:
        with pytest.raises(SlotError, match='no unit "u9"'):
            ring.prefetch("u9")
        with pytest.raises(SlotError, match='no unit "u9"'):
            ring.changed("u9")
        with pytest.raises(SlotError, match="'u9'"):
            Prefetcher(ring, ["u0", "u9"])
        assert ring.stats.copies == 0


def test_slots_that_do_not_fit(store: HostStore) -> None:
    sizes = iter([512, 8])

    def allocate(nbytes: int) -> DeviceBuffer:
        return DeviceBuffer.allocate(next(sizes), device="cpu")

    with pytest.raises(SlotError, match="slot 1 was allocated with 8 bytes, but the largest unit needs 512"):
        SlotRing(slabs(store), device="cpu", allocate=allocate)
    assert ("device", 512) not in live_buffers()


def test_slabs_of_another_kind_of_device(store: HostStore) -> None:
    class Foreign(GraphDriver):
        platform = "cuda"
        device = "cuda:0"

    with installed(Foreign()), pytest.raises(SlotError, match='unit "u0" is made for cpu, but the ring is on cuda'):
        SlotRing(slabs(store), device="cuda:0")


@pytest.mark.parametrize("fitting", [0, 1, 2])
def test_a_slot_that_finds_no_room_frees_the_others(fitting: int) -> None:
    with installed(CpuDriver(device_limit_nbytes=512 * fitting + 100)) as driver:
        specs = {"t": TensorSpec((100,), "float32")}
        with HostStore.allocate(specs, units={"u": ("t",)}, device="cpu") as store:
            with pytest.raises(DeviceMemoryError):
                SlotRing(slabs(store), slots=3, device="cpu")
            assert driver.device_memory_info()[0] == 512 * fitting + 100


def test_a_full_ring_that_may_not_map(store: HostStore) -> None:
    with SlotRing(slabs(store), slots=1, device="cpu", when_full="error") as ring:
        lease = ring.prefetch("u0")
        with pytest.raises(SlotError, match='unit "u1" finds all 1 slots leased'):
            ring.prefetch("u1")
        assert ring.prefetch("u0").slot is lease.slot, "what is staged already needs no slot"
        ring._timelines.eager.states[0].leases -= 1
        lease.release()
        with ring.prefetch("u1"):
            assert ring.stats.mapped_runs == 0


def test_a_full_ring_where_memory_cannot_be_mapped() -> None:
    with installed(CpuDriver(map_host_memory=False)):
        specs = {f"t{index}": TensorSpec((100,), "float32") for index in range(2)}
        with (
            HostStore.allocate(specs, units={"u0": ("t0",), "u1": ("t1",)}, device="cpu") as store,
            SlotRing(slabs(store), slots=1, device="cpu") as ring,
            ring.prefetch("u0"),
            pytest.raises(SlotError, match="leased"),
        ):
            ring.prefetch("u1")


def test_a_released_lease_gives_nothing(bench: Workbench) -> None:
    stream = bench.streams[0]
    with (lease := bench.ring.prefetch("u0", stream=stream)) as views:
        assert set(views) == {"u0.a", "u0.b"}
        bench.read(lease)
    assert not views
    lease.release()
    assert leases(bench.ring) == 0
    for use in (lease.wait, lambda: lease.views, lambda: lease.share(stream)):
        with pytest.raises(SlotError, match='lease of unit "u0" is released'):
            use()


def test_a_stream_may_be_an_object(bench: Workbench) -> None:
    class Stream:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, bench.streams[1]

    with (lease := bench.ring.prefetch("u0", stream=Stream())):
        assert lease.stream == bench.streams[1]
        bench.read(lease)


def test_units_of_empty_tensors_only() -> None:
    specs = {"none": TensorSpec((0, 4), "float32")}
    with (
        HostStore.allocate(specs, units={"u": ("none",)}, device="cpu") as store,
        SlotRing(slabs(store), device="cpu") as ring,
        ring.prefetch("u") as views,
    ):
        assert views["none"].shape == (0, 4)


# ------------------------------------------------------------------------------------------ when it fails
@pytest.mark.parametrize("leaving", [False, True], ids=["entering", "leaving"])
def test_a_driver_that_fails_at_any_call(leaving: bool) -> None:
    """Nothing is claimed that is not so: whatever is entered next has the right bytes, and nothing leaks."""
    failures = 0
    for fuse in range(200):
        driver = FaultyDriver()
        with installed(driver):
            bench = Workbench(transfer, driver, fuse, slots=2)
            first, second, _ = bench.streams
            bench.step(first)
            bench.write_on(second, bench.slabs["u3"].host_pointer, bench.truth["u3"])
            bench.ring.changed_on_stream("u3", stream=second)
            lease = bench.prefetcher.enter("u2", stream=first) if leaving else None
            driver.fuse = fuse
            try:
                if lease is None:
                    lease = bench.prefetcher.enter("u3", stream=second)
                else:
                    bench.read(lease)
                    bench.prefetcher.leave(lease)
            except CudaError:
                failures += 1
            finished, driver.fuse = driver.fuse is not None, None
            if lease is not None:
                lease.release()
            assert leases(bench.ring) == 0
            for unit in bench.random.sample(bench.names, 5):
                bench.use(unit, first)
            bench.check()
            bench.ring.close()
            bench.store.close()
            assert not driver.events, "events are left"
            assert driver.created == set(bench.streams), "the copy stream is left"
        if finished:
            break
    assert finished
    assert failures == fuse > 5


@pytest.mark.parametrize("fuse", [0, 1])
def test_a_write_that_could_not_be_marked_is_in_no_slot(seed: int, fuse: int) -> None:
    driver = FaultyDriver()
    with installed(driver):
        bench = Workbench(transfer, driver, seed)
        first, second, _ = bench.streams
        bench.ring._stopwatch.limit = 0
        lease = bench.ring.prefetch("u0", stream=first)
        lease.wait()
        bench.ring.changed_on_stream("u0", stream=first, valid=lease.slot)  # makes the event
        driver.fuse = fuse
        with pytest.raises(CudaError):
            bench.ring.changed_on_stream("u0", stream=first, valid=lease.slot)
        lease.release()
        copies = bench.ring.stats.copies
        bench.use("u0", second)
        assert bench.ring.stats.copies > copies
        bench.check()
        bench.ring.close()
        bench.store.close()
        assert not driver.events


def test_a_driver_that_fails_while_the_ring_is_made(store: HostStore) -> None:
    for fuse in range(100):
        driver = FaultyDriver()
        driver.fuse = fuse
        with installed(driver):
            free = driver.device_memory_info()[0]
            try:
                SlotRing(slabs(store), device="cpu").close()
                break
            except CudaError:
                assert not driver.events
                assert not driver.created
                assert driver.device_memory_info()[0] == free
    assert fuse > 2


def test_a_mark_that_fails_keeps_the_slot_leased(store: HostStore) -> None:
    driver = FaultyDriver()
    with installed(driver), SlotRing(slabs(store), slots=1, device="cpu", when_full="error") as ring:
        lease = ring.prefetch("u0")
        lease.wait()
        driver.fuse = 0
        with pytest.raises(CudaError):
            lease.release()
        with pytest.raises(SlotError, match="leased"):
            ring.prefetch("u1")
        lease.release()
        ring.prefetch("u1").release()


def test_entering_a_block_that_fails_leaves_no_lease(store: HostStore) -> None:
    driver = FaultyDriver()
    with installed(driver), SlotRing(slabs(store), device="cpu") as ring:
        lease = ring.prefetch("u0")
        driver.fuse = 1
        with pytest.raises(CudaError), lease:
            pytest.fail("entered")
        assert leases(ring) == 0


def test_a_failed_reader_fails_the_close_and_keeps_the_ring(seed: int) -> None:
    def fail() -> None:
        raise ValueError("a kernel failed")

    driver = GraphDriver()
    with installed(driver):
        bench = Workbench(transfer, driver, seed)
        lease = bench.prefetcher.enter("u0", stream=bench.streams[0])
        bench.driver.enqueue(bench.streams[0], fail)
        bench.prefetcher.leave(lease)
        with pytest.raises(CudaError, match="a kernel failed"):
            bench.ring.close()
        assert not bench.ring.closed


# ------------------------------------------------------------------------------------------------- writes
def test_host_bytes_under_a_mapped_reader_are_not_written(seed: int) -> None:
    with workbench(transfer, seed, slots=1) as bench:
        outer = bench.ring.prefetch("u0", stream=bench.streams[0])
        inner = bench.ring.prefetch("u1", stream=bench.streams[0])
        bench.read(outer)
        with pytest.raises(SlotError, match='"u1" runs from its mapped view'):
            bench.ring.before_host_write("u1")
        bench.ring.before_host_write("u0")
        with pytest.raises(SlotError, match="2 leases are open"):
            bench.ring.close()
        inner.release()
        outer.release()
        bench.update("u1")
        assert bench.ring.stats.host_waits == 2


def test_a_slot_keeps_what_was_not_changed(bench: Workbench) -> None:
    stream, stats = bench.streams[0], bench.ring.stats

    def enter() -> int:
        with (lease := bench.ring.prefetch("u0", stream=stream)):
            bench.read(lease)
        return stats.copies

    assert enter() == 1
    bench.update("u3")
    assert (enter(), stats.invalidations) == (1, 0)
    bench.update("u0")
    assert (enter(), stats.invalidations) == (2, 1)


# ------------------------------------------------------------------------------------------------ the end
def test_a_closed_ring_refuses(bench: Workbench) -> None:
    bench.use("u0", 0)
    bench.ring.close()
    bench.ring.close()
    assert bench.ring.closed
    ring = bench.ring
    for use in (
        lambda: ring.prefetch("u0"),
        lambda: ring.look_ahead(["u0"]),
        ring.begin_step,
        lambda: ring.before_host_write("u0"),
        lambda: ring.changed("u0"),
        lambda: ring.changed_on_stream("u0"),
    ):
        with pytest.raises(ClosedError):
            use()
    ring.end_step()  # in a finally it must not hide what happened
    assert ring.read_stats().copies > 0


def test_leases_and_views_keep_a_ring_open(bench: Workbench) -> None:
    lease = bench.ring.prefetch("u0", stream=bench.streams[0])
    bench.read(lease)
    view = lease.views["u0.a"]
    with pytest.raises(SlotError, match="1 leases are open"):
        bench.ring.close()
    lease.release()
    with pytest.raises(ClosedError, match="1 live views of slots"):
        bench.ring.close()
    bench.use("u1", bench.streams[0])
    del view


def test_leaving_a_ring_hides_no_exception(store: HostStore) -> None:
    ring = SlotRing(slabs(store), device="cpu")
    lease = ring.prefetch("u0")
    with pytest.raises(KeyError, match="mine") as caught, ring:
        raise KeyError("mine")
    assert any("while leaving the ring: 1 leases are open" in note for note in caught.value.__notes__)
    lease.release()
    ring.close()


def test_a_lease_keeps_a_dropped_ring(store: HostStore) -> None:
    ring = SlotRing(slabs(store), device="cpu")
    with ring.prefetch("u0") as views:
        del ring
        gc.collect()
        assert ctypes.string_at(views["t0"].device_pointer, 400) == bytes(400)


def test_a_blocked_reader_blocks_no_other_thread(store: HostStore) -> None:
    """The wait of stream 0 blocks its thread, and must not hold the ring meanwhile."""
    driver = GraphDriver()
    gate, waiting = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    with installed(driver), SlotRing(slabs(store), slots=2, device="cpu") as ring:
        stream = driver.stream_create()
        with ring.prefetch("u0", stream=stream):
            driver.enqueue(stream, lambda: gate.wait(20))
        with ring.prefetch("u1", stream=stream):
            pass

        def read() -> None:
            try:
                lease = ring.prefetch("u2")  # its copy waits for the gated reader
                waiting.set()
                with lease:
                    pass
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert waiting.wait(20)
        thread.join(0.05)
        other = threading.Thread(target=lambda: ring.prefetch("u1", stream=stream).release())
        other.start()
        other.join(10)
        passed = not other.is_alive()
        gate.set()
        thread.join(20)
        other.join(20)
    assert passed
    assert not errors


def test_reclaims_rest_while_a_step_is_captured(bench: Workbench) -> None:
    stream = bench.streams[0]
    bench.use("u0", stream)

    def dropped() -> bool:
        DeviceBuffer.allocate(77, device="cpu")
        gc.collect()
        lifetime.drain()
        return ("device", 77) not in live_buffers()

    assert dropped()
    bench.driver.begin_capture(stream)
    bench.prefetcher.begin_step(stream=stream)
    assert not dropped()
    bench.prefetcher.end_step(stream=stream)
    bench.driver.end_capture(stream)
    lifetime.drain()
    assert dropped()
