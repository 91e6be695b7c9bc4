"""The soak can fail: a wrong byte, memory that grows, and what is left alive are all seen."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dlpoffload

SOAK = Path(__file__).parents[1] / "gpu" / "soak.py"
MIB = 1 << 20
ARGS = argparse.Namespace(seconds=100.0, device="cpu", seed=0, width=128)


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def done(**changes: Any) -> dict[str, Any]:
    row = {"name": "torch a", "counts": {"step": 3}, "compared": 1 << 20, "refused": {"layer": 1}}
    return {"rows": [row], "failed": [], "left": [], "pinned": 0, **changes}


def samples(**growth: int) -> list[tuple[float, dict[str, int]]]:
    flat = {"PSS": 400 * MIB, "anonymous": 300 * MIB, "threads": 20, "descriptors": 9, "mappings": 600, "device": MIB}
    return [
        (float(at), {name: value + growth.get(name, 0) * at // 100 for name, value in flat.items()})
        for at in range(100)
    ]


def test_what_is_right_and_flat_passes(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.report(ARGS, done(), samples()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "right, flat: 3 actions, 1 MB compared, 1 failures injected"


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("PSS", 80 * MIB),
        ("anonymous", 80 * MIB),
        ("device", 120 * MIB),
        ("threads", 20),
        ("descriptors", 20),
        ("mappings", 300),
    ],
)
def test_growth_is_seen(soak: ModuleType, name: str, by: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.report(ARGS, done(), samples(**{name: by})) == 1
    assert f"WRONG: {name} grew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failed": ["torch a, after step: AssertionError"]}, "AssertionError"),
        ({"left": [["pinned", 4096]]}, "left alive"),
        ({"pinned": 4096}, "4096 bytes pinned"),
        ({"rows": [{"name": "jax", "counts": {}, "compared": 0, "refused": {}}]}, "did nothing"),
    ],
)
def test_what_is_wrong_is_said(
    soak: ModuleType, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.report(ARGS, done(**changes), samples()) == 1
    assert said in capsys.readouterr().out


def test_a_run_that_was_not_measured_is_no_success(soak: ModuleType) -> None:
    assert soak.report(ARGS, done(), samples()[:20]) == 1


PLANTED = """
import argparse, sys
import soak, soak_torch

def update(lane):
    with soak_torch.torch.no_grad():
        lane.twin.layers[2].up.bias[0] += 1  # and not the module's
    lane.step()

soak_torch.TorchLane.update = update
sys.exit(soak.work(argparse.Namespace(seconds=30.0, device="cpu", seed=0, width=64)))
"""


@pytest.mark.torch
@pytest.mark.timeout(240)
def test_a_minute_on_the_cpu_driver() -> None:
    run = subprocess.run(
        [sys.executable, str(SOAK), "--seconds", "60"],
        env={**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert run.stdout.splitlines()[-1].startswith("right, flat: ")


@pytest.mark.torch
def test_a_byte_that_differs_ends_the_run_and_is_named() -> None:
    paths = (SOAK.parent, Path(dlpoffload.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run(
        [sys.executable, "-c", PLANTED], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 0, run.stderr
    failed = json.loads(run.stdout.splitlines()[-1])["failed"][0]
    assert "an output differs from the resident twin's, after" in failed
    assert failed.partition(":")[0].endswith("update")
