"""Benchmark: eight bf16 transformer blocks under a budget, against the link and against peers in the same run.

    python tests/gpu/bench_blocks.py [--hidden 4096] [--ffn 14336] [--blocks 8] [--many 2048]
        [--rounds 8] [--steps 5] [--peers]

Steps that follow each other are timed with CUDA events between them, after warm-up. A host that is shared disturbs its
link for seconds on end, so a case is measured in rounds, with the link between any two: the median of a round's steps
counts, that of the best round, and the median of all steps stands beside it. The link is a pinned 1 GiB host-to-device
copy by the driver API, median of 5; the floor of a case is what it streams over the best of all of them, or the
resident step where that takes longer. Prints one table, and one JSON object last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import dlpoffload as dlpo
from dlpoffload.planning import Placement, all_mapped, all_staged
from dlpoffload.torch import offload_
from dlpoffload.transfer import measure_link

COLUMNS = ["who", "tokens", "ms", "median", "floor ms", "floor / ms", "enqueue ms", "pinned", "device", "bitwise"]


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


def milliseconds(step: Callable[[], object], steps: int, *, warm_up: int = 3) -> list[float]:
    """Times of steps by CUDA events; they follow each other as in serving."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def enqueue_milliseconds(step: Callable[[], object], steps: int) -> float:
    """Median time that the host takes to enqueue a step, with nothing before it in the queue."""
    taken = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        taken.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return median(taken)


def tidy() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@dataclass
class Row:
    """One line of the table."""

    who: str
    tokens: int
    rounds: list[list[float]]
    streamed_nbytes: int
    resident_ms: float = 0.0
    enqueue_ms: float | None = None
    pinned_over_weights: float | None = None
    device_over_plan: float | None = None
    late_copies: int | None = None
    bitwise: bool | None = None

    @property
    def ms(self) -> float:
        """The median step of the best round."""
        return min(map(median, self.rounds))

    @property
    def median_ms(self) -> float:
        """The median of all steps."""
        return median(chain.from_iterable(self.rounds))

    def floor_ms(self, link: float) -> float:
        return max(self.streamed_nbytes / link / 1e6, self.resident_ms)

    def facts(self, link: float) -> dict[str, Any]:
        return asdict(self) | {"ms": self.ms, "median_ms": self.median_ms, "floor_ms": self.floor_ms(link)}


