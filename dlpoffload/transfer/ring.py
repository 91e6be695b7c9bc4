"""`SlotRing`: a fixed ring of device slots, filled from host slabs, ordered by events.

Two orders make it right. A copy into a slot waits for the slot's last reader on every stream. A reader waits for the
copy. Both are waits of streams; the host never blocks in a step. What a slot holds is state, never derived from a
counter: a unit that is skipped, repeated, reordered or that raises costs at most a late copy.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

from ..closing import Closing
from ..driver import Driver, open_driver
from ..errors import ClosedError, CudaError, SlotError, SpecError
from ..memory import DeviceBuffer
from ..rollback import rolled_back
from ..slab import Slab
from ..spec import ALIGNMENT, aligned, format_nbytes
from .capture import Horizon, Timelines, dispose, end
from .inherited import at_the_end
from .lease import Lease, StreamLike, leased, stream_handle
from .slots import Slot, SlotState, check_device, close_slots, make_slots, no_free_slot
from .stats import Stopwatch, TransferStats
from .timeline import Timeline

__all__ = ["SlotRing"]

Expected = Callable[[Horizon], Sequence[str]]


class SlotRing(Closing):
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
        What a unit does that finds every slot leased: "map" runs it from its mapped view (counted in `mapped_runs`),
        "error" raises `SlotError`. In read-only memory (a mapped file) it runs by "map_read_only" alone: no write then.

    Raises
    ------
    SlotError
        No units, fewer than one slot, a slab that is pinned for another kind of device, or a slot from `allocate` that
        is too small or on another device.
    SpecError
        `when_full` is none of them.
    DeviceMemoryError
        The device has no room; no slot stays allocated.
    """

    _called = "the ring"

    def __init__(
        self,
        slabs: Mapping[str, Slab],
        *,
        slots: int = 2,
        device: str | int | None = None,
        allocate: Callable[[int], DeviceBuffer] | None = None,
        when_full: Literal["map", "map_read_only", "error"] = "map",
    ) -> None:
        if not slabs:
            raise SlotError("a slot ring needs at least one unit to stage")
        if slots < 1:
            raise SlotError(f"slots={slots}; a ring needs at least one slot, and two to overlap copies with compute")
        if when_full not in ("map", "map_read_only", "error"):
            raise SpecError(f'when_full={when_full!r}; it is "map", "map_read_only" or "error"')
        self.driver: Driver = open_driver(device)
        self.slabs = dict(slabs)
        for unit, slab in self.slabs.items():
            check_device(f'the slab of unit "{unit}"', slab.buffer.device.partition(":")[0], self.driver.platform)
        # Units of empty tensors only need an address all the same.
        self.slot_nbytes = aligned(max(1, *(slab.nbytes for slab in slabs.values())), ALIGNMENT)
        self.stats = TransferStats()
        # Without mapped memory there is nothing to run from but a slot.
        mapped = self.driver.capabilities().map_host_memory and all(s.buffer.pinned for s in self.slabs.values())
        self.when_full = when_full if mapped else "error"
        self._lock = threading.RLock()
        self._uses = itertools.count(1)
        self._closed = False
        self.unleft: CudaError | None = None  # why a lease stays open that nobody has any more
        with rolled_back() as undo:
            self.slots = make_slots(slots, self.slot_nbytes, self.driver.device, allocate)
            undo.append(partial(close_slots, self.slots))
            with self.driver.current():
                self._stopwatch = Stopwatch(self.driver)
                self._timelines = Timelines(self.driver, self.slots, self.slabs)
                undo.append(self._timelines.close)
        # Dropped without close: the timelines keep the slots until their copies and readers have ended.
        self._dispose = at_the_end(self, dispose, self.driver, self._stopwatch, self._timelines)

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
        self, unit: str, *, stream: int | StreamLike = 0, keep: Sequence[str] = (), foreseen: bool = True
    ) -> Lease:
        """Enqueue the copy of a unit into a slot, unless one holds it, and lease that slot.

        *Aliasing*: the lease's views alias the slot. *Ordering*: asynchronous; the copy waits for the slot's last
        readers, `Lease.wait` makes `stream` wait for the copy.

        Parameters
        ----------
        stream
            The compute stream that will read the unit.
        keep
            Units whose slots should be taken last, because they are needed soon, in this order.
        foreseen
            False counts the copy as late.

        Raises
        ------
        SlotError
            The unit is unknown, or every slot is leased and the ring was made with ``when_full="error"``.
        """
        handle = stream_handle(stream)

        def prefetch() -> Lease:
            slab = self._slab(unit)
            return self._prefetch(self._timelines.entering(handle), handle, unit, slab, keep, foreseen)

        return leased(self, prefetch)

    def enter(self, unit: str, expected: Expected, *, stream: int | StreamLike = 0) -> Lease:
        """Prefetch a unit that nobody foresaw unless a slot holds it, then look ahead: both in one go.

        `expected` gives the units that follow it, as far as the horizon allows.
        """
        handle = stream_handle(stream)

        def enter() -> Lease:
            slab = self._slab(unit)
            timeline = self._timelines.entering(handle)
            ahead = expected(self._timelines.horizon_of(timeline))
            lease = self._prefetch(timeline, handle, unit, slab, ahead, False)
            try:
                self._look_ahead(timeline, ahead[: len(self.slots) - 1])
            except BaseException:
                lease.abandon()
                raise
            return lease

        return leased(self, enter)

    def _prefetch(
        self, timeline: Timeline, stream: int, unit: str, slab: Slab, keep: Sequence[str], foreseen: bool
    ) -> Lease:
        state = timeline.holding(unit)
        if state is not None:
            self.stats.hits += 1
        else:
            state = timeline.free_slot(keep)
            if state is not None:
                self._copy(timeline, state, unit, slab)
                self.stats.late_copies += not foreseen
            elif self.when_full == "error" or (self.when_full == "map" and slab.read_only):
                raise no_free_slot(unit, self.slots, self.slot_nbytes, self.when_full)
            else:
                self.stats.mapped_runs += 1
        if state is not None:
            state.last_use = next(self._uses)
        return Lease(self, unit, stream, timeline, state)

    def host_lease(self, unit: str, *, stream: int | StreamLike = 0) -> Lease:
        """Lease a unit's host bytes themselves, without a slot: for a copy of one's own out of them.

        *Ordering*: `Lease.wait` makes `stream` wait for the device's writes of these bytes; a host write waits for what
        is enqueued on `stream` until `Lease.release`.
        """
        handle = stream_handle(stream)

        def lease() -> Lease:
            self._slab(unit)
            return Lease(self, unit, handle, self._timelines.entering(handle), None)

        return leased(self, lease)

    def look_ahead(self, units: Sequence[str] | Expected, *, stream: int | StreamLike = 0) -> None:
        """Prefetch units that are needed next, in this order, into slots that are free; leases nothing.

        Stops at the first unit that finds no slot: none is taken from a unit needed sooner. Does nothing where
        `horizon` is none: a copy that nobody waits for would meet the replay of a graph.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            self._check_open()
            timeline = self._timelines.of(handle)
            horizon = self._timelines.horizon_of(timeline)
            if horizon is not Horizon.NONE:
                self._look_ahead(timeline, units(horizon) if callable(units) else units)

    def _look_ahead(self, timeline: Timeline, units: Sequence[str]) -> None:
        for unit in units:
            if timeline.holding(unit) is None:
                state = timeline.free_slot(units, spare_kept=True)
                if state is None:
                    return
                self._copy(timeline, state, unit, self._slab(unit))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this slot ring is closed; make a new one")

    def _slab(self, unit: str) -> Slab:
        self._check_open()
        slab = self.slabs.get(unit)
        if slab is None:
            raise SlotError(f'no unit "{unit}" in this ring; it stages {", ".join(map(repr, list(self.slabs)[:8]))}')
        return slab

    def _copy(self, timeline: Timeline, state: SlotState, unit: str, slab: Slab) -> None:
        copies = slab.copies()  # first: a file that was written to is refused before anything is enqueued
        timeline.copy(state, unit, copies, self._timed(timeline, timeline.copy_stream, slab.nbytes))
        state.last_use = next(self._uses)
        self.stats.copies += 1
        self.stats.copied_nbytes += sum([copy.nbytes for copy in copies])

    def _timed(self, timeline: Timeline, stream: int, nbytes: int | None) -> AbstractContextManager[None]:
        return nullcontext() if timeline.capture else self._stopwatch.timed(stream, nbytes)

    # ---------------------------------------------------------------------------------------------- steps
    def begin_step(self, *, stream: int | StreamLike = 0) -> None:
        """Say that a step begins on `stream`. Only after a graph was captured does it change anything.

        *Ordering*: once a graph may replay into the slots, a step trusts nothing that they hold, and its copies wait
        for what `stream` has enqueued before, replays included. No graph that was captured of whole steps may be
        replayed before the step's end. One that was captured of units without a step may, and costs all eager steps
        their look-ahead.
        """
        handle = stream_handle(stream)
        with self._lock, rolled_back() as undo, self.driver.current():
            self._check_open()
            self._timelines.begin_step(handle)
            undo.append(lambda: self._timelines.end_step(handle, join=False))

    def end_step(self, *, stream: int | StreamLike = 0) -> None:
        """Say that a step ends on `stream`.

        *Ordering*: inside a capture, and in eager steps after one, `stream` waits for every copy enqueued so far and
        for the slots' readers on other streams: a capture must join the copy stream, a replay must meet neither.
        """
        handle = stream_handle(stream)
        with self._lock, self.driver.current():
            if self._closed:
                return
            self._timelines.end_step(handle)
            if len(self._stopwatch.pending) > self._stopwatch.limit // 2 and not self.driver.capture_id(handle):
                with self.driver.relaxed():
                    self._stopwatch.read(self.stats)

    def horizon(self, *, stream: int | StreamLike = 0) -> Horizon:
        """How far ahead copies may be enqueued behind `stream`: captures and steps beside graphs end where they end."""
        with self._lock, self.driver.current():
            return self._timelines.horizon_of(self._timelines.of(stream_handle(stream)))

    # -------------------------------------------------------------------------------------------- changes
    def before_host_write(self, unit: str) -> None:
        """Wait on the host until no enqueued work reads or writes the unit's host bytes any more.

        Raises
        ------
        SlotError
            No such unit, or it runs from its mapped view: its work cannot be waited for before it is left.
        """
        with self._lock, self.driver.current(), self.driver.relaxed():
            self._slab(unit)
            if any(timeline.mapped_leases[unit] for timeline in self._timelines.all()):
                raise SlotError(f'unit "{unit}" runs from its mapped view; leave it before its host bytes are written')
            self.stats.host_waits += 1
            self._timelines.drain_unit(unit)

    def changed(self, unit: str) -> None:
        """Say that the host wrote the unit's bytes: no slot holds the unit any more."""
        with self._lock:
            self._slab(unit)
            self._forget(unit, None)

    def changed_on_stream(self, unit: str, *, stream: int | StreamLike = 0, valid: Slot | None = None) -> None:
        """Say that work enqueued on `stream` writes the unit's host bytes.

        *Ordering*: copies enqueued from now on out of the slab, and units that run from it, wait for that work; replays
        of graphs do not. Readers enqueued before, from the slab or from a slot leased then, are the caller's to order.

        Parameters
        ----------
        valid
            The slot that has the new bytes itself, written by work on `stream`. Its readers wait for that work, too.
        """
        handle = stream_handle(stream)
        with self._lock, rolled_back() as undo, self.driver.current():
            self._slab(unit)
            undo.append(partial(self._forget, unit, None))  # written it is all the same
            timeline = self._timelines.of(handle)
            kept = next((s for s in timeline.states if s.slot is valid and s.holds == unit), None)
            self._forget(unit, kept)
            timeline.events.mark(timeline.written.setdefault(unit, {}), handle)
            if kept is not None:
                self.driver.event_record(kept.ready, handle)

    def _forget(self, unit: str, kept: SlotState | None) -> None:
        for state in self._states():
            if state.holds == unit and state is not kept:
                state.holds = None
                self.stats.invalidations += 1

    def _states(self) -> list[SlotState]:
        return [state for timeline in self._timelines.all() for state in timeline.states]

    # ---------------------------------------------------------------------------------------------- close
    def check_uncaptured(self, what: str) -> None:
        """Refuse what captured graphs would break by, naming them.

        Raises
        ------
        SlotError
            Graphs that were captured through this ring can still be replayed.
        """
        with self._lock, self.driver.current(), self.driver.relaxed():
            self._timelines.check_uncaptured(what)

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
            A unit is entered and not left, or a captured graph can still be replayed.
        ClosedError
            Views of slots are alive.
        CudaError
            Work that uses the slots failed.

        After any of them nothing is freed, and the ring stays open.
        """
        if self.closed:  # as it is in a forked child, which must not call the driver
            return
        with self._lock, self.driver.current(), self.driver.relaxed():
            if self._closed:
                return
            leased = sum(timeline.leases for timeline in self._timelines.all())
            if leased:
                if self.unleft is not None:
                    raise SlotError(f"{leased} leases are open and cannot be left: {self.unleft}") from self.unleft
                raise SlotError(f"{leased} leases are open; leave their units before the ring is closed")
            views = sum(slot.buffer.live_views for slot in self.slots)
            if views:
                raise ClosedError(f"{views} live views of slots; drop them before the ring is closed")
            self.check_uncaptured("closed")
            self.stats.host_waits += 1
            self._timelines.eager.drain()
            self._stopwatch.read(self.stats)
            self._closed = True
            self._dispose.detach()
            try:
                end(self._stopwatch, self._timelines)
            finally:
                close_slots(self.slots)

    def __repr__(self) -> str:
        return f"<SlotRing of {len(self.slots)} slots of {format_nbytes(self.slot_nbytes)} on {self.driver.device}>"
