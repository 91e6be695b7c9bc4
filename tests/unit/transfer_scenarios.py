"""What users of a `SlotRing` do, checked byte by byte, under a driver that breaks every order the ring forgot to state.

A scenario is a function of the package that it tests (`dlpoffload.transfer`, or a mutant of it) and of the adversary's
seed; it raises when a reader saw a byte that was not the unit's. Readers are the calling thread (stream 0) and tasks of
streams, which look at the slot when they run, not when they are enqueued.
"""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, Literal

from transfer_graphs import Graph, GraphDriver

from dlpoffload.driver import installed
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import CudaError
from dlpoffload.memory import DeviceBuffer
from dlpoffload.spec import TensorSpec
from dlpoffload.store import HostStore

__all__ = ["EAGER", "GRAPHS", "Scenario", "Workbench", "workbench"]

Scenario = Callable[[ModuleType, int], None]
EAGER: dict[str, Scenario] = {}
GRAPHS: dict[str, Scenario] = {}


class Workbench:
    """A driver, a store, a ring with a prefetcher, streams, and the bytes that every unit has now."""

    def __init__(
        self,
        transfer: ModuleType,
        driver: GraphDriver,
        seed: int,
        *,
        units: int = 5,
        slots: int = 2,
        when_full: Literal["map", "error"] = "map",
        borrowed: bool = False,
    ) -> None:
        self.driver = driver
        self.random = random.Random(seed)
        self.wrong: list[str] = []
        self.reads = 0
        self.truth: dict[str, bytes] = {}
        self.names = [f"u{index}" for index in range(units)]
        specs: dict[str, TensorSpec] = {}
        for index, unit in enumerate(self.names):
            specs[f"{unit}.a"] = TensorSpec((37 + 101 * (index % 3),), "uint8")
            specs[f"{unit}.b"] = TensorSpec((11, 1 + index % 4), "float32")
        self.store = HostStore.allocate(
            specs, units={unit: (f"{unit}.a", f"{unit}.b") for unit in self.names}, device="cpu"
        )
        self.slabs = {unit: self.store.slab(unit) for unit in self.names}
        for unit in self.names:
            self.write(unit)
        self.lent: list[bytearray] = []
        self.ring = transfer.SlotRing(
            self.slabs,
            slots=slots,
            device="cpu",
            when_full=when_full,
            allocate=self._lend if borrowed else None,
        )
        self.prefetcher = transfer.Prefetcher(self.ring)
        self.streams = [driver.stream_create() for _ in range(3)]

    def _lend(self, nbytes: int) -> DeviceBuffer:
        """Memory that is the driver's neither to know nor to free, like that of a framework."""
        self.lent.append(bytearray(nbytes))
        return DeviceBuffer.register(self.lent[-1], device="cpu")

    # ---------------------------------------------------------------------------------------- bytes
    def fresh(self, unit: str) -> bytes:
        return self.random.randbytes(self.slabs[unit].nbytes)

    def write(self, unit: str, content: bytes | None = None) -> None:
        """Write a unit's host bytes, now."""
        slab = self.slabs[unit]
        content = self.fresh(unit) if content is None else content
        ctypes.memmove(slab.host_pointer, content, slab.nbytes)
        self.truth[unit] = content

    def update(self, unit: str) -> None:
        """Write a unit's host bytes as a user does."""
        self.ring.before_host_write(unit)
        self.write(unit)
        self.ring.changed(unit)

    def write_on(self, stream: int, pointer: int, content: bytes) -> None:
        """Enqueue a kernel that writes."""
        self.driver.enqueue(stream, lambda: ctypes.memmove(pointer, content, len(content)))

    # -------------------------------------------------------------------------------------- readers
    def read(self, lease: Any, stream: int | None = None) -> None:
        """Enqueue a kernel that reads every byte of the unit's tensors and compares."""
        unit, truth = lease.unit, dict(self.truth)
        offsets = self.slabs[unit].byte_offsets
        places = [(view.device_pointer, offsets[name], view.nbytes) for name, view in lease.views.items()]
        assert len(places) == 2

        def look() -> None:
            given = self.driver.argument
            wanted = (truth if given is None else given)[unit]  # type: ignore[index]
            self.reads += 1
            for pointer, start, nbytes in places:
                if ctypes.string_at(pointer, nbytes) != wanted[start : start + nbytes]:
                    self.wrong.append(unit)

        self.driver.enqueue(lease.stream if stream is None else stream, look)

    def use(self, unit: str, stream: int) -> None:
        """Enter a unit, read it, leave it."""
        lease = self.prefetcher.enter(unit, stream=stream)
        try:
            self.read(lease)
        finally:
            self.prefetcher.leave(lease)

    def step(self, stream: int, units: Sequence[str] | None = None) -> None:
        """A pass over the units."""
        self.prefetcher.begin_step(stream=stream)
        try:
            for unit in self.names if units is None else units:
                self.use(unit, stream)
        finally:
            self.prefetcher.end_step(stream=stream)

    # --------------------------------------------------------------------------------------- graphs
    def capture(self, stream: int, record: Callable[[], None]) -> Graph:
        self.driver.begin_capture(stream)
        try:
            record()
        finally:
            graph = self.driver.end_capture(stream)
        return graph

    def replay(self, graph: Graph, stream: int) -> None:
        self.driver.replay(graph, stream, dict(self.truth))

    def replay_with(self, graph: Graph, stream: int, event: int) -> None:
        """Replay, and let what `event` marks run in the middle of it."""
        place = self.random.randrange(len(graph.nodes))

        def between(index: int) -> None:
            if index == place:
                self.driver.event_synchronize(event)

        self.driver.replay(graph, stream, dict(self.truth), between)

    # ------------------------------------------------------------------------------------------ end
    def settle(self) -> None:
        """Let everything run, stream by stream in some order."""
        streams = [*self.streams] if self.ring.closed else [*self.streams, self.ring.copy_stream]
        self.random.shuffle(streams)
        for stream in streams:
            self.driver.stream_synchronize(stream)
        self.driver.synchronize()

    def check(self) -> None:
        """Let everything run, and see that every reader found its unit."""
        self.settle()
        assert self.reads, "nothing was read"
        assert not self.wrong, f"{len(self.wrong)} of {self.reads} readers saw other bytes: {self.wrong[:5]}"


