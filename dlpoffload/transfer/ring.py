"""`SlotRing`: a fixed ring of device slots, filled from host slabs, ordered by events.

Two orders make it right. A copy into a slot waits for the slot's last reader on every stream. A reader waits for the
copy. Both are waits of streams; the host never blocks in a step. What a slot holds is state, never derived from a
counter: a unit that is skipped, repeated, reordered or that raises costs at most a late copy.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Literal, Protocol

from ..driver import Driver, open_driver
from ..errors import ClosedError, SlotError
from ..memory import DeviceBuffer
from ..slab import Slab
from ..spec import ALIGNMENT, aligned, format_nbytes
from ..view import View
from .capture import Horizon, Timeline, Timelines
from .slots import Slot, SlotState
from .stats import Stopwatch, TransferStats

__all__ = ["Lease", "SlotRing", "StreamLike", "stream_handle"]


class StreamLike(Protocol):
    """An object with ``__cuda_stream__``, such as cuda.core's streams: returns (version, handle)."""

    def __cuda_stream__(self) -> tuple[int, int]: ...


def stream_handle(stream: int | StreamLike) -> int:
    """The handle of a stream given as an int or as an object with ``__cuda_stream__``."""
    if isinstance(stream, int):
        return stream
    _version, handle = stream.__cuda_stream__()
    return int(handle)


class Lease:
    """A unit's hold on a slot, from `SlotRing.prefetch` until `release`.

    As a context manager it gives the views of the unit's tensors: entering makes the stream wait for the copy,
    leaving marks the slot's last reader.

    Attributes
    ----------
    unit : str
    slot : Slot or None
        None when no slot was free: the unit then runs from its mapped views.
    """

    __slots__ = ("_released", "_ring", "_state", "_timeline", "slot", "stream", "unit")

    def __init__(self, ring: SlotRing, unit: str, stream: int, timeline: Timeline, state: SlotState | None) -> None:
        self._ring = ring
        self._timeline = timeline
        self._state = state
        self._released = False
        self.unit = unit
        self.stream = stream
        self.slot = None if state is None else state.slot

    def wait(self) -> None:
        """Make the lease's stream wait for the unit's copy. Asynchronous, except on the CPU driver's stream 0."""
        self._ring._wait(self)

    def share(self, stream: int | StreamLike) -> Lease:
        """Lease the same slot once more, for another reader of the unit on `stream`."""
        return self._ring._share(self, stream_handle(stream))

    def release(self) -> None:
        """Mark what is enqueued on the lease's stream so far as the slot's last reader there. Idempotent."""
        if not self._released:
            self._released = True
            self._ring._release(self)

    @property
    def views(self) -> dict[str, View]:
        """View the unit's tensors in the slot, or mapped from the host where there was none.

        *Lifetime*: the views are good until `release`; afterwards the slot's bytes become another unit's.
        """
        slab = self._ring.slabs[self.unit]
        if self.slot is None:
            return {name: slab.device_view(name) for name in slab.specs}
        buffer = self.slot.buffer
        return {
            name: buffer.device_view(
                spec.shape, spec.dtype, strides=spec.strides, byte_offset=slab.byte_offsets[name]
            )
            for name, spec in slab.specs.items()
        }

    def __enter__(self) -> dict[str, View]:
        self.wait()
        return self.views

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _dispose(driver: Driver, stopwatch: Stopwatch, timelines: Timelines) -> None:
    with driver.current(), driver.relaxed():
        timelines.drain()
        stopwatch.close()
        timelines.close()


