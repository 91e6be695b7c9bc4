"""What every test shares: devices, frameworks that may be missing, leak checks, seeds.

A test that cannot run here skips with a reason that begins ``requires gpu:``, ``requires torch:`` or
``requires jax:`` (the marks ``gpu``, ``torch``, ``jax`` and `require` write it), or through
``pytest.importorskip("torch")``.
``DLPOFFLOAD_REQUIRE=gpu,torch,jax`` turns exactly those skips into failures, so that a machine that should
run them cannot leave them out unseen.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from dlpoffload.driver import open_driver
from dlpoffload.errors import OffloadError

if TYPE_CHECKING:
    import numpy

    from dlpoffload.driver import Driver

REQUIRABLE = ("gpu", "torch", "jax")
LEAK_WAIT_S = 2.0
_SKIPPED_FOR = re.compile(r"(?:Skipped: )?(?:requires (\w+):|could not import '(\w+)[.'])")
_FAILED = pytest.StashKey[bool]()


# ------------------------------------------------------------------------------------- what may be missing


def _required() -> frozenset[str]:
    names = frozenset(filter(None, re.split(r"[,\s]+", os.environ.get("DLPOFFLOAD_REQUIRE", ""))))
    if unknown := sorted(names - set(REQUIRABLE)):
        raise pytest.UsageError(f"DLPOFFLOAD_REQUIRE names {unknown}; it knows {', '.join(REQUIRABLE)}")
    return names


def _require(what: str, reason: str) -> NoReturn:
    if what not in REQUIRABLE:
        raise ValueError(f'require("{what}") is none of {", ".join(REQUIRABLE)}')
    pytest.skip(f"requires {what}: {reason}")


def _no_gpu() -> str | None:
    """Why ``cuda:0`` cannot be used here; None when it can."""
    try:
        open_driver("cuda:0")
    except OffloadError as error:
        return str(error).partition(":")[0]  # one line for each of many tests; `dlpoffload doctor` says the rest
    return None


def _framework(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        _require(name, f"pip install {name}")


def _turn_into_failure(report: pytest.CollectReport | pytest.TestReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    path, line, reason = report.longrepr
    match = _SKIPPED_FOR.match(reason)
    what = match and (match.group(1) or match.group(2))
    if what in _required():
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: DLPOFFLOAD_REQUIRE names {what}, but: {reason}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu``, ``torch`` or ``jax`` where that is missing."""
    if item.get_closest_marker("gpu") and (reason := _no_gpu()):
        _require("gpu", reason)
    for name in ("torch", "jax"):
        if item.get_closest_marker(name):
            _framework(name)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _turn_into_failure(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    _turn_into_failure(report)
    if report.failed or hasattr(report, "wasxfail"):
        item.stash[_FAILED] = True
    return report


def pytest_configure() -> None:
    _required()
    # JAX would otherwise take three quarters of the device before torch's tests begin.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # What is compared must be comparable at all: no products by whichever kernel was quicker today, and no casts to a
    # lower precision left out in one program and made in another.
    flags = ("gpu_autotune_level=0", "gpu_enable_triton_gemm=false", "allow_excess_precision=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in flags))


def pytest_report_header() -> list[str]:
    versions = []
    for name in ("torch", "jax", "numpy", "cuda-bindings"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    where = os.path.dirname(sys.modules["dlpoffload"].__file__ or "")
    return [f"dlpoffload: {where}", f"with: {', '.join(versions)}", f"cuda:0: {_no_gpu() or 'yes'}"]


@pytest.fixture(scope="session")
def require() -> Callable[[str, str], NoReturn]:
    """``require("gpu", "needs two devices")``: skip, or fail where ``DLPOFFLOAD_REQUIRE`` names it."""
    return _require


# ------------------------------------------------------------------------------------ devices and frameworks


@pytest.fixture(scope="module", params=["cpu", "cuda:0"])
def device(request: pytest.FixtureRequest) -> str:
    """The device to test on: ``"cpu"`` always, ``"cuda:0"`` where there is one."""
    name: str = request.param
    if name != "cpu" and (reason := _no_gpu()):
        _require("gpu", reason)
    return name


@pytest.fixture(scope="module")
def cuda_driver() -> Driver:
    """The driver of ``cuda:0``, or skip."""
    if reason := _no_gpu():
        _require("gpu", reason)
    return open_driver("cuda:0")


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, or skip."""
    return _framework("torch")


@pytest.fixture(scope="session")
def jax() -> ModuleType:
    """JAX, or skip."""
    return _framework("jax")


# ------------------------------------------------------------------------------------------ leaks and seeds


def _live_buffers() -> Counter[Any]:
    memory = sys.modules.get("dlpoffload.memory")
    return Counter() if memory is None else Counter(memory.live_buffers())


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Take what is alive by now out of every later collection: tests make thousands, and frameworks are large."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaked_buffers(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that passed, every buffer it made is freed."""
    before = _live_buffers()
    yield
    # the traceback of a failed test keeps its frames, and so their buffers, alive
    if request.node.stash.get(_FAILED, False) or not _live_buffers() - before:
        return
    from dlpoffload import lifetime

    deadline = time.monotonic() + LEAK_WAIT_S
    while True:
        gc.collect()
        lifetime.drain()
        leaked = _live_buffers() - before
        if not leaked:
            return
        if time.monotonic() >= deadline:
            pytest.fail(f"left alive by this test, as (kind, nbytes): {list(leaked.elements())}", pytrace=False)
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed, made from its name; the frameworks that are loaded are seeded with it."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> numpy.random.Generator:
    """A NumPy generator seeded by the test's name."""
    import numpy

    return numpy.random.default_rng(seed)
