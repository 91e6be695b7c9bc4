"""Benchmark: from a checkpoint to an offloaded model, against the way over ordinary memory.

    python tests/gpu/bench_building.py [--device cuda:0] [--layers 24] [--width 4096] [--folder /tmp]

Writes a checkpoint once (12 width^2 elements of bf16 a layer: 9.7 GB by default), so that it lies in the page cache,
and builds the same model from it in a fresh process each: `offload_` from meta, the same through a recipe that fuses
q, k, v and takes a rank's half, layers wrapped one by one and then loaded, and `load_file` + `load_state_dict` +
`offload_`. Tells seconds, the peak of host memory that came along (VmHWM) over the weights, and the peak of torch's
device memory over the budget. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import json, re, sys, time
import torch
from torch import nn
from dlpoffload.checkpoint import concat, part
from dlpoffload.torch import Offloader, offload_
way, device, folder, layers, width = *sys.argv[1:4], *map(int, sys.argv[4:])
ranks = 2 if way == "recipe" else 1

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        if way == "recipe":
            self.qkv = nn.Linear(width, 3 * width // ranks, bias=False, dtype=torch.bfloat16)
        else:
            for name in "qkv":
                setattr(self, name, nn.Linear(width, width, bias=False, dtype=torch.bfloat16))
        self.out = nn.Linear(width // ranks, width, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(width, 4 * width // ranks, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(4 * width // ranks, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return x

def model(blocks):
    whole = nn.Module()
    whole.layers = nn.ModuleList(blocks)
    return whole

def resident(key):
    return int(re.search(rf"^{key}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M).group(1)) << 10

def load_layers(whole):
    from safetensors import safe_open
    for name, parameter in whole.named_parameters():
        # Opened for each, or the pages of the file that it maps would count as memory of this process.
        with safe_open(folder + "/model.safetensors", framework="pt") as file:
            parameter.data.copy_(file.get_tensor(name))

if device != "cpu":
    torch.cuda.init()
weights = 12 * width * width * 2 * layers // ranks
budget = weights // 4
options = {"device": device, "units": ["layers.*"]}
small = nn.Linear(64, 64)
offload_(small, "1MiB", device=device).restore_()
open("/proc/self/clear_refs", "w").write("5")
before, start = resident("VmRSS"), time.perf_counter()
if way in ("meta", "recipe"):
    with torch.device("meta"):
        whole = model([Block() for _ in range(layers)])
    ours = lambda name, dim: part(f"layers.*.{name}.weight", dim=dim, index=0, count=2)
    recipe = {
        "layers.*.qkv.weight": concat(*(ours(name, 0) for name in "qkv"), dim=0),
        "layers.*.out.weight": ours("out", 1),
        "layers.*.up.weight": ours("up", 0),
        "layers.*.down.weight": ours("down", 1),
    }
    offload_(whole, budget, checkpoint=folder, recipe=recipe if way == "recipe" else None, **options)
elif way == "wrap":
    offloader = Offloader(budget, **options)
    with torch.device("meta"):
        whole = model(offloader.wrap(Block() for _ in range(layers)))
    load_layers(whole)
    offloader.offload_(whole)
else:
    from safetensors.torch import load_file
    with torch.device("meta"):
        whole = model([Block() for _ in range(layers)])
    whole.load_state_dict(load_file(folder + "/model.safetensors"), assign=True)
    offload_(whole, budget, **options)
seconds = time.perf_counter() - start
peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
print(json.dumps({"seconds": round(seconds, 3), "gb_per_s": round(weights / seconds / 1e9, 2),
    "host_peak_over_weights": round((resident("VmHWM") - before) / weights, 3),
    "device_peak_over_budget": round(peak / budget, 3)}))
"""

WAYS = {
    "meta": "offload_ from meta",
    "recipe": "the same, fused and sharded by a recipe",
    "wrap": "layers wrapped, then loaded",
    "plain": "load_file, load_state_dict, offload_",
}


def write(folder: Path, layers: int, width: int) -> None:
    """A checkpoint of random bits that are finite numbers."""
    import torch
    from safetensors.torch import save_file

    shapes = dict.fromkeys(("q", "k", "v", "out"), (width, width))
    shapes |= {"up": (4 * width, width), "down": (width, 4 * width)}
    save_file(
        {
            f"layers.{i}.{name}.weight": torch.full(shape, float(i % 7), dtype=torch.bfloat16)
            for i in range(layers)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.layers, args.width)
        for way, words in WAYS.items():
            command = [sys.executable, "-c", CODE, way, args.device, folder, str(args.layers), str(args.width)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if run.returncode:
                print(f"{words:42s} not measured: {run.stderr.strip().splitlines()[-1]}")
                continue
            found = results[way] = json.loads(run.stdout.splitlines()[-1])
            print(
                f"{words:42s} {found['seconds']:7.2f} s {found['gb_per_s']:6.2f} GB/s, "
                f"host peak {found['host_peak_over_weights']:.2f} x weights, "
                f"device peak {found['device_peak_over_budget']:.2f} x budget",
                flush=True,
            )
    print(json.dumps({"layers": args.layers, "width": args.width, "results": results}))


if __name__ == "__main__":
    main()
