"""A process with much pinned memory forks: memory stays flat, the child ends cleanly, the parent streams on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dlpoffload

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")

ENDS = ("os._exit", "sys.exit", "raise", "close", "drop", "use", "multiprocessing")
GIB = 1 << 30


def forked(device: str, nbytes: int, end: str, *options: str) -> tuple[dict[str, Any], str]:
    """Run the scenario; gives what it measured, and what was said on stderr."""
    script = Path(__file__).with_name("fork_scenario.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, *options, str(script), device, str(nbytes), end],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def check(found: dict[str, Any], errors: str, nbytes: int, end: str) -> None:
    assert found["steps"] == [True, True, True], "before the fork, while the child lived, and after it"
    assert found["code"] == (1 if end == "raise" else 3), errors
    said = errors.splitlines()
    if end == "raise":
        assert said.pop() == 'KeyError: "the child\'s own"'
        assert said.pop(0) == "Traceback (most recent call last):"
        assert not [line for line in said if not line.startswith(" ")], errors
    else:
        assert errors == ""
    assert found["before"] > nbytes
    assert found["during"] - found["before"] < nbytes // 16, "both processes together, shared pages counted once"
    assert found["pinned"] >= nbytes
    assert (found["left"], found["buffers"]) == (0, [])


@pytest.mark.parametrize("device", ["cpu", "like-cuda"])
@pytest.mark.parametrize("end", ENDS)
def test_a_fork_beside_pinned_memory(end: str, device: str) -> None:
    nbytes = GIB // 16
    check(*forked(device, nbytes, end, "-X", "dev"), nbytes, end)


def test_a_fork_beside_a_gigabyte_takes_none_of_what_is_free() -> None:
    for _ in range(3):  # what others on this machine take meanwhile is not ours
        found, errors = forked("cpu", GIB, "sys.exit")
        check(found, errors, GIB, "sys.exit")
        if found["taken"] < GIB // 4:
            return
    pytest.fail(f"{found['taken']} bytes of MemAvailable were gone while the child was there")
