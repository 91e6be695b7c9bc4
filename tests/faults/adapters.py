"""Fail each driver call of each of the adapters' operations at each position, and look at the bits and at what is left.

    python tests/faults/adapters.py                     every operation; what was found, and the table of positions
    python tests/faults/adapters.py "torch: a step"     these operations
    python tests/faults/adapters.py --json ...          for the tests

No framework computes over the fake library of `sweep`, so here it is the calls of the `Driver` protocol that fail, one
layer above, on the CPU driver, and torch's own allocations for the device. Each position is tried with a failure that
passes, with one after which every call fails alike, and with the call's own refusal where there is an error for it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

from operations import OPERATIONS, RESTART, Operation, Swept, attempted, causes, table, then

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.driver import installed
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import AliasError, CudaError, DeviceMemoryError, HostMemoryError, OffloadError, RegistrationError

__all__ = ["Bench", "Case"]

TIMEOUT_S: Final = 60
SETTLE_S: Final = 1.0
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
CALLS: Final = (
    "device_memory_info",
    "synchronize",
    "host_alloc",
    "host_free",
    "host_register",
    "host_unregister",
    "host_device_pointer",
    "pointer_info",
    "device_alloc",
    "device_free",
    "stream_create",
    "stream_destroy",
    "stream_synchronize",
    "stream_wait_event",
    "capture_id",
    "event_create",
    "event_destroy",
    "event_record",
    "event_query",
    "event_synchronize",
    "event_elapsed_ms",
    "copy_async",
    "copy",
    "fill_async",
)
"""Of the protocol, what can fail in the driver's hands; `current` and `relaxed` are swept below it."""
ALLOCATES: Final = "torch.empty"
RELEASES: Final = ("host_free", "host_unregister", "device_free")
DESTROYS: Final = ("stream_destroy", "event_destroy")
REFUSALS: Final[dict[str, Callable[[str], OffloadError]]] = {
    "host_alloc": lambda words: HostMemoryError(words, nbytes=1),
    "host_register": RegistrationError,
    "host_device_pointer": AliasError,
    "device_alloc": lambda words: DeviceMemoryError(words, nbytes=1),
    ALLOCATES: lambda words: DeviceMemoryError(words, nbytes=1),
}


# ------------------------------------------------------------------------------------------------ what fails
@dataclass(frozen=True)
class Fault:
    """One thing to try: the nth use of a call, and how it fails."""

    call: str
    nth: int
    kind: str
    """"passing", "sticky" or "refused"."""

    def __str__(self) -> str:
        return f"{self.call} #{self.nth} ({self.kind})"

    def error(self) -> OffloadError:
        if self.kind == "refused":
            return REFUSALS[self.call](f"{self.call} is refused")
        if self.kind == "sticky":
            return CudaError(self.call, 700, "CUDA_ERROR_ILLEGAL_ADDRESS", RESTART)
        return CudaError(self.call, 999, "CUDA_ERROR_UNKNOWN")


