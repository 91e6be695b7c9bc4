"""Benchmark: host memory that a pinned buffer costs, measured from outside in a fresh process each.

    python tests/gpu/bench_memory.py [--nbytes 5368709120]

MemAvailable before and after, for `HostBuffer.allocate`, the driver's own cuMemHostAlloc, torch's `pin_memory` and
JAX's `pinned_host`; and for the same pages without pinning, since the kernel and the driver keep tables of them.
Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

PRELUDE = """
import sys, time
nbytes = int(sys.argv[1])
def available():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
def measure(make):
    warm = make(1 << 20)
    before, start = available(), time.perf_counter()
    kept = make(nbytes)
    seconds = time.perf_counter() - start
    time.sleep(0.2)
    print(before - available(), seconds)
"""

WAYS = {
    "anonymous pages, populated": """
from dlpoffload import _native
def make(n):
    pointer = _native.map_anonymous(n, 2 << 20, True)
    _native.populate(pointer, n, 4)
    return pointer
measure(make)
""",
    "cuMemHostAlloc": """
import dlpoffload as dlpo
measure(dlpo.open_driver("cuda:0").host_alloc)
""",
    "dlpoffload HostBuffer.allocate": """
import dlpoffload as dlpo
measure(lambda n: dlpo.HostBuffer.allocate(n, device="cuda:0"))
""",
    "torch pin_memory": """
import torch
torch.cuda.init()
measure(lambda n: torch.empty(n, dtype=torch.uint8, pin_memory=True))
""",
    "jax pinned_host": """
import jax, numpy
host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
def make(n):
    array = jax.device_put(numpy.ones(n, numpy.uint8), host)
    array.block_until_ready()
    return array
measure(make)
""",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nbytes", type=int, default=5 << 30)
    nbytes = parser.parse_args().nbytes
    results = {}
    for name, code in WAYS.items():
        run = subprocess.run(
            [sys.executable, "-c", PRELUDE + code, str(nbytes)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        if run.returncode:
            print(f"{name:34s} not measured: {run.stderr.strip().splitlines()[-1]}")
            continue
        cost, seconds = run.stdout.split()[-2:]
        results[name] = {"over_asked": round(int(cost) / nbytes, 4), "seconds": round(float(seconds), 3)}
        print(f"{name:34s} {int(cost) / nbytes:7.4f} of {nbytes} bytes, {float(seconds):6.2f} s", flush=True)
    print(json.dumps({"nbytes": nbytes, "results": results}))


if __name__ == "__main__":
    main()
