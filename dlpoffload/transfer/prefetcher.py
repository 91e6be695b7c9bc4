"""`Prefetcher`: enter and leave units in any order; the copies of those to come are enqueued ahead.

It predicts the next unit from the order seen: from the last two units where that pair was seen, so that a unit that
is used in several places (a shared block, recomputation in backward) has several followers; else from the last one.
A wrong prediction costs a late copy, never a wrong byte: what a slot holds is the ring's knowledge, not the
prefetcher's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from ..errors import CudaError, SlotError
from .capture import Horizon
from .lease import Lease, StreamLike
from .ring import SlotRing

__all__ = ["Prefetcher"]


_PAIRS_A_UNIT: Final = 16


class _Seen(threading.local):
    """The last two units that a thread entered, and whether a step begins with the next one."""

    before: str | None = None
    unit: str | None = None
    step_begins: bool = False


class Prefetcher:
    """Look-ahead over a `SlotRing`.

    Parameters
    ----------
    ring
        Where units are staged.
    order
        The units in the order expected at first; the ring's own order by default. What is seen corrects it.

    Raises
    ------
    SlotError
        `order` names a unit that the ring does not stage.
    """

    def __init__(self, ring: SlotRing, order: Sequence[str] | None = None) -> None:
        self.ring = ring
        units = list(ring.slabs if order is None else order)
        if unknown := [unit for unit in units if unit not in ring.slabs]:
            raise SlotError(f"order names {', '.join(map(repr, unknown[:8]))}, which the ring does not stage")
        self._next = dict(zip(units, units[1:] + units[:1], strict=True))
        self._next_of_pair: dict[tuple[str, str], str] = {}
        self._first = units[0] if units else None
        self._seen = _Seen()  # units of two threads interleave in no order worth learning

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
        self._learn(unit)
        lease: Lease | None = None
        try:
            with self.ring.driver.current():  # once for all that is inside
                lease = self.ring.enter(unit, lambda horizon: self._ahead(unit, horizon), stream=stream)
                lease.wait()
                return lease
        except BaseException:
            if lease is not None:
                lease.abandon()
            raise

    def leave(self, lease: Lease) -> None:
        """Release a unit, and enqueue the copy of the next one behind its last reader.

        Should the driver fail, the unit is left all the same, if need be after a wait of the host for its readers.
        """
        try:
            with self.ring.driver.current():
                lease.release()
                self.ring.look_ahead(lambda horizon: self._ahead(lease.unit, horizon), stream=lease.stream)
        except CudaError:
            lease.abandon()
            raise

    def _learn(self, unit: str) -> None:
        seen = self._seen
        if seen.step_begins:
            self._first = unit
            seen.step_begins = False
        if seen.unit is not None:
            self._next[seen.unit] = unit
            if seen.before is not None:
                if len(self._next_of_pair) >= _PAIRS_A_UNIT * len(self.ring.slabs):
                    self._next_of_pair.clear()  # an order without order: experts, routed by the data
                self._next_of_pair[seen.before, seen.unit] = unit
        seen.before, seen.unit = seen.unit, unit

    def _ahead(self, unit: str, horizon: Horizon) -> list[str]:
        """The units expected behind `unit`, each once, as many as there are slots."""
        before = self._seen.before if self._seen.unit == unit else None
        units: list[str] = []
        while horizon is not Horizon.NONE and len(units) < len(self.ring.slots):
            following = self._next_of_pair.get((before, unit)) if before is not None else None
            following = following or self._next.get(unit)
            if following is None or following in units:
                break
            if horizon is Horizon.STEP and following == self._first:
                break
            units.append(following)
            before, unit = unit, following
        return units
