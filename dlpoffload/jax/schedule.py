"""When each unit is staged: a ring of slots, played through over the steps of a program.

The order of the steps is known, so it is known which unit is used when. A unit that is needed and not in the ring takes
the slot of the one that is needed again last, and its copy may start as soon as that one's last reader has ended: at
the boundary behind that window. This is what makes the look-ahead, and what bounds the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ..errors import PlanError
from ..spec import format_nbytes
from .program import Id, Program

__all__ = ["Copy", "Schedule", "Window", "schedule"]

_SPARE_SHARE: Final = 50
_SPARE_NBYTES: Final = 64 << 10
"""What may be kept on the device beside the ring: one in so many bytes of it, or so many."""


@dataclass(slots=True)
class Window:
    """Steps behind each other that use the same units."""

    start: int
    units: frozenset[str]
    scans: bool = False
    end: int = 0


@dataclass(slots=True, eq=False)
class Copy:
    """One staging of a unit.

    Attributes
    ----------
    unit : str
    weights : set of int
        The arguments that are used while it is in the ring.
    boundary : int
        The window before which it is made.
    behind : int or None
        The first window whose results must be there before: those that used the slot's former unit; None where the
        slot was free.
    """

    unit: str
    boundary: int
    behind: int | None
    weights: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Schedule:
    windows: list[Window]
    copies: list[Copy]
    copy_of: list[dict[str, Copy]]
    """For each window, from unit to the copy that it reads."""


@dataclass(slots=True, eq=False)
class _Slot:
    copy: Copy | None = None
    first_use: int | None = None
    last_use: int = -1


def schedule(program: Program, slots: int) -> Schedule:
    """Play the ring through.

    Raises
    ------
    PlanError
        One step needs more units than there are slots, or units beside the stack that it scans.
    """
    windows = _windows(program)
    uses: dict[str, list[int]] = {}
    for index, window in enumerate(windows):
        for unit in window.units:
            uses.setdefault(unit, []).append(index)
    ring = [_Slot() for _ in range(slots)]
    made = Schedule(windows, [], [])
    for index, window in enumerate(windows):
        if len(window.units) > slots or (window.scans and window.units):
            raise _too_many(program, window, slots)
        if window.scans:  # it has the ring for itself
            for slot in ring:
                slot.copy, slot.first_use, slot.last_use = None, index, index
        for unit in sorted(window.units):
            found = next((s for s in ring if s.copy is not None and s.copy.unit == unit), None)
            if found is None:
                found = min(
                    (s for s in ring if s.copy is None or s.copy.unit not in window.units),
                    key=lambda s: (-_next_use(s, uses, index), s.last_use),
                )
                found.copy = Copy(unit, found.last_use + 1, found.first_use)
                found.first_use = index
                made.copies.append(found.copy)
            found.last_use = index
        made.copy_of.append({s.copy.unit: s.copy for s in ring if s.copy is not None and s.copy.unit in window.units})
        for step in program.steps[window.start : window.end]:
            for weight in step.weights:
                made.copy_of[-1][program.homes[weight].unit].weights.add(weight)
    _check_kept(program, made, slots)
    return made


def _check_kept(program: Program, made: Schedule, slots: int) -> None:
    """Refuse a program that keeps weights on the device by another name."""
    window_of: dict[Id, int] = {}
    last_use: dict[Id, int] = {}
    for index, window in enumerate(made.windows):
        for step in program.steps[window.start : window.end]:
            window_of.update((result, index) for result in step.outputs)
            last_use.update((atom, index) for atom in step.inputs if isinstance(atom, Id))
    last_use.update((atom, len(made.windows)) for atom in program.outputs if isinstance(atom, Id))

    def kept(made: Mapping[Id, int]) -> int:
        return sum(n for result, n in made.items() if last_use.get(result, -1) > window_of[result])

    slot = max((sum(program.homes[weight].spec.nbytes for weight in copy.weights) for copy in made.copies), default=0)
    slot += sum(program.homes[s].spec.nbytes // program.homes[s].rows for step in program.steps for s in step.stacks)
    copies, merged = kept(program.copies), kept(program.merged)
    remedy = (
        "They would stay on the device for all units at once; put jax.checkpoint around the block, or around the body "
        "of a scan, so that they are made again"
    )
    # Scales with one added, and the like, are small.
    if copies > max(slots * slot // _SPARE_SHARE, _SPARE_NBYTES):
        raise PlanError(
            f"{format_nbytes(copies)} that are computed from staged weights alone are kept for later, most often for a "
            f"backward pass: casts, or weights that were unpacked. {remedy}"
        )
    if copies + merged > slot:
        raise PlanError(
            f"{format_nbytes(copies + merged)} that are as large as the staged weights that they are computed from are "
            f"kept for later, most often for a backward pass: weights with an adapter merged into them. {remedy}, or "
            "apply the adapter to the activations: x @ w + x @ a @ b"
        )


def _next_use(slot: _Slot, uses: dict[str, list[int]], now: int) -> float:
    if slot.copy is None:
        return float("inf")
    return next((use for use in uses[slot.copy.unit] if use >= now), float("inf"))


def _windows(program: Program) -> list[Window]:
    windows = [Window(0, frozenset())]
    for index, step in enumerate(program.steps):
        units = frozenset(program.homes[weight].unit for weight in step.weights)
        scans = bool(step.stacks)
        if scans or (units and not units <= windows[-1].units) or (windows[-1].scans and units):
            windows[-1].end = index
            windows.append(Window(index, units, scans))
    windows[-1].end = len(program.steps)
    return windows


def _too_many(program: Program, window: Window, slots: int) -> PlanError:
    names = sorted(window.units)
    listed = ", ".join(f'"{name}"' for name in names[:4]) + (" …" if len(names) > 4 else "")
    step = program.steps[window.start]
    what = step.equation.primitive.name
    if window.scans:
        return PlanError(
            f'"{what}" scans a staged stack and uses {listed} at each turn; place those on the device or map them: '
            f'policy=pattern_policy({{"{names[0]}*": "device"}})'
        )
    loop = "call handle.streamed inside of the loop's body, " if what in ("while", "scan") else ""
    return PlanError(
        f'"{what}" uses {len(names)} units at once ({listed}), but the ring has {slots} slots; {loop}raise slots, make '
        "them one unit (units=), or map them"
    )