@contextmanager
def workbench(transfer: ModuleType, seed: int, **options: Any) -> Iterator[Workbench]:
    """A workbench whose readers are checked at the end, and whose ring is closed; nothing may be left over."""
    driver = GraphDriver(adversary=seed)
    with installed(driver):
        bench = Workbench(transfer, driver, seed, **options)
        try:
            yield bench
            bench.check()
            driver.destroy_graphs()
            bench.ring.close()
            bench.store.close()
        except BaseException:
            driver.destroy_graphs()
            with suppress(CudaError):
                CpuDriver.synchronize(driver)  # what is still enqueued keeps the whole bench alive
            raise
    driver.close()


def _scenario(table: dict[str, Scenario]) -> Callable[[Scenario], Scenario]:
    def add(scenario: Scenario) -> Scenario:
        table[scenario.__name__] = scenario
        return scenario

    return add


# ------------------------------------------------------------------------------------------ eager: orders
@_scenario(EAGER)
def steps_in_order(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, units=4 + seed % 3, slots=1 + seed % 3) as bench:
        for _ in range(3):
            bench.step(bench.streams[0])
        stats = bench.ring.stats
        assert stats.copies >= len(bench.names)
        assert stats.late_copies == 1, "only the very first unit is met unprepared"
        assert (stats.mapped_runs, stats.host_waits) == (0, 0)


@_scenario(EAGER)
def steps_of_the_calling_thread(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, units=4 + seed % 3, slots=1 + seed % 3) as bench:
        for _ in range(2):
            bench.step(0)
        assert bench.ring.stats.late_copies == 1
        assert not bench.wrong, "readers of stream 0 have run"


@_scenario(EAGER)
def skipped_repeated_reordered_raised(transfer: ModuleType, seed: int) -> None:
    class BrokenError(Exception):
        pass

    with workbench(transfer, seed, slots=1 + seed % 3) as bench:
        for _ in range(4):
            order = bench.random.choices(bench.names, k=6)
            stream = bench.random.choice([0, *bench.streams])
            bench.prefetcher.begin_step(stream=stream)
            for unit in order:
                lease = bench.prefetcher.enter(unit, stream=stream)
                try:
                    if bench.random.random() < 0.3:
                        raise BrokenError
                    bench.read(lease)
                except BrokenError:
                    bench.read(lease)
                finally:
                    bench.prefetcher.leave(lease)
            bench.prefetcher.end_step(stream=stream)
        assert bench.ring.stats.mapped_runs == 0


