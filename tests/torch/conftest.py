"""What the tests of the torch adapter share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from dlpoffload import driver as drivers
from dlpoffload.driver.cpu import CpuDriver


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One compute thread: the models are small, and the machine may be shared."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def same_kernels() -> Iterator[None]:
    """cuDNN without algorithms that differ from run to run: what is compared bitwise must be comparable at all."""
    torch = pytest.importorskip("torch")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Take what is alive already out of the collector's sight: many tests collect, and torch is large."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def cpu_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CpuDriver]]:
    """``cpu_driver(adversary=3)``: put another CPU driver in the place of the usual one for the test."""
    made: list[CpuDriver] = []

    def put(**options: object) -> CpuDriver:
        made.append(CpuDriver(**options))  # type: ignore[arg-type]
        monkeypatch.setattr(drivers, "_open_cpu", lambda: made[-1])
        return made[-1]

    yield put
    for driver in made:
        driver.synchronize()
