"""A checkpoint mapped from the page cache: no second copy in host memory, staged from there, and never written."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import dlpoffload as dlpo

LAYERS, HIDDEN = 8, 512
DEVICE = sys.argv[1] if len(sys.argv) > 1 else None

with tempfile.TemporaryDirectory() as name:
    path = Path(name) / "model.safetensors"
    rng = np.random.default_rng(0)
    weights = {
        f"layers.{i}.{part}": rng.standard_normal((HIDDEN, HIDDEN), np.float32) for i in range(LAYERS) for part in "qk"
    }
    save_file(weights, path)
    units = {f"layers.{i}": [n for n in weights if n.startswith(f"layers.{i}.")] for i in range(LAYERS)}

    with dlpo.HostStore.open(path, mode="auto", units=units, device=DEVICE) as store:
        print(f"{store.mode}: {store.because}")
        print(
            f"{store.nbytes:,} bytes of weights, {store.host_nbytes - store.file_nbytes:,} bytes beside the page cache"
        )
        print(f"off 16 bytes, so that kernels cannot read them in place: {len(store.unaligned)}")

        # Kernels may write through a device view, and that would end the CUDA context: so it is asked for by name.
        if store.mode == "map":
            try:
                store.slab("layers.0").device_view("layers.0.q")
            except dlpo.AliasError as error:
                print(f"refused: {str(error).partition(',')[0]}")

        # Staging copies out of the page cache; a write moves one tensor to memory of its own first.
        store.update("layers.3.q", 2 * weights["layers.3.q"])
        print(f"moved out of the file: {dict(store.moved)}")
        with dlpo.SlotRing({unit: store.slab(unit) for unit in units}, device=DEVICE) as ring:
            for unit, names in units.items():
                print(unit, [copy.nbytes for copy in ring.slabs[unit].copies()])
                with ring.prefetch(unit) as views:
                    ring.driver.synchronize()
                    for tensor in names:
                        staged = dlpo.HostBuffer.copy_of(views[tensor], device=DEVICE)
                        wanted = weights[tensor] * (2 if tensor == "layers.3.q" else 1)
                        assert bytes(staged.memoryview()) == wanted.tobytes(), tensor
                    del views
        print(f"{ring.stats.copies} units staged bit for bit")
