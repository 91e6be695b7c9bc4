"""Timelines: what the slots hold for eager work, and for each graph that is being captured.

A capture records work that runs later, many times. So it assumes nothing of what the slots hold, uses only events
made inside it, has a copy stream of its own that is forked from the capturing stream and joined to it, and leaves
the eager timeline alone. While a graph exists, its replays write into the slots at times that nobody announces: eager
steps then start from empty slots, behind everything on their stream, and end with no copy under way. Where a graph
was captured of less than a step, replays may lie in the middle of eager steps, and every use of a unit stands alone.
The graph keeps the memory that it uses, and counts: once it cannot be replayed any more, eager steps are free again.

Replays, like whatever else uses the same memory, are the caller's to order against steps and writes on other streams.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from typing import Final

from .. import lifetime
from ..driver import Driver
from ..errors import CudaError, SlotError
from ..rollback import rolled_back
from ..slab import Slab
from .slots import Slot
from .stats import Stopwatch
from .timeline import Timeline

__all__ = ["Horizon", "Timelines", "dispose", "end"]


_GRAPH_END_S: Final = 0.1


class Horizon(Enum):
    """How far ahead copies may be enqueued: not at all, up to the end of the step, or past it."""

    NONE = "none"
    STEP = "step"
    OPEN = "open"


class Timelines:
    """The eager timeline, and one for each capture."""

    def __init__(self, driver: Driver, slots: Sequence[Slot], slabs: Mapping[str, Slab]) -> None:
        self._driver = driver
        self._slabs = slabs
        self._slots = [slot.buffer for slot in slots]
        self._captures: dict[int, Timeline] = {}
        self._steps: list[tuple[int, Timeline]] = []  # begun and not ended, and on which stream
        self._parts_captured = False
        self.eager = Timeline.make(driver, slots)

    @property
    def shared(self) -> bool:
        """Whether a graph may write into the slots."""
        return bool(self._captures)

    def all(self) -> Iterator[Timeline]:
        """Every timeline."""
        yield self.eager
        yield from self._captures.values()

    def of(self, stream: int) -> Timeline:
        """The timeline that `stream` is in now."""
        capture = self._driver.capture_id(stream)
        if not capture:
            return self.eager
        timeline = self._captures.get(capture)
        return self._captured(capture, stream) if timeline is None else timeline

    def _captured(self, capture: int, stream: int) -> Timeline:
        """A timeline for a capture that is met for the first time."""
        with rolled_back() as undo:
            with self._driver.relaxed():
                # What eager work left under way must not meet the graph's first replay.
                self.eager.drain()
                # A slot that is leased now is in use around the graph, so it is none of the graph's.
                slots = [state.slot for state in self.eager.states if not state.leases]
                timeline = Timeline.make(self._driver, slots, capture=capture)
                undo.append(timeline.close)
            timeline.replayable = self._held(stream)
            timeline.fork(stream)
        self._captures[capture] = timeline
        return timeline

    def _held(self, stream: int) -> lifetime.Owner:
        """Let the graph that is captured keep the memory that it will use; counts who can replay it."""
        # What a replay reads and writes.
        kept = [*self._slots, *(buffer for slab in self._slabs.values() for buffer in slab.buffers)]
        owner = lifetime.own("graph", 0, kept.clear)
        argument, function = owner.lend()
        try:
            self._driver.capture_hold(stream, argument, function)
        except BaseException:
            owner.take_back()
            raise
        finally:
            owner.release()
        for slab in self._slabs.values():
            slab.captured(owner)
        return owner

    def replayable(self) -> list[Timeline]:
        """Those of the captures that can still be replayed; the others are forgotten.

        What the slots hold is trusted no more where one was forgotten: it may have been replayed last.
        """
        for capture, timeline in list(self._captures.items()):
            if timeline.replayable is not None and not timeline.replayable.users and not timeline.leases:
                del self._captures[capture]
                timeline.close()
                self.eager.forget()
        self._parts_captured &= self.shared
        return list(self._captures.values())

    def entering(self, stream: int) -> Timeline:
        """The timeline for a unit that is entered on `stream` now."""
        timeline = self.of(stream)
        if timeline.capture:
            self._parts_captured |= not timeline.steps
        elif self.horizon_of(timeline) is Horizon.NONE:
            timeline.fork(stream)
        return timeline

    def horizon_of(self, timeline: Timeline) -> Horizon:
        """How far ahead copies may be enqueued."""
        if not timeline.capture:
            if not self.shared:
                return Horizon.OPEN
            if self._parts_captured:
                return Horizon.NONE
        return Horizon.STEP if timeline.steps else Horizon.NONE

    def begin_step(self, stream: int) -> None:
        """See `SlotRing.begin_step`."""
        timeline = self.of(stream)
        if not timeline.steps:
            if timeline.capture:
                timeline.pause.enter_context(lifetime.paused())
            elif self.shared and self.replayable():
                timeline.fork(stream)
        timeline.steps += 1
        self._steps.append((stream, timeline))

    def end_step(self, stream: int, *, join: bool = True) -> None:
        """See `SlotRing.end_step`; without `join` it is as if the step had not begun."""
        if not self._steps:
            return
        # Whoever changed streams in between ends the latest step.
        begun = [index for index, (on, _) in enumerate(self._steps) if on == stream]
        _, timeline = self._steps.pop(begun[-1] if begun else -1)
        timeline.steps -= 1
        try:
            # A capture that broke, or that was ended before its step, has nothing left to join.
            if join and self.shared and self._driver.capture_id(stream) == timeline.capture:
                timeline.join(stream)
        finally:
            if not timeline.steps:
                timeline.pause.close()

    def replayable_now(self) -> list[Timeline]:
        """As `replayable`, after waiting for replays: a graph that was dropped ends with the last of them."""
        if self.replayable():
            self._driver.synchronize()
            deadline = time.monotonic() + _GRAPH_END_S
            while self.replayable() and time.monotonic() < deadline:
                time.sleep(0.001)  # the driver ends it on a thread of its own
        return list(self._captures.values())

    def check_uncaptured(self, what: str) -> None:
        """See `SlotRing.check_uncaptured`."""
        if alive := self.replayable_now():
            raise SlotError(
                f"{len(alive)} captured graphs can still be replayed into this ring's slots, so it cannot be "
                f"{what}: {', '.join(map(str, alive))}; drop them first (del graph), and capture again afterwards"
            )

    def drain_unit(self, unit: str) -> None:
        """Block until nothing enqueued reads or writes the unit's host bytes, replays included."""
        if self.shared:
            self._driver.synchronize()  # replays leave no event behind
        else:
            self.eager.drain_unit(unit)

    def close(self) -> None:
        """Destroy every event and stream."""
        with ExitStack() as closing:
            for timeline in self.all():
                closing.callback(timeline.close)


def dispose(driver: Driver, stopwatch: Stopwatch, timelines: Timelines) -> None:
    """End a ring that was dropped: after its copies and readers, destroy events and streams."""
    with suppress(CudaError), driver.relaxed():  # work that failed has ended, too; `close` is where one hears of it
        timelines.eager.drain()
    end(stopwatch, timelines)


def end(stopwatch: Stopwatch, timelines: Timelines) -> None:
    """Destroy the events and streams of a ring, all of them, whichever the driver refuses."""
    with ExitStack() as closing:
        closing.callback(timelines.close)
        closing.callback(stopwatch.close)
