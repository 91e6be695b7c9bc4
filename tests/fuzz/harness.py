"""Run a fuzzer in a process of its own, under limits that the kernel keeps, so that a crash is seen and survived.

A fuzzer is a script whose properties are hypothesis tests. By hand, with more examples and another seed::

    python tests/fuzz/capsules.py --examples 20000 --seed 7
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import dlpoffload

__all__ = ["COUNTS", "GROWTH_NBYTES", "Outcome", "fuzz", "main", "noted"]

GROWTH_NBYTES: Final = 64 << 20
"""How much a fuzzer's memory may grow by bad input: the largest good one has some KiB."""
_SPACE_NBYTES: Final = 512 << 20
"""Address space beyond what the first, good example needed; stacks of reading threads are reserved, not used."""
_LIMIT_S: Final = 300

COUNTS: Final[Counter[str]] = Counter()
"""How examples ended, by whatever names a fuzzer gives."""
_trace: int | None = None


# ------------------------------------------------------------------------------------------------- in the tests


class Outcome(dict[str, Any]):
    """What a fuzzer printed: examples by property, endings by name, bytes."""


def fuzz(script: str, *arguments: str, folder: Path) -> Outcome:
    """Run a fuzzer; an AssertionError says how it died, and upon which example."""
    trace = folder / "example.txt"
    command = [sys.executable, "-P", str(Path(__file__).parent / script), "--trace", str(trace), *arguments]
    # One arena and no threads of numeric libraries: the address space of a process is then nearly what it uses.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(dlpoffload.__file__).parents[1])  # what these tests import
    with (folder / "out.txt").open("w+") as out, (folder / "err.txt").open("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=folder)
        try:
            process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        said, complaints = out.read(), err.read()
    if process.returncode:
        died = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit {process.returncode}"
        example = trace.read_text() if trace.exists() else "none was begun"
        raise AssertionError(f"{script}: {died}\nlast example: {example}\n{complaints[-8000:]}")
    return Outcome(json.loads(said.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------- in the process


def noted(example: object) -> None:
    """Write down which example is tried, for whoever finds this process dead."""
    if _trace is not None:
        text = ascii(example).encode()
        os.ftruncate(_trace, 0)
        os.pwrite(_trace, text, 0)


def _peak_nbytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _space_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main(warm_up: Callable[[], None], *properties: Callable[[], None]) -> None:
    """Run the properties of a fuzzer: what a script ends with.

    `warm_up` does once what good input does, so that whatever is loaded and started late is there; what grows after it
    is the input's doing.
    """
    import hypothesis

    global _trace
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=300, help="for each property")
    parser.add_argument("--seed", type=int, help="the same examples at every run by default")
    parser.add_argument("--trace", help="a file for the example that is tried")
    parser.add_argument("--no-limits", action="store_true", help="for sanitizers, which need terabytes of addresses")
    arguments = parser.parse_args()
    faulthandler.enable()
    if arguments.trace:
        _trace = os.open(arguments.trace, os.O_RDWR | os.O_CREAT, 0o600)
    settings = hypothesis.settings(
        max_examples=arguments.examples,
        deadline=None,
        database=None,
        derandomize=arguments.seed is None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(hypothesis.strategies.text())(lambda text: None))()  # it makes large tables, once
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _peak_nbytes()
    if not arguments.no_limits:
        most = _space_nbytes() + _SPACE_NBYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    examples = {}
    for run in properties:
        seeded = run if arguments.seed is None else hypothesis.seed(arguments.seed)(run)
        inner = seeded.hypothesis.inner_test  # type: ignore[attr-defined]
        count = Counter[str]()

        @functools.wraps(inner)
        def counted(*args: Any, inner: Any = inner, count: Counter[str] = count, **drawn: Any) -> None:
            count["tried"] += 1
            noted((inner.__name__, args, drawn))
            inner(*args, **drawn)

        seeded.hypothesis.inner_test = counted  # type: ignore[attr-defined]
        try:
            settings(seeded)()
        except BaseException:
            # A failed example's memory is held by its traceback; what becomes of that at the end is not the finding.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        examples[inner.__name__] = count["tried"]
    print(json.dumps({"examples": examples, "endings": COUNTS, "growth_nbytes": _peak_nbytes() - before}))
