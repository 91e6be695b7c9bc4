"""The suite's own guards, each seen to fail: a skip that is not allowed, a buffer that is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dlpoffload

INNER = """
import pytest
import dlpoffload

kept = []

def test_device(device): pass
def test_required(require): require("torch", "of a newer version")
@pytest.mark.gpu
def test_marked(): pass
@pytest.mark.skipif(True, reason="another reason")
def test_other(): pass
def test_leaks(): kept.append(dlpoffload.HostBuffer.allocate(4096, device="cpu"))
def test_in_a_cycle():
    cycle = [dlpoffload.HostBuffer.allocate(8192, device="cpu")]
    cycle.append(cycle)
def test_fails_with_a_buffer():
    buffer = dlpoffload.HostBuffer.allocate(16384, device="cpu")
    assert buffer.closed
"""
MODULE = "import sys\nimport pytest\nsys.modules['jax'] = None\npytest.importorskip('jax')\n"


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run the inner tests under the suite's conftest, without a GPU."""
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_inner.py").write_text(INNER)
    (tmp_path / "test_module.py").write_text(MODULE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n")

    def start(required: str) -> str:
        environment = {
            **os.environ,
            "DLPOFFLOAD_REQUIRE": required,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1]),
            "COLUMNS": "200",
        }
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"]
        command += ["--import-mode=importlib", "--continue-on-collection-errors"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        ).stdout

    return start


def outcomes(output: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in output.partition("short test summary info")[2].splitlines():
        word, _, rest = line.partition(" ")
        if "::" in rest:
            found.setdefault(word, set()).add(rest.partition("::")[2].partition(" ")[0])
    return found


def test_what_is_missing_is_skipped_and_leaks_are_errors(run) -> None:  # type: ignore[no-untyped-def]
    output = run("")
    found = outcomes(output)
    assert found["PASSED"] == {"test_device[cpu]", "test_leaks", "test_in_a_cycle"}
    assert found["FAILED"] == {"test_fails_with_a_buffer"}
    assert found["ERROR"] == {"test_leaks"}
    assert "left alive by this test, as (kind, nbytes): [('pinned', 4096)]" in output
    assert "requires gpu: " in output
    assert "requires torch: of a newer version" in output
    assert "5 skipped" in output


def test_what_is_required_and_missing_is_a_failure(run) -> None:  # type: ignore[no-untyped-def]
    output = run("gpu,torch,jax")
    found = outcomes(output)
    assert found["FAILED"] >= {"test_required"}
    assert found["ERROR"] >= {"test_device[cuda:0]", "test_marked"}
    assert "DLPOFFLOAD_REQUIRE names jax, but: Skipped: could not import 'jax'" in output


def test_an_unknown_requirement_is_refused(run) -> None:  # type: ignore[no-untyped-def]
    assert "PASSED" not in run("gpus")
