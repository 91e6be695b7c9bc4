"""NumPy's own tests of DLPack, as its wheel ships them, with our producer in the place of its arrays' own.

Every case passes, or stands in `EXCLUDED` with its reason; one that stands there and would pass fails.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

numpy = pytest.importorskip("numpy")

from numpy_shim import KINDS, load, suite_path  # noqa: E402
from reliability import suite_row  # noqa: E402

SUITE = suite_path()
VERSION = ".".join(numpy.__version__.split(".")[:2])

_REGISTRY = "codes that NumPy is told for dtypes of its own (since 2.5) are known to NumPy's producer alone"

EXCLUDED: dict[tuple[str, str], str] = {
    ("*", "test_dunder_dlpack_stream"): "a stream on the CPU is a BufferError here, as the standard has it for what "
    "cannot be exported; NumPy's own producer raises a RuntimeError or, since 2.5, a ValueError",
    ("host_view", "test_strides_not_multiple_of_itemsize"): "strides are told in elements, so such a view of a "
    "HostBuffer cannot be asked for",
    ("host_view", "test_invalid_dtype"): "a HostBuffer has no dtype datetime64: asking for it is a SpecError",
    ("host_view", "test_invalid_byte_swapping"): "a HostBuffer has no byte-swapped dtype: asking for it is a SpecError",
    ("*", "test_roundtrip"): _REGISTRY,
    ("*", "test_register_conflict"): _REGISTRY,
    ("*", "test_buffererror_bad_dtype"): _REGISTRY,
}
"""By way and by test: why our producer is not what it asks for."""


def _reason(kind: str, name: str) -> str | None:
    return EXCLUDED.get((kind, name)) or EXCLUDED.get(("*", name))


def _case_counts(suite: type[Any]) -> Iterator[tuple[str, int]]:
    """Every test of a class, and how many cases its parameters make."""
    for name, function in inspect.getmembers(suite, inspect.isfunction):
        if name.startswith("test_"):
            count = 1
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "parametrize":
                    count *= len(mark.args[1])
            yield name, count


def _collected(kind: str) -> dict[str, type[Any]]:
    """The classes of the suite over one kind of arrays; what is excluded is expected to fail."""
    assert SUITE is not None
    found = {}
    for name, suite in inspect.getmembers(load(SUITE, kind), inspect.isclass):
        if not name.startswith("Test"):
            continue
        for test, _ in _case_counts(suite):
            if reason := _reason(kind, test):
                setattr(suite, test, pytest.mark.xfail(reason=reason, strict=True)(getattr(suite, test)))
        found[f"{name}_{kind}"] = suite
    return found


if SUITE is None:

    def test_the_suite_is_shipped() -> None:
        pytest.skip(f"NumPy {numpy.__version__} ships no tests of DLPack (numpy/_core/tests/test_dlpack.py)")

else:
    SUITES = {kind: _collected(kind) for kind in KINDS}
    for _found in SUITES.values():
        globals().update(_found)


@pytest.mark.skipif(SUITE is None, reason="NumPy ships no tests of DLPack")
def test_each_exclusion_is_of_a_test_that_is_there() -> None:
    assert SUITE is not None
    known = set(re.findall(r"def (test_\w+)", SUITE.read_text()))
    since = {name for (_, name), reason in EXCLUDED.items() if reason == _REGISTRY}
    assert {name for _, name in EXCLUDED} - known in (set(), since)


@pytest.mark.skipif(SUITE is None, reason="NumPy ships no tests of DLPack")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_docs_have_the_numbers(kind: str) -> None:
    row = suite_row(f"NumPy {VERSION}, `{kind}`")
    if row is None:
        pytest.skip(f"docs/reliability.md has no row of NumPy {VERSION}, which it names by version")
    cases = excluded = 0
    for suite in SUITES[kind].values():
        for name, count in _case_counts(suite):
            cases += count
            excluded += count if _reason(kind, name) else 0
    assert row[:3] == [str(cases), str(cases - excluded), str(excluded)]
