"""Run by test_torch_building_peaks in a fresh process: what building takes of host and device, seen from outside.

``python building_peaks.py how device checkpoint`` prints figures in bytes as JSON; ``how`` is ``meta``, ``wrap``, or
``split`` for meta over two devices, of which the second is the CPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlpoffload import driver as drivers
from dlpoffload.checkpoint import concat, part
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.planning import Placement, Plan
from dlpoffload.torch import Offloader, offload_

WIDTH, DEPTH = 1024, 8
LAYERS = ["layers.*"]
SLACK = {"cpu": 4 << 20, "cuda": 24 << 20}
"""Stacks of threads, and what a driver keeps for itself."""


class SecondCpu(CpuDriver):
    """A second device of the CPU driver."""

    device = "cpu:1"


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module], width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def weights(depth: int = DEPTH, width: int = WIDTH) -> dict[str, Tensor]:
    """What the checkpoint holds: up as two halves, to be made one by a recipe."""
    generator = torch.Generator().manual_seed(7)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 32

    found = {"head.weight": made(width, width)}
    for i in range(depth):
        found |= {f"layers.{i}.up.{half}": made(2 * width, width // 2) for half in ("left", "right")}
        found[f"layers.{i}.down.weight"] = made(width, 2 * width)
    return found


RECIPE = {
    "layers.*.up.weight": concat("layers.*.up.left", "layers.*.up.right", dim=1),
    "layers.*.down.weight": concat(
        *(part("layers.*.down.weight", dim=1, index=index, count=4) for index in range(4)), dim=1
    ),
}


def _status(*keys: str) -> dict[str, int]:
    """What the kernel counts of this process, in bytes; pages of libraries and other files are ``RssFile``."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    return {key: int(found[key]) << 10 for key in keys}


def _on_meta(depth: int = DEPTH, width: int = WIDTH) -> Model:
    with torch.device("meta"):
        return Model([Layer(width) for _ in range(depth)], width)


def _second(device: str) -> str:
    return "cpu:1" if device == "cpu" else "cpu"


def _offload(
    how: str, device: str, budget: int, source: Any, depth: int = DEPTH, width: int = WIDTH
) -> tuple[Any, Any]:
    options: dict[str, Any] = {"units": LAYERS, "checkpoint": source, "recipe": RECIPE}
    if how == "meta":
        model = _on_meta(depth, width)
        return model, offload_(model, budget, device=device, **options)
    if how == "split":
        model, other = _on_meta(depth, width), _second(device)
        device_map = {"": device} | {f"layers.{i}": other for i in range(depth // 2, depth)}
        return model, offload_(model, dict.fromkeys((device, other), budget), device_map=device_map, **options)

    def layers() -> Iterator[nn.Module]:
        for i in range(depth):
            torch.manual_seed(i)
            with torch.device(device):
                yield Layer(width)

    offloader = Offloader(budget, device=device, units=LAYERS)
    model = Model(offloader.wrap(layers()), width)
    return model, offloader.offload_(model)


def _in_host_memory(how: str, plans: dict[str, Plan]) -> int:
    """What the weights take of the host: "device memory" of the CPU driver is host memory, too.

    What wraps a layer cannot know where it will live, since that is planned when all are there. So each has a slab, and
    those of residents are given up when they move.
    """
    if how == "wrap":
        return sum(plan.total_nbytes for plan in plans.values())
    return sum(
        p.total_nbytes - (0 if device.startswith("cpu") else p.nbytes(Placement.DEVICE)) for device, p in plans.items()
    )


def main(how: str, device: str, path: str) -> dict[str, int]:
    """Build once, small, so that what is loaded on first use is there; then measure."""
    small = weights(2, 64)
    model, handle = _offload(how, device, 10 << 20, small, 2, 64)
    handle.restore_()
    del model, handle
    layer = 4 * 4 * WIDTH * WIDTH
    layers = 2 if how == "split" else 6  # of four on each device, or of eight
    budget = layers * layer + 4 * WIDTH * WIDTH + (1 << 20)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    kinds = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
    before, device_before = _status(*kinds), 0
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        device_before = torch.cuda.memory_allocated()
    model, handle = _offload(how, device, budget, path)
    after = _status("VmHWM", *kinds)
    device_peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated() - device_before
    reports = handle.report(link=False)
    reports = reports if how == "split" else {device: reports}
    plans = {name: report.plan for name, report in reports.items()}
    with torch.no_grad():
        y = model(torch.linspace(-1, 1, WIDTH, device=device)[None])
    built_there = layer if how == "wrap" and device == "cpu" else 0
    return {
        # Less what was paged in of libraries meanwhile, which the kernel can have back: no weights lie in files here.
        "peak": after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"]),
        "home": _in_host_memory(how, plans),
        "more": max(layer // 2, built_there),  # the largest tensor, or the layer that is built in ordinary memory
        "device_peak": device_peak,
        "budget": budget,
        "host": sum(report.pinned_nbytes for report in reports.values()),
        "device": reports[device].device_nbytes,
        "ring": sum(plan.ring_nbytes for plan in plans.values()),
        "devices": sum(report.device_nbytes for report in reports.values()),
        "weights": sum(plan.total_nbytes for plan in plans.values()),
        **{f"{key} grew by": after[key] - before[key] for key in kinds},
        "sum": int(y.double().abs().sum().item() * 1e6),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with drivers.installed(SecondCpu()):
        print(json.dumps(main(*sys.argv[1:])))
