"""Where the time of a streamed step goes: each copy and each gap between copies, and the host's own time.

    python tests/gpu/trace_blocks.py [--hidden 4096] [--ffn 14336] [--blocks 8] [--steps 6]

The blocks of `bench_blocks.py`, all streamed, one token a step, eager and in a CUDA graph, under torch's profiler
(CUPTI): how long the copies of a step took and at what rate, the gaps between them by size, and what ran on the device
in the longest gap. The same copies with nothing around them, on a stream and in a graph. How much of the time that a
step takes to be enqueued is the blocks' own, and the host functions that take the longest then, by cProfile, which
makes all of them slower. For finding what a figure is short of, not for figures.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

import dlpoffload as dlpo
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


def copies_alone(nbytes: int, count: int, rounds: int = 8) -> None:
    """Print what the copies of a step take without a model: in turn on a stream, in a graph, in a graph in pieces."""
    host = dlpo.HostBuffer.allocate(nbytes * count, device="cuda:0")
    weights = torch.from_dlpack(host.host_view((nbytes * count,), "uint8", label="pinned_as_cpu"))
    slots = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def copies(piece: int = nbytes) -> None:
        for unit in range(count):
            for start in range(0, nbytes, piece):
                source = weights[unit * nbytes + start : unit * nbytes + min(start + piece, nbytes)]
                slots[unit % 2][start : start + piece].copy_(source, non_blocking=True)

    def captured(piece: int) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            copies(piece)
        return graph.replay

    ways = {"on a stream": copies, "in a graph": captured(nbytes), "in pieces of 64 MiB": captured(64 << 20)}
    taken: dict[str, list[float]] = {who: [] for who in ways}
    for _ in range(rounds):
        for who, step in ways.items():
            taken[who] += milliseconds(step, 3, warm_up=1)
    print("\nthe copies alone, ms")
    for who, ms in taken.items():
        print(f"  {who:20s} best {min(ms):.2f}, median {median(ms):.2f}")


def enqueued(model: Blocks, x: torch.Tensor, steps: int) -> None:
    """Print how long the host takes to enqueue a step, the blocks' own part of it, and what it does meanwhile."""
    own = 0.0

    def timed(inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            nonlocal own
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                own += time.perf_counter() - start

        return timed

    shares = []
    with ExitStack() as patched:
        for layer in model.layers:
            patched.enter_context(patch.object(layer.forward, "inner", timed(layer.forward.inner)))
        for _ in range(3 * steps):
            torch.cuda.synchronize()
            own, start = 0.0, time.perf_counter()
            model(x)
            shares.append((time.perf_counter() - start, own))
    whole, inside = (median(share) * 1e3 for share in zip(*shares, strict=True))
    print(f"\n{x.shape[1]} tokens: enqueued in {whole:.2f} ms, of which the blocks' own forward takes {inside:.2f} ms")
    recorded = cProfile.Profile()
    for _ in range(steps):
        torch.cuda.synchronize()
        recorded.enable()
        model(x)
        recorded.disable()
    torch.cuda.synchronize()
    pstats.Stats(recorded).sort_stats("tottime").print_stats(25)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 4096), ("ffn", 14336), ("blocks", 8), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Blocks(args.blocks, args.hidden, args.ffn)
        x, many = torch.randn(1, 1, args.hidden), torch.randn(1, 2048, args.hidden)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    handle = offload_(model, "4GiB", device="cuda:0", policy=all_staged, units=["layers.*"])
    copies_alone(nbytes // args.blocks, args.blocks)
    traced("eager", lambda: model(x), args.steps, nbytes)
    for tokens in (x, many):
        enqueued(model, tokens, args.steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    traced("in a CUDA graph", graph.replay, args.steps, nbytes)
    del graph
    handle.restore_()


if __name__ == "__main__":
    main()
