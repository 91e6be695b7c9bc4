"""Operations of the torch adapter: a small model beside a resident twin, compared bit by bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapters import Bench, Case
from operations import operation
from safetensors.torch import save_file
from torch import Tensor, nn

from dlpoffload import lifetime
from dlpoffload.checkpoint.aligning import align
from dlpoffload.planning import all_mapped, all_staged, balanced
from dlpoffload.torch import Offloader, OffloadHandle, offload_

torch.set_num_threads(1)
WIDTH, DEPTH = 64, 4
UNIT = 4 * (WIDTH * WIDTH + WIDTH)
State = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Counting(Block):
    """Writes a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def equal(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


class Pair:
    """A module, the states it may be in, and a resident twin that computes what it must.

    It is closed by `restore_`, which gives the host's memory back.
    """

    def __init__(self, bench: Bench, block: Callable[[], nn.Module] = Block) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = Model(block).requires_grad_(False)
        self.twin: nn.Module = copy.deepcopy(self.module)
        self.states = [copy.deepcopy(self.twin.state_dict())]
        self.x = torch.randn(2, WIDTH)
        self.folder = bench.folder

    def offload(self, budget: int = 2 * UNIT + 512, **options: Any) -> OffloadHandle:
        options = {"device": "cpu", "policy": all_staged} | options
        if options["policy"] is not all_mapped:
            options["units"] = ["layers.*"]
        return offload_(self.module, budget, **options)

    @property
    def handle(self) -> OffloadHandle | None:
        return OffloadHandle.of(self.module)

    def checkpoint(self) -> Path:
        """The weights as a file that can be mapped."""
        path = self.folder / "aligned.safetensors"
        if not path.exists():
            save_file(self.twin.state_dict(), self.folder / "model.safetensors")
            align(self.folder / "model.safetensors", path)
        return path

    def to_meta(self) -> None:
        """What is to be built from a checkpoint."""
        self.module.to("meta")

    def check(self) -> None:
        """The module is in one of its states, and computes what a resident one does."""
        handle = self.handle
        if handle is not None and handle.asleep:
            handle.wake()
        state = self.module.state_dict()
        if any(tensor.is_meta for tensor in state.values()):
            assert all(tensor.is_meta for tensor in state.values()), "half of it is built"
            return
        assert any(equal(state, wanted) for wanted in self.states), "its state is none that it may have"
        self.twin.load_state_dict(state)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(self.module(self.x), self.twin(self.x)), "an output differs"
        assert equal(self.module.state_dict(), self.twin.state_dict()), "its state differs after a step"

    def close(self) -> None:
        if self.handle is not None:
            self.handle.restore_()
        state = self.module.state_dict()
        if not any(tensor.is_meta for tensor in state.values()):
            assert equal(state, self.twin.state_dict()), "its state differs when it is restored"
        del self.module

    def case(self, act: Callable[[], Any], again: Callable[[], Any] | None = None) -> Case:
        return Case(act, self.check, self.close, again)


# ------------------------------------------------------------------------------------------------- offload_
def _offloading(bench: Bench, budget: int, **options: Any) -> Case:
    pair = Pair(bench)
    return pair.case(lambda: pair.offload(budget, **options))


@operation("torch: offload_, staged")
def offload_staged(bench: Bench) -> Case:
    return _offloading(bench, 2 * UNIT + 512)


@operation("torch: offload_, mapped")
def offload_mapped(bench: Bench) -> Case:
    return _offloading(bench, 0, policy=all_mapped)


@operation("torch: offload_, some resident")
def offload_balanced(bench: Bench) -> Case:
    return _offloading(bench, 3 * UNIT + 1024, policy=balanced)


@operation("torch: offload_, pageable memory if it is refused", swallows=("host_register", "host_alloc"))
def offload_pageable(bench: Bench) -> Case:
    return _offloading(bench, 2 * UNIT + 512, pageable="if_refused")


def _from_meta(bench: Bench, mode: Any) -> Case:
    pair = Pair(bench)
    path = pair.checkpoint()
    pair.to_meta()
    return pair.case(lambda: pair.offload(checkpoint=path, mode=mode))


@operation("torch: offload_ from meta, a file copied")
def offload_copied_file(bench: Bench) -> Case:
    return _from_meta(bench, "copy")


@operation("torch: offload_ from meta, a file mapped")
def offload_mapped_file(bench: Bench) -> Case:
    return _from_meta(bench, "map")


@operation("torch: Offloader, layers wrapped")
def wrap(bench: Bench) -> Case:
    pair = Pair(bench)

    def act() -> None:
        module: Any = copy.deepcopy(pair.module)
        with Offloader(2 * UNIT + 512, device="cpu", policy=all_staged) as offloader:
            module.layers = nn.ModuleList(offloader.wrap(copy.deepcopy(layer) for layer in module.layers))
            offloader.offload_(module)
        pair.module = module

    return pair.case(act)


# ---------------------------------------------------------------------------------------------------- steps
@operation("torch: a step that writes buffers")
def writing_step(bench: Bench) -> Case:
    """A unit that was left in error may have been written or not: its own bytes say which."""
    pair = Pair(bench, Counting)
    pair.offload()
    done = [copy.deepcopy(pair.states[0])]
    for layer in range(DEPTH):
        state = copy.deepcopy(done[-1])
        state[f"layers.{layer}.calls"] += 1
        done.append(state)
    pair.states = done

    def check() -> None:
        pair.check()
        pair.states = [copy.deepcopy(pair.twin.state_dict())]

    def again() -> None:
        with torch.no_grad():
            assert torch.equal(pair.module(pair.x), pair.twin(pair.x)), "an output differs"
        pair.states = [copy.deepcopy(pair.twin.state_dict())]

    return Case(torch.no_grad()(lambda: pair.module(pair.x)), check, pair.close, again)


@operation("torch: a step and its backward pass")
def backward(bench: Bench) -> Case:
    pair = Pair(bench)
    pair.offload()

    def gradient(module: nn.Module) -> Tensor:
        x = pair.x.clone().requires_grad_()
        (found,) = torch.autograd.grad(module(x).square().sum(), x)
        return found

    def check() -> None:
        pair.check()
        assert torch.equal(gradient(pair.module), gradient(pair.twin)), "a gradient differs"

    return Case(lambda: gradient(pair.module), check, pair.close)


# --------------------------------------------------------------------------------------------------- writes
def _written(bench: Bench, write: Callable[[Pair, State], Any], **options: Any) -> Case:
    """What writes some tensors: each of them is the old or the new one afterwards, and the new ones when it is done."""
    pair = Pair(bench)
    if options:
        path = pair.checkpoint()
        pair.to_meta()
        options["checkpoint"] = path
    pair.offload(**options)
    new = {name: tensor + 1 for name, tensor in pair.states[0].items()}
    with torch.no_grad():
        pair.module(pair.x)  # the ring holds what was

    def check() -> None:
        state = pair.module.state_dict()
        mixed = {n: new[n] if torch.equal(state[n], new[n]) else old for n, old in pair.states[0].items()}
        pair.states = [pair.states[0], mixed]
        pair.check()

    return Case(lambda: write(pair, new), check, pair.close)


@operation("torch: update")
def update(bench: Bench) -> Case:
    return _written(
        bench, lambda pair, new: pair.handle.update("layers.1.linear.weight", new["layers.1.linear.weight"])
    )


@operation("torch: update, out of a mapped file", keeps=True)
def update_mapped_file(bench: Bench) -> Case:
    name = "layers.1.linear.weight"
    return _written(bench, lambda pair, new: pair.handle.update(name, new[name]), mode="map")


@operation("torch: load_state_dict, out of a mapped file", keeps=True)
def load_state_dict_mapped_file(bench: Bench) -> Case:
    return _written(bench, lambda pair, new: pair.module.load_state_dict(new), mode="map")


@operation("torch: copy_ in place, and its unit run")
def write_in_place(bench: Bench) -> Case:
    def write(pair: Pair, new: State) -> None:
        with torch.no_grad():
            pair.module.layers[1].linear.weight.copy_(new["layers.1.linear.weight"])
            pair.module.layers[1](pair.x)

    return _written(bench, write)


@operation("torch: refresh_, after a parameter was replaced")
def refresh(bench: Bench) -> Case:
    def write(pair: Pair, new: State) -> None:
        if pair.handle is None:  # restored, as the last one was refused memory
            pair.offload()
        linear: Any = pair.module.layers[1].linear
        linear.weight = nn.Parameter(new["layers.1.linear.weight"], requires_grad=False)
        pair.handle.refresh_()

    return _written(bench, write)


# ---------------------------------------------------------------------------------------------------- moves
@operation("torch: resize_, fewer residents")
def resize_down(bench: Bench) -> Case:
    pair = Pair(bench)
    handle = pair.offload(5 * UNIT + 1024, policy=balanced)
    return pair.case(lambda: handle.resize_(2 * UNIT + 512))


@operation("torch: resize_, more residents")
def resize_up(bench: Bench) -> Case:
    pair = Pair(bench)
    handle = pair.offload(2 * UNIT + 512, policy=balanced)
    return pair.case(lambda: handle.resize_(5 * UNIT + 1024))


@operation("torch: sleep")
def sleep(bench: Bench) -> Case:
    pair = Pair(bench)
    handle = pair.offload(3 * UNIT + 1024, policy=balanced)
    return pair.case(handle.sleep)


@operation("torch: wake")
def wake(bench: Bench) -> Case:
    pair = Pair(bench)
    handle = pair.offload(3 * UNIT + 1024, policy=balanced)
    handle.sleep()
    return pair.case(handle.wake)


@operation("torch: deepcopy")
def deep_copy(bench: Bench) -> Case:
    pair = Pair(bench)
    pair.offload(3 * UNIT + 1024, policy=balanced)
    copies: list[Any] = []

    def check() -> None:
        pair.check()
        for module in copies:
            with torch.no_grad():
                assert torch.equal(module(pair.x), pair.twin(pair.x)), "a copy's output differs"

    def close() -> None:
        pair.close()
        while copies:
            OffloadHandle.of(copies.pop()).restore_()

    return Case(lambda: copies.append(copy.deepcopy(pair.module)), check, close)


@operation("torch: restore_", releases=True)
def restore(bench: Bench) -> Case:
    pair = Pair(bench)
    handle = pair.offload(3 * UNIT + 1024, policy=balanced)
    with torch.no_grad():
        pair.module(pair.x)
    return pair.case(handle.restore_)


@operation("torch: the module dropped", releases=True, swallows=("event_synchronize", "stream_synchronize"))
def dropped(bench: Bench) -> Case:
    pair = Pair(bench)
    pair.offload(3 * UNIT + 1024, policy=balanced)
    with torch.no_grad():
        pair.module(pair.x)

    def act() -> None:
        del pair.module
        gc.collect()
        lifetime.drain()

    return Case(act, lambda: None, lambda: None)
