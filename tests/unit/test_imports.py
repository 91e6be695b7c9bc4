"""Imports point down only, each foreign package has one door, and importing the package loads nothing."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dlpoffload

PACKAGE = Path(dlpoffload.__file__).parent

VALUES = {"errors", "spec"}
DRIVERS = VALUES | {"limits", "driver"}
PINNING = DRIVERS | {"maps", "lifetime", "pages", "promises", "registrations", "wall", "blocks"}
MEMORY = PINNING | {
    "accounting",
    "background",
    "chunked",
    "copies",
    "labels",
    "view",
    "producers",
    "buffer",
    "filemap",
    "memfile",
    "memory",
}
ADAPTER = MEMORY | {"slab", "checkpoint", "store", "planning", "reporting", "transfer"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seals": set(),
    "closing": {"errors"},
    "spec": {"errors"},
    "limits": VALUES,
    "maps": VALUES,
    "driver": VALUES | {"limits", "maps"},
    "lifetime": {"_native", "errors"},
    "rollback": set(),
    "readers": set(),
    "wall": DRIVERS,
    "pages": DRIVERS | {"_native"},
    "promises": set(),
    "registrations": DRIVERS,
    "blocks": (PINNING - {"blocks"}) | {"_native"},
    "accounting": {"lifetime", "registrations"},
    "background": VALUES | {"lifetime"},
    "chunked": PINNING | {"_native", "background"},
    "filemap": PINNING | {"_native", "memfile", "readers"},
    "labels": VALUES,
    "memfile": PINNING | {"_native", "seals"},
    "view": DRIVERS | {"_native", "lifetime", "blocks", "copies", "labels"},
    "copies": DRIVERS | {"_native", "registrations", "blocks", "pages"},
    "producers": DRIVERS | {"_native", "lifetime", "view"},
    "buffer": DRIVERS | {"background", "closing", "lifetime", "blocks", "view"},
    "memory": (MEMORY - {"memory", "filemap", "memfile", "seals"}) | {"_native"},
    "slab": MEMORY,
    "planning": VALUES,
    "reporting": set(),
    "checkpoint": VALUES | {"seals", "readers"},
    "store": MEMORY | {"closing", "slab", "checkpoint", "rollback"},
    "transfer": MEMORY | {"closing", "slab", "rollback"},
    "torch": ADAPTER,
    "jax": ADAPTER,
    "probe": MEMORY,
    "findings": DRIVERS,
    "host_checks": MEMORY | {"findings"},
    "doctor": MEMORY | {"transfer", "probe", "findings", "host_checks", "version"},
    "cli": VALUES | {"checkpoint", "doctor", "store", "version"},
}
"""Part of the package -> the parts that it may import. ``version`` is ``dlpoffload.__version__``."""

DOORS: dict[str, set[str]] = {
    "cuda": {"driver.cuda"},
    "torch": {"torch"},
    "jax": {"jax"},
    "jaxlib": {"jax"},
    "numpy": {"jax"},
    "rich": {"cli", "planning", "reporting", "torch.report"},
    "safetensors": {"checkpoint"},
    "_native": {"blocks", "chunked", "copies", "filemap", "lifetime", "memfile", "pages", "producers", "view"},
}
"""Foreign package, or the native core -> the modules (with everything below them) that may import it."""


# ----------------------------------------------------------------------------------------------- reading


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package; the package itself is left to a test of its own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Absolute dotted names of everything that a module imports, at any depth of nesting."""
    package = ["dlpoffload", *module.split(".")]
    if not is_package:
        package.pop()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def edges(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Parts of the package that a module imports."""
    found = set()
    for name in imports(source, module, is_package=is_package):
        root, _, rest = name.partition(".")
        if root == "dlpoffload":
            part = rest.partition(".")[0]
            found.add("version" if part in ("", "__version__") else part)
    return found - {module.partition(".")[0]}


def foreign(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Packages outside the standard library that a module imports, and the native core."""
    found = set()
    for name in imports(source, module, is_package=is_package):
        root, _, rest = name.partition(".")
        if root == "dlpoffload" and rest.partition(".")[0] == "_native":
            found.add("_native")
        elif root != "dlpoffload" and root not in sys.stdlib_module_names:
            found.add(root)
    return found


def wrong_doors(found: set[str], module: str) -> set[str]:
    return {name for name in found if not any(f"{module}.".startswith(f"{door}.") for door in DOORS.get(name, set()))}


# ------------------------------------------------------------------------------------------------- tests


def test_every_part_stands_in_the_table() -> None:
    parts = {name.partition(".")[0] for name in modules()}
    assert not parts - ALLOWED.keys(), "add the part to ALLOWED, below what it imports"
    for part in parts - {"torch", "jax"}:
        assert not ALLOWED[part] & {"torch", "jax"}, f"{part} must not import an adapter"


def test_the_table_has_a_down() -> None:
    graphlib.TopologicalSorter(ALLOWED).prepare()  # CycleError when it has none


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    path = modules()[module]
    found = edges(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert not found - ALLOWED[module.partition(".")[0]]


@pytest.mark.parametrize("module", modules())
def test_each_foreign_package_has_one_door(module: str) -> None:
    path = modules()[module]
    found = foreign(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert not wrong_doors(found, module)


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from ..memory import HostBuffer", "planning.choose", {"memory"}),
        ("from .. import memory, view", "planning.choose", {"memory", "view"}),
        ("from . import lifetime", "spec", {"lifetime"}),
        ("from . import request", "planning.choose", set()),
        ("from .request import Unit", "planning", set()),
        ("from . import __version__", "cli", {"version"}),
        ("import dlpoffload.torch.offload", "planning.choose", {"torch"}),
        ("def f():\n    from dlpoffload.store import HostStore", "spec", {"store"}),
        ("if x:\n    importlib.import_module('dlpoffload.jax')", "spec", {"jax"}),
    ],
)
def test_the_reader_sees_an_edge(source: str, module: str, found: set[str]) -> None:
    assert edges(source, module, is_package=module == "planning") == found


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from cuda.bindings import driver", "driver.cuda", set()),
        ("from cuda.bindings import driver", "driver.cpu", {"cuda"}),
        ("import torch.nn as nn", "torch.modules", set()),
        ("def f():\n    import torch", "transfer.ring", {"torch"}),
        ("import numpy", "torch_like", {"numpy"}),
        ("from . import _native", "view", set()),
        ("from .. import _native", "transfer.ring", {"_native"}),
        ("from ._native import copy", "spec", {"_native"}),
        ("import pandas", "spec", {"pandas"}),
        ("import_module('jax')", "torch.modules", {"jax"}),
        ("import json, os.path", "spec", set()),
    ],
)
def test_the_reader_sees_a_wrong_door(source: str, module: str, wrong: set[str]) -> None:
    assert wrong_doors(foreign(source, module), module) == wrong