class SlotRing:
    """A ring of device slots that units are staged in.

    Parameters
    ----------
    slabs
        The host bytes of each unit, by name.
    slots
        How many slots: two overlap copies with compute.
    device
        For which device; the first CUDA device by default, or the CPU driver where there is none.
    allocate
        Allocates one slot of so many bytes: a framework's own allocator, so that its accounting stays true.
    when_full
        What a unit does that finds every slot leased: "map" runs it from its mapped view (counted in
        `stats.mapped_runs`), "error" raises `SlotError`.

    Raises
    ------
    SlotError
        No units, or fewer than one slot.
    DeviceMemoryError
        The device has no room; no slot stays allocated.
    """

    def __init__(
        self,
        slabs: Mapping[str, Slab],
        *,
        slots: int = 2,
        device: str | int | None = None,
        allocate: Callable[[int], DeviceBuffer] | None = None,
        when_full: Literal["map", "error"] = "map",
    ) -> None:
        if not slabs:
            raise SlotError("a slot ring needs at least one unit to stage")
        if slots < 1:
            raise SlotError(f"slots={slots}; a ring needs at least one slot, and two to overlap copies with compute")
        self.driver: Driver = open_driver(device)
        self.slabs = dict(slabs)
        self.slot_nbytes = aligned(max(slab.nbytes for slab in slabs.values()), ALIGNMENT)
        self.stats = TransferStats()
        # Without mapped memory there is nothing to run from but a slot.
        self.when_full = when_full if self.driver.capabilities().map_host_memory else "error"
        self._lock = threading.RLock()
        self._uses = itertools.count(1)
        self._closed = False
        if allocate is None:

            def allocate(nbytes: int) -> DeviceBuffer:
                return DeviceBuffer.allocate(nbytes, device=self.driver.device)

        self.slots: list[Slot] = []
        try:
            for index in range(slots):
                self.slots.append(Slot(index, allocate(self.slot_nbytes)))
            with self.driver.current():
                self._stopwatch = Stopwatch(self.driver)
                self._timelines = Timelines(self.driver, self.slots)
        except BaseException:
            for slot in reversed(self.slots):
                slot.buffer.close()
            raise
        # Dropped without close: the timelines keep the slots until their copies and readers have ended, in whatever
        # order the garbage goes. At exit the process frees everything.
        self._dispose = weakref.finalize(self, _dispose, self.driver, self._stopwatch, self._timelines)
        self._dispose.atexit = False

    @property
    def copy_stream(self) -> int:
        """The stream that eager copies are enqueued on."""
        return self._timelines.eager.copy_stream

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    # --------------------------------------------------------------------------------------- enter, leave
    def prefetch(
        self, unit: str, *, stream: int | StreamLike = 0, keep: Collection[str] = (), foreseen: bool = True
    ) -> Lease:
        """Enqueue the copy of a unit into a slot, unless one holds it, and lease that slot.

        *Aliasing*: the lease's views alias the slot. *Ordering*: asynchronous; the copy waits for the slot's last
        readers, `Lease.wait` makes `stream` wait for the copy.

        Parameters
        ----------
        stream
            The compute stream that will read the unit.
        keep
            Units whose slots should be taken last, because they are needed soon.
        foreseen
            False counts the copy as late.

        Raises
        ------
        SlotError
            The unit is unknown, or every slot is leased and the ring was made with ``when_full="error"``.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            slab = self._slab(unit)
            timeline = self._timelines.entering(handle)
            state = timeline.holding(unit)
            if state is not None:
                self.stats.hits += 1
            else:
                state = timeline.free_slot(keep)
                if state is not None:
                    self._copy(timeline, state, unit, slab)
                    self.stats.late_copies += not foreseen
                elif self.when_full == "error":
                    raise SlotError(
                        f'unit "{unit}" finds all {len(self.slots)} slots leased; '
                        f"leave a unit first, or make the ring with more slots ({self.slot_nbytes} bytes each)"
                    )
                else:
                    self.stats.mapped_runs += 1
            if state is not None:
                state.leases += 1
                state.last_use = next(self._uses)
            return Lease(self, unit, handle, timeline, state)

    def look_ahead(self, units: list[str], *, stream: int | StreamLike = 0) -> None:
        """Prefetch units that are needed next, in this order, into slots that are free; leases nothing.

        Stops at the first unit that finds no slot: none is taken from a unit needed sooner.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            timeline = self._timelines.of(handle)
            for unit in units:
                if timeline.holding(unit) is None:
                    state = timeline.free_slot(units, spare_kept=True)
                    if state is None:
                        return
                    self._copy(timeline, state, unit, self._slab(unit))

    def _share(self, lease: Lease, stream: int) -> Lease:
        with self._lock:
            if lease._released:
                raise SlotError(f'the lease of unit "{lease.unit}" is released; prefetch the unit again')
            if lease._state is not None:
                lease._state.leases += 1
            return Lease(self, lease.unit, stream, lease._timeline, lease._state)

    def _slab(self, unit: str) -> Slab:
        if self._closed:
            raise ClosedError("this slot ring is closed; make a new one")
        slab = self.slabs.get(unit)
        if slab is None:
            raise SlotError(f'no unit "{unit}" in this ring; it stages {", ".join(map(repr, list(self.slabs)[:8]))}')
        return slab

    def _copy(self, timeline: Timeline, state: SlotState, unit: str, slab: Slab) -> None:
        driver, copy_stream = self.driver, timeline.copy_stream
        state.holds = None  # should a call below fail, the slot holds nothing
        for event in state.readers.values():
            driver.stream_wait_event(copy_stream, event)
        for event in timeline.written.get(unit, {}).values():
            driver.stream_wait_event(copy_stream, event)
        start = None if timeline.captured else self._stopwatch.start(copy_stream)
        driver.copy_async(state.slot.device_pointer, slab.host_pointer, slab.nbytes, copy_stream)
        self._stopwatch.stop(start, copy_stream, slab.nbytes)
        driver.event_record(state.ready, copy_stream)
        state.holds = unit
        self.stats.copies += 1
        self.stats.copied_nbytes += slab.nbytes

    def _wait(self, lease: Lease) -> None:
        state = lease._state
        if state is None:
            return
        with self._lock, self.driver.current():
            start = None if lease._timeline.captured else self._stopwatch.start(lease.stream)
            self.driver.stream_wait_event(lease.stream, state.ready)
            self._stopwatch.stop(start, lease.stream, None)

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if self._closed:
                return
            with self.driver.current():
                state, timeline = lease._state, lease._timeline
                if state is None:
                    readers = timeline.mapped_readers.setdefault(lease.unit, {})
                else:
                    readers = state.readers
                    state.leases -= 1
                timeline.mark(readers, lease.stream)

    # ---------------------------------------------------------------------------------------------- steps
    def begin_step(self, *, stream: int | StreamLike = 0) -> None:
        """Say that a step begins on `stream`. Only after a graph was captured does it change anything.

        *Ordering*: once a graph may replay into the slots, a step trusts nothing that they hold, and its copies wait
        for what `stream` has enqueued before, replays included.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            self._timelines.begin_step(handle)

    def end_step(self, *, stream: int | StreamLike = 0) -> None:
        """Say that a step ends on `stream`.

        *Ordering*: inside a capture, and in eager steps after one, `stream` waits for every copy enqueued so far: a
        capture must join the copy stream, and a replay must not meet a copy under way.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            self._timelines.end_step(handle)
            if len(self._stopwatch.pending) > self._stopwatch.limit // 2 and not self.driver.capture_id(handle):
                with self.driver.relaxed():
                    self._stopwatch.read(self.stats)

    def horizon(self, *, stream: int | StreamLike = 0) -> Horizon:
        """How far ahead copies may be enqueued behind `stream`: captures and steps beside graphs end where they end."""
        with self._lock, self.driver.current():
            return self._timelines.horizon(stream_handle(stream))

    # -------------------------------------------------------------------------------------------- changes
    def before_host_write(self, unit: str) -> None:
        """Wait on the host until no enqueued work reads or writes the unit's host bytes any more."""
        with self._lock, self.driver.current():
            self._slab(unit)
            self.stats.host_waits += 1
            if self._timelines.shared:
                self.driver.synchronize()  # replays read the slab too, and leave no event behind
                return
            eager = self._timelines.eager
            self.driver.stream_synchronize(eager.copy_stream)
            for readers_or_writers in (eager.mapped_readers, eager.written):
                for event in readers_or_writers.get(unit, {}).values():
                    self.driver.event_synchronize(event)

    def changed(self, unit: str) -> None:
        """Say that the host wrote the unit's bytes: no slot holds the unit any more."""
        with self._lock:
            self._slab(unit)
            self._forget(unit, None)

    def changed_on_stream(self, unit: str, *, stream: int | StreamLike = 0, valid: Slot | None = None) -> None:
        """Say that work enqueued on `stream` writes the unit's host bytes.

        *Ordering*: copies enqueued from now on out of the slab wait for that work. `valid` names the slot that has
        the new bytes itself.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            self._slab(unit)
            timeline = self._timelines.of(handle)
            timeline.mark(timeline.written.setdefault(unit, {}), handle)
            self._forget(unit, valid)

    def _forget(self, unit: str, valid: Slot | None) -> None:
        for state in self._states():
            if state.holds == unit and state.slot is not valid:
                state.holds = None
                self.stats.invalidations += 1

    def _states(self) -> list[SlotState]:
        return [state for timeline in self._timelines.all() for state in timeline.states]

    # ---------------------------------------------------------------------------------------------- close
    def read_stats(self) -> TransferStats:
        """The counters, with the times of everything that has passed by now."""
        with self._lock, self.driver.current(), self.driver.relaxed():
            if not self._closed:
                self._stopwatch.read(self.stats)
            return self.stats

    def close(self) -> None:
        """Free the slots, after their last readers and copies. Idempotent.

        Raises
        ------
        SlotError
            A slot is leased; nothing is freed.
        """
        with self._lock, self.driver.current():
            if self._closed:
                return
            leased = sum(state.leases for state in self._states())
            if leased:
                raise SlotError(f"{leased} leases are open; leave their units before the ring is closed")
            views = sum(slot.buffer.live_views for slot in self.slots)
            if views:
                raise ClosedError(f"{views} live views of slots; drop them before the ring is closed")
            self.stats.host_waits += 1
            self._timelines.drain()
            self._stopwatch.read(self.stats)
            self._closed = True
            self._dispose()
            for slot in self.slots:
                slot.buffer.close()

    def __enter__(self) -> SlotRing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (SlotError, ClosedError) as refused:
            if error is None:
                raise
            error.add_note(f"while leaving the ring: {refused}")

    def __repr__(self) -> str:
        return f"<SlotRing of {len(self.slots)} slots of {format_nbytes(self.slot_nbytes)} on {self.driver.device}>"
