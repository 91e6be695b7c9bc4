"""The sweep over the adapters' operations, in processes of their own; see `adapters`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dlpoffload

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs" / "reliability.md"
GROUPS = 4


def names_of(framework: str) -> list[str]:
    text = (HERE / f"adapters_{framework}.py").read_text(encoding="utf-8")
    return re.findall(r'^@operation\("([^"]+)"', text, re.MULTILINE)


TORCH, JAX = names_of("torch"), names_of("jax")
BACKWARD, WRITING = "torch: a step and its backward pass", "torch: a step that writes buffers"
CHOSEN = {**{f"torch {group}": TORCH[group::GROUPS] for group in range(GROUPS)}, "jax": JAX}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE), str(Path(dlpoffload.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)


@pytest.mark.parametrize("names", CHOSEN.values(), ids=CHOSEN.keys())
def test_every_call_of_every_operation_may_fail(names: list[str]) -> None:
    pytest.importorskip(names[0].partition(":")[0])
    done = run(str(HERE / "adapters.py"), "--json", *names)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["operation"] for row in rows] == names, done.stderr
    assert all(row["faults"] >= 2 * sum(row["calls"].values()) > 0 for row in rows)
    found = [f"{row['operation']}: {words}" for row in rows for words in row["found"]]
    assert not found, "\n".join([f"{len(found)} found", *found[:40]])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("planted", "operation", "fault"),
    [
        ("torch.handle.retired = lambda placed: placed.retire()", "torch: sleep", '"event_destroy", 1, "passing"'),
        ("torch.placed.Placed.undo = lambda _: None", "torch: offload_, staged", '"event_create", 1, "passing"'),
        ("torch.placed.Placed._unmark = lambda _: None", "torch: restore_", '"event_destroy", 1, "passing"'),
        ("transfer.lease.Lease.abandon = lambda _: None", BACKWARD, '"stream_wait_event", 1, "passing"'),
        ("torch.units.StagedUnit.untouched = lambda *_: True", WRITING, '"event_record", 9, "passing"'),
        ("lifetime._release = lambda _: None", "torch: offload_, mapped", '"host_device_pointer", 1, "passing"'),
    ],
)
def test_the_sweep_finds_what_is_planted(tmp_path: Path, planted: str, operation: str, fault: str) -> None:
    pytest.importorskip("torch")
    code = f"""
        import json
        from pathlib import Path
        import adapters, adapters_torch, operations
        import dlpoffload.torch.staging, dlpoffload.torch.units, dlpoffload.transfer.ring
        operation, fault = operations.OPERATIONS[{operation!r}], adapters.Fault({fault})
        before = adapters.attempt(operation, Path({str(tmp_path)!r}), fault)
        dlpoffload.{planted}
        print(json.dumps([before, adapters.attempt(operation, Path({str(tmp_path)!r}), fault)]))
        """
    done = run("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert before == []
    assert after != []


def test_the_table_in_the_docs_is_what_is_swept() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    done = run(str(HERE / "adapters.py"), "--count")
    assert done.returncode == 0, done.stderr
    if not DOCS.exists():
        pytest.skip("the documents are not here")
    said = rows_of(DOCS.read_text(encoding="utf-8"))
    for operation, positions in rows_of(done.stdout).items():
        # How often an event is asked whether it has passed is a matter of time.
        assert said[operation] == pytest.approx(positions, rel=0.05), f"paste the output of adapters.py: {operation}"


def rows_of(text: str) -> dict[str, int]:
    """Positions by operation."""
    rows = re.findall(r"^\| ((?:torch|jax): [^|]+) \| \d+ \| (\d+) \| \d+ \|$", text, re.MULTILINE)
    return {operation: int(positions) for operation, positions in rows}
