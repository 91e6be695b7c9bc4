"""Fail each driver call of each public operation at each position, and look at what is left.

    python tests/faults/sweep.py                    every operation; what was found, and the table of positions
    python tests/faults/sweep.py "SlotRing.close"   these operations
    python tests/faults/sweep.py --json ...         for the tests

Every position is tried in a forked child of its own, once with a failure that passes and once with one that does not,
and where the call has a refusal with an error of its own, with that, too.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import re
import select
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import operations_memory  # noqa: F401
import operations_rings  # noqa: F401
import operations_stores  # noqa: F401 - they add their operations
from bench import DEVICE, Bench, write_checkpoint
from fake import FakeCuda, build
from operations import OPERATIONS, RESTART, Operation, Swept, attempted, causes, table, then
from watching import look, settle

import dlpoffload as dlpo
from dlpoffload import pages
from dlpoffload.doctor import Machine
from dlpoffload.driver import open_driver
from dlpoffload.errors import AliasError, CudaError, DeviceMemoryError, HostMemoryError, OffloadError, RegistrationError
from dlpoffload.host_checks import check_pinned
from dlpoffload.limits import host_limits

UNKNOWN, ILLEGAL_ADDRESS = 999, 700
TIMEOUT_S: Final = 30
_NUMBERS: Final = re.compile(r"#\d+|0x[0-9a-f]+")
RELEASES: Final = ("cuMemHostUnregister", "cuMemFree", "cuMemFreeHost")
DESTROYS: Final = ("cuStreamDestroy", "cuEventDestroy", "cuGraphRetainUserObject", "cuUserObjectRelease")
"""Calls that leave a handle of the driver's behind when they fail."""
THREAD_CALLS: Final = ("cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode")
FREE_STANDING: Final = (
    *THREAD_CALLS,
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain",
)
"""Calls that are made in no context, and so lose none."""
REFUSALS: Final[dict[str, tuple[int, tuple[type[OffloadError], ...]]]] = {
    # call: a result that is a refusal, and the errors that may become of it
    "cuMemAlloc": (2, (DeviceMemoryError,)),
    "cuMemHostRegister": (2, (HostMemoryError, RegistrationError)),
    "cuMemHostUnregister": (713, (RegistrationError,)),
    "cuMemHostGetDevicePointer": (1, (AliasError,)),
}


@dataclass(frozen=True)
class Fault:
    """One thing to try: the nth use of a call, and what it fails with."""

    call: str
    nth: int
    code: int
    sticky: bool = False

    def __str__(self) -> str:
        return f"{self.call} #{self.nth} fails with {self.code}{', and so does all after it' if self.sticky else ''}"


# ------------------------------------------------------------------------------------------------ one position
def attempt(operation: Operation, fake: FakeCuda, folder: Path, fault: Fault) -> list[str]:
    """Fail one call once, in this process; what is wrong afterwards, in words."""
    wrong: list[str] = []
    reported: list[BaseException | None] = []
    sys.unraisablehook = lambda report: reported.append(report.exc_value)
    untouched = look(fake, folder, whole=False)  # no handle is made yet, nothing mapped
    stack = ExitStack()
    bench = Bench(stack, folder, fake)
    act, undo = operation.prepare(bench)
    before = look(fake, folder, whole=False)
    fake.fail(fault.call, fault.nth, fault.code, sticky=fault.sticky)
    result, raised = attempted(act)
    if not fake.fired():
        return [f"it was not reached{f': {raised!r}' if raised else ''}"]
    wrong += _thread(fake, fault)
    failed = raised or next(iter(reported), None)
    wrong += _error(operation, fault, failed, result)
    # What is kept stays; what another thread frees is gone soon.
    wait_s = 0.0 if fault.sticky or operation.releases or fault.call in RELEASES else 1.0
    kept = settle(fake, folder, before, wait_s, whole=False) if raised or reported else before
    wrong += _left(operation, fault, before, kept)
    if fault.sticky:
        _, refused = attempted(lambda: _anything(act))
        if refused is None or RESTART not in str(refused):
            wrong.append(f"the next operation does not say to restart: {refused!r}")
        return wrong + fake.violations()
    if not raised:
        undo(result)
    del result
    wrong += then("it cannot be done again", lambda: undo(act()))
    wrong += then("nothing else works", lambda: _anything(lambda: None))
    act = undo = _gone
    wrong += then("what was prepared cannot be closed", stack.close)
    del bench, stack
    wrong += _left(operation, fault, untouched, settle(fake, folder, untouched, wait_s))
    return wrong + fake.violations()


