"""What the tests of the torch adapter share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlpoffload import driver as drivers
from dlpoffload import memory
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import HostMemoryError
from dlpoffload.promises import Promise, promising


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


@pytest.fixture(autouse=True, scope="session")
def adversary() -> Iterator[None]:
    """``DLPOFFLOAD_ADVERSARY=3``: every test that asks for no CPU driver of its own runs on one that is adversarial."""
    seed = os.environ.get("DLPOFFLOAD_ADVERSARY")
    if seed is None:
        yield
        return
    made = CpuDriver(adversary=int(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drivers, "_open_cpu", lambda: made)
        yield
        made.synchronize()


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


PAIRS = [
    pytest.param(("cpu", "cpu:1"), id="cpu-cpu"),
    pytest.param(("cpu", "cuda:0"), id="cpu-cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda:0", "cuda:1"), id="cuda-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Two devices: two of the CPU driver always, and where there are any, the CPU and a card, or two cards.

    The first two are one device to torch, which mixes their tensors; what that hides is tested in test_torch_borders.
    """
    torch = pytest.importorskip("torch")
    from split_models import SecondCpu

    names: tuple[str, str] = request.param
    if names[1] == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two cards, and torch sees {torch.cuda.device_count()}")
    if names[1] == "cpu:1":
        with drivers.installed(SecondCpu()):
            yield names
    else:
        yield names


@pytest.fixture
def two_cpus() -> Iterator[Callable[..., Any]]:
    """``two_cpus(host_limit_nbytes=1)``: put a second device of the CPU driver there, such as one with limits."""
    pytest.importorskip("torch")
    from split_models import SecondCpu

    with drivers.installed(SecondCpu()):  # what was there before is put back

        def put(**options: Any) -> SecondCpu:
            drivers._installed["cpu:1"] = SecondCpu(**options)
            return drivers._installed["cpu:1"]

        yield put
        drivers._installed["cpu:1"].synchronize()


@pytest.fixture
def all_promised() -> Iterator[None]:
    """Another thread is about to pin all there is."""
    promise = Promise()
    with promising:
        promise.make(1 << 60, 1 << 60)
    yield
    promise.keep()


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``refuse(3)``: the third pinned buffer from now on is refused, and only that."""
    real = memory.allocate_pinned
    left = [0]

    def allocate(nbytes: int, *args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise HostMemoryError(f"{nbytes} bytes refused by the test", nbytes=nbytes)
        return real(nbytes, *args, **options)

    monkeypatch.setattr(memory, "allocate_pinned", allocate)
    return lambda which: left.__setitem__(0, which)
