"""What building takes of host and device at its peak, seen from outside: by the kernel, and by torch's allocator."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import building_peaks  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import dlpoffload  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(building_peaks.weights(), folder / "model.safetensors")
    return folder


@functools.cache
def measured(how: str, device: str, checkpoint: Path) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, building_peaks.__file__, how, device, str(checkpoint)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1]),
            # Or malloc would come to keep the memory that layers were built in, for more of the kind.
            "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("how", ["meta", "wrap", "split"])
def test_weights_once_and_one_tensor(how: str, device: str, checkpoint: Path) -> None:
    """One tensor more than the weights; of layers that are built in ordinary memory, one layer: it is there itself."""
    found = measured(how, device, checkpoint)
    on_gpu = device != "cpu"
    slack = building_peaks.SLACK["cuda" if on_gpu else "cpu"]
    parts = "\n".join(f"{name:>18} {nbytes / 1e6:10.3f} MB" for name, nbytes in found.items() if name != "sum")
    assert found["peak"] <= found["home"] + found["more"] + slack, parts
    assert found["peak"] >= found["host"], f"else the measure is none\n{parts}"
    assert found["host"] + found["devices"] - found["ring"] >= found["weights"], parts
    assert found["device"] <= found["budget"], parts
    if on_gpu:
        assert found["device_peak"] <= found["budget"], parts


def test_the_same_results_as_loaded_the_plain_way(device: str, checkpoint: Path) -> None:
    stored = building_peaks.weights()
    model = building_peaks.Model([building_peaks.Layer() for _ in range(building_peaks.DEPTH)])
    state = {name: tensor for name, tensor in stored.items() if ".up." not in name}
    for i in range(building_peaks.DEPTH):
        state[f"layers.{i}.up.weight"] = torch.cat([stored[f"layers.{i}.up.{half}"] for half in ("left", "right")], 1)
    model.load_state_dict(state)
    with torch.no_grad():
        y = model.to(device)(torch.linspace(-1, 1, building_peaks.WIDTH, device=device)[None])
    assert measured("meta", device, checkpoint)["sum"] == int(y.double().abs().sum().item() * 1e6)
    if device == "cpu":
        assert measured("split", device, checkpoint)["sum"] == measured("meta", device, checkpoint)["sum"]