def _gone(_: object = None) -> None:
    """In the place of what would hold memory."""


def _anything(act: Callable[[], Any]) -> None:
    """Use memory of both kinds, and what `act` does."""
    with (
        dlpo.HostBuffer.allocate(1 << 16, device=DEVICE) as host,
        dlpo.DeviceBuffer.allocate(1 << 16, device=DEVICE) as device,
    ):
        open_driver(DEVICE).copy(device.device_pointer, host.host_pointer, 1 << 16)
        act()


def _thread(fake: FakeCuda, fault: Fault) -> list[str]:
    """The thread's contexts and mode are as they were, unless it is the putting back that failed."""
    depth, mode = fake.thread()
    fake.reset_thread()
    if fault.call in THREAD_CALLS:
        return [] if depth <= 1 else [f"{depth} contexts are left on the thread"]
    return [] if (depth, mode) == (0, 0) else [f"{depth} contexts and capture mode {mode} are left on the thread"]


def _error(operation: Operation, fault: Fault, failed: BaseException | None, result: Any) -> list[str]:
    """The right error was raised."""
    if failed is None:
        if fault.call in operation.swallows or _is_said(operation, fault, result):
            return []
        return [f"no error; it returned {str(result)[:80]}"]
    refusal = REFUSALS.get(fault.call, (None, ()))
    expected = refusal[1] if fault.code == refusal[0] else (CudaError,)
    wrong = []
    if not isinstance(failed, expected) or (expected == (CudaError,) and type(failed) is not CudaError):
        wrong.append(f"the error is {failed!r}")
    sources = [error for error in causes(failed) if isinstance(error, CudaError)]
    # Where all that follows fails alike, what is rolled back may be heard of last.
    if not any(error.code == fault.code and (fault.sticky or error.call == fault.call) for error in sources):
        wrong.append(f"the error does not name the call: {failed!r}")
    if fault.sticky and RESTART not in str(failed):
        wrong.append(f"the error does not say to restart: {failed!r}")
    return wrong


def _is_said(operation: Operation, fault: Fault, result: Any) -> bool:
    """Whether a report, which `doctor` makes in place of errors, names the failure."""
    if operation.name != "doctor" or not isinstance(result, dict):
        return False
    words = [line for check in result["checks"].values() if check["status"] == "failed" for line in check["says"]]
    words += [str(result["checks"]["driver"]["facts"].get("problem"))]
    wanted = RESTART if fault.sticky else f"{fault.call} failed with"
    return not result["healthy"] and any(wanted in line for line in words)


def _left(operation: Operation, fault: Fault, before: Any, after: Any) -> list[str]:
    """Nothing is left; or what could not be freed is kept, counted, and shown by `doctor`."""
    different = after.differences(before)
    if not different:
        return []
    handles = after.handles - before.handles
    if fault.call in DESTROYS and handles == len(different) == 1:
        return []  # which the driver would not destroy
    if not (fault.call in RELEASES or operation.releases or fault.sticky):
        return list(different.values())
    wrong = [words for name, words in different.items() if name == "threads"]
    if "descriptors" in different:  # a mapping that is kept needs none
        wrong.append(different["descriptors"])
    if not fault.sticky and handles > 1:
        wrong.append(f"{handles} streams and events are left")
    shown = check_pinned(Machine(open_driver(DEVICE), [DEVICE], host_limits())).facts
    if shown["pinned_nbytes"] != after.pinned_nbytes:
        wrong.append(f"doctor shows {shown['pinned_nbytes']} of {after.pinned_nbytes} pinned bytes")
    listed = Counter((row["kind"], row["nbytes"]) for row in shown["live"])
    if listed != after.buffers:
        wrong.append(f"doctor lists {listed}, and alive are {after.buffers}")
    if after.registered_nbytes > after.pinned_nbytes:
        wrong.append(f"the driver has {after.registered_nbytes} bytes registered, counted are {after.pinned_nbytes}")
    more = after.pinned_nbytes - before.pinned_nbytes
    if more > 0 and sum(n for _, n in (after.buffers - before.buffers).elements()) == 0:
        wrong.append(f"{more} bytes stay pinned and belong to no buffer that is listed")
    device = dict(after.driver)["device_nbytes"] - dict(before.driver)["device_nbytes"]
    if device > sum(n for kind, n in (after.buffers - before.buffers).elements() if kind == "device"):
        wrong.append(f"{device} bytes of device memory stay and are not counted")
    return wrong