class FaultyDriver(CpuDriver):
    """A CPU driver that counts its calls, and fails one of them, or all from there on."""

    def __init__(self) -> None:
        super().__init__()
        self.used: Counter[str] = Counter()
        self.order: list[str] = []
        self.fault: Fault | None = None
        self.fired: OffloadError | None = None
        self._counting = threading.Lock()
        self._inside = threading.local()
        for call in CALLS:
            setattr(self, call, self.guarded(call, getattr(self, call)))

    def begin(self, fault: Fault | None = None) -> None:
        """Count from here."""
        with self._counting:
            self.used.clear()
            self.order.clear()
            self.fault, self.fired = fault, None

    def guarded(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, but where it is to fail."""

        def called(*arguments: Any, **options: Any) -> Any:
            if getattr(self._inside, "it", False):  # one call that makes use of another
                return function(*arguments, **options)
            self._count(call)
            self._inside.it = True
            try:
                return function(*arguments, **options)
            finally:
                self._inside.it = False

        return called

    def _count(self, call: str) -> None:
        with self._counting:
            self.used[call] += 1
            self.order.append(call)
            fault = self.fault
            if fault is None:
                return
            if self.fired is not None:
                if fault.kind == "sticky":
                    raise fault.error()
                return
            if fault.call == call and fault.nth == self.used[call]:
                self.fired = fault.error()
                raise self.fired


# ------------------------------------------------------------------------------------------------ operations
@dataclass
class Case:
    """An operation that is prepared.

    Attributes
    ----------
    act
        Does it.
    check
        Raises AssertionError where bits are wrong, whether `act` came to its end or not.
    close
        Gives everything back, and checks what is left to look at.
    again
        Does it once more, after it failed.
    """

    act: Callable[[], None]
    check: Callable[[], None]
    close: Callable[[], None]
    again: Callable[[], None] | None = None


@dataclass
class Bench:
    """What an operation has to work with."""

    driver: FaultyDriver
    stack: ExitStack
    folder: Path


# ------------------------------------------------------------------------------------------------ one position
@dataclass(frozen=True)
class Alive:
    """What is alive in this process."""

    pinned_nbytes: int
    buffers: Counter[tuple[str, int]]
    threads: Counter[str]

    def more_than(self, before: Alive) -> list[str]:
        """What is here that was not; of what earlier positions left, some may be gone."""
        wrong = []
        if self.buffers - before.buffers:
            wrong.append(f"buffers are left: {self.buffers - before.buffers}")
        if self.pinned_nbytes > before.pinned_nbytes:
            wrong.append(f"{self.pinned_nbytes - before.pinned_nbytes} bytes stay pinned")
        if threads := self.threads - before.threads:
            wrong.append(f"threads are left: {threads}")
        return wrong


def look() -> Alive:
    names = (re.sub(r"\d+", "#", thread.name) for thread in threading.enumerate())
    threads = Counter(name for name in names if name.startswith("dlpoffload") and name != "dlpoffload-reclaim")
    return Alive(dlpo.pinned_nbytes(), Counter(dlpo.live_buffers()), threads)


def left(before: Alive, wait_s: float = SETTLE_S) -> list[str]:
    """What is left; other threads may still free something, and have the time."""
    deadline = time.monotonic() + wait_s
    while True:
        gc.collect()
        lifetime.drain()
        found = look().more_than(before)
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.005)


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """A driver of its own for each position, which stands in the CPU driver's place."""
    with ExitStack() as stack:
        driver = FaultyDriver()
        stack.callback(driver.begin)
        stack.enter_context(installed(driver))
        if placed := sys.modules.get("dlpoffload.torch.placed"):
            before = placed.empty_bytes
            stack.callback(setattr, placed, "empty_bytes", before)
            placed.empty_bytes = driver.guarded(ALLOCATES, before)
        yield Bench(driver, stack, folder)


def attempt(operation: Operation, folder: Path, fault: Fault) -> list[str]:
    """Fail one call once; what is wrong afterwards, in words."""
    wrong: list[str] = []
    gc.collect()
    lifetime.drain()
    gc.freeze()  # frameworks are large, and what a lost context left is no garbage of this position's
    untouched = look()
    unheard: list[BaseException | None] = []
    sys.unraisablehook = lambda report: unheard.append(report.exc_value)
    with bench(folder) as made_bench:
        case = operation.prepare(made_bench)
        driver = made_bench.driver
        before = look()
        driver.begin(fault)
        _, raised = attempted(case.act)
        fired = driver.fired
        if fired is None:
            collected = fault.call in RELEASES and raised is None  # memory in cycles is freed sooner or later
            return [] if collected else [f"it was not reached{f': {raised!r}' if raised else ''}"]
        wrong += _error(operation, fault, raised, unheard)
        if fault.kind == "sticky":
            return wrong + _lost(case)
        driver.begin()
        fired.__traceback__ = None
        if raised is not None and not (operation.releases or operation.keeps or fault.call in (*RELEASES, *DESTROYS)):
            wrong += [f"at once, {words}" for words in left(before)]
        wrong += then("bits", case.check)
        if raised is not None:
            wrong += then("it cannot be done again", case.again or case.act)
            wrong += then("bits, when it was done again", case.check)
        wrong += then("it cannot be closed", case.close)
        del case, made_bench, driver, raised, fired
    unheard.clear()
    if fault.call in (*RELEASES, *DESTROYS) or operation.releases:
        return wrong + _uncounted(untouched, fault)
    return wrong + left(untouched)


def _error(operation: Operation, fault: Fault, raised: BaseException | None, unheard: Sequence[Any]) -> list[str]:
    """The right error was raised."""
    failed = raised or next(iter(unheard), None)
    if failed is None:
        swallowed = fault.call in operation.swallows and fault.kind != "sticky"
        return [] if swallowed else ["no error"]
    wrong = []
    if not isinstance(failed, OffloadError):
        wrong.append(f"the error is {failed!r}")
    if not any(fault.call in str(each) for each in causes(failed)) and fault.kind != "sticky":
        wrong.append(f"the error does not name the call: {failed!r}")
    if fault.kind == "sticky" and not any(RESTART in str(each) for each in causes(failed)):
        wrong.append(f"the error does not say to restart: {failed!r}")
    return wrong


def _lost(case: Case) -> list[str]:
    """After an error that stays, nothing computes: a step raises, and says why; closing comes to an end."""
    wrong = []
    _, error = attempted(case.check)
    if isinstance(error, AssertionError):
        wrong.append(f"bits: {error}")
    elif error is not None and not any(RESTART in str(each) for each in causes(error)):
        wrong.append(f"the next operation does not say to restart: {error!r}")
    _, error = attempted(case.close)
    if error is not None and not any(RESTART in str(each) for each in causes(error)):
        wrong.append(f"closing does not say to restart: {error!r}")
    return wrong


def _uncounted(before: Alive, fault: Fault) -> list[str]:
    """What could not be freed is counted and listed; nothing else is left."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        # Of memory that is kept there is no use to wait; a stream's thread ends a moment after it.
        found = left(before, 0.0 if fault.call in RELEASES else SETTLE_S)
        if not any(words.startswith("threads") for words in found) or time.monotonic() >= deadline:
            break
    after = look()
    listed = sum(-(-nbytes // PAGE) * PAGE for _, nbytes in (after.buffers - before.buffers).elements())
    if after.pinned_nbytes - before.pinned_nbytes <= listed:
        found = [words for words in found if words.startswith("threads")]
    return [] if fault.call == "stream_destroy" else found  # a stream of the CPU driver is a thread


# ----------------------------------------------------------------------------------------------- an operation
def count(operation: Operation, folder: Path) -> dict[str, int]:
    """The calls of an operation that nothing fails."""
    with bench(folder) as made_bench:
        case = operation.prepare(made_bench)
        made_bench.driver.begin()
        case.act()
        used = dict(made_bench.driver.used)
        made_bench.driver.begin()
        case.check()
        case.close()
    return used


def sweep(operation: Operation, folder: Path, *, count_only: bool = False) -> Swept:
    """Try every position of an operation, or count them only."""
    count(operation, folder)  # what is made once is by now
    calls = count(operation, folder)
    swept = Swept(operation.name, calls, sum(calls.values()))
    for call, uses in swept.calls.items():
        kinds = ["passing", "sticky", *(["refused"] if call in REFUSALS else [])]
        for fault in (Fault(call, nth, kind) for nth in range(1, uses + 1) for kind in kinds):
            swept.faults += 1
            if count_only:
                continue
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
            swept.found += [f"{fault}: {words}" for words in attempt(operation, folder, fault)]
            faulthandler.cancel_dump_traceback_later()
    return swept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help="all by default")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each operation")
    parser.add_argument("--count", action="store_true", help="fail nothing; the table only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = arguments.operations
    for framework in ("torch", "jax"):
        if not chosen or any(name.startswith(framework) for name in chosen):
            importlib.import_module(f"adapters_{framework}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for each in [OPERATIONS[name] for name in chosen] if chosen else list(OPERATIONS.values()):
            start = time.monotonic()
            rows.append(row := sweep(each, Path(name), count_only=arguments.count))
            if arguments.json:
                print(json.dumps(asdict(row)), flush=True)
            else:
                seconds = time.monotonic() - start
                print(f"{row.operation}: {row.faults} faults, {len(row.found)} found, {seconds:.1f} s", file=sys.stderr)
                for words, times in Counter(re.sub(r"#\d+|0x[0-9a-f]+", "#", text) for text in row.found).items():
                    print(f"  {times} x {words}", file=sys.stderr)
    if not arguments.json:
        print(table(rows))
    return int(any(row.found for row in rows))


if __name__ == "__main__":
    sys.modules["adapters"] = sys.modules["__main__"]  # where the operations add themselves
    sys.exit(main())
