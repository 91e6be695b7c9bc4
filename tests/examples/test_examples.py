"""Every example runs as a user runs it, says something, and stays short enough to read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlpoffload

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
MAX_LINES = 60


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example: Path) -> None:
    lines = example.read_text(encoding="utf-8").splitlines()
    assert len(lines) < MAX_LINES


@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, device: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # for the frameworks too
    run = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{example.name} on {device}:\n{run.stdout}\n{run.stderr}"
    assert run.stdout.strip(), f"{example.name} printed nothing"