# ----------------------------------------------------------------------------------------------- an operation
def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child; a list of words when the child dies or hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            answer = work()
        except BaseException:
            answer = [f"the sweep itself failed:\n{traceback.format_exc()}"]
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        if not select.select([pipe], [], [], TIMEOUT_S)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return [f"it hung for {TIMEOUT_S} s"]
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else [f"the process died: {os.waitstatus_to_exitcode(status)}"]


def count(operation: Operation, fake: FakeCuda, folder: Path) -> list[str]:
    """The driver calls of an operation that nothing fails."""
    with ExitStack() as stack:
        act, undo = operation.prepare(Bench(stack, folder, fake))
        fake.begin()
        result = act()
        calls = fake.calls()
        undo(result)
        del result, act, undo
    if wrong := fake.violations():
        raise AssertionError(wrong)
    return calls


def faults_of(operation: Operation, call: str, nth: int) -> Iterator[Fault]:
    yield Fault(call, nth, UNKNOWN)
    if operation.deferred or call not in FREE_STANDING:
        yield Fault(call, nth, ILLEGAL_ADDRESS, sticky=True)
    if call in REFUSALS:
        yield Fault(call, nth, REFUSALS[call][0])


def sweep(operation: Operation, fake: FakeCuda, folder: Path, *, count_only: bool = False) -> Swept:
    """Try every position of an operation, or count them only."""
    swept = Swept(operation.name)
    calls = in_child(lambda: count(operation, fake, folder))
    if any(" " in call for call in calls):
        swept.found += calls
        return swept
    swept.calls = dict(Counter(calls))
    swept.positions = len(calls)
    for call, uses in swept.calls.items():
        for nth in range(1, uses + 1):
            for fault in faults_of(operation, call, nth):
                swept.faults += 1
                if count_only:
                    continue
                tried = in_child(partial(attempt, operation, fake, folder, fault))
                swept.found += [f"{fault}: {words}" for words in tried]
    return swept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS), help="all by default")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each operation")
    parser.add_argument("--count", action="store_true", help="fail nothing; the table only")
    parser.add_argument("--library", type=Path, help="a fake libcuda.so.1 that is built already")
    arguments = parser.parse_args()
    # A child has one thread, and is made to be thrown away.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fake = FakeCuda(arguments.library or build(folder))
        write_checkpoint(folder / "weights.safetensors")
        chosen = [OPERATIONS[name] for name in arguments.operations]
        load(chosen, fake, folder)
        rows = []
        gc.freeze()  # what is here now is no child's garbage
        for operation in chosen:
            rows.append(row := sweep(operation, fake, folder, count_only=arguments.count))
            if arguments.json:
                print(json.dumps(asdict(row)), flush=True)
            else:
                print(f"{row.operation}: {row.positions} positions, {len(row.found)} found", file=sys.stderr)
                for words, count in Counter(_NUMBERS.sub("#", text) for text in row.found).items():
                    print(f"  {count} x {words}", file=sys.stderr)
    if not arguments.json:
        print(table(rows))
    return int(any(row.found for row in rows))


def load(operations: Sequence[Operation], fake: FakeCuda, folder: Path) -> None:
    """Import here, and once, what the operations import when they are first made, and nothing else of them."""

    def loaded() -> list[str]:
        for operation in operations:
            count(operation, fake, folder)
        return [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or NumPy starts threads, which no child would have
    pages._nodes = lambda: [0]  # the same calls on every machine
    for name in in_child(loaded):
        if " " in name:
            raise RuntimeError(name)
        importlib.import_module(name)
    import cuda.bindings.driver as cuda

    cuda.cuGetErrorName(cuda.CUresult(0))  # now it has looked every function up


if __name__ == "__main__":
    sys.exit(main())
