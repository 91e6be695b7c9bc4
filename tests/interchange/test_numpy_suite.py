"""NumPy's own tests of DLPack, as its wheel ships them, with our producer in the place of its arrays' own.

Every case passes, or stands in `EXCLUDED` with its reason; one that stands there and would pass fails.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

numpy = pytest.importorskip("numpy")

from numpy_shim import KINDS, load, suite_path  # noqa: E402
from reliability import check_row, functions_of  # noqa: E402

from dlpoffload.errors import AliasError, SpecError  # noqa: E402

SUITE = suite_path()
VERSION = ".".join(numpy.__version__.split(".")[:2])

_STREAM = (
    AliasError,
    "a stream on the CPU is a BufferError here, as the standard has it for what cannot be exported; NumPy's own "
    "producer raises a RuntimeError or, since 2.5, a ValueError",
)
_REGISTRY = (
    SpecError,
    "NumPy is told a DLPack code for a dtype of its own (since 2.5), which a HostBuffer does not have",
)
_NO_SUCH_DTYPE = (SpecError, "a HostBuffer has no datetime64 and no byte-swapped dtype: asking for it is a SpecError")

EXCLUDED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("view_of", "test_dunder_dlpack_stream"): _STREAM,
    ("host_view", "test_dunder_dlpack_stream"): _STREAM,
    ("host_view", "test_strides_not_multiple_of_itemsize"): (
        SpecError,
        "strides are told in whole elements: such a view of a HostBuffer cannot be asked for",
    ),
    ("host_view", "test_invalid_dtype"): _NO_SUCH_DTYPE,
    ("host_view", "test_invalid_byte_swapping"): _NO_SUCH_DTYPE,
    ("host_view", "test_roundtrip"): _REGISTRY,
    ("host_view", "test_register_conflict"): _REGISTRY,
    ("host_view", "test_buffererror_bad_dtype"): _REGISTRY,
    ("view_of", "test_buffererror_bad_dtype"): (
        AliasError,
        "exports a dtype under a code that DLPack does not have (since 2.5): we refuse what cannot be described, NumPy "
        "leaves that to the consumer",
    ),
}
"""By way and by test: how our producer differs from what is asked for, and why."""
SINCE_2_5 = {"test_roundtrip", "test_register_conflict", "test_buffererror_bad_dtype"}


def _collected(kind: str) -> dict[str, type[Any]]:
    """The classes of the suite over one kind of arrays; what is excluded is expected to fail."""
    assert SUITE is not None
    found = {}
    for name, suite in inspect.getmembers(load(SUITE, kind), inspect.isclass):
        if not name.startswith("Test"):
            continue
        for function in functions_of(suite):
            if excluded := EXCLUDED.get((kind, function.__name__)):
                pytest.mark.xfail(raises=excluded[0], reason=excluded[1], strict=True)(function)
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
    assert {name for _, name in EXCLUDED} - known in (set(), SINCE_2_5)


@pytest.mark.skipif(SUITE is None, reason="NumPy ships no tests of DLPack")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_docs_have_the_numbers(kind: str) -> None:
    check_row(f"NumPy {VERSION}, `{kind}`", functions_of(*SUITES[kind].values()))
