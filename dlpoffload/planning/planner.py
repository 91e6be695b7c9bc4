"""`plan`: from specs and one number, the bytes of device memory, to a `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from ..errors import PlanError
from ..spec import TensorSpec, aligned, format_nbytes, parse_nbytes
from .balanced import balanced
from .choose import choose_units
from .plans import Plan
from .request import CostModel, Decision, Placement, PlanRequest, Policy, Unit, checked_slots, matching
from .tree import UnitTree, tree_of_names

__all__ = ["plan"]


def plan(
    specs: Mapping[str, TensorSpec] | UnitTree,
    device_budget: int | str,
    *,
    units: Mapping[str, Sequence[str]] | Sequence[Unit] | Sequence[str] | None = None,
    slots: int = 2,
    policy: Policy = balanced,
    cost: CostModel | None = None,
    gathered: Iterable[str] | None = None,
    elsewhere: Iterable[str] = (),
) -> Plan:
    """Plan which tensor lives where under a budget of device memory.

    Parameters
    ----------
    specs : mapping of str to TensorSpec, or UnitTree
        Each distinct tensor once (tied tensors are one), or the module tree that holds them.
    device_budget : int or str
        Bytes that residents and ring may take on the device together, or such as ``"20GiB"``.
    units : mapping, sequence of Unit, or sequence of str, optional
        What is staged together, in the order in which it runs: lists of tensor names by unit name, or units;
        or patterns on module paths as `choose_units` takes them. Left out, `choose_units` finds them, in the
        tree or in the tree that the names suggest.
    slots : int
        Slots of the ring. Two are enough to keep the link busy.
    policy : Policy
        Decides: `balanced`, `all_mapped`, `all_staged`, a `pattern_policy`, or your own.
    cost : CostModel, optional
        What the link costs.
    gathered : iterable of str, optional
        Names of, or shell patterns on, tensors of which a step reads a few rows. They are taken out of the
        units. Left out, the embeddings of the tree that are in no unit.
    elsewhere : iterable of str
        Names of tensors of the same model that are planned apart, for another device. Units and patterns that mean
        only those are no error, and have no effect here.

    Returns
    -------
    Plan
        Its `device_nbytes` is at most the budget.

    Raises
    ------
    PlanError
        The budget cannot hold the ring (`smallest_budget` says which can); a unit names an unknown tensor or
        one of another unit; a pattern matches nothing; the policy's answer is incomplete or over the budget.
    SpecError
        The budget does not parse.
    """
    budget = parse_nbytes(device_budget, "device_budget")
    slots = checked_slots(slots)
    cost = cost or CostModel()
    if isinstance(specs, UnitTree):
        tree, flat = specs, specs.specs()
    else:
        tree, flat = tree_of_names(specs), dict(specs)
    if not flat:
        raise PlanError("there are no tensors, so there is nothing to plan")
    apart_from = frozenset(elsewhere)
    given, patterns = _units(units)
    if given is not None:
        given = [unit for unit in given if not _is_elsewhere(unit, apart_from)]
        _check_units(given, flat)
    apart = None if gathered is None else _gathered(gathered, flat, apart_from)

    def at(nbytes: int) -> Plan:
        chosen = given
        if chosen is None:
            chosen = choose_units(tree, nbytes, slots, units=patterns, cost=cost, elsewhere=apart_from)
        rows = tree.gathered() if apart is None else apart
        if apart:
            left = (Unit(unit.name, tuple(n for n in unit.tensors if n not in apart)) for unit in chosen)
            chosen = [unit for unit in left if unit.tensors]
        inside = {name for unit in chosen for name in unit.tensors}
        request = PlanRequest(
            MappingProxyType(flat),
            tuple(chosen),
            nbytes,
            slots=slots,
            gathered=rows - inside,
            cost=cost,
            elsewhere=apart_from,
        )
        return _assemble(request, policy, tree if isinstance(specs, UnitTree) else None)

    try:
        return at(budget)
    except PlanError as failure:
        if failure.smallest_budget is None or units is not None:
            raise
        # another budget means other units, so the figure for these units is not the answer yet
        smallest = _smallest_budget(at, budget, failure.smallest_budget)
    raise PlanError(
        f'device_budget={format_nbytes(budget)} cannot hold what the policy "{_name(policy)}" needs, a ring '
        f"of {slots} slots included, however the units are chosen; the smallest budget that can is "
        f"{format_nbytes(smallest)}",
        smallest_budget=smallest,
    )


def _units(
    units: Mapping[str, Sequence[str]] | Sequence[Unit] | Sequence[str] | None,
) -> tuple[list[Unit] | None, list[str] | None]:
    """Sort out what `units` is: units, or patterns on module paths, or neither."""
    if units is None:
        return None, None
    if isinstance(units, Mapping):
        return [Unit(name, tuple(tensors)) for name, tensors in units.items()], None
    if isinstance(units, str):
        raise PlanError(f'units="{units}" is one string; pass a list of patterns: ["{units}"]')
    listed = list(units)
    made = [unit for unit in listed if isinstance(unit, Unit)]
    patterns = [unit for unit in listed if isinstance(unit, str)]
    if len(made) == len(listed):
        return made, None
    if len(patterns) == len(listed):
        return None, patterns
    raise PlanError(f"units={listed!r} mixes kinds; pass units, or patterns on module paths, or a mapping")


def _check_units(units: Sequence[Unit], specs: Mapping[str, TensorSpec]) -> None:
    home: dict[str, str] = {}
    seen: set[str] = set()
    for unit in units:
        if unit.name in seen:
            raise PlanError(f'two units are named "{unit.name}"; names of units are unique')
        seen.add(unit.name)
        if not unit.tensors:
            raise PlanError(f'the unit "{unit.name}" names no tensor; leave it out')
        for name in unit.tensors:
            if name not in specs:
                near = ", ".join(f'"{known}"' for known in list(specs)[:3])
                raise PlanError(
                    f'the unit "{unit.name}" names the tensor "{name}", which is none of the {len(specs)} '
                    f"planned, such as {near}"
                )
            if name in home:
                raise PlanError(
                    f'the tensor "{name}" is in the units "{home[name]}" and "{unit.name}"; a tensor is '
                    "staged with one unit: leave it in none, and it is resident or mapped for all"
                )
            home[name] = unit.name


def _is_elsewhere(unit: Unit, elsewhere: frozenset[str]) -> bool:
    away = [name for name in unit.tensors if name in elsewhere]
    if away and len(away) < len(unit.tensors):
        here = next(name for name in unit.tensors if name not in elsewhere)
        raise PlanError(
            f'the unit "{unit.name}" has "{here}" on one device and "{away[0]}" on another; a unit is one copy to one '
            "device, so part it, or put its tensors together"
        )
    return bool(away)


def _gathered(patterns: Iterable[str], specs: Mapping[str, TensorSpec], elsewhere: frozenset[str]) -> frozenset[str]:
    if isinstance(patterns, str):
        raise PlanError(f'gathered="{patterns}" is one string; pass a list of names or patterns: ["{patterns}"]')
    found: set[str] = set()
    for pattern in patterns:
        matched = matching(pattern, specs)
        if not matched and not matching(pattern, elsewhere):
            raise PlanError(f'gathered names "{pattern}", which matches none of the {len(specs)} tensors')
        found.update(matched)
    return frozenset(found)


def _name(policy: Policy) -> str:
    return getattr(policy, "__name__", type(policy).__name__)


def _decisions(request: PlanRequest, policy: Policy) -> dict[str, Decision]:
    """Ask the policy, and hold its answer against the request."""
    who = f'the policy "{_name(policy)}"'
    answer = policy(request)
    unknown = [name for name in answer if name not in request.specs]
    missing = [name for name in request.specs if name not in answer]
    for names, what in (
        (unknown, "places tensors that are not planned"),
        (missing, "leaves tensors unplaced"),
    ):
        if names:
            listed = ", ".join(f'"{name}"' for name in names[:3])
            more = f" and {len(names) - 3} others" if len(names) > 3 else ""
            raise PlanError(f"{who} {what}: {listed}{more}")
    decisions = {}
    for name in request.specs:
        placed = answer[name]
        what, why = placed if isinstance(placed, tuple) else (placed, f"chosen by {who}")
        if not isinstance(what, Placement):
            what = Placement.parse(what, f'{who}: the placement of "{name}"')
        decisions[name] = Decision(what, why)
    return decisions


def _assemble(request: PlanRequest, policy: Policy, tree: UnitTree | None) -> Plan:
    """`tree` is of modules that are entered and left; names alone say nothing of that."""
    decisions = _decisions(request, policy)
    placements = {name: decision.placement for name, decision in decisions.items()}
    staged = Placement.HOST_STAGED
    loose = [name for name in request.loose if placements[name] is staged]
    apart = {name: (name,) for name in loose} if tree is None else tree.own_units(loose)
    units = (*request.units, *(Unit(name, tensors) for name, tensors in apart.items()))
    slabs = [Unit(unit.name, tuple(n for n in unit.tensors if placements[n] is staged)) for unit in units]
    streamed = tuple(slab for slab in slabs if slab.tensors)
    made = Plan(
        specs=dict(request.specs),
        placements=placements,
        reasons={name: decision.reason for name, decision in decisions.items()},
        units=units,
        streamed_units=streamed,
        resident_units=tuple(unit for unit in units if all(placements[n] is Placement.DEVICE for n in unit.tensors)),
        slots=min(request.slots, len(streamed)),
        slot_nbytes=max((aligned(slab.slab_nbytes(request.specs)) for slab in streamed), default=0),
        device_budget=request.device_budget,
        cost=request.cost,
        policy=_name(policy),
        at_once=1 if tree is None else tree.at_once({n: slab.name for slab in streamed for n in slab.tensors}),
    )
    excess = made.device_nbytes - made.device_budget
    if excess > 0:
        raise PlanError(
            f'the policy "{made.policy}" takes {format_nbytes(made.device_nbytes)} on the device '
            f"({format_nbytes(made.resident_nbytes)} resident, {made.slots} slots of "
            f"{format_nbytes(made.slot_nbytes)}), which is {format_nbytes(excess)} more than "
            f"device_budget={format_nbytes(made.device_budget)}; raise the budget to the former, or place "
            "less there",
            smallest_budget=made.device_nbytes,
        )
    return made


def _smallest_budget(at: Callable[[int], Plan], fails: int, holds: int) -> int:
    """Find the least budget that has a plan, between one that has none and one that may have."""
    while True:
        try:
            at(holds)
            break
        except PlanError as error:
            if error.smallest_budget is None or error.smallest_budget <= holds:
                raise
            fails, holds = holds, error.smallest_budget
    while holds - fails > 1:
        middle = (fails + holds) // 2
        try:
            at(middle)
            holds = middle
        except PlanError:
            fails = middle
    return holds
