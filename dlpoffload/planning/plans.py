"""`Plan`: where every tensor lives, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..spec import TensorSpec, aligned
from .request import CostModel, Placement, Unit

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every tensor lives, and why. Printing it gives a table.

    Attributes
    ----------
    specs : mapping of str to TensorSpec
        Every tensor, once.
    placements : mapping of str to Placement
        For every tensor.
    reasons : mapping of str to str
        Why, for every tensor.
    units : tuple of Unit
        All units in order: the ones asked for, then one for the staged tensors of each module that were in none.
    streamed_units : tuple of Unit
        Those with staged tensors, in order, less the tensors that are not staged: what a slab holds.
    resident_units : tuple of Unit
        Those whose tensors are all on the device.
    slots : int
        Slots of the ring: as asked, but no more than streamed units; 0 when nothing is streamed.
    slot_nbytes : int
        Bytes of one slot: the largest slab, rounded up to 256.
    device_budget : int
        The budget in bytes.
    cost : CostModel
        What the link was taken to cost.
    policy : str
        Name of the policy that decided.
    at_once : int
        How many streamed units are entered and not left at most, as their modules run inside of each other: each holds
        a slot. 1 where no module tree was given.
    """

    specs: Mapping[str, TensorSpec]
    placements: Mapping[str, Placement]
    reasons: Mapping[str, str]
    units: tuple[Unit, ...]
    streamed_units: tuple[Unit, ...]
    resident_units: tuple[Unit, ...]
    slots: int
    slot_nbytes: int
    device_budget: int
    cost: CostModel
    policy: str
    at_once: int = 1

    def names(self, placement: Placement) -> tuple[str, ...]:
        """Tensors with this placement, in the order of the specs."""
        return tuple(name for name in self.specs if self.placements[name] is placement)

    def nbytes(self, placement: Placement) -> int:
        """Bytes of the tensors with this placement, without padding."""
        return sum(self.specs[name].nbytes for name in self.names(placement))

    @property
    def total_nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def ring_nbytes(self) -> int:
        """Bytes of the ring: slots times the bytes of one."""
        return self.slots * self.slot_nbytes

    @property
    def resident_nbytes(self) -> int:
        """Bytes that the tensors on the device take: each one's own, rounded up to 256."""
        return sum(aligned(self.specs[name].nbytes) for name in self.names(Placement.DEVICE))

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device: residents and ring. Never above the budget."""
        return self.resident_nbytes + self.ring_nbytes

    @property
    def link_seconds(self) -> float:
        """Seconds that copying every streamed unit once takes at the cost model's rate."""
        return self.cost.seconds(staged_nbytes=self.nbytes(Placement.HOST_STAGED), mapped_nbytes=0)

    def asleep(self) -> Plan:
        """This plan with nothing on the device: what is resident is on the host beside the rest, and there is no ring.

        Slabs of streamed units stay what they are.
        """
        apart = {name for unit in (*self.streamed_units, *self.resident_units) for name in unit.tensors}
        others = tuple(name for name in self.names(Placement.DEVICE) if name not in apart)
        slabs = (*self.streamed_units, *self.resident_units, *([Unit("asleep", others)] if others else []))
        resident = set(self.names(Placement.DEVICE))
        return replace(
            self,
            placements={n: Placement.HOST_STAGED if n in resident else p for n, p in self.placements.items()},
            reasons={n: "resident, asleep" if n in resident else why for n, why in self.reasons.items()},
            streamed_units=slabs,
            resident_units=(),
            slots=0,
            slot_nbytes=0,
        )

    def __rich__(self) -> Group:
        from .table import render

        return render(self)

    def __str__(self) -> str:
        from .table import to_text

        return to_text(self)
