"""The table of suites in docs/reliability.md, held against what is collected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["check_row", "functions_of"]

_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def functions_of(*owners: Any) -> list[Any]:
    """The tests of modules' namespaces and classes."""
    spaces = [vars(owner) if inspect.isclass(owner) else owner for owner in owners]
    return [found for space in spaces for name, found in space.items() if name.startswith("test_") and callable(found)]


def check_row(suite: str, functions: Iterable[Any]) -> None:
    """Fail where the row of one suite has other counts of cases, passed and excluded than its tests make.

    Excluded is what is expected to fail: `xfail_strict` makes a failure of every such case that passes.
    """
    if not _PAGE.exists():
        pytest.skip("docs/reliability.md is not beside these tests")
    cases = passed = 0
    for function in functions:
        axes = [mark.args[1] for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        cases += math.prod(len(axis) for axis in axes)
        if not any(mark.name == "xfail" for mark in getattr(function, "pytestmark", [])):
            passed += math.prod(sum(not _excluded(value) for value in axis) for axis in axes)
    counts = [str(cases), str(passed), str(cases - passed)]
    row = _row(suite)
    if row is None:
        pytest.skip(f"docs/reliability.md has no row of {suite}, which here is to say {' | '.join(counts)}")
    assert row[:3] == counts, f"the row of {suite} is to say {' | '.join(counts)}"


def _excluded(value: Any) -> bool:
    return any(mark.name == "xfail" for mark in getattr(value, "marks", ()))


def _row(suite: str) -> list[str] | None:
    """Cells behind the first: cases, must pass, excluded, reasons."""
    _, _, section = _PAGE.read_text().partition("\n## Peers' suites\n")
    assert section, "docs/reliability.md has no section of peers' suites"
    for line in section.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == suite:
            return cells[1:]
    return None
