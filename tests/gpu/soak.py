"""Steps, updates, resizing, sleep, adapters and refusals, on several models and threads, for as long as one likes.

    python tests/gpu/soak.py [--seconds 60] [--device cpu] [--seed 0] [--width 128]

Every output is compared bit by bit with a resident twin's, in a process of its own whose memory is measured from
here, outside of it: it must be as large in the last part of the run as in the first. A table last; the exit status is
1 when anything differed, leaked or grew.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

MIB = 1 << 20
WARM_SHARE = 0.25
"""Of the run, before memory counts: kernels, caches and allocators have settled by then."""
GROWTH = {"PSS": 24 * MIB, "anonymous": 24 * MIB, "device": 48 * MIB, "threads": 4, "descriptors": 4, "mappings": 64}
"""What the last part may have more than the first, beside a hundredth of it: noise of the allocators."""


# ----------------------------------------------------------------------------------------- the process inside


def work(args: argparse.Namespace) -> int:
    """Run the lanes until time is up; says so on stdout, as JSON."""
    import torch
    from soak_lanes import Refusals
    from soak_torch import TorchLane

    import dlpoffload as dlpo
    from dlpoffload import lifetime
    from dlpoffload.driver import installed, open_driver
    from dlpoffload.driver.cpu import CpuDriver

    torch.set_num_threads(1)
    # On the CPU: copies as late as their waits allow, slots full of garbage before each.
    driver = CpuDriver(adversary=args.seed) if args.device == "cpu" else open_driver(args.device)
    failed: list[str] = []
    with installed(driver):
        refusals = Refusals(driver)
        kinds: dict[str, Any] = {"torch a": TorchLane, "torch b": TorchLane}
        if importlib.util.find_spec("jax"):
            from soak_jax import JaxLane

            kinds["jax"] = JaxLane
        lanes = [kind(name, args.device, args.seed, refusals, args.width) for name, kind in kinds.items()]
        driver.synchronize()  # lanes have streams of their own
        end = time.monotonic() + args.seconds

        def run(lane: Any) -> None:
            try:
                lane.run(lambda: time.monotonic() < end and not failed)
            except BaseException:
                failed.append(f"{lane.name}, after {', '.join(lane.log)}:\n{traceback.format_exc()}")

        threads = [threading.Thread(target=run, args=(lane,)) for lane in lanes]
        print(json.dumps({"event": "begin", "lanes": list(kinds)}), flush=True)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps({"event": "end"}), flush=True)
        rows = [{"name": n.name, "counts": n.counts, "compared": n.compared, "refused": n.refused} for n in lanes]
        del lanes, threads, run
        for _ in range(100):
            gc.collect()
            lifetime.drain()
            if failed or not dlpo.live_buffers():
                break
            time.sleep(0.02)
        left = [] if failed else dlpo.live_buffers()
    print(json.dumps({"event": "done", "rows": rows, "failed": failed, "left": left, "pinned": dlpo.pinned_nbytes()}))
    return 0


# ------------------------------------------------------------------------------------------------- outside


def sample(pid: int, device: Any) -> dict[str, int]:
    """What a process has, as the system sees it."""
    proc = Path(f"/proc/{pid}")
    text = (proc / "smaps_rollup").read_text()
    fields = {name: 1024 * int(kib) for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    meminfo = Path("/proc/meminfo").read_text()
    found = {
        "PSS": fields["Pss"],
        "anonymous": fields["Anonymous"],
        "threads": len(os.listdir(proc / "task")),
        "descriptors": len(os.listdir(proc / "fd")),
        "mappings": (proc / "maps").read_text().count("\n"),
        "MemAvailable": 1024 * int(re.findall(r"MemAvailable: +(\d+)", meminfo)[0]),
    }
    if device is not None:
        free, total = device.device_memory_info()
        found["device"] = total - free
    return found


def measure(process: Any, seconds: float, device: Any) -> list[tuple[float, dict[str, int]]]:
    """Samples until the lanes end."""
    samples: list[tuple[float, dict[str, int]]] = []
    begin = time.monotonic()
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(max(0.1, min(1.0, seconds / 200))):
            try:
                samples.append((time.monotonic() - begin, sample(process.pid, device)))
            except (FileNotFoundError, ProcessLookupError, KeyError):
                return

    reader = threading.Thread(target=read)
    reader.start()
    process.stdout.readline()
    ended.set()
    reader.join()
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return work(args)
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "2",  # glibc gives each thread an arena, and they fill one after the other
        "MALLOC_TRIM_THRESHOLD_": str(MIB),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_allow_excess_precision=false",
    }
    command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), __file__, "--inside"]
    command += [f"--{name}={getattr(args, name)}" for name in ("seconds", "device", "seed", "width")]
    paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # an empty one would be the current directory
    device = None
    if args.device != "cpu":
        from dlpoffload.driver import open_driver

        device = open_driver(args.device)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    samples = measure(process, args.seconds, device) if first else []
    rest = process.stdout.read()
    code = process.wait()
    last = rest.strip().splitlines()[-1] if rest.strip() else ""
    if code or not last:
        print(f"the process inside ended with {code}, seed {args.seed}")
        return 1
    return report(args, json.loads(last), samples)


def report(args: argparse.Namespace, done: dict[str, Any], samples: list[tuple[float, dict[str, int]]]) -> int:
    """Print what was done and what it took; 1 when something is wrong."""
    wrong = list(done["failed"])
    if done["left"] or done["pinned"]:
        wrong.append(f"left alive: {done['left']}, {done['pinned']} bytes pinned")
    print(f"soak of {args.seconds:g} s on {args.device}, seed {args.seed}, width {args.width}\n")
    for row in done["rows"]:
        counts = ", ".join(f"{count} {action}" for action, count in sorted(row["counts"].items()))
        refused = ", ".join(f"{count} {call}" for call, count in sorted(row["refused"].items())) or "none"
        print(f"{row['name']:8s} {sum(row['counts'].values())} actions: {counts}")
        print(f"{'':8s} {row['compared'] / 1e6:.0f} MB compared, failures injected: {refused}")
    warm = [found for at, found in samples if at > WARM_SHARE * args.seconds]
    part = max(len(warm) // 4, 1)
    print(f"\n{'from outside':16s}{'first':>12s}{'last':>12s}{'most':>12s}   ({part} samples each, median)")
    for name in warm[0] if warm else ():
        series = [found[name] for found in warm]
        before, after = (int(statistics.median(s)) for s in (series[:part], series[-part:]))
        unit = MIB if max(series) > MIB else 1
        figures = "".join(f"{value / unit:12.0f}" for value in (before, after, max(series)))
        print(f"{name:16s}{figures}   {'MiB' if unit > 1 else ''}")
        if name in GROWTH and after - before > GROWTH[name] + before // 100:
            wrong.append(f"{name} grew from {before} to {after}")
    if len(warm) < 8:
        wrong.append(f"only {len(warm)} samples of memory")
    if not all(row["counts"] and row["compared"] for row in done["rows"]):
        wrong.append("a lane did nothing")
    total: Counter[str] = Counter()
    for row in done["rows"]:
        total.update(row["refused"])
    for problem in wrong:
        print(f"\nWRONG: {problem}")
    compared = sum(row["compared"] for row in done["rows"])
    actions = sum(sum(row["counts"].values()) for row in done["rows"])
    verdict = "wrong" if wrong else "right, flat"
    print(f"\n{verdict}: {actions} actions, {compared / 1e6:.0f} MB compared, {sum(total.values())} failures injected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
