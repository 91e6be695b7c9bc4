"""Take away each wait and each record of `dlpoffload.transfer` in turn: every one of them must be missed by somebody.

What the scenarios do not miss is either not needed, and then should not be there, or shows that they are too weak.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from transfer_scenarios import EAGER, GRAPHS, Scenario

import dlpoffload.transfer
from dlpoffload.errors import OffloadError

SOURCES = Path(dlpoffload.transfer.__file__).parent
WAITS = ("event_synchronize", "stream_synchronize", "stream_wait_event", "synchronize")
RECORDS = ("event_record",)
SEEDS = range(16)
SCENARIOS = [*EAGER.values(), *GRAPHS.values()]

_names = itertools.count()


@dataclass(frozen=True)
class Site:
    """One call in one file: the `index`th of all calls there."""

    file: str
    index: int
    label: str

    def __str__(self) -> str:
        return self.label


def calls(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    """Every call, with the name of the function that it stands in."""
    found: list[tuple[str, ast.Call]] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            found.append((function, node))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


def sites(*names: str) -> list[Site]:
    found = []
    for path in sorted(SOURCES.glob("*.py")):
        for index, (function, call) in enumerate(calls(ast.parse(path.read_text(encoding="utf-8")))):
            if isinstance(call.func, ast.Attribute) and call.func.attr in names:
                found.append(Site(path.name, index, f"{path.stem}.{function}:{call.func.attr}:{call.lineno}"))
    return found


def without(site: Site) -> str:
    """The file's source with the call replaced by None."""
    tree = ast.parse((SOURCES / site.file).read_text(encoding="utf-8"))
    gone = calls(tree)[site.index][1]

    class Remove(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            return ast.copy_location(ast.Constant(None), node) if node is gone else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Remove().visit(tree)))


@pytest.fixture
def load(tmp_path: Path) -> Iterator[object]:
    """Load a copy of the package beside the real one, one file of it changed."""
    loaded: list[str] = []

    def load_with(changes: dict[str, str]) -> ModuleType:
        name = f"dlpoffload.transfer_mutant_{next(_names)}"
        folder = tmp_path / name
        shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file, source in changes.items():
            (folder / file).write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield load_with
    for name in [*sys.modules]:
        if any(name == known or name.startswith(f"{known}.") for known in loaded):
            del sys.modules[name]


def missed_by(package: ModuleType) -> tuple[Scenario, int] | None:
    """The first scenario, and seed, that the package does not pass."""
    for seed in SEEDS:
        for scenario in SCENARIOS:
            try:
                scenario(package, seed)
            except (AssertionError, OffloadError):
                return scenario, seed
    return None


def test_there_are_waits_in_every_part() -> None:
    parts = {site.label.partition(":")[0] for site in sites(*WAITS)}
    assert {"timeline.copy", "lease.wait", "timeline.fork", "timeline.join", "timeline.drain", "link._rate"} <= parts
    assert len(sites(*WAITS)) >= 12


@pytest.mark.parametrize("site", sites(*WAITS, *RECORDS), ids=str)
def test_each_is_missed(site: Site, load) -> None:  # type: ignore[no-untyped-def]
    mutant = load({site.file: without(site)})
    assert missed_by(mutant) is not None, f"no scenario misses {site}"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_none_is_missed_in_an_unchanged_copy(scenario: Scenario, load) -> None:  # type: ignore[no-untyped-def]
    copy = load({})
    for seed in SEEDS:
        scenario(copy, seed)
