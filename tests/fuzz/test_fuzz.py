"""Fuzzers, each in a process of its own: no crash, no read out of bounds, no memory blow-up, typed errors only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from harness import GROWTH_NBYTES, fuzz

pytest.importorskip("hypothesis")

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux has them"),
    pytest.mark.timeout(400),  # the fuzzers have a limit of their own, and tell upon which example it passed
]

EXAMPLES = {"capsules.py": 300, "checkpoints.py": 150}
"""Of each property, in CI. docs/reliability.md says the same numbers."""


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_nothing_that_is_wrong_gets_through(script: str, tmp_path: Path) -> None:
    outcome = fuzz(script, "--examples", str(EXAMPLES[script]), folder=tmp_path)
    assert outcome["growth_nbytes"] < GROWTH_NBYTES
    examples, endings = outcome["examples"], outcome["endings"]
    if script == "capsules.py":
        assert min(examples["view_of_a_lie"], examples["the_other_ways_in"]) >= EXAMPLES[script]
        # A fuzzer that only ever meets refusals, or none, tests nothing.
        assert min(endings[name] for name in ("read", "viewed", "refused", "capsule", "no capsule")) > 20
        assert all(endings[f"{way}: made"] and endings[f"{way}: refused"] for way in ("copy_of", "register", "store"))
        assert endings["consumed in its own deleter"]
    else:
        assert min(examples[name] for name in ("files", "indexes", "changed_while_open")) >= EXAMPLES[script]
        assert min(endings["read"], endings["refused"]) > 30
        assert endings["refused for memory"] == 3 * examples["more_than_the_machine_has"]
        assert min(endings[f"{how}: seen"] for how in ("cut", "grown", "written")) > 0


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_the_docs_say_how_many(script: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "reliability.md"
    if not page.exists():
        pytest.skip("docs/reliability.md is not beside these tests")
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| `{script}` |")]
    assert row.endswith(f"| {EXAMPLES[script]} |")


SEGFAULT = """
import ctypes
from harness import main, noted
from hypothesis import given, strategies as st

@given(st.integers(0, 100))
def touches(at):
    if at > 90:
        ctypes.string_at(at)

main(lambda: None, touches)
"""
HOARD = """
from harness import main
from hypothesis import given, strategies as st

kept = []

@given(st.integers(0, 100))
def hoards(at):
    kept.append(b"x" * (16 << 20))

main(lambda: None, hoards)
"""


@pytest.mark.parametrize(("body", "wanted"), [(SEGFAULT, "SIGSEGV"), (HOARD, "MemoryError")], ids=["crash", "hoard"])
def test_a_fuzzer_that_finds_something_fails_and_says_upon_what(body: str, wanted: str, tmp_path: Path) -> None:
    script = tmp_path / "found.py"
    script.write_text(f"import sys\nsys.path.append({os.path.dirname(__file__)!r})\n{body}")
    with pytest.raises(AssertionError, match=r"(?s)last example: \('(touches|hoards)'") as found:
        fuzz(str(script), folder=tmp_path)
    assert wanted in str(found.value)
