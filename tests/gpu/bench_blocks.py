"""Benchmark: eight bf16 transformer blocks, all streamed, against the link and against peers in the same run.

    python tests/gpu/bench_blocks.py [--hidden 4096] [--ffn 14336] [--blocks 8] [--tokens 1] [--steps 20]

The link is a pinned 1 GiB host-to-device copy by the driver API, median of 20, in this process. It is measured before,
between and after the steps, and the fastest of the three is what shares are of. A step is timed with CUDA events around
it, after warm-up; the median of the steps counts. Prints a table and one JSON object last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import nn
from torch.nn import functional

import dlpoffload as dlpo
from dlpoffload.planning import all_mapped, all_staged
from dlpoffload.torch import offload_
from dlpoffload.transfer import measure_link


class Block(nn.Module):
    """A Llama-like block: attention with four square projections, gated feed-forward."""

    def __init__(self, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(hidden)
        self.norm2 = nn.RMSNorm(hidden)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Linear(hidden, hidden, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for p in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Blocks(nn.Module):
    def __init__(self, blocks: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden, ffn, hidden // 128) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def milliseconds(step: Callable[[], object], steps: int) -> float:
    """Median time of a step by CUDA events; steps follow each other as in serving."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks))


class PinnedTo(nn.Module):
    """The peer everybody writes first: pinned weights, `.to(non_blocking=True)` on the compute stream."""

    def __init__(self, model: Blocks) -> None:
        super().__init__()
        self.shell = copy.deepcopy(model.layers[0]).cuda()
        self.blocks = [[p.detach().cpu().pin_memory() for p in layer.parameters()] for layer in model.layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            for parameter, pinned in zip(self.shell.parameters(), block, strict=True):
                parameter.data = pinned.to("cuda", non_blocking=True)
            x = self.shell(x)
        return x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 4096), ("ffn", 14336), ("blocks", 8), ("tokens", 1), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    driver = dlpo.open_driver("cuda:0")
    links = [measure_link(driver)]
    torch.set_default_dtype(torch.bfloat16)
    resident = Blocks(args.blocks, args.hidden, args.ffn).cuda()
    x = torch.randn(1, args.tokens, args.hidden, device="cuda")
    weights = sum(p.numel() * p.element_size() for p in resident.parameters())
    wanted = resident(x)
    results: dict[str, dict[str, object]] = {}

    def record(name: str, ms: float, **more: object) -> None:
        results[name] = {"ms": round(ms, 3), **more}
        print(f"{name:32s} {ms:9.2f} ms", more, flush=True)

    record("resident", milliseconds(lambda: resident(x), args.steps))
    model = copy.deepcopy(resident)
    before = torch.cuda.memory_allocated()
    handle = offload_(model, "4GiB", device="cuda:0", policy=all_staged, units=["layers.*"])
    print(handle.plan, flush=True)
    assert torch.equal(model(x), wanted), "not bitwise equal to resident"
    ms = milliseconds(lambda: model(x), args.steps)
    equal = torch.equal(model(x), wanted)
    report = handle.report()
    assert equal, "not bitwise equal to resident"
    assert (report.stats.mapped_runs, report.stats.host_waits) == (0, 0)
    record(
        "dlpoffload staged",
        ms,
        pinned_over_weights=round(report.pinned_nbytes / weights, 4),
        late_copies=report.stats.late_copies,
        device_over_plan=round((torch.cuda.memory_allocated() - before + weights) / report.plan.device_nbytes, 4),
        bitwise=equal,
    )
    print(report, flush=True)
    links.append(measure_link(driver))

    static = x.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(static)
    graph.replay()
    torch.cuda.synchronize()
    equal = torch.equal(captured, wanted)
    assert equal, "graph is not bitwise equal to resident"
    record("dlpoffload staged, CUDA graph", milliseconds(graph.replay, args.steps), bitwise=equal)
    del graph, captured
    handle.restore_()
    del model, handle
    gc.collect()
    torch.cuda.empty_cache()

    if args.peers:
        model = copy.deepcopy(resident)
        handle = offload_(model, 0, device="cuda:0", policy=all_mapped)
        assert torch.equal(model(x), wanted)
        record("dlpoffload mapped (UVA)", milliseconds(lambda: model(x), args.steps))
        handle.restore_()
        del model, handle
        gc.collect()
        peer = PinnedTo(resident)
        record("pinned .to(non_blocking)", milliseconds(lambda: peer(x), args.steps))
        del peer
        gc.collect()
        torch.cuda.empty_cache()
        try:
            from accelerate import cpu_offload
        except ImportError:
            print("accelerate is not installed: its cpu_offload is not measured")
        else:
            model = copy.deepcopy(resident).cpu()
            cpu_offload(model, execution_device=0)
            record("accelerate cpu_offload", milliseconds(lambda: model(x), 3))
    links.append(measure_link(driver))
    rates = [round(link.host_to_device, 2) for link in links]
    floor = weights / max(rates) / 1e6
    print(f"\nlink {rates} GB/s; all weights once at the fastest: {floor:.2f} ms")
    for name, row in results.items():
        row["link_share"] = round(floor / float(str(row["ms"])), 4)
        print(f"{name:32s} {row['ms']:>9} ms  {row['link_share']:8.1%} of the link")
    print(
        json.dumps(
            {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "links_h2d_gb_per_s": rates,
                "weights_nbytes": weights,
                "floor_ms": round(floor, 2),
                "tokens": args.tokens,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
