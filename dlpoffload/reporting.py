"""`Rows`: what a report is printed as, whichever adapter made it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Rows"]


class Rows:
    """Base of the adapters' reports: names and values, printed as a table of two columns."""

    __slots__ = ()

    def rows(self) -> list[tuple[str, str]]:
        """What is printed, as name and value."""
        raise NotImplementedError

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="offload report", show_header=False, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=100, color_system=None).print(self)
        return out.getvalue().rstrip()
