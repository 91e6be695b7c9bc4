"""Where the device reads host memory as it is: what a copy costs there, and what is placed instead of copied.

On GH200 and GB200 the device reads host memory through the host's page tables, over a link of several hundred GB/s:
a weight that is read once is read in place, and a copy of it would cross the same link and be written and read besides.
On GB10 and the Jetsons device memory is the same DRAM, so even a resident copy only takes room.
"""

from __future__ import annotations

from ..spec import aligned
from .request import Decision, Placement, PlanRequest, Unit
from .spread import spread

__all__ = ["in_place"]

_FIXED = "placed beforehand"
_UNIFIED = "unified memory: device and host share it, so a copy only takes room"
_READ = "coherent memory: read in place, where a copy would be a loss"
_RESIDENT = "resident: device memory is faster than the coherent link"


def in_place(request: PlanRequest) -> dict[str, Decision]:
    """Map everything that is not resident, and stream nothing.

    In coherent memory whole units are resident as far as the budget goes, spread evenly, and loose tensors that are
    not gathered before them. In unified memory nothing is.
    """
    decisions = {name: Decision(placement, _FIXED) for name, placement in request.fixed.items()}
    free = [name for name in request.specs if name not in decisions]
    if request.cost.memory == "unified":
        return decisions | dict.fromkeys(free, Decision(Placement.HOST_MAPPED, _UNIFIED))
    on_device = [name for name, placement in request.fixed.items() if placement is Placement.DEVICE]
    room = request.device_budget - request.resident_nbytes(on_device) - _ring_nbytes(request)
    resident: set[str] = set()
    loose = [name for name in request.loose if name not in decisions]
    for name in sorted(loose, key=lambda name: (name in request.gathered, request.specs[name].nbytes)):
        nbytes = aligned(request.specs[name].nbytes)
        if name not in request.gathered and nbytes <= room:
            room -= nbytes
            resident.add(name)
    units = [[name for name in unit.tensors if name not in decisions] for unit in request.units]
    for index in spread([request.resident_nbytes(names) for names in units], room):
        resident.update(units[index])
    for name in free:
        on = Placement.DEVICE if name in resident else Placement.HOST_MAPPED
        decisions[name] = Decision(on, _RESIDENT if name in resident else _READ)
    return decisions


def _ring_nbytes(request: PlanRequest) -> int:
    """Bytes of the ring that tensors take which were fixed as staged."""
    staged = {name for name, placement in request.fixed.items() if placement is Placement.HOST_STAGED}
    units = [*request.units, *(Unit(name, (name,)) for name in request.loose)]
    slabs = [Unit(unit.name, tuple(n for n in unit.tensors if n in staged)) for unit in units]
    sizes = [aligned(slab.slab_nbytes(request.specs)) for slab in slabs if slab.tensors]
    return min(request.slots, len(sizes)) * max(sizes, default=0)
