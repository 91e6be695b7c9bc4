"""One device slot, and the events that order its readers and its copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from ..driver import Driver
from ..errors import SlotError
from ..memory import DeviceBuffer
from ..rollback import rolled_back
from ..spec import format_nbytes

__all__ = ["EventPool", "Slot", "SlotState", "check_device", "close_slots", "make_slots", "no_free_slot"]


@dataclass(slots=True)
class EventPool:
    """Events of one driver, made when first needed and destroyed together."""

    driver: Driver
    made: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def event(self) -> int:
        """An event that nobody refers to; what it recorded before is of no account."""
        if self.free:
            return self.free.pop()
        event = self.driver.event_create()
        self.made.append(event)
        return event

    def mark(self, events: dict[int, int], stream: int) -> None:
        """Record, in a table of one event a stream, everything enqueued on `stream` so far."""
        known = events.get(stream)
        event = self.event() if known is None else known
        try:
            self.driver.event_record(event, stream)
        except BaseException:
            if known is None:
                self.free.append(event)
            raise
        events[stream] = event

    def recycle(self, events: dict[int, int]) -> None:
        """Empty a table whose events are waited for. A wait holds what was recorded when it was enqueued."""
        self.free += events.values()
        events.clear()

    def close(self) -> None:
        """Destroy every event of the pool."""
        self.free.clear()
        with ExitStack() as closing:  # all of them, whichever the driver refuses
            while self.made:
                closing.callback(self.driver.event_destroy, self.made.pop())


@dataclass(eq=False, slots=True)
class Slot:
    """A fixed range of device memory. Its address never changes while the ring lives."""

    index: int
    buffer: DeviceBuffer

    @property
    def device_pointer(self) -> int:
        """Address of the first byte for the device."""
        return self.buffer.device_pointer


@dataclass(eq=False, slots=True)
class SlotState:
    """What one slot holds, as one timeline sees it: the eager one, or that of one captured graph.

    Attributes
    ----------
    holds : str or None
        The unit whose bytes are in the slot, or will be when `ready` has passed.
    ready : int
        Event behind the last copy into the slot, or the last write into it by a kernel.
    readers : dict of int to int
        For each stream that read the slot since its last copy, the event behind its last reader.
    leases : int
        Units entered and not left yet. A leased slot is never copied into.
    last_use : int
        For choosing the slot that was not used for longest.
    """

    slot: Slot
    ready: int
    holds: str | None = None
    readers: dict[int, int] = field(default_factory=dict)
    leases: int = 0
    last_use: int = 0


def check_device(what: str, found: str, wanted: str) -> None:
    """Raise the SlotError of memory for another device."""
    if found != wanted:
        raise SlotError(f"{what} is made for {found}, but the ring is on {wanted}; make both for the same device")


def make_slots(
    count: int, nbytes: int, device: str, allocate: Callable[[int], DeviceBuffer] | None = None
) -> list[Slot]:
    """Allocate slots of `nbytes` each. After an error none stays allocated."""
    slots: list[Slot] = []
    with rolled_back() as undo:
        undo.append(lambda: close_slots(slots))
        for index in range(count):
            made = DeviceBuffer.allocate(nbytes, device=device) if allocate is None else allocate(nbytes)
            slots.append(Slot(index, made))
            check_device(f"slot {index}", made.device, device)
            if made.nbytes < nbytes:
                raise SlotError(
                    f"slot {index} was allocated with {format_nbytes(made.nbytes)}, but the largest unit needs "
                    f"{format_nbytes(nbytes)}"
                )
    return slots


def close_slots(slots: Sequence[Slot]) -> None:
    """Free all of them, the last one first, whichever the driver refuses."""
    with ExitStack() as closing:
        for slot in slots:
            closing.callback(slot.buffer.close)


def no_free_slot(unit: str, slots: Sequence[Slot], slot_nbytes: int, when_full: str) -> SlotError:
    """The error of a unit that finds every slot leased and may not run from its mapped view."""
    instead = "" if when_full == "error" else ', or with when_full="map_read_only": its file is not to be written'
    return SlotError(
        f'unit "{unit}" finds all {len(slots)} slots leased; leave a unit first, or make the ring with more slots '
        f"({slot_nbytes} bytes each){instead}"
    )
