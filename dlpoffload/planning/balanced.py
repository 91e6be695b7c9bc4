"""The default policy: the least traffic over the link that the budget allows, spread evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PlanError
from ..spec import aligned, format_nbytes
from .coherent import in_place
from .request import Decision, Placement, PlanRequest, Unit
from .spread import spread

__all__ = ["balanced"]

_FIXED = "placed beforehand"
_EVERYTHING_FITS = "everything fits"
_SPREAD = "unit, resident: spread between the streamed"
_OUTLIER = "unit, resident: the ring is smaller without it"
_UNIT_FITS = "unit, resident: all units fit"
_STREAMED = "unit, streamed through the ring"
_SMALL = "in no unit, small"
_DENSE = "in no unit, would be read over the link at each use"
_NO_ROOM = "in no unit, no room on the device"
_GATHERED = "gathered: few of its rows cross the link"
_LEFT_OVER = "gathered, and the budget has room left"


@dataclass(frozen=True, slots=True)
class _Group:
    """A unit less what is fixed on the device or mapped."""

    names: tuple[str, ...]
    """What the policy may place."""
    nbytes: int
    """Of its slot when streamed, and of its residents when not: the two are equal, 256-aligned."""
    must_stream: bool
    """It holds a tensor that is fixed as staged, so it is streamed as a whole."""


@dataclass(frozen=True, slots=True)
class _Choice:
    seconds: float
    ring_nbytes: int
    resident: frozenset[int]
    outliers: frozenset[int]
    loose: dict[str, Decision]


def balanced(request: PlanRequest) -> dict[str, Decision]:
    """Place as much as fits on the device and stream the rest in whole units.

    What comes first when the budget is short:

    1. the ring, without which nothing runs: `slots` times the largest streamed unit. A few units that are
       much larger than the others are made resident where that shrinks the ring enough to pay;
    2. small loose tensors: they cost little memory, and a copy or a mapped read is mostly latency for them;
    3. large loose tensors that are read whole: mapped, they take the link from the copies at a lower rate;
    4. whole units, spread evenly by bytes between the streamed ones, so that copies and compute overlap;
    5. gathered tensors, of which a step reads a few rows even when they are mapped.

    Loose tensors that find no room are mapped. Where the device reads host memory coherently, nothing is streamed; see
    `CostModel.memory`.

    Raises
    ------
    PlanError
        The ring does not fit; names the smallest budget with which it does.
    """
    if request.cost.memory in ("coherent", "unified"):
        return in_place(request)
    groups, loose, decisions = _split(request)
    on_device = [name for name, placement in request.fixed.items() if placement is Placement.DEVICE]
    fixed_nbytes = request.resident_nbytes(on_device)
    room = request.device_budget - fixed_nbytes
    by_size = sorted(
        (i for i, group in enumerate(groups) if not group.must_stream), key=lambda i: (-groups[i].nbytes, i)
    )
    needs = _needs(request.slots, groups, by_size)
    least = min(range(len(needs)), key=needs.__getitem__)
    if needs[least] > room:
        raise _no_room(request, fixed_nbytes, needs[least], groups)
    sizes = [groups[i].nbytes for i in by_size]
    cuts = [
        k
        for k in range(len(needs))
        # a cut between units of nearly one size would buy little, and make one end of the model resident
        if (k in (0, len(by_size)) or 4 * sizes[k - 1] >= 5 * sizes[k]) and needs[k] <= room
    ]
    choices = [_fill(request, groups, loose, frozenset(by_size[:k]), room) for k in cuts or [least]]
    best = min(choices, key=lambda choice: (choice.seconds, choice.ring_nbytes))
    return decisions | best.loose | _explain(groups, best)


def _split(request: PlanRequest) -> tuple[list[_Group], list[str], dict[str, Decision]]:
    """What can be placed: units, loose tensors; and what cannot, because it is fixed."""
    fixed = request.fixed
    groups = []
    own = [Unit(name, (name,)) for name in request.loose if fixed.get(name) is Placement.HOST_STAGED]
    for unit in (*request.units, *own):
        slab = Unit(
            unit.name,
            tuple(n for n in unit.tensors if fixed.get(n) in (None, Placement.HOST_STAGED)),
        )
        if slab.tensors:
            names = tuple(n for n in slab.tensors if n not in fixed)
            nbytes = aligned(slab.slab_nbytes(request.specs))
            groups.append(_Group(names, nbytes, must_stream=len(names) < len(slab.tensors)))
    loose = [name for name in request.loose if name not in fixed]
    return groups, loose, {name: Decision(placement, _FIXED) for name, placement in fixed.items()}


def _ring_nbytes(slots: int, groups: Sequence[_Group]) -> int:
    """Bytes of the ring through which these groups stream; never more slots than groups."""
    return min(slots, len(groups)) * max((group.nbytes for group in groups), default=0)


def _needs(slots: int, groups: Sequence[_Group], by_size: Sequence[int]) -> list[int]:
    """Bytes that it takes to keep the k largest units and stream the others, for each k.

    Whatever is resident, the ring is as large as if exactly the units larger than any streamed one were, so
    the least of these is the least that any choice takes.
    """
    forced = [group for group in groups if group.must_stream]
    floor = max((group.nbytes for group in forced), default=0)
    needs = []
    kept = 0
    for k in range(len(by_size) + 1):
        largest = max(floor, groups[by_size[k]].nbytes) if k < len(by_size) else floor
        needs.append(kept + min(slots, len(forced) + len(by_size) - k) * largest)
        if k < len(by_size):
            kept += groups[by_size[k]].nbytes
    return needs


def _fill(
    request: PlanRequest, groups: Sequence[_Group], loose: Sequence[str], kept: frozenset[int], room: int
) -> _Choice:
    """Give out the budget that is left when the units `kept` are resident and the others have their ring."""
    specs, cost = request.specs, request.cost
    streamed = {i: group for i, group in enumerate(groups) if i not in kept}
    room -= sum(groups[i].nbytes for i in kept)
    ring = _ring_nbytes(request.slots, list(streamed.values()))
    decisions: dict[str, Decision] = {}

    def place(name: str, reason: str, otherwise: str) -> None:
        nonlocal room
        nbytes = aligned(specs[name].nbytes)
        if nbytes <= room - ring:
            room -= nbytes
            decisions[name] = Decision(Placement.DEVICE, reason)
        else:
            decisions[name] = Decision(Placement.HOST_MAPPED, otherwise)

    dense = [name for name in loose if name not in request.gathered]
    small = [name for name in dense if specs[name].nbytes < cost.small_nbytes]
    large = [name for name in dense if specs[name].nbytes >= cost.small_nbytes]
    for name in sorted(small, key=lambda name: specs[name].nbytes):
        place(name, _SMALL, _NO_ROOM)
    for name in sorted(large, key=lambda name: -specs[name].nbytes):
        place(name, _DENSE, _NO_ROOM)
    # the ring may shrink once its largest unit has become resident, and make room for another round
    while True:
        free = [i for i, group in streamed.items() if not group.must_stream]
        picked = [free[j] for j in spread([groups[i].nbytes for i in free], room - ring)]
        if not picked:
            break
        room -= sum(streamed.pop(i).nbytes for i in picked)
        ring = _ring_nbytes(request.slots, list(streamed.values()))
    for name in sorted((n for n in loose if n in request.gathered), key=lambda name: specs[name].nbytes):
        place(name, _LEFT_OVER, _GATHERED)

    seconds = cost.seconds(
        staged_nbytes=sum(group.nbytes for group in streamed.values()),
        mapped_nbytes=sum(specs[n].nbytes for n in dense if decisions[n].placement is Placement.HOST_MAPPED),
    )
    resident = frozenset(range(len(groups))) - streamed.keys()
    return _Choice(seconds, ring, resident, kept, decisions)


def _explain(groups: Sequence[_Group], choice: _Choice) -> dict[str, Decision]:
    everything = len(choice.resident) == len(groups)
    all_fits = everything and all(d.placement is Placement.DEVICE for d in choice.loose.values())
    decisions = {}
    for i, group in enumerate(groups):
        if i not in choice.resident:
            decision = Decision(Placement.HOST_STAGED, _STREAMED)
        elif everything:
            decision = Decision(Placement.DEVICE, _UNIT_FITS)
        else:
            decision = Decision(Placement.DEVICE, _OUTLIER if i in choice.outliers else _SPREAD)
        decisions.update(dict.fromkeys(group.names, decision))
    if all_fits:
        names = [*decisions, *choice.loose]
        return dict.fromkeys(names, Decision(Placement.DEVICE, _EVERYTHING_FITS))
    return decisions


def _no_room(request: PlanRequest, fixed_nbytes: int, need: int, groups: Sequence[_Group]) -> PlanError:
    smallest = fixed_nbytes + need
    parts = []
    if groups:
        largest = max(group.nbytes for group in groups)
        parts.append(f"{min(request.slots, len(groups))} slots for units of up to {format_nbytes(largest)}")
    if fixed_nbytes:
        parts.append(f"{format_nbytes(fixed_nbytes)} that are fixed on the device")
    return PlanError(
        f"device_budget={format_nbytes(request.device_budget)} cannot hold {' and '.join(parts)}; the "
        f"smallest budget that can is {format_nbytes(smallest)}. Raise device_budget, or make the units "
        "smaller",
        smallest_budget=smallest,
    )