def test_the_package_itself_imports_nothing_at_once() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_once = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])
    names = {name.partition(".")[0] for name in imports(ast.unparse(at_once), "x")}
    assert names <= sys.stdlib_module_names


def newly_loaded(code: str) -> set[str]:
    """Modules that `code` loads in a fresh interpreter."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint('\\n'.join(sorted(set(sys.modules) - before)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def outside(loaded: set[str]) -> set[str]:
    roots = {name.partition(".")[0] for name in loaded}
    return roots - sys.stdlib_module_names - {"dlpoffload"}


def test_importing_the_package_loads_no_framework_and_no_driver() -> None:
    # An import costs what it loads: one module of ours, none of anybody else's, none of the slow ones.
    loaded = newly_loaded("import dlpoffload")
    assert {name for name in loaded if name.startswith("dlpoffload")} == {"dlpoffload"}
    assert not outside(loaded)
    assert not loaded & {
        "asyncio",
        "ctypes",
        "inspect",
        "logging",
        "multiprocessing",
        "subprocess",
        "threading",
    }


def test_the_reader_of_loaded_modules_can_fail() -> None:
    assert outside(newly_loaded("import pytest")) >= {"pytest"}


def test_using_memory_on_the_cpu_loads_no_framework() -> None:
    loaded = newly_loaded(
        "import dlpoffload\n"
        "with dlpoffload.HostBuffer.allocate(4096, device='cpu') as buffer:\n"
        "    buffer.device_view((4,), 'float32').__dlpack__(max_version=(1, 0))"
    )
    assert not outside(loaded)
    assert "dlpoffload.driver.cuda" not in loaded


def test_every_public_name_is_there() -> None:
    for name in dlpoffload.__all__:
        assert getattr(dlpoffload, name) is not None
    with pytest.raises(AttributeError, match='"no_such_name"'):
        dlpoffload.no_such_name  # noqa: B018
