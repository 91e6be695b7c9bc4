"""The command ``dlpoffload``: argument parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from . import __version__
from .errors import DriverNotFoundError, OffloadError, SpecError

__all__ = ["main"]

_MARKS: Final = {
    "ok": ("✓", "green"),
    "note": ("!", "yellow"),
    "missing": ("·", "yellow"),
    "failed": ("✗", "bold red"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0 when what is there works, 1 when a check failed, 2 when the question was wrong.
    """
    parser = argparse.ArgumentParser(
        prog="dlpoffload", description="Host memory for model weights, handed out as DLPack."
    )
    parser.add_argument("--version", action="version", version=f"dlpoffload {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="show what is on this machine, and probe that it works",
        description="Shows driver, devices, memory and its real limits, link rate and frameworks, and probes "
        "that host and device see each other's writes. Exit code 0: what is there works; 1: a check failed; "
        "2: there is no such device.",
    )
    doctor.add_argument(
        "--device",
        metavar="NAME",
        help='what to examine: "cuda:0", "cpu" (default: the first that is there)',
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object; bytes are ints")
    arguments = parser.parse_args(argv)
    return _doctor(arguments.device, as_json=arguments.json)


def _doctor(device: str | None, *, as_json: bool) -> int:
    from .doctor import examine

    try:
        report = examine(device)
    except OffloadError as error:
        print(f"dlpoffload doctor: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError | DriverNotFoundError) else 1
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["healthy"] else 1


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(
        f"[bold]dlpoffload {report['dlpoffload']}[/bold]  on {report['device']}  "
        f"[dim]{report['system']}, Python {report['python']}[/dim]"
    )
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(width=1)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for check in report["checks"].values():
        mark, style = _MARKS[check["status"]]
        words = Text("\n".join(check["says"]))
        if check["remedy"]:
            words.append(f"\n→ {check['remedy']}", style="yellow")
        table.add_row(Text(mark, style=style), check["title"], words)
    console.print(table)
    failed = [check["title"] for check in report["checks"].values() if check["status"] == "failed"]
    if failed:
        console.print(f"[bold red]{len(failed)} failed: {', '.join(failed)}[/bold red]")
    else:
        console.print("[green]What is here works.[/green]")
