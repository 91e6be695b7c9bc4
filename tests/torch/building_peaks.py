"""Run by test_torch_building_peaks in a fresh process: what building takes of host and device, seen from outside.

``python building_peaks.py how device checkpoint`` prints figures in bytes as JSON.
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

from dlpoffload.checkpoint import concat, part
from dlpoffload.torch import Offloader, offload_

WIDTH, DEPTH = 1024, 8
LAYERS = ["layers.*"]
SLACK = {"cpu": 4 << 20, "cuda": 24 << 20}
"""Stacks of threads, and what a driver keeps for itself."""


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


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) << 10


def _on_meta(depth: int = DEPTH, width: int = WIDTH) -> Model:
    with torch.device("meta"):
        return Model([Layer(width) for _ in range(depth)], width)


def _offload(how: str, device: str, budget: int, source: Any) -> tuple[Any, Any]:
    if how == "meta":
        model = _on_meta()
        return model, offload_(model, budget, device=device, units=LAYERS, checkpoint=source, recipe=RECIPE)

    def layers() -> Iterator[nn.Module]:
        for i in range(DEPTH):
            torch.manual_seed(i)
            with torch.device(device):
                yield Layer()

    offloader = Offloader(budget, device=device, units=LAYERS)
    model = Model(offloader.wrap(layers()))
    return model, offloader.offload_(model)


def main(how: str, device: str, path: str) -> dict[str, int]:
    """Build once, small, so that what is loaded on first use is there; then measure."""
    small = weights(2, 64)
    offload_(_on_meta(2, 64), "10MiB", device=device, checkpoint=small, recipe=RECIPE).restore_()
    with Offloader("10MiB", device=device) as offloader:
        offloader.wrap([Layer(64)])
    layer = 4 * 4 * WIDTH * WIDTH
    budget = 6 * layer + 4 * WIDTH * WIDTH + (1 << 20)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, device_before = _resident("VmRSS"), 0
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        device_before = torch.cuda.memory_allocated()
    model, handle = _offload(how, device, budget, path)
    peak = _resident("VmHWM") - before
    device_peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated() - device_before
    report = handle.report(link=False)
    with torch.no_grad():
        y = model(torch.linspace(-1, 1, WIDTH, device=device)[None])
    return {
        "peak": peak,
        "device_peak": device_peak,
        "budget": budget,
        "host": report.pinned_nbytes,
        "device": report.device_nbytes,
        "ring": report.plan.ring_nbytes,
        "weights": report.plan.total_nbytes,
        "layer": layer,
        "tensor": layer // 2,
        "sum": int(y.double().abs().sum().item() * 1e6),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(*sys.argv[1:])))