@_scenario(EAGER)
def raw_prefetch(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2 + seed % 2) as bench:
        ring, stream = bench.ring, bench.streams[0]
        for unit, following in zip(bench.names * 2, bench.names[1:] + bench.names, strict=False):
            lease = ring.prefetch(unit, stream=stream)
            ring.look_ahead([following], stream=stream)
            with lease as views:
                bench.read(lease)
                assert len(views) == 2
            assert not views, "what the block gave is good no longer"
            if bench.random.random() < 0.3:
                ring.prefetch(following, stream=stream).release()  # entered and left without a look
        assert ring.stats.late_copies == 0


# ------------------------------------------------------------------------------------ eager: many at once
@_scenario(EAGER)
def nested_leases(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        stream = bench.streams[0]
        for _ in range(2):
            leases = [bench.prefetcher.enter(unit, stream=stream) for unit in bench.names[:3]]
            assert [lease.slot is None for lease in leases] == [False, False, True]
            for lease in leases:
                bench.read(lease)
            for lease in reversed(leases):
                bench.prefetcher.leave(lease)
            bench.step(stream)
        assert bench.ring.stats.mapped_runs == 2


@_scenario(EAGER)
def two_rings(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed) as one:
        two = Workbench(transfer, one.driver, seed + 1, units=3, slots=1)
        for _ in range(3):
            order = [(one, unit) for unit in one.names] + [(two, unit) for unit in two.names]
            one.random.shuffle(order)
            for bench, unit in order:
                bench.use(unit, one.streams[0])
        two.check()
        two.ring.close()
        two.store.close()


@_scenario(EAGER)
def two_threads(transfer: ModuleType, seed: int) -> None:
    errors: list[BaseException] = []
    with workbench(transfer, seed, slots=3) as bench:

        def work(stream: int) -> None:
            try:
                for _ in range(2):
                    bench.step(stream)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(stream,)) for stream in bench.streams[:2]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


@_scenario(EAGER)
def shared_between_streams(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=1 + seed % 2) as bench:
        first, second, _ = bench.streams
        for unit in bench.names * 2:
            lease = bench.prefetcher.enter(unit, stream=first)
            other = lease.share(second)
            other.wait()
            assert other.slot is lease.slot
            bench.read(lease)
            bench.read(other)
            for each in bench.random.sample([lease, other], 2):
                bench.prefetcher.leave(each)


# ---------------------------------------------------------------------------------------- eager: writes
@_scenario(EAGER)
def host_writes_between_steps(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2 + seed % 2) as bench:
        stream = bench.streams[0]
        for _ in range(4):
            bench.step(stream)
            for unit in bench.random.sample(bench.names, 2):
                bench.update(unit)
        assert bench.ring.stats.invalidations


@_scenario(EAGER)
def host_write_behind_mapped_reader(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=1) as bench:
        first, second, _ = bench.streams
        outer = bench.prefetcher.enter("u0", stream=first)
        bench.use("u1", second)  # finds no slot
        bench.prefetcher.leave(outer)
        bench.update("u1")
        bench.use("u1", first)
        assert bench.ring.stats.mapped_runs == 1


@_scenario(EAGER)
def host_write_behind_device_write(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed) as bench:
        first, second, _ = bench.streams
        bench.write_on(second, bench.slabs["u1"].host_pointer, bench.fresh("u1"))
        bench.ring.changed_on_stream("u1", stream=second)
        bench.update("u1")
        bench.driver.stream_synchronize(second)
        bench.use("u1", first)


@_scenario(EAGER)
def device_writes(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed) as bench:
        first, second, _ = bench.streams
        copied = bench.driver.event_create()
        for _ in range(3):
            bench.step(first)
            unit = bench.random.choice(bench.names)
            # The writer has to come behind those who still copy the old bytes; that order is the caller's.
            bench.driver.event_record(copied, bench.ring.copy_stream)
            bench.driver.stream_wait_event(second, copied)
            bench.truth[unit] = bench.fresh(unit)
            bench.write_on(second, bench.slabs[unit].host_pointer, bench.truth[unit])
            bench.ring.changed_on_stream(unit, stream=second)
            bench.use(unit, first)


