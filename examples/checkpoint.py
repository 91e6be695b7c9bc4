"""A sharded checkpoint, read straight into exact pinned memory, planned, and read back bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import dlpoffload as dlpo

LAYERS, HIDDEN = 8, 256


def write_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """A small transformer in two shards with an index, as the hub keeps large ones."""
    rng = np.random.default_rng(0)
    tensors = {"embed.weight": rng.standard_normal((4096, HIDDEN), dtype=np.float32)}
    for i in range(LAYERS):
        for name, shape in (("qkv", (3 * HIDDEN, HIDDEN)), ("up", (4 * HIDDEN, HIDDEN)), ("norm", (HIDDEN,))):
            tensors[f"layers.{i}.{name}.weight"] = rng.standard_normal(shape, dtype=np.float32)
    names = list(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    written = write_checkpoint(folder)
    for file in sorted(folder.iterdir()):
        print(f"{file.name:32}{file.stat().st_size:12,} bytes")

    units = {f"layers.{i}": [n for n in written if n.startswith(f"layers.{i}.")] for i in range(LAYERS)}
    with dlpo.HostStore.copy_of(folder, units=units) as store:
        print(f"\n{store}\n{store.pinned_nbytes:,} bytes pinned for {store.nbytes:,} bytes of weights")
        slab = store.slab("layers.3")
        print(f"layers.3 is one slab of {slab.nbytes:,} bytes: {dict(slab.byte_offsets)}\n")
        print(dlpo.plan(store.specs, device_budget="9MiB", units=units))

        for name, array in written.items():
            assert np.array_equal(np.from_dlpack(store.host_view(name)), array), name
        print(f"\nall {len(store)} tensors read back bit for bit")
