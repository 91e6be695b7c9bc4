"""Benchmark: what host memory costs, in bytes and in seconds, peers in the same run; one table.

    python tests/gpu/bench_memory.py [--rows exact,small,speed,open,peak] [--folder /tmp] [--gib 1,5,9,17]

Every figure is of a fresh process. Bytes are MemAvailable before and after (pages of files in the cache count as
available, so what a mapping adds is what it costs); seconds are of the second call, after a small one.

exact   pinned bytes over asked, for each size
small   the same for 10,000 tensors of odd sizes from 128 KiB to 4 MiB, each on its own
speed   8 GiB (or a third of what is free): HostBuffer.allocate, cuMemHostAlloc, torch's pin_memory
open    a checkpoint of 4 GiB in the page cache, to first use on the device; the rate of copies from it; what it adds
peak    the highest resident memory of a process that opens a checkpoint to be offloaded, over its weights

Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PRELUDE = r"""
import json, os, random, sys, time
argument = sys.argv[1]
def field(path, name):
    with open(path) as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
def available(): return field("/proc/meminfo", "MemAvailable")
def settled():
    best = available()
    for _ in range(5):
        time.sleep(0.05)
        best = max(best, available())
    return best
def say(**what): print(json.dumps(what), flush=True)
def odd_sizes():
    random.seed(1)
    return [random.randrange(128 << 10, 4 << 20) | 1 for _ in range(10_000)]
def measure(make, sizes, pinned=lambda: None):
    kept = [make(1 << 20)]
    before, start = settled(), time.perf_counter()
    kept += [make(n) for n in sizes]
    seconds = time.perf_counter() - start
    time.sleep(0.3)
    count = pinned()
    more = {} if count is None else {"pinned": count - (1 << 20)}
    say(cost=before - available(), asked=sum(sizes), seconds=seconds, **more)
    os._exit(0)  # freeing is not what is measured
sizes = odd_sizes() if argument == "odd" else [int(argument)] if argument.isdigit() else []
"""

PINNERS = {
    "dlpoffload": """
import dlpoffload as dlpo
if argument == "odd":  # as a store has them: one after the other, a buffer of at most 1 GiB at a time
    specs = {str(i): dlpo.TensorSpec((n,), "uint8") for i, n in enumerate(sizes)}
    dlpo.HostBuffer.allocate(1 << 20, device="cuda:0")
    before, start = settled(), time.perf_counter()
    store = dlpo.HostStore.allocate(specs, device="cuda:0")
    for name in specs: store.host_view(name)
    seconds = time.perf_counter() - start
    say(cost=before - available(), asked=sum(sizes), seconds=seconds, pinned=store.pinned_nbytes)
    os._exit(0)
measure(lambda n: dlpo.HostBuffer.allocate(n, device="cuda:0"), sizes, dlpo.pinned_nbytes)
""",
    "the same pages, not pinned": """
from dlpoffload import _native
def make(n):
    pointer = _native.map_anonymous(n, 2 << 20, True)
    _native.populate(pointer, n, 8)
    return pointer
measure(make, sizes)
""",
    "cuMemHostAlloc": """
import dlpoffload as dlpo
measure(dlpo.open_driver("cuda:0").host_alloc, sizes)
""",
    "torch pin_memory": """
import torch
torch.cuda.init()
measure(lambda n: torch.empty(n, dtype=torch.uint8, pin_memory=True), sizes)
""",
    "jax pinned_host": """
import jax, numpy
host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
def make(n):
    array = jax.device_put(numpy.ones(n, numpy.uint8), host)
    array.block_until_ready()
    return array
measure(make, sizes)
""",
}

CHECKPOINT = r"""
# argument: a path; 4 GiB in 16 units of 4 tensors, and aligned
import numpy
from safetensors.numpy import save_file
import dlpoffload as dlpo
nbytes = int(sys.argv[2])
part = nbytes // 64
tensors = {f"{u}.{t}": numpy.random.default_rng(u * 4 + t).integers(0, 255, part, numpy.uint8)
           for u in range(16) for t in range(4)}