@_scenario(EAGER)
def written_in_the_slot_on_another_stream(transfer: ModuleType, seed: int) -> None:
    """Who wrote leaves first; who leaves last brings it home."""
    with workbench(transfer, seed) as bench:
        first, second, third = bench.streams
        for unit in bench.names[:3]:
            writer = bench.ring.prefetch(unit, stream=first)
            writer.wait()
            last = writer.share(second)
            last.wait()
            bench.truth[unit] = bench.fresh(unit)
            bench.write_on(first, writer.slot.device_pointer, bench.truth[unit])
            writer.release()
            last.wait_for_readers()
            slab = bench.slabs[unit]
            bench.driver.copy_async(slab.host_pointer, last.slot.device_pointer, slab.nbytes, second)
            bench.ring.changed_on_stream(unit, stream=second, valid=last.slot)
            last.release()
            bench.use(unit, third)
        for unit in bench.names:  # out of their host bytes again
            bench.use(unit, third)


@_scenario(EAGER)
def device_write_then_mapped_reader(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=1) as bench:
        first, second, third = bench.streams
        bench.truth["u1"] = bench.fresh("u1")
        bench.write_on(second, bench.slabs["u1"].host_pointer, bench.truth["u1"])
        bench.ring.changed_on_stream("u1", stream=second)
        outer = bench.prefetcher.enter("u0", stream=first)
        bench.use("u1", third)  # finds no slot
        bench.prefetcher.leave(outer)
        assert bench.ring.stats.mapped_runs == 1


@_scenario(EAGER)
def written_in_the_slot(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed) as bench:
        first, second, _ = bench.streams
        for unit in bench.names:
            lease = bench.ring.prefetch(unit, stream=first)
            lease.wait()
            bench.truth[unit] = bench.fresh(unit)
            bench.write_on(first, lease.slot.device_pointer, bench.truth[unit])
            slab = bench.slabs[unit]
            bench.driver.copy_async(slab.host_pointer, lease.slot.device_pointer, slab.nbytes, first)
            bench.ring.changed_on_stream(unit, stream=first, valid=lease.slot)
            lease.release()
            hits = bench.ring.stats.hits
            bench.use(unit, second)
            assert bench.ring.stats.hits == hits + 1, "the slot has the new bytes"
        bench.step(second)


# ------------------------------------------------------------------------------------------- eager: ends
def _scribble(bench: Workbench) -> list[bytes]:
    """Write over memory that the ring gave back, as its next owner does."""
    for memory in bench.lent:
        memory[:] = bench.random.randbytes(len(memory))
    return [bytes(memory) for memory in bench.lent]


@_scenario(EAGER)
def closed_with_work_pending(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2, borrowed=True) as bench:
        first, second, _ = bench.streams
        outer = bench.prefetcher.enter("u0", stream=first)
        inner = bench.prefetcher.enter("u1", stream=first)
        bench.use("u2", second)  # finds no slot
        bench.read(outer)
        bench.prefetcher.leave(inner)
        bench.prefetcher.leave(outer)
        bench.ring.close()
        kept = _scribble(bench)
        for unit in bench.names:
            ctypes.memset(bench.slabs[unit].host_pointer, 0xEE, bench.slabs[unit].nbytes)
        bench.settle()
        assert [bytes(memory) for memory in bench.lent] == kept, "a copy came after the end"


@_scenario(EAGER)
def last_readers_that_cannot_be_marked(transfer: ModuleType, seed: int) -> None:
    """A block that is left by an error of the driver has given its slot back, and its readers are done with it."""

    class Faulty(GraphDriver):
        fails = 0

        def event_record(self, event: int, stream: int) -> None:
            if self.fails:
                self.fails -= 1
                raise CudaError("cuEventRecord", 999, "CUDA_ERROR_UNKNOWN")
            super().event_record(event, stream)

    driver = Faulty(adversary=seed)
    with installed(driver):
        bench = Workbench(transfer, driver, seed, slots=1, when_full="error")
        bench.ring._stopwatch.limit = 0
        for index, unit in enumerate(bench.names):
            stream = bench.streams[index % 2]
            lease = bench.ring.prefetch(unit, stream=stream)
            with suppress(CudaError), lease:
                bench.read(lease)
                driver.fails = 2  # it is tried once more
            assert not driver.fails
            with (lease := bench.ring.prefetch(bench.names[index - 1], stream=bench.streams[2])):
                bench.read(lease)
            driver.stream_synchronize(bench.streams[2])  # and of the other stream nothing that nobody waits for
        bench.check()
        bench.ring.close()
        bench.store.close()


