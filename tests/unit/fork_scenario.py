"""A process that streams from pinned memory, and forks: run by test_fork.py, and on a GPU by tests/gpu.

    python fork_scenario.py DEVICE NBYTES END

END says how the child ends. What was measured, from outside of both, is printed as JSON. The device "like-cuda" is the
CPU driver under CUDA's name: its pinned memory is left out of children, and a child that calls it gets an error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import random
import re
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dlpoffload as dlpo
from dlpoffload.driver import installed, open_driver
from dlpoffload.driver.cpu import CpuDriver

UNITS = 8
CODE = 3
MIB = 1 << 20


def pss(pid: int) -> int:
    """A process's memory, pages that others have, too, counted in part."""
    return 1024 * int(re.findall(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[0])


def available() -> int:
    return 1024 * int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0])


class LikeCuda(CpuDriver):
    platform, device = "cuda", "cuda:0"
    pid = os.getpid()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if callable(found) and not name.startswith("_") and os.getpid() != LikeCuda.pid:
            raise dlpo.CudaError(name, 3, "CUDA_ERROR_NOT_INITIALIZED", "a forked child cannot use CUDA")
        return found


class Stream:
    """A store of pinned memory, and a ring that streams it."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.driver = open_driver(device)
        self.nbytes = nbytes // UNITS
        specs = {str(n): dlpo.TensorSpec((self.nbytes,), "uint8") for n in range(UNITS)}
        self.store = dlpo.HostStore.allocate(specs, units={name: (name,) for name in specs}, device=device)
        self.block = random.Random(0).randbytes(MIB)
        for view, starts in self.store.memoryviews():
            (name,) = starts
            view[:] = self.unit(name)
            view.release()
        slabs = {name: self.store.slab(name) for name in self.store.units}
        self.ring = dlpo.SlotRing(slabs, slots=2, device=device)
        self.back = bytearray(self.nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.back))

    def unit(self, name: str) -> bytes:
        turn = 1 + int(name)
        return (self.block[turn:] + self.block[:turn]) * (self.nbytes // MIB)

    def step(self) -> bool:
        """Stream every unit through the ring, and compare all of what arrives."""
        right = True
        for name in self.store.units:
            with self.ring.prefetch(name) as views:
                self.driver.copy_async(self.address, views[name].device_pointer, self.nbytes, 0)
                self.driver.stream_synchronize(0)
                del views
            right = right and self.back == self.unit(name)
        return right


def child(stream: Stream, end: str) -> None:
    assert dlpo.live_buffers() == []
    assert dlpo.pinned_nbytes() == 0
    if end in ("close", "multiprocessing"):
        stream.ring.close()
        stream.store.close()
        assert stream.ring.closed
        assert stream.store.closed
    elif end == "drop":
        del stream.ring, stream.store
        gc.collect()
    elif end == "use":
        use(stream)
    elif end == "os._exit":
        os._exit(CODE)
    elif end == "raise":
        raise KeyError("the child's own")
    sys.exit(CODE)


def use(stream: Stream) -> None:
    """On the CPU a child may go on with a copy of all there is; of CUDA it is told that it cannot."""
    if stream.driver.platform == "cpu":
        assert stream.step()
        stream.store.copy_into("0", bytes(stream.nbytes))  # a copy of the page
        return
    refused = []
    for call in (
        lambda: stream.ring.prefetch("0").__enter__(),
        lambda: dlpo.HostBuffer.allocate(4096, device=stream.driver.device),
    ):
        try:
            call()
        except (dlpo.ClosedError, dlpo.CudaError) as error:
            refused.append(str(error))
    assert len(refused) == 2
    assert "closed" in refused[0] or "forked child" in refused[0], refused
    assert "forked child" in refused[1], refused


def main() -> None:
    device, nbytes, end = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    with ExitStack() as stack:
        if device == "like-cuda":
            stack.enter_context(installed(LikeCuda()))
            device = "cuda:0"
        run(Stream(device, nbytes), end)


def run(stream: Stream, end: str) -> None:
    steps = [stream.step()]
    gc.collect()
    ready, go_on = os.pipe(), os.pipe()
    before, free = pss(os.getpid()), max(available() for _ in range(5))

    def begin() -> None:
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)
        child(stream, end)

    if end == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=begin)
        process.start()
        pid = process.pid
        assert pid is not None
    else:
        pid = os.fork()
        if pid == 0:
            begin()
    os.read(ready[0], 1)
    during, taken = pss(os.getpid()) + pss(pid), free - available()
    # What others on this machine take meanwhile is not ours; of less than a GiB it cannot be told apart.
    for _ in range(20 if stream.store.nbytes >= 1 << 30 else 0):
        time.sleep(0.02)
        taken = min(taken, free - available())
    steps.append(stream.step())  # while the child is there
    os.write(go_on[1], b"x")
    if end == "multiprocessing":
        process.join()
        code = process.exitcode
    else:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps.append(stream.step())
    pinned = dlpo.pinned_nbytes()
    stream.ring.close()
    stream.store.close()
    measured = {"before": before, "during": during, "taken": taken, "code": code, "steps": steps, "pinned": pinned}
    print(json.dumps(measured | {"left": dlpo.pinned_nbytes(), "buffers": dlpo.live_buffers()}))


if __name__ == "__main__":
    main()
