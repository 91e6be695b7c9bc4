"""The native module on its own, for the tests that look at the reclaim list."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A second copy of ``dlpoffload._native``, loaded from a file of its own.

    It has a reclaim list of its own: the one of the package is drained by the package's own thread, which would take
    these tests' tokens.
    """
    found = importlib.util.find_spec("dlpoffload._native")
    assert found is not None
    assert found.origin is not None
    path = tmp_path_factory.mktemp("native") / Path(found.origin).name
    shutil.copy(found.origin, path)
    loader = importlib.machinery.ExtensionFileLoader("dlpoffload._native", str(path))
    spec = importlib.util.spec_from_file_location("dlpoffload._native", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def owner(native: ModuleType) -> Any:
    """An owner of memory that the test has elsewhere; everything of it is gone when the test ends."""
    native.reclaim_drain()
    made = native.Owner(1)
    yield made
    made.release()
    assert made.users == 0, "the test left a capsule or a reference alive"
    assert native.reclaim_drain() == [1]
