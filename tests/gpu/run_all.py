"""Everything that needs a GPU, in one go: the tests, the benchmarks, the demo; a short table last.

    python tests/gpu/run_all.py [--only doctor,tests,blocks,jax,memory,mapping,building,trace,demo,flax,soak]
        [--soak-seconds 60]

Runs what is installed. Each part is a process of its own with its own limit; the exit status is the number of parts
that failed. Logs go to the folder named by OUT, or to `out`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTEST = [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]

PARTS: dict[str, tuple[list[str], int]] = {
    "doctor": ([sys.executable, "-P", "-c", "from dlpoffload.cli import main; raise SystemExit(main(['doctor']))"], 90),
    "tests": ([*PYTEST, str(ROOT / "tests")], 480),
    "blocks": ([sys.executable, "-P", str(HERE / "bench_blocks.py"), "--peers"], 240),
    "jax": ([sys.executable, "-P", str(HERE / "bench_jax.py")], 420),
    "memory": ([sys.executable, "-P", str(HERE / "bench_memory.py"), "--rows", "exact,small,speed"], 500),
    "mapping": ([sys.executable, "-P", str(HERE / "bench_memory.py"), "--rows", "open,peak"], 300),
    "building": ([sys.executable, "-P", str(HERE / "bench_building.py")], 200),
    "trace": ([sys.executable, "-P", str(HERE / "trace_blocks.py")], 120),
    "demo": ([sys.executable, "-P", str(ROOT / "examples" / "minilm.py"), "cuda:0"], 120),
    "flax": ([sys.executable, "-P", str(ROOT / "examples" / "minilm_flax.py"), "cuda:0"], 120),
    "soak": ([sys.executable, "-P", str(HERE / "soak.py"), "--device", "cuda:0", "--width", "512"], 240),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--pytest-args", default="")
    parser.add_argument("--soak-seconds", type=int, default=60)
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", ROOT / "out"))
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DLPOFFLOAD_REQUIRE": "gpu,torch,jax", "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
    # JAX would otherwise take three quarters of the device before torch's tests begin.
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {"PYTHONSAFEPATH": "1"}  # for the tests' own subprocesses too: what is installed is what is run
    rows = []
    for name in args.only.split(","):
        command, limit = PARTS[name]
        if name == "tests":
            command = [*command, *args.pytest_args.split()]
        if name == "soak":
            command, limit = [*command, f"--seconds={args.soak_seconds}"], limit + args.soak_seconds
        print(f"==> {name}", flush=True)
        start = time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            try:
                code = subprocess.run(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit, cwd=ROOT, check=False
                ).returncode
                verdict = "ok" if code == 0 else f"exit {code}"
            except subprocess.TimeoutExpired:
                code, verdict = 1, f"over {limit} s"
        lines = (out / f"{name}.log").read_text().splitlines()
        print("\n".join(lines[-(60 if code else 30) :]), flush=True)
        rows.append((name, verdict, time.monotonic() - start, lines[-1] if lines else ""))
    print()
    for name, verdict, seconds, last in rows:
        print(f"{name:8s} {verdict:10s} {seconds:6.1f} s  {last[:100]}")
    return sum(verdict != "ok" for _, verdict, _, _ in rows)


if __name__ == "__main__":
    sys.exit(main())