save_file(tensors, argument + ".raw")
del tensors
dlpo.align(argument + ".raw", argument)
os.unlink(argument + ".raw")
say(done=True)
"""

RATE = r"""
def rate(driver, pointers, nbytes, repeat=9):
    there, stream = driver.device_alloc(nbytes), driver.stream_create()
    start, end = driver.event_create(timing=True), driver.event_create(timing=True)
    found = []
    for i in range(repeat + 2):
        driver.event_record(start, stream)
        driver.copy_async(there, pointers[i % len(pointers)], nbytes, stream)
        driver.event_record(end, stream)
        driver.event_synchronize(end)
        found.append(nbytes / driver.event_elapsed_ms(start, end) / 1e6)
    return sorted(found[2:])[repeat // 2]
with open(argument, "rb") as file:  # into the page cache
    while file.read(64 << 20): pass
"""

OPENERS = {
    "dlpoffload map_file": r"""
import dlpoffload as dlpo
units = {str(u): [f"{u}.{t}" for t in range(4)] for u in range(16)}
driver = dlpo.open_driver("cuda:0")
driver.synchronize()
warm = dlpo.HostBuffer.allocate(1 << 20, device="cuda:0"); warm.close()
import safetensors, numpy
own = {name: field("/proc/self/status", name) for name in ("RssAnon", "VmPTE")}
before, start = settled(), time.perf_counter()
store = dlpo.HostStore.map_file(argument, units=units, device="cuda:0")
opened = time.perf_counter() - start
slab = store.slab("0")
there, stream = driver.device_alloc(slab.nbytes), driver.stream_create()
for at, pointer, n in slab.copies(): driver.copy_async(there + at, pointer, n, stream)
driver.stream_synchronize(stream)
first = time.perf_counter() - start
time.sleep(0.3)
cost = before - available()
own = {name: field("/proc/self/status", name) - was for name, was in own.items()}
pieces = [store.slab(u).copies()[0] for u in units]
buffer = dlpo.HostBuffer.allocate(pieces[0].nbytes, device="cuda:0")
mapped = pinned = 0
for _ in range(2):  # in turn: the link itself drifts by a percent
    mapped = max(mapped, rate(driver, [p.host_pointer for p in pieces], pieces[0].nbytes))
    pinned = max(pinned, rate(driver, [buffer.host_pointer], pieces[0].nbytes))
say(opened=opened, first=first, cost=cost, nbytes=store.nbytes, mapped=mapped, pinned=pinned, **own)
os._exit(0)
""",
    "safetensors load + pin_memory": r"""
import torch
from safetensors.torch import load_file
torch.cuda.init(); torch.empty(1 << 20, pin_memory=True)
before, start = settled(), time.perf_counter()
tensors = {name: tensor.pin_memory() for name, tensor in load_file(argument).items()}
opened = time.perf_counter() - start
there = [tensors[f"0.{t}"].to("cuda", non_blocking=True) for t in range(4)]
torch.cuda.synchronize()
first = time.perf_counter() - start
time.sleep(0.3)
say(opened=opened, first=first, cost=before - available(), nbytes=sum(t.nbytes for t in tensors.values()))
os._exit(0)
""",
    "dlpoffload copy_of": r"""
import dlpoffload as dlpo
driver = dlpo.open_driver("cuda:0")
dlpo.HostBuffer.allocate(1 << 20, device="cuda:0").close()
import safetensors, numpy
before, start = settled(), time.perf_counter()
store = dlpo.HostStore.copy_of(argument, device="cuda:0")
opened = time.perf_counter() - start
there = driver.device_alloc(store.specs["0.0"].nbytes)
driver.copy(there, store.host_view("0.0").pointer, store.specs["0.0"].nbytes)
first = time.perf_counter() - start
time.sleep(0.3)
say(opened=opened, first=first, cost=before - available(), nbytes=store.nbytes)
os._exit(0)
""",
}

PEAK = {
    mode: rf"""
import dlpoffload as dlpo
dlpo.HostBuffer.allocate(1 << 20, device="cuda:0").close()
import safetensors, numpy
from safetensors import safe_open
with safe_open(argument, "numpy") as file: file.keys()
def anonymous(): return field("/proc/self/status", "RssAnon")
def peak(): return field("/proc/self/status", "VmHWM")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
base = peak()
store = dlpo.HostStore.open(argument, mode="{mode}", device="cuda:0")
say(peak=peak() - base, anonymous=anonymous(), nbytes=store.nbytes, mode=store.mode)
os._exit(0)
"""
    for mode in ("copy", "map")
}


def measured(code: str, *arguments: str, timeout: int = 300) -> dict[str, float]:
    """The last line that a fresh process said; what went wrong under "problem"."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", PRELUDE + code, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"over {timeout} s"}  # type: ignore[dict-item]
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        return {"problem": (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1][:200]}  # type: ignore[dict-item]
    found: dict[str, float] = json.loads(lines[-1])
    return found


