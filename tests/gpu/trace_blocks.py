"""Where the time of a streamed step goes: each copy and each gap between copies, and the host's own time.

    python tests/gpu/trace_blocks.py [--hidden 4096] [--ffn 14336] [--blocks 8] [--steps 6]

The blocks of `bench_blocks.py`, all streamed, one token a step, eager and in a CUDA graph, under torch's profiler
(CUPTI): how long the copies of a step took and at what rate, the gaps between them by size, and what ran on the device
in the longest gap. Then the host functions that take the longest while a step is enqueued, by cProfile, which makes all
of them slower. For finding what a figure is short of, not for figures.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dlpoffload.planning import all_staged
from dlpoffload.torch import offload_

sys.path.append(str(Path(__file__).parent))  # where python -P does not look
from bench_blocks import Blocks, milliseconds


def traced(who: str, step: Callable[[], object], steps: int, nbytes: int) -> None:
    """Print the copies of some steps, and what lies between them."""
    plain = median(milliseconds(step, steps))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events: list[Any] = [e for e in recorded.profiler.kineto_results.events() if str(e.device_type()).endswith("CUDA")]
    events.sort(key=lambda e: e.start_ns())
    copies = [e for e in events if "HtoD" in e.name() and e.duration_ns() > 1e6]
    taken = sum(e.duration_ns() for e in copies) / 1e6
    gaps = sorted(
        ((b.start_ns() - a.start_ns() - a.duration_ns(), a) for a, b in pairwise(copies)), key=lambda gap: -gap[0]
    )
    print(f"\n{who}: {plain:.2f} ms a step untraced; {len(copies)} copies in {steps} steps")
    print(f"  copies: {taken / steps:.2f} ms a step, {nbytes * steps / taken / 1e6:.2f} GB/s")
    print(f"  between copies: {sum(max(0, gap) for gap, _ in gaps) / 1e6 / steps:.3f} ms a step")
    print("  longest gaps, us: " + ", ".join(f"{gap / 1e3:.0f}" for gap, _ in gaps[: 2 * steps]))
    gap, before = gaps[0]
    start = before.start_ns() + before.duration_ns()
    inside = [e for e in events if start <= e.start_ns() < start + gap]
    for event in inside[:40]:
        print(
            f"    +{(event.start_ns() - start) / 1e3:7.1f} us {event.duration_ns() / 1e3:7.1f} us {event.name()[:70]}"
        )


def enqueued(step: Callable[[], object], steps: int) -> None:
    """Print what the host does while it enqueues."""
    recorded = cProfile.Profile()
    for _ in range(steps):
        torch.cuda.synchronize()
        recorded.enable()
        step()
        recorded.disable()
    torch.cuda.synchronize()
    pstats.Stats(recorded).sort_stats("tottime").print_stats(35)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 4096), ("ffn", 14336), ("blocks", 8), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Blocks(args.blocks, args.hidden, args.ffn)
        x = torch.randn(1, 1, args.hidden)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    handle = offload_(model, "4GiB", device="cuda:0", policy=all_staged, units=["layers.*"])
    traced("eager", lambda: model(x), args.steps, nbytes)
    enqueued(lambda: model(x), args.steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    traced("in a CUDA graph", graph.replay, args.steps, nbytes)
    del graph
    handle.restore_()


if __name__ == "__main__":
    main()
