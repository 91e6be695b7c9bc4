"""`Prefetcher`: enter and leave units in any order; the copies of those to come are enqueued ahead.

It predicts the next unit from the order seen. A wrong prediction costs a late copy, never a wrong byte: what a slot
holds is the ring's knowledge, not the prefetcher's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .capture import Horizon
from .ring import Lease, SlotRing, StreamLike, stream_handle

__all__ = ["Prefetcher"]


class Prefetcher:
    """Look-ahead over a `SlotRing`.

    Parameters
    ----------
    ring
        Where units are staged.
    order
        The units in the order expected at first; the ring's own order by default. What is seen corrects it.
    """

    def __init__(self, ring: SlotRing, order: Sequence[str] | None = None) -> None:
        self.ring = ring
        units = list(ring.slabs if order is None else order)
        self._next = dict(zip(units, units[1:] + units[:1], strict=True))
        self._first = units[0] if units else None
        self._seen = threading.local()  # units of two threads interleave in no order worth learning

    def begin_step(self, *, stream: int | StreamLike = 0) -> None:
        """Say that a step, a pass over the units, begins on `stream`; see `SlotRing.begin_step`."""
        self.ring.begin_step(stream=stream)
        self._seen.step_begins = True

    def end_step(self, *, stream: int | StreamLike = 0) -> None:
        """Say that the step ends; see `SlotRing.end_step`."""
        self.ring.end_step(stream=stream)

    def enter(self, unit: str, *, stream: int | StreamLike = 0) -> Lease:
        """Prefetch a unit, make `stream` wait for its copy, and enqueue the copies of those to come.

        *Lifetime*: the lease's views are good until `leave`.

        Raises
        ------
        SlotError
            As `SlotRing.prefetch`.
        """
        handle = stream_handle(stream)
        self._learn(unit)
        ahead = self._ahead(unit, stream=handle)
        lease = self.ring.prefetch(unit, stream=handle, keep=ahead, foreseen=False)
        try:
            self.ring.look_ahead(ahead[: len(self.ring.slots) - 1], stream=handle)
            lease.wait()
        except BaseException:
            lease.release()
            raise
        return lease

    def leave(self, lease: Lease) -> None:
        """Release a unit, and enqueue the copy of the next one behind its last reader."""
        lease.release()
        self.ring.look_ahead(self._ahead(lease.unit, stream=lease.stream), stream=lease.stream)

    def _learn(self, unit: str) -> None:
        previous = getattr(self._seen, "unit", None)
        if getattr(self._seen, "step_begins", False):
            self._first = unit
            self._seen.step_begins = False
        if previous is not None:
            self._next[previous] = unit
        self._seen.unit = unit

    def _ahead(self, unit: str, *, stream: int) -> list[str]:
        """The units expected behind `unit`, each once, as many as there are slots."""
        horizon = self.ring.horizon(stream=stream)
        units: list[str] = []
        while horizon is not Horizon.NONE and len(units) < len(self.ring.slots):
            following = self._next.get(unit)
            if following is None or following in units:
                break
            if horizon is Horizon.STEP and following == self._first:
                break
            units.append(following)
            unit = following
        return units