def free_nbytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Table:
    """Rows as they are measured, and all of them as JSON last."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, who: str, found: dict[str, float], value: str = "", **more: object) -> None:
        said = f"not measured: {found['problem']}" if "problem" in found else value
        print(f"| {what} | {who} | {said} |", flush=True)
        self.rows.append({"what": what, "who": who, **found, **more})

    def pinned(self, what: str, who: str, found: dict[str, float]) -> None:
        said = ""
        if "cost" in found:
            said = f"{found['cost'] / found['asked']:.4f} of asked, {found['seconds']:.2f} s"
        if "pinned" in found:
            said += f" (pinned, by its own count: {found['pinned'] / found['asked']:.5f})"
        self.add(what, who, found, said)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="exact,small,speed,open,peak")
    parser.add_argument("--gib", default="1,5,9,17")
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--checkpoint-gib", type=float, default=4)
    args = parser.parse_args()
    rows, table = args.rows.split(","), Table()
    # A virtual machine's memory is backed when it is first touched, and whoever came first would pay for that.
    most = max([8.0, *map(float, args.gib.split(","))]) * (1 << 30)
    measured(PINNERS["the same pages, not pinned"], str(int(min(1.1 * most, 0.8 * free_nbytes()))))
    print("| what | who | measured |\n|---|---|---|")
    if "exact" in rows:
        for gib in map(float, args.gib.split(",")):
            nbytes = int(gib * (1 << 30))
            for who, code in PINNERS.items():
                if nbytes * (3.2 if who.startswith(("torch", "jax")) else 1.1) > free_nbytes():
                    table.add(f"{gib:g} GiB pinned", who, {"problem": "not enough free memory"})  # type: ignore[dict-item]
                    continue
                table.pinned(f"{gib:g} GiB pinned", who, measured(code, str(nbytes)))
    if "small" in rows:
        for who, code in PINNERS.items():
            if who.startswith("the same"):
                continue
            table.pinned("10,000 odd tensors", who, measured(code, "odd"))
    if "speed" in rows:
        nbytes = min(8 << 30, free_nbytes() // 3) >> 21 << 21
        seconds = {}
        for who in ("dlpoffload", "cuMemHostAlloc", "torch pin_memory"):
            found = measured(PINNERS[who], str(nbytes))
            seconds[who] = found.get("seconds", float("nan"))
            ratio = seconds[who] / seconds["dlpoffload"]
            said = f"{seconds[who]:.2f} s, {nbytes / seconds[who] / (1 << 30):.1f} GiB/s, {ratio:.1f} times ours"
            table.add(f"{nbytes / (1 << 30):.2f} GiB allocated", who, found, said)
    path = Path(args.folder) / f"dlpoffload-bench-{os.getpid()}.safetensors"
    try:
        if {"open", "peak"} & set(rows):
            made = measured(CHECKPOINT, str(path), str(int(args.checkpoint_gib * (1 << 30))), timeout=400)
            if "problem" in made:
                table.add("checkpoint", "writing it", made)
                rows = []
        if "open" in rows:
            times = {}
            for who, code in OPENERS.items():
                found = measured(RATE + code, str(path))
                if "first" not in found:
                    table.add("opened to first use", who, found)
                    continue
                times[who] = found["first"]
                said = (
                    f"{found['first']:.3f} s, host memory grows by {found['cost'] / found['nbytes']:.4f} of the weights"
                )
                if "VmPTE" in found:
                    own, tables = (found[name] / found["nbytes"] for name in ("RssAnon", "VmPTE"))
                    said += f" (its own memory {own:.4f}, its page tables {tables:.4f}, the rest the driver's)"
                if "mapped" in found:
                    share = found["mapped"] / found["pinned"]
                    said += f", copies at {found['mapped']:.2f} GB/s, {share:.1%} of anonymous pinned memory"
                table.add("opened to first use", who, found, said)
            if len(times) == len(OPENERS):
                ratio = times["safetensors load + pin_memory"] / times["dlpoffload map_file"]
                table.add("opened to first use", "ratio", {"ratio": ratio}, f"{ratio:.1f} times faster")
        if "peak" in rows:
            for mode, code in PEAK.items():
                found = measured(code, str(path))
                if "peak" in found:
                    said = f"high-water mark {found['peak'] / found['nbytes']:.4f} of the weights"
                    table.add(f'opened to offload, mode="{mode}"', "dlpoffload", found, said)
                else:
                    table.add(f'opened to offload, mode="{mode}"', "dlpoffload", found)
    finally:
        path.unlink(missing_ok=True)
        Path(f"{path}.raw").unlink(missing_ok=True)
    print(json.dumps({"rows": table.rows}))


if __name__ == "__main__":
    main()
