"""The table of suites in docs/reliability.md, which tests hold against what they run."""

from __future__ import annotations

from pathlib import Path

import pytest

__all__ = ["suite_row"]

_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def suite_row(name: str) -> list[str] | None:
    """Cells behind the first of the row of one suite: cases, passed, excluded, reasons; None without such a row."""
    if not _PAGE.exists():
        pytest.skip("docs/reliability.md is not beside these tests")
    _, _, section = _PAGE.read_text().partition("\n## Peers' suites\n")
    assert section, "docs/reliability.md has no section of peers' suites"
    for line in section.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == name:
            return cells[1:]
    return None
