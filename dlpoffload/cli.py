"""The command ``dlpoffload``: argument parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from . import __version__
from .errors import CheckpointError, DriverNotFoundError, OffloadError, SpecError
from .spec import format_nbytes

__all__ = ["main"]

_MARKS: Final = {
    "ok": ("✓", "green"),
    "note": ("!", "yellow"),
    "missing": ("·", "yellow"),
    "failed": ("✗", "bold red"),
}
_ALIKE: Final = str.maketrans({"✓": "+", "·": "-", "✗": "x", "→": ">", "…": "~", "×": "x"})
"""For a stream that has ASCII alone: as wide, so that columns stay."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0 when what is there works, 1 when a check failed, 2 when the question was wrong; 130 or 143 when it was
        interrupted (SIGINT) or terminated (SIGTERM), after what was half done is taken back, and 141 when nobody
        reads its output any more (SIGPIPE).
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
    align = commands.add_parser(
        "align",
        help="rewrite a checkpoint so that it can be mapped as it is",
        description="Rewrites a safetensors file, or a sharded checkpoint, with its tensors aligned in the file, so "
        "that kernels can read them from the page cache. No value changes. Exit code 0: written; 2: it could not be.",
    )
    align.add_argument("source", metavar="IN", help="a safetensors file, an index, or a folder with either")
    align.add_argument("target", metavar="OUT", help="a file for a file, a folder for a sharded checkpoint")
    check = commands.add_parser(
        "open",
        help="open a checkpoint and say how: mapped from the page cache, or copied",
        description="Opens a checkpoint on a device, as offloading does, and shows what it costs. Exit code 0: it can "
        "be opened; 1: not so; 2: there is no such checkpoint or device.",
    )
    check.add_argument("source", metavar="PATH", help="a safetensors file, an index, or a folder with either")
    check.add_argument("--mode", choices=("map", "copy", "auto"), default="auto", help="default: auto")
    check.add_argument("--device", metavar="NAME", help='"cuda:0", "cpu" (default: the first that is there)')
    check.add_argument("--host-budget", metavar="BYTES", help='what may be pinned in all, for example "64GiB"')
    check.add_argument("--json", action="store_true", help="print one JSON object; bytes are ints")
    arguments = parser.parse_args(argv)
    try:
        with _terminable():
            code = _run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a broken pipe is caught
            return code
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        print(f"dlpoffload {arguments.command}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "align":
        return _align(arguments.source, arguments.target)
    if arguments.command == "open":
        return _open(arguments)
    return _doctor(arguments.device, as_json=arguments.json)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as the exception that SIGINT is: what is half done is taken back, and its files are removed."""


@contextmanager
def _terminable() -> Iterator[None]:
    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # who embeds the command has its own way
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _drop_output() -> None:
    """What is not written yet would be tried again, with a traceback, when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)


def _say(text: str) -> None:
    """Print a line; what the stream cannot encode as something alike, or else as its code."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ALIKE).encode(encoding, "backslashreplace").decode(encoding)
    print(text)


def _align(source: str, target: str) -> int:
    from .checkpoint import align

    try:
        with _progress("writing") as progress:
            done = align(source, target, progress)
    except OffloadError as error:
        print(f"dlpoffload align: {error}", file=sys.stderr)
        return 2
    for path in done.files:
        _say(str(path))
    _say(f"{done.aligned_after} of {done.tensors} tensors on 16 bytes, {done.aligned_before} before")
    return 0


def _open(arguments: argparse.Namespace) -> int:
    from .store import HostStore

    started = time.monotonic()
    try:
        with (
            _progress("pinning") as progress,
            HostStore.open(
                arguments.source,
                mode=arguments.mode,
                device=arguments.device,
                host_budget=arguments.host_budget,
                progress=progress,
            ) as store,
        ):
            facts = {
                "device": store.device,
                "mode": store.mode,
                "because": store.because,
                "tensors": len(store),
                "nbytes": store.nbytes,
                "pinned_nbytes": store.pinned_nbytes,
                "file_nbytes": store.file_nbytes,
                "unaligned": len(store.unaligned),
                "notes": list(store.notes),
                "seconds": round(time.monotonic() - started, 3),
            }
    except OffloadError as error:
        print(f"dlpoffload open: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError | DriverNotFoundError | CheckpointError) else 1
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    _say(f"{facts['mode']} on {facts['device']}: {facts['because']}")
    _say(f"{facts['tensors']} tensors, {format_nbytes(store.nbytes)}, in {facts['seconds']} s")
    _say(f"pinned {format_nbytes(int(str(facts['pinned_nbytes'])))}, of which in the page cache {facts['file_nbytes']}")
    if facts["unaligned"]:
        _say(f"{facts['unaligned']} tensors are not on 16 bytes: `dlpoffload align` rewrites the checkpoint")
    for note in store.notes:
        _say(note)
    return 0


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, on standard error; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
    console.begin_capture()  # rich says 1, "a check failed", to a broken pipe
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
    _say(console.end_capture().rstrip("\n"))
