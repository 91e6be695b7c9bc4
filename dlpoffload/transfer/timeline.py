"""`Timeline`: one order of copies and readers over the slots of a ring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import chain

from ..driver import Driver
from ..errors import CudaError
from ..lifetime import Owner
from ..rollback import rolled_back
from ..slab import Copy
from .slots import EventPool, Slot, SlotState

__all__ = ["Timeline"]


@dataclass(eq=False, slots=True)
class Timeline:
    """What the slots hold, and who uses them: for eager work, or for one captured graph.

    Attributes
    ----------
    copy_stream : int
        The stream that its copies are enqueued on.
    border : int
        Event for forking the copy stream from a compute stream, and for joining them.
    states : list of SlotState
        The slots that it may use.
    capture : int
        Which capture it belongs to; 0 for the eager one.
    written : dict
        For each unit whose host bytes the device wrote, the event behind the last write on each stream.
    mapped_readers : dict
        For each unit that ran from its mapped view, the event behind the last reader on each stream.
    mapped_leases : Counter
        Units entered and not left yet that run from their mapped view.
    steps : int
        Steps begun and not ended.
    pause : ExitStack
        Holds reclaims back while a captured step is recorded.
    copied : dict of str to None
        Units whose copies a capture recorded, in order.
    replayable : Owner or None
        Counts who can replay the captured graph.
    """

    events: EventPool
    copy_stream: int
    border: int
    states: list[SlotState]
    capture: int = 0
    written: dict[str, dict[int, int]] = field(default_factory=dict)
    mapped_readers: dict[str, dict[int, int]] = field(default_factory=dict)
    mapped_leases: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    pause: ExitStack = field(default_factory=ExitStack)
    copied: dict[str, None] = field(default_factory=dict)
    replayable: Owner | None = None

    @classmethod
    def make(cls, driver: Driver, slots: Sequence[Slot], *, capture: int = 0) -> Timeline:
        """Make one over empty slots, with events and a copy stream of its own."""
        events = EventPool(driver)
        with rolled_back() as undo:
            undo.append(events.close)
            states = [SlotState(slot, ready=events.event()) for slot in slots]
            border = events.event()
            return cls(events, driver.stream_create(), border, states, capture)

    def __str__(self) -> str:
        copied = list(self.copied)
        what = f'"{copied[0]}" to "{copied[-1]}"' if copied else "no units"
        return f"capture {self.capture} of {what}"

    # ------------------------------------------------------------------------------------------- slots
    @property
    def leases(self) -> int:
        """Units entered and not left yet."""
        return sum(state.leases for state in self.states) + self.mapped_leases.total()

    def holding(self, unit: str) -> SlotState | None:
        """The slot that holds `unit`."""
        return next((state for state in self.states if state.holds == unit), None)

    def free_slot(self, keep: Sequence[str], *, spare_kept: bool = False) -> SlotState | None:
        """A slot that nobody leases: an empty one, else the one unused for longest.

        Those of `keep`, which are needed in that order, come last, and the last of them first; or never.
        """
        free = [state for state in self.states if not state.leases]
        others = [state for state in free if state.holds not in keep]
        if others or spare_kept:
            return min(others, key=lambda state: (state.holds is not None, state.last_use), default=None)
        return max(free, key=lambda state: keep.index(state.holds or ""), default=None)

    def forget(self) -> None:
        """Trust nothing that the slots hold."""
        for state in self.states:
            state.holds = None

    # ------------------------------------------------------------------------------------------- order
    def fork(self, stream: int) -> None:
        """Let the copy stream wait for everything on `stream`, and assume nothing of the slots."""
        driver = self.events.driver
        self.forget()
        driver.event_record(self.border, stream)
        driver.stream_wait_event(self.copy_stream, self.border)

    def join(self, stream: int) -> None:
        """Let `stream` wait for every copy, and for the slots' readers on other streams."""
        driver = self.events.driver
        driver.event_record(self.border, self.copy_stream)
        driver.stream_wait_event(stream, self.border)
        for state in self.states:
            for reader, event in state.readers.items():
                if reader != stream:
                    driver.stream_wait_event(stream, event)

    def copy(self, state: SlotState, unit: str, copies: Sequence[Copy], timed: AbstractContextManager[None]) -> None:
        """Enqueue the copies of a unit into a slot, behind its last readers and the writes of the host bytes."""
        driver = self.events.driver
        state.holds = None  # should a call below fail, the slot holds nothing
        for event in state.readers.values():
            driver.stream_wait_event(self.copy_stream, event)
        for event in self.written.get(unit, {}).values():
            driver.stream_wait_event(self.copy_stream, event)
        with timed:
            for start, host_pointer, nbytes in copies:
                driver.copy_async(state.slot.device_pointer + start, host_pointer, nbytes, self.copy_stream)
        driver.event_record(state.ready, self.copy_stream)
        if self.capture:
            self.copied[unit] = None
        self.events.recycle(state.readers)
        state.holds = unit

    def drain(self) -> None:
        """Block until no copy is under way, nor a reader of a slot or of mapped bytes, nor a write of host bytes.

        Where one of them failed, the others are waited for all the same.
        """
        driver = self.events.driver
        failed: CudaError | None = None
        for events in self._tables():
            for event in events.values():
                try:
                    driver.event_synchronize(event)
                except CudaError as error:
                    failed = failed or error
        driver.stream_synchronize(self.copy_stream)
        if failed is not None:
            raise failed

    def _tables(self) -> Iterator[dict[int, int]]:
        slots = (state.readers for state in self.states)
        return chain(slots, self.mapped_readers.values(), self.written.values())

    def drain_unit(self, unit: str) -> None:
        """Block until nothing enqueued reads or writes the unit's host bytes."""
        driver = self.events.driver
        driver.stream_synchronize(self.copy_stream)
        for table in (self.mapped_readers, self.written):
            events = table.get(unit, {})
            for event in events.values():
                driver.event_synchronize(event)
            self.events.recycle(events)

    # --------------------------------------------------------------------------------------------- end
    def close(self) -> None:
        """Destroy every event and the stream."""
        with ExitStack() as closing:
            closing.callback(self.events.driver.stream_destroy, self.copy_stream)
            closing.callback(self.events.close)
            closing.callback(self.pause.close)
