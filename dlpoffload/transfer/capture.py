"""Timelines: what the slots hold for eager work, and for each graph that is being captured.

A capture records work that runs later, many times. So it assumes nothing of what the slots hold, uses only events
made inside it, has a copy stream of its own that is forked from the capturing stream and joined to it, and leaves
the eager timeline alone. Once a graph exists, its replays write into the slots at times that nobody announces: eager
steps then start from empty slots, behind everything on their stream, and end with no copy under way. Where a graph
was captured of less than a step, replays may lie in the middle of eager steps, and every use of a unit stands alone.

Replays, like whatever else uses the same memory, are the caller's to order against steps and writes on other streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from .. import lifetime
from ..driver import Driver
from .slots import Slot
from .timeline import Timeline

__all__ = ["Horizon", "Timelines"]


class Horizon(Enum):
    """How far ahead copies may be enqueued: not at all, up to the end of the step, or past it."""

    NONE = "none"
    STEP = "step"
    OPEN = "open"


class Timelines:
    """The eager timeline, and one for each capture."""

    def __init__(self, driver: Driver, slots: Sequence[Slot]) -> None:
        self._driver = driver
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
        with self._driver.relaxed():
            # What eager work left under way must not meet the graph's first replay.
            self.eager.drain()
            # A slot that is leased now is in use around the graph, so it is none of the graph's.
            slots = [state.slot for state in self.eager.states if not state.leases]
            timeline = Timeline.make(self._driver, slots, capture=capture)
        try:
            timeline.fork(stream)
        except BaseException:
            timeline.close()
            raise
        self._captures[capture] = timeline
        return timeline

    def entering(self, stream: int) -> Timeline:
        """The timeline for a unit that is entered on `stream` now."""
        timeline = self.of(stream)
        if timeline.capture:
            self._parts_captured |= not timeline.steps
        elif self._horizon(timeline) is Horizon.NONE:
            timeline.fork(stream)
        return timeline

    def horizon(self, stream: int) -> Horizon:
        """How far ahead copies may be enqueued behind `stream`."""
        return self._horizon(self.of(stream))

    def _horizon(self, timeline: Timeline) -> Horizon:
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
            elif self.shared:
                timeline.fork(stream)
        timeline.steps += 1
        self._steps.append((stream, timeline))

    def end_step(self, stream: int) -> None:
        """See `SlotRing.end_step`."""
        if not self._steps:
            return
        # Whoever changed streams in between ends the latest step.
        begun = [index for index, (on, _) in enumerate(self._steps) if on == stream]
        _, timeline = self._steps.pop(begun[-1] if begun else -1)
        timeline.steps -= 1
        try:
            # A capture that broke, or that was ended before its step, has nothing left to join.
            if self.shared and self._driver.capture_id(stream) == timeline.capture:
                timeline.join(stream)
        finally:
            if not timeline.steps:
                timeline.pause.close()

    def drain(self) -> None:
        """Block until no copy and no reader is under way, those of replays included."""
        if self.shared:
            self._driver.synchronize()  # replays leave no event behind
        else:
            self.eager.drain()

    def drain_unit(self, unit: str) -> None:
        """Block until nothing enqueued reads or writes the unit's host bytes, replays included."""
        if self.shared:
            self._driver.synchronize()
        else:
            self.eager.drain_unit(unit)

    def close(self) -> None:
        """Destroy every event and stream."""
        for timeline in self.all():
            timeline.close()