@_scenario(EAGER)
def dropped_with_work_pending(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2, borrowed=True) as bench:
        ring = Workbench(transfer, bench.driver, seed + 1, units=3, borrowed=True)
        ring.names.reverse()
        ring.step(bench.streams[0])
        ring.step(bench.streams[1])
        del ring.ring, ring.prefetcher
        gc.collect()
        kept = _scribble(ring)
        bench.step(bench.streams[0])
        bench.settle()
        assert ring.reads
        assert not ring.wrong
        assert [bytes(memory) for memory in ring.lent] == kept, "a copy came after the end"
        ring.store.close()


# --------------------------------------------------------------------------------------- captured graphs
def _captured_step(bench: Workbench, stream: int, units: Sequence[str] | None = None) -> Graph:
    return bench.capture(stream, lambda: bench.step(stream, units))


@_scenario(GRAPHS)
def replay_and_eager_in_turn(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=1 + seed % 3) as bench:
        stream = bench.streams[0]
        bench.step(stream)
        graph = _captured_step(bench, stream)
        assert bench.reads < len(graph.nodes) or not bench.wrong
        for _ in range(2):
            bench.replay(graph, stream)
            bench.step(stream)
            bench.update(bench.random.choice(bench.names))
            bench.replay(graph, stream)
            bench.replay(graph, stream)
        bench.step(stream)
        assert bench.ring.stats.mapped_runs == 0


@_scenario(GRAPHS)
def steps_cut_short(transfer: ModuleType, seed: int) -> None:
    """What was copied ahead for units that then were not entered is under way no longer than the step."""
    with workbench(transfer, seed, slots=2) as bench:
        stream = bench.streams[0]
        bench.step(stream)
        graph = _captured_step(bench, stream, bench.names[:-1])
        copied = bench.driver.event_create()
        for count in (1, 3):
            bench.step(stream, bench.names[:count])
            bench.driver.event_record(copied, bench.ring.copy_stream)
            bench.replay_with(graph, stream, copied)


