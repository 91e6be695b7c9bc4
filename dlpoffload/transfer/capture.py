"""Timelines: what the slots hold for eager work, and for each graph that is being captured.

A capture records work that runs later, many times. So it assumes nothing of what the slots hold, uses only events
made inside it, has a copy stream of its own that is forked from the capturing stream and joined to it, and leaves
the eager timeline alone. Once a graph exists, its replays write into the slots at times that nobody announces: eager
steps then start from empty slots, behind everything on their stream, and end with no copy under way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum

from .. import lifetime
from ..driver import Driver
from .slots import EventPool, Slot, SlotState

__all__ = ["Horizon", "Timeline", "Timelines"]


class Horizon(Enum):
    """How far ahead copies may be enqueued: not at all, up to the end of the step, or past it."""

    NONE = "none"
    STEP = "step"
    OPEN = "open"


@dataclass(eq=False, slots=True)
class Timeline:
    """One order of copies and readers over the same slots.

    Attributes
    ----------
    copy_stream : int
        The stream that its copies are enqueued on.
    captured : bool
        It belongs to a graph.
    written : dict
        For each unit whose host bytes the device wrote, the event behind the last write on each stream.
    mapped_readers : dict
        For each unit that ran from its mapped view, the event behind the last reader on each stream.
    border : int
        Event for forking the copy stream from a compute stream, and for joining them.
    steps : int
        Steps begun and not ended.
    """

    events: EventPool
    copy_stream: int
    captured: bool
    states: list[SlotState]
    written: dict[str, dict[int, int]] = field(default_factory=dict)
    mapped_readers: dict[str, dict[int, int]] = field(default_factory=dict)
    border: int = 0
    steps: int = 0
    pause: AbstractContextManager[None] | None = None

    def holding(self, unit: str) -> SlotState | None:
        """The slot that holds `unit`."""
        return next((state for state in self.states if state.holds == unit), None)

    def free_slot(self, keep: Collection[str], *, spare_kept: bool = False) -> SlotState | None:
        """A slot that nobody leases: an empty one, else the one unused for longest; those of `keep` last, or never."""
        free = [state for state in self.states if not state.leases]
        others = [state for state in free if state.holds not in keep]
        if others or spare_kept:
            free = others
        return min(free, key=lambda state: (state.holds is not None, state.last_use), default=None)

    def mark(self, events: dict[int, int], stream: int) -> None:
        """Record, in a table of one event a stream, everything enqueued on `stream` so far."""
        event = events.get(stream)
        if event is None:
            event = self.events.event()
        self.events.driver.event_record(event, stream)
        events[stream] = event

    def forget(self) -> None:
        """Trust nothing that the slots hold."""
        for state in self.states:
            state.holds = None


class Timelines:
    """The eager timeline, and one for each capture."""

    def __init__(self, driver: Driver, slots: list[Slot]) -> None:
        self._driver = driver
        self._slots = slots
        self._captures: dict[int, Timeline] = {}
        self.eager = self._timeline(captured=False)

    def _timeline(self, *, captured: bool) -> Timeline:
        events = EventPool(self._driver)
        states = [SlotState(slot, ready=events.event()) for slot in self._slots]
        return Timeline(events, self._driver.stream_create(), captured, states, border=events.event())

    @property
    def shared(self) -> bool:
        """Whether a graph may write into the slots."""
        return bool(self._captures)

    def all(self) -> Iterator[Timeline]:
        """Every timeline."""
        yield self.eager
        yield from self._captures.values()

    def entering(self, stream: int) -> Timeline:
        """The timeline for a unit that is entered on `stream` now."""
        timeline = self.of(stream)
        if self.shared and timeline is self.eager and not timeline.steps:
            self._fork(timeline, stream)  # outside a step, every use stands alone
        return timeline

    def of(self, stream: int) -> Timeline:
        """The timeline that `stream` is in now."""
        capture = self._driver.capture_id(stream)
        if not capture:
            return self.eager
        timeline = self._captures.get(capture)
        if timeline is None:
            with self._driver.relaxed():
                # Copies that an eager step enqueued ahead must not meet the graph's first replay.
                self._driver.stream_synchronize(self.eager.copy_stream)
                timeline = self._captures[capture] = self._timeline(captured=True)
            self.eager.forget()
            self._fork(timeline, stream)
        return timeline

    def _fork(self, timeline: Timeline, stream: int) -> None:
        """Let the copy stream wait for everything on `stream`, and assume nothing of the slots."""
        self._driver.event_record(timeline.border, stream)
        self._driver.stream_wait_event(timeline.copy_stream, timeline.border)
        timeline.forget()

    def _join(self, timeline: Timeline, stream: int) -> None:
        """Let `stream` wait for everything on the copy stream."""
        self._driver.event_record(timeline.border, timeline.copy_stream)
        self._driver.stream_wait_event(stream, timeline.border)

    def horizon(self, stream: int) -> Horizon:
        """How far ahead copies may be enqueued behind `stream`."""
        timeline = self.of(stream)
        if not timeline.captured and not self.shared:
            return Horizon.OPEN
        return Horizon.STEP if timeline.steps else Horizon.NONE

    def begin_step(self, stream: int) -> None:
        """See `SlotRing.begin_step`."""
        timeline = self.entering(stream)
        timeline.steps += 1
        if timeline.captured and timeline.pause is None:
            timeline.pause = lifetime.paused()
            timeline.pause.__enter__()

    def end_step(self, stream: int) -> None:
        """See `SlotRing.end_step`."""
        capture = self._driver.capture_id(stream)
        timeline = self._captures.get(capture, self.eager) if capture else self.eager
        timeline.steps = max(timeline.steps - 1, 0)
        if timeline.captured or self.shared:
            self._join(timeline, stream)
        if timeline.pause is not None and not timeline.steps:
            timeline.pause.__exit__(None, None, None)
            timeline.pause = None

    def close(self) -> None:
        """Destroy every event and stream."""
        for timeline in self.all():
            timeline.events.close()
            self._driver.stream_destroy(timeline.copy_stream)
