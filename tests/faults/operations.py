"""What both sweeps share: their operations, what came of each, and how an attempt is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["OPERATIONS", "RESTART", "Operation", "Swept", "attempted", "causes", "operation", "table", "then"]

RESTART: Final = "restart the process"


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes
    ----------
    releases : bool
        It takes memory back: what is failed then may stay, where it is counted.
    keeps : bool
        It is several in a row, of which those that were done stay done.
    swallows : tuple of str
        Calls whose failure is no failure of the operation.
    deferred : bool
        Calls that need no context fail for good, too: they may give the errors of earlier work (CUDA driver API).
    """

    name: str
    prepare: Callable[[Any], Any]
    releases: bool = False
    keeps: bool = False
    swallows: tuple[str, ...] = ()
    deferred: bool = False


OPERATIONS: dict[str, Operation] = {}


def operation(name: str, **options: Any) -> Callable[[Any], Any]:
    def add(prepare: Any) -> Any:
        OPERATIONS[name] = Operation(name, prepare, **options)
        return prepare

    return add


@dataclass
class Swept:
    """What came of one operation."""

    operation: str
    calls: dict[str, int] = field(default_factory=dict)
    positions: int = 0
    faults: int = 0
    found: list[str] = field(default_factory=list)


def table(rows: Sequence[Swept]) -> str:
    """The table of the documentation."""
    lines = ["| operation | driver calls | positions | faults tried |", "|---|---|---|---|"]
    lines += [f"| {row.operation} | {len(row.calls)} | {row.positions} | {row.faults} |" for row in rows]
    called = {call for row in rows for call in row.calls}
    positions, faults = sum(row.positions for row in rows), sum(row.faults for row in rows)
    return "\n".join([*lines, f"| **all {len(rows)}** | **{len(called)}** | **{positions}** | **{faults}** |"])


def attempted(act: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What it gave, and what it raised."""
    try:
        return act(), None
    except BaseException as error:
        _forget_frames(error)
        return None, error


def _forget_frames(error: BaseException | None) -> None:
    """A traceback holds the memory of whoever raised."""
    while error is not None:
        error.__traceback__ = None
        _forget_frames(error.__cause__)
        error = error.__context__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def then(words: str, act: Callable[[], Any]) -> list[str]:
    """What is wrong when something that must work afterwards does not."""
    _, error = attempted(act)
    return [] if error is None else [f"{words}: {error!r}"]