class Bench:
    """The resident model, what it gives, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args = args
        self.driver = dlpo.open_driver("cuda:0")
        self.links: list[float] = []
        self.rows: list[Row] = []
        torch.set_default_dtype(torch.bfloat16)
        self.resident = Blocks(args.blocks, args.hidden, args.ffn).cuda()
        self.weights = sum(p.numel() * p.element_size() for p in self.resident.parameters())
        self.x = {n: torch.randn(1, n, args.hidden, device="cuda") for n in (1, args.many)}
        self.wanted = {n: self.resident(x) for n, x in self.x.items()}
        self.resident_ms: dict[int, float] = {}
        for tokens, x in self.x.items():
            rounds = self.timed(lambda x=x: self.resident(x))
            enqueue = enqueue_milliseconds(lambda x=x: self.resident(x), args.steps)
            self.add(Row("resident", tokens, rounds, 0, enqueue_ms=enqueue))
            self.resident_ms[tokens] = self.rows[-1].ms

    def timed(self, step: Callable[[], object], rounds: int | None = None) -> list[list[float]]:
        """Times of steps, round by round, and the link before each of them."""
        taken = []
        for _ in range(rounds or self.args.rounds):
            self.links.append(measure_link(self.driver, repeat=5).host_to_device)
            taken.append(milliseconds(step, self.args.steps))
        return taken

    def add(self, row: Row) -> None:
        self.rows.append(row)
        links = self.links[-len(row.rounds) :]
        print(
            f"{row.who:36s} {row.tokens:5d} tokens {row.ms:9.2f} ms, median {row.median_ms:9.2f} ms, "
            f"link {min(links):.2f} to {max(links):.2f} GB/s",
            flush=True,
        )

    def ours(self, who: str, budget: int | str, tokens: list[int], *, graph: bool = False, **options: Any) -> None:
        model: nn.Module = copy.deepcopy(self.resident)
        before = torch.cuda.memory_allocated() - self.weights
        handle = offload_(model, budget, device="cuda:0", **options)
        print(handle.plan, flush=True)
        streamed = self.weights - handle.plan.nbytes(Placement.DEVICE)
        for n in tokens:
            x = self.x[n]
            assert torch.equal(model(x), self.wanted[n]), f"{who}: not bitwise equal to resident"
            rounds = self.timed(lambda x=x: model(x))
            assert torch.equal(model(x), self.wanted[n]), f"{who}: not bitwise equal to resident"
            report = handle.report()
            assert (report.stats.mapped_runs, report.stats.host_waits) == (0, 0)
            self.add(
                Row(
                    who,
                    n,
                    rounds,
                    streamed,
                    self.resident_ms[n],
                    enqueue_milliseconds(lambda x=x: model(x), self.args.steps),
                    report.pinned_nbytes / max(1, streamed),
                    (torch.cuda.memory_allocated() - before) / max(1, handle.plan.device_nbytes),
                    report.stats.late_copies,
                    True,
                )
            )
        print(handle.report(), flush=True)
        if graph:
            self.captured(f"{who}, CUDA graph", model, streamed)
        handle.restore_()
        tidy()

    def captured(self, who: str, model: nn.Module, streamed: int) -> None:
        static = self.x[1].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(static)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, self.wanted[1]), f"{who}: not bitwise equal to resident"
        rounds = self.timed(graph.replay)
        assert torch.equal(captured, self.wanted[1]), f"{who}: not bitwise equal to resident"
        enqueue = enqueue_milliseconds(graph.replay, self.args.steps)
        self.add(Row(who, 1, rounds, streamed, self.resident_ms[1], enqueue, bitwise=True))

    def peer(self, who: str, make: Callable[[], nn.Module], tokens: list[int], rounds: int | None = None) -> None:
        try:
            model = make()
            for n in tokens:
                x = self.x[n]
                equal = torch.equal(model(x), self.wanted[n])
                taken = self.timed(lambda x=x: model(x), rounds)
                self.add(Row(who, n, taken, self.weights, self.resident_ms[n], bitwise=equal))
        except (ImportError, RuntimeError) as error:
            print(f"{who} is not measured: {type(error).__name__}: {str(error)[:200]}", flush=True)
        tidy()

    def show(self) -> None:
        link = max(self.links)
        table = Table(title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}, link {link:.2f} GB/s")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "who" else "right")
        for row in self.rows:
            floor = row.floor_ms(link)
            table.add_row(
                row.who,
                str(row.tokens),
                f"{row.ms:.2f}",
                f"{row.median_ms:.2f}",
                f"{floor:.2f}" if floor else "",
                f"{floor / row.ms:.1%}" if floor else "",
                "" if row.enqueue_ms is None else f"{row.enqueue_ms:.2f}",
                "" if row.pinned_over_weights is None else f"{row.pinned_over_weights:.4f}",
                "" if row.device_over_plan is None else f"{row.device_over_plan:.4f}",
                "" if row.bitwise is None else ("yes" if row.bitwise else "no"),
            )
        Console(width=150).print(table)
        facts = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "links_h2d_gb_per_s": [round(rate, 2) for rate in self.links],
            "weights_nbytes": self.weights,
            "rows": [row.facts(link) for row in self.rows],
        }
        print(json.dumps(facts))


def accelerate_peer(resident: Blocks) -> nn.Module:
    from accelerate import cpu_offload

    model = copy.deepcopy(resident).cpu()
    cpu_offload(model, execution_device=0)
    return model


def fsdp_peer(resident: Blocks) -> nn.Module:
    from torch import distributed
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if not distributed.is_initialized():
        store = distributed.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda:0"))
    model = copy.deepcopy(resident).cpu()
    for layer in model.layers:
        fully_shard(layer, offload_policy=CPUOffloadPolicy())
    fully_shard(model, offload_policy=CPUOffloadPolicy())
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 4096), ("ffn", 14336), ("blocks", 8), ("many", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rounds", 8), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()

    bench = Bench(args)
    units = ["layers.*"]
    bench.ours("dlpoffload staged", "4GiB", [1, args.many], graph=True, policy=all_staged, units=units)
    # Of eight blocks four are resident, and the ring of two slots takes as much as two more.
    half = bench.weights * (args.blocks // 2 + 2) // args.blocks + (4 << 20)
    bench.ours("dlpoffload, half resident", half, [1, args.many], graph=True, units=units)
    bench.ours("dlpoffload mapped (UVA)", 0, [1], policy=all_mapped)
    if args.peers:
        bench.peer("pinned .to(non_blocking)", lambda: PinnedTo(bench.resident), [1, args.many])
        bench.peer("FSDP2, CPUOffloadPolicy", lambda: fsdp_peer(bench.resident), [1, args.many])
        bench.peer("accelerate cpu_offload", lambda: accelerate_peer(bench.resident), [1], rounds=1)
    bench.show()


if __name__ == "__main__":
    main()