@_scenario(GRAPHS)
def units_outside_of_steps(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        stream = bench.streams[0]
        graph = _captured_step(bench, stream)
        for unit in bench.names:
            bench.replay(graph, stream)
            bench.use(unit, stream)
            bench.ring.look_ahead(bench.names, stream=stream)
            if bench.random.random() < 0.5:
                bench.ring.prefetch(unit, stream=stream).release()  # entered and left without a look
        bench.replay(graph, stream)


@_scenario(GRAPHS)
def second_capture(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        stream, other, _ = bench.streams
        first = _captured_step(bench, stream)
        bench.replay(first, stream)
        bench.step(stream)
        bench.driver.stream_synchronize(stream)
        second = _captured_step(bench, other, bench.names[::-1])
        done = bench.driver.event_create()
        for graph in (second, first, second):
            bench.replay(graph, stream)
        bench.driver.event_record(done, stream)
        bench.driver.stream_wait_event(other, done)
        bench.step(other)
        bench.update("u1")
        bench.replay(first, other)


@_scenario(GRAPHS)
def captured_without_steps(transfer: ModuleType, seed: int) -> None:
    """Parts of a model are captured, and replayed in the middle of eager steps of the rest."""
    with workbench(transfer, seed, slots=2) as bench:
        stream = bench.streams[0]
        part = bench.names[1:3]

        def record() -> None:
            for unit in part:
                bench.use(unit, stream)

        graph = bench.capture(stream, record)
        for _ in range(2):
            bench.prefetcher.begin_step(stream=stream)
            bench.use("u0", stream)
            bench.replay(graph, stream)
            bench.use("u3", stream)
            bench.use("u4", stream)
            bench.prefetcher.end_step(stream=stream)


@_scenario(GRAPHS)
def captured_raw(transfer: ModuleType, seed: int) -> None:
    """Without steps and without a look at every unit."""
    with workbench(transfer, seed, slots=2) as bench:
        stream = bench.streams[0]

        def record() -> None:
            for unit in bench.names:
                lease = bench.ring.prefetch(unit, stream=stream)
                if unit == "u3":
                    lease.release()
                    continue
                with lease:
                    bench.read(lease)

        graph = bench.capture(stream, record)
        for _ in range(3):
            bench.replay(graph, stream)


@_scenario(GRAPHS)
def captured_on_two_streams(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        first, second, _ = bench.streams
        border = bench.driver.event_create()

        def record() -> None:
            bench.prefetcher.begin_step(stream=first)
            bench.driver.event_record(border, first)
            bench.driver.stream_wait_event(second, border)
            for unit in bench.names:
                lease = bench.prefetcher.enter(unit, stream=first)
                other = lease.share(second)
                other.wait()
                bench.read(lease)
                bench.read(other)
                bench.prefetcher.leave(lease)
                bench.prefetcher.leave(other)
            bench.prefetcher.end_step(stream=first)

        graph = bench.capture(first, record)
        for _ in range(3):
            bench.replay(graph, first)
        bench.step(first)


@_scenario(GRAPHS)
def written_inside_a_capture(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        first, second, _ = bench.streams
        border, slab = bench.driver.event_create(), bench.slabs["u2"]
        content = bench.fresh("u2")

        def record() -> None:
            bench.prefetcher.begin_step(stream=first)
            bench.driver.event_record(border, first)
            bench.driver.stream_wait_event(second, border)
            bench.write_on(second, slab.host_pointer, content)
            bench.ring.changed_on_stream("u2", stream=second)
            for unit in bench.names:
                bench.use(unit, first)
            bench.prefetcher.end_step(stream=first)

        bench.truth["u2"] = content
        graph = bench.capture(first, record)
        bench.replay(graph, first)
        bench.driver.stream_synchronize(first)
        bench.update("u2")
        bench.step(first)
        bench.driver.stream_synchronize(first)
        bench.truth["u2"] = content
        bench.replay(graph, first)
        bench.step(first)


@_scenario(GRAPHS)
def eager_copies_pending_at_a_capture(transfer: ModuleType, seed: int) -> None:
    """They may run whenever they like after that: here between any two nodes of a replay on another stream."""
    with workbench(transfer, seed, slots=2) as bench:
        first, second, third = bench.streams
        bench.step(first, bench.names[:3])
        copied = bench.driver.event_create()
        bench.driver.event_record(copied, bench.ring.copy_stream)
        graph = _captured_step(bench, second, bench.names[::-1])
        bench.replay_with(graph, third, copied)


@_scenario(GRAPHS)
def eager_reader_pending_at_a_capture(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        first, second, third = bench.streams
        bench.use("u0", first)
        graph = _captured_step(bench, second, bench.names[::-1])
        bench.replay(graph, third)
        bench.driver.stream_synchronize(third)


@_scenario(GRAPHS)
def device_write_pending_at_a_capture(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        first, second, third = bench.streams
        bench.truth["u1"] = bench.fresh("u1")
        bench.write_on(first, bench.slabs["u1"].host_pointer, bench.truth["u1"])
        bench.ring.changed_on_stream("u1", stream=first)
        graph = _captured_step(bench, second)
        bench.replay(graph, third)
        bench.driver.stream_synchronize(third)


@_scenario(GRAPHS)
def reader_on_another_stream_before_a_replay(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        first, second, _ = bench.streams
        graph = _captured_step(bench, first, bench.names[::-1])
        bench.prefetcher.begin_step(stream=first)
        lease = bench.prefetcher.enter("u0", stream=first)
        other = lease.share(second)
        other.wait()
        bench.read(other)
        bench.prefetcher.leave(other)
        bench.prefetcher.leave(lease)
        bench.prefetcher.end_step(stream=first)
        bench.replay(graph, first)
        bench.driver.stream_synchronize(first)


@_scenario(GRAPHS)
def leased_around_a_capture(transfer: ModuleType, seed: int) -> None:
    """What is entered around a capture may be entered around its replays: its slot is none of the graph's."""
    with workbench(transfer, seed, slots=3) as bench:
        first, second, _ = bench.streams
        outer = bench.prefetcher.enter("u0", stream=first)
        graph = _captured_step(bench, second, bench.names[::-1])
        bench.replay(graph, first)
        bench.driver.stream_synchronize(first)
        bench.read(outer)
        bench.prefetcher.leave(outer)


@_scenario(GRAPHS)
def host_write_behind_a_replay(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2) as bench:
        stream = bench.streams[0]
        graph = _captured_step(bench, stream)
        for unit in bench.names:
            bench.replay(graph, stream)
            bench.update(unit)


@_scenario(GRAPHS)
def closed_behind_a_replay(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, slots=2, borrowed=True) as bench:
        stream = bench.streams[0]
        graph = _captured_step(bench, stream)
        bench.replay(graph, stream)
        bench.driver.destroy_graphs()
        bench.ring.close()
        _scribble(bench)


class _Anything:
    """Whatever a user may do, in any order. The user's own streams follow each other, as replays demand."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.stream = bench.streams[0]
        self.border = bench.driver.event_create()
        self.graphs: list[Graph] = []

    def act(self) -> None:
        bench = self.bench
        self.hop(bench.random.choice(bench.streams))
        acts = [self.use, self.use, self.step, self.nest, self.update, self.write, self.write_in_slot, self.replay]
        acts += [self.capture] * (len(self.graphs) < 2)
        bench.random.choice(acts)()

    def hop(self, stream: int) -> None:
        self.bench.driver.event_record(self.border, self.stream)
        self.bench.driver.stream_wait_event(stream, self.border)
        self.stream = stream

    def some(self) -> list[str]:
        return self.bench.random.choices(self.bench.names, k=self.bench.random.randrange(1, 6))

    def unit(self) -> str:
        return self.bench.random.choice(self.bench.names)

    def use(self) -> None:
        self.bench.use(self.unit(), self.stream)

    def use_each(self, units: Sequence[str]) -> None:
        for unit in units:
            self.bench.use(unit, self.stream)

    def step(self) -> None:
        self.bench.step(self.stream, self.some())

    def nest(self) -> None:
        leases = [self.bench.prefetcher.enter(unit, stream=self.stream) for unit in self.some()]
        for lease in self.bench.random.sample(leases, len(leases)):
            self.bench.read(lease)
            self.bench.prefetcher.leave(lease)

    def update(self) -> None:
        self.bench.update(self.unit())

    def write(self) -> None:
        bench, unit = self.bench, self.unit()
        copied = bench.driver.event_create()
        bench.driver.event_record(copied, bench.ring.copy_stream)
        bench.driver.stream_wait_event(self.stream, copied)
        bench.truth[unit] = bench.fresh(unit)
        bench.write_on(self.stream, bench.slabs[unit].host_pointer, bench.truth[unit])
        bench.ring.changed_on_stream(unit, stream=self.stream)

    def write_in_slot(self) -> None:
        bench, unit = self.bench, self.unit()
        lease = bench.prefetcher.enter(unit, stream=self.stream)
        slab = bench.slabs[unit]
        assert lease.slot is not None
        bench.truth[unit] = bench.fresh(unit)
        bench.write_on(self.stream, lease.slot.device_pointer, bench.truth[unit])
        bench.driver.copy_async(slab.host_pointer, lease.slot.device_pointer, slab.nbytes, self.stream)
        bench.ring.changed_on_stream(unit, stream=self.stream, valid=lease.slot)
        bench.read(lease)
        bench.prefetcher.leave(lease)

    def capture(self) -> None:
        bench, units = self.bench, self.some()
        if bench.random.random() < 0.7:
            self.graphs.append(_captured_step(bench, self.stream, units))
        else:
            self.graphs.append(bench.capture(self.stream, lambda: self.use_each(units)))

    def replay(self) -> None:
        if self.graphs:
            self.bench.replay(self.bench.random.choice(self.graphs), self.stream)


@_scenario(GRAPHS)
def anything_in_any_order(transfer: ModuleType, seed: int) -> None:
    with workbench(transfer, seed, units=3 + seed % 4, slots=1 + seed % 3) as bench:
        user = _Anything(bench)
        for _ in range(25):
            user.act()
        user.use()


# -------------------------------------------------------------------------------------------------- link
@_scenario(EAGER)
def link_measured(transfer: ModuleType, seed: int) -> None:
    """A copy that takes so long is never measured as quicker than that."""

    class Slow(GraphDriver):
        def copy_async(self, destination: int, source: int, nbytes: int, stream: int) -> None:
            self.enqueue(stream, lambda: time.sleep(0.002))
            super().copy_async(destination, source, nbytes, stream)

    with installed(Slow()) as driver:
        link = transfer.measure_link(driver, nbytes=4096, repeat=3)
    assert 0 < link.host_to_device <= 4096 / 0.002 / 1e9
    assert 0 < link.device_to_host <= 4096 / 0.002 / 1e9
    assert (link.device, link.nbytes) == ("cpu", 4096)
