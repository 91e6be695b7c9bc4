"""Deep copies of an offloaded module while other threads use it: to them it is never without what guards it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import same  # noqa: E402
from torch import nn  # noqa: E402

from dlpoffload.errors import OffloadError  # noqa: E402
from dlpoffload.planning import all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

WIDTH = 8


class Slow:
    """An attribute whose copying lets another thread act, and waits for it."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act: Callable[[], Any] | None = act
        self.found: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        act, self.act = self.act, None
        if act is not None:
            thread = threading.Thread(target=self._run, args=(act,))
            thread.start()
            thread.join(0.5)  # one that waits for this copy to end goes on afterwards
            self.thread = thread

    def _run(self, act: Callable[[], Any]) -> None:
        try:
            self.found = act()
        except OffloadError as error:
            self.found = error


def offloaded(device: str) -> tuple[nn.Module, OffloadHandle, Any, Any]:
    torch.manual_seed(3)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(4))).requires_grad_(False)
    x = torch.randn(2, WIDTH).to(device)
    wanted = copy.deepcopy(module).to(device)(x)
    return module, offload_(module, "1MiB", device=device, policy=all_staged), x, wanted


def meanwhile(module: Any, act: Callable[[], Any]) -> tuple[nn.Module, Any]:
    """Copy a module while another thread acts: the copy, and what that thread found."""
    module.tag = slow = Slow(act)
    copied = copy.deepcopy(module)
    slow.thread.join(30)
    assert not slow.thread.is_alive()
    del module.tag
    return copied, slow.found


@pytest.mark.parametrize(
    "act",
    [
        lambda module: copy.deepcopy(module[0]),
        lambda module: module.half(),
        lambda module: module[1].double(),
        pickle.dumps,
        lambda module: pickle.dumps(module[0]),
        lambda module: offload_(module, "1MiB"),
        torch.jit.script,
    ],
    ids=["copy a part", "half", "double a part", "pickle", "pickle a part", "offload", "script"],
)
def test_what_is_refused_is_refused_meanwhile(device: str, act: Callable[[Any], Any]) -> None:
    module, handle, x, wanted = offloaded(device)
    copied, found = meanwhile(module, lambda: act(module))
    assert isinstance(found, OffloadError)
    assert same(module(x), wanted)
    assert same(copied(x), wanted)
    assert OffloadHandle.of(copied) is not handle


def test_a_copy_beside_a_copy_is_offloaded_too(device: str) -> None:
    module, _, x, wanted = offloaded(device)
    for copied in meanwhile(module, lambda: copy.deepcopy(module)):
        assert isinstance(OffloadHandle.of(copied), OffloadHandle)
        assert same(copied(x), wanted)
        assert not [name for inside in copied.modules() for name in inside.__dict__ if "tag" in name and name != "tag"]


def test_a_state_dict_meanwhile_has_no_view_of_a_slot(device: str) -> None:
    module, _, x, wanted = offloaded(device)
    taken: list[dict[str, Any]] = []

    def hook(*_: Any) -> None:
        thread = threading.Thread(target=lambda: taken.append(module.state_dict()))
        thread.start()
        thread.join()

    def run() -> Any:
        handle = module[1][0].register_forward_hook(hook)
        try:
            return module(x)
        finally:
            handle.remove()

    _, found = meanwhile(module, run)
    assert same(found, wanted)
    assert len(taken) == 1


def test_copies_beside_moves(device: str) -> None:
    module, handle, x, wanted = offloaded(device)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            handle.refresh_()
            handle.resize_("2MiB")

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for _ in range(10):
            copied = copy.deepcopy(module)
            assert isinstance(OffloadHandle.of(copied), OffloadHandle)
            assert same(copied(x), wanted)
    finally:
        stop.set()
        thread.join()
    handle.restore_()
    assert not [name for inside in module.modules() for name in inside.__dict__ if "dlpoffload" in name]
    assert not [
        inside for inside in module.modules() if "_apply" in inside.__dict__ or "__deepcopy__" in inside.__dict__
    ]


class Own(nn.Linear):
    """Has attributes of its own under names that are shadowed, and a copy of its own."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.__dict__["_apply"] = self.counted
        self.applied = 0

    def counted(self, function: Callable[..., Any], recurse: bool = True) -> nn.Module:
        self.applied += 1
        return super()._apply(function, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        made = Own()
        memo[id(self)] = made
        made.weight, made.bias = copy.deepcopy((self.weight, self.bias), memo)
        return made


def test_what_a_module_had_of_its_own_comes_back(device: str) -> None:
    module = nn.Sequential(*(Own() for _ in range(4))).requires_grad_(False)
    x = torch.randn(2, WIDTH).to(device)
    wanted = copy.deepcopy(module).to(device)(x)
    handle = offload_(module, "1MiB", device=device, policy=all_staged)
    copied = copy.deepcopy(module)
    assert same(copied(x), wanted)
    for each in (handle, OffloadHandle.of(copied)):
        assert isinstance(each, OffloadHandle)
        for layer in each.restore_():
            before = layer.applied
            layer.float()
            assert layer.applied == before + 1


def test_a_function_over_all_tensors_takes_no_view_of_a_slot(device: str) -> None:
    module, _, x, wanted = offloaded(device)
    kept: list[Any] = []

    def hook(*_: Any) -> None:
        thread = threading.Thread(target=lambda: module._apply(lambda tensor: kept.append(tensor) or tensor))
        thread.start()
        thread.join()

    module[1][0].register_forward_hook(hook)
    assert same(module(x), wanted)
    assert kept
