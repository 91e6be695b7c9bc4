"""A plan as a table."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import chain

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..spec import format_nbytes
from .plans import Plan
from .request import Placement

__all__ = ["render", "to_text"]

_WIDTH = 100
_STRIP = 64
_RESIDENT, _STREAMED, _MAPPED = "\N{BLACK SQUARE}", "\N{WHITE SQUARE}", "\N{MIDDLE DOT}"


def to_text(plan: Plan) -> str:
    """Lay the table out as plain text, 100 columns wide."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(render(plan))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def render(plan: Plan) -> Group:
    """Table, strip of units and what a step costs."""
    table = Table(title=f'plan by the policy "{plan.policy}"', title_justify="left")
    table.add_column("where")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("why")
    total = plan.total_nbytes
    for placement in Placement:
        by_reason: dict[str, list[str]] = {}
        for name in plan.names(placement):
            by_reason.setdefault(plan.reasons[name], []).append(name)
        nbytes = plan.nbytes(placement)
        why = next(iter(by_reason), "") if len(by_reason) < 2 else ""
        table.add_row(placement.value, str(len(plan.names(placement))), _nbytes(nbytes), _share(nbytes, total), why)
        for reason, names in by_reason.items() if len(by_reason) > 1 else ():
            part = sum(plan.specs[name].nbytes for name in names)
            table.add_row("", str(len(names)), _nbytes(part), _share(part, total), reason, style="dim")
    table.add_section()
    table.add_row("weights", str(len(plan.specs)), _nbytes(total), _share(total, total), "")
    table.add_row("ring", "", _nbytes(plan.ring_nbytes), "", f"{plan.slots} slots of {_nbytes(plan.slot_nbytes)}")
    table.add_row(
        "on the device",
        "",
        _nbytes(plan.device_nbytes),
        _share(plan.device_nbytes, plan.device_budget),
        f"of the budget of {_nbytes(plan.device_budget)}; residents and ring",
    )
    lines = []
    if plan.units:
        lines.append(Text(f"units  {_strip(plan)}  {_RESIDENT} resident {_STREAMED} streamed"))
    if plan.streamed_units:
        lines.append(
            Text(
                f"link   {format_nbytes(plan.nbytes(Placement.HOST_STAGED))} when every streamed unit runs "
                f"once: {plan.link_seconds * 1e3:.3g} ms at {plan.cost.link_gb_per_s:g} GB/s"
            )
        )
    return Group(table, *lines)


def _strip(plan: Plan) -> str:
    """One sign a unit, in order; the middle of a long row is left out."""
    resident = {unit.name for unit in plan.resident_units}
    streamed = {unit.name for unit in plan.streamed_units}
    signs = [_RESIDENT if u.name in resident else _STREAMED if u.name in streamed else _MAPPED for u in plan.units]
    if len(signs) <= _STRIP:
        return "".join(signs)
    half = (_STRIP - 10) // 2
    kept: Iterable[str] = chain(signs[:half], f" …{len(signs) - 2 * half}… ", signs[-half:])
    return "".join(kept)


def _nbytes(nbytes: int) -> str:
    """The readable half of `format_nbytes`, when there is one."""
    exact, _, readable = format_nbytes(nbytes).partition(" (")
    return readable.rstrip(")") or exact


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
