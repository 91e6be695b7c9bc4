"""Host memory while a tree is offloaded, from outside: the weights once and one leaf; consumed, the weights once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlpoffload

pytest.importorskip("jax")

LEAF, COUNT = 32 << 20, 8
SCRIPT = """
import gc, json, re, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from dlpoffload.jax import offload
from dlpoffload.jax.arrays import jax_device
from dlpoffload.driver import open_driver
from dlpoffload.planning import all_staged

form, device, leaf, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def value(i):
    return np.full(leaf // 4, i, np.float32)

at = jax_device(open_driver(device))
small = {"layers": [np.ones(1024, np.float32)]}
offload(small, 8192, device=device, policy=all_staged)  # loads what is loaded once
tree, leaves = None, None
if form == "numpy":
    tree = [value(i) for i in range(count)]
elif form == "leaves":
    tree = [jax.ShapeDtypeStruct((leaf // 4,), np.float32)] * count
    leaves = (value(i) for i in range(count))
else:
    tree = [jax.device_put(value(i), at).block_until_ready() for i in range(count)]
gc.collect()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
new, handle = offload(tree, 2 * leaf, device=device, policy=all_staged, leaves=leaves, donate=form == "donated")
peak = status("VmHWM") - before
assert [int(np.asarray(a[:1])[0]) for a in [np.asarray(a) for a in new]] == list(range(count))
print(json.dumps(peak))
"""


@pytest.mark.parametrize("form", ["numpy", "jax", "leaves", "donated"])
def test_the_peak_of_host_memory(form: str, device: str) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process reset its own peak")
    environment = {**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, form, device, str(LEAF), str(COUNT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr
    peak = json.loads(run.stdout.splitlines()[-1])

    leaves = COUNT + 1
    if form == "donated" and device == "cpu":
        leaves = 2  # what is consumed is host memory as well, and is given back leaf by leaf
    assert peak < leaves * LEAF + (8 << 20), f"{peak / LEAF:.2f} leaves"
    if form != "donated":
        assert peak > (COUNT - 1) * LEAF, "the measurement sees the weights"
