"""What a soak does: lanes, each a thread with models of its own, a resident twin beside each, and its own seed."""

from __future__ import annotations

import copy
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dlpoffload as dlpo
from dlpoffload.driver import Driver
from dlpoffload.errors import CudaError, DeviceMemoryError, OffloadError, RegistrationError
from dlpoffload.planning import all_mapped, all_staged
from dlpoffload.torch import OffloadHandle, offload_
from dlpoffload.torch import placed as placed_module

__all__ = ["LANES", "Lane", "Refusals"]

Action = Callable[[], None]


# ------------------------------------------------------------------------------------------------ refusals


class Refusals:
    """Refuses the n-th call of a kind on one thread, when it was asked for there: other threads are left alone."""

    CALLS = ("host_register", "device_alloc", "event_create", "stream_create", "empty_bytes")

    def __init__(self, driver: Driver) -> None:
        self._mine = threading.local()
        for call in self.CALLS[:-1]:
            setattr(driver, call, self._guarded(call, getattr(driver, call)))
        # Residents and slots come from torch's own allocator.
        placed_module.empty_bytes = self._guarded("empty_bytes", placed_module.empty_bytes)

    def _guarded(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if getattr(self._mine, "call", None) == call:
                self._mine.left -= 1
                if self._mine.left == 0:
                    self._mine.call = None
                    raise self._error(call)
            return function(*arguments, **options)

        return guarded

    @staticmethod
    def _error(call: str) -> OffloadError:
        if call == "host_register":
            return RegistrationError("refused by the soak")
        if call in ("device_alloc", "empty_bytes"):
            return DeviceMemoryError("refused by the soak", nbytes=1)
        return CudaError(call, 2, "CUDA_ERROR_OUT_OF_MEMORY", "refused by the soak")

    @contextmanager
    def nth(self, call: str, n: int) -> Iterator[None]:
        """Refuse the n-th call inside the block; fewer calls end in no error."""
        self._mine.call, self._mine.left = call, n
        try:
            yield
        finally:
            self._mine.call = None


# ------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A feed-forward block that raises when it is told to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.raises = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(self.norm(x)))
        if self.raises:
            raise ArithmeticError("a layer failed")
        return x + self.down(hidden)


class Model(nn.Module):
    """Embeddings, blocks, and a head tied to the embeddings."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return functional.linear(x, self.head.weight)


def nbytes_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in {id(p): p for p in module.state_dict(keep_vars=True).values()}.values())


# -------------------------------------------------------------------------------------------------- lanes


class Lane:
    """One thread's work: actions drawn by its seed, each of which ends with a comparison.

    Attributes
    ----------
    counts : Counter
        How often each action was done.
    compared : int
        Bytes that were compared with the twin's.
    refused : Counter
        Injected errors by call, or by "layer".
    log : list of str
        The last actions, for whoever has to find out.
    """

    def __init__(self, name: str, device: str, seed: int, refusals: Refusals, width: int) -> None:
        self.name, self.device, self.width = name, device, width
        self.refusals = refusals
        self.rng = random.Random(f"{seed}/{name}")
        self.generator = torch.Generator().manual_seed(self.rng.randrange(1 << 31))
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.compared = 0
        self.log: list[str] = []
        self.actions: dict[str, tuple[int, Action]] = {}

    def run(self, going: Callable[[], bool]) -> None:
        """Do one action after the other; a difference is an error that names them."""
        names = list(self.actions)
        weights = [self.actions[name][0] for name in names]
        with ExitStack() as stack:
            if self.device != "cpu" and self.name.endswith("b"):
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self.device)))
            while going():
                (action,) = self.rng.choices(names, weights)
                self.log = [*self.log[-19:], action]
                self.actions[action][1]()
                self.counts[action] += 1
            self.close()

    def close(self) -> None:
        """Let go of everything."""

    def same(self, found: Tensor, wanted: Tensor, what: str) -> None:
        """Compare bit by bit."""
        wanted = wanted.to(found.device)
        one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted))
        if found.shape != wanted.shape or found.dtype != wanted.dtype or not torch.equal(one, other):
            raise AssertionError(f"{self.name}: {what} differs from the resident twin's, after {', '.join(self.log)}")
        self.compared += other.numel()

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)


class TorchLane(Lane):
    """A module that is called, written, resized, put to sleep, restored, and refused memory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(self.rng.randrange(1 << 31))
        self.twin: Any = Model(self.width, 6).to(self.device)
        self.total = nbytes_of(self.twin)
        self.module: Any = copy.deepcopy(self.twin)
        self.handle: OffloadHandle
        self.offload()
        self.actions = {
            "step": (8, self.step),
            "threads": (2, self.threads),
            "update": (3, self.update),
            "load": (1, self.load),
            "adapters": (3, self.adapters),
            "resize": (3, self.resize),
            "sleep": (2, self.sleep),
            "again": (1, self.again),
            "layer fails": (2, self.layer_fails),
            "refused": (6, self.refuse),
            "share": (1, self.share),
        }

    def close(self) -> None:
        self.handle.restore_()
        for name, tensor in self.module.state_dict().items():
            self.same(tensor, self.twin.state_dict()[name], name)

    def tokens(self) -> Tensor:
        return torch.randint(0, 256, (2, 8), generator=self.generator).to(self.device)

    def offload(self) -> None:
        options = self.rng.choice([{}, {"slots": 3}, {"policy": all_staged}, {"policy": all_mapped}])
        self.handle = offload_(self.module, self.budget(), device=self.device, **options)

    def budget(self) -> int:
        return self.total * self.rng.randrange(45, 110) // 100

    # --------------------------------------------------------------------------------------- actions
    @torch.no_grad()
    def step(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            tokens = self.tokens()
            self.same(self.module(tokens), self.twin(tokens), "an output")

    def threads(self) -> None:
        """Two threads call one module."""
        given = [self.tokens(), self.tokens()]
        found: list[Any] = [None, None]

        def call(index: int) -> None:
            try:
                with torch.no_grad():
                    found[index] = self.module(given[index])
            except BaseException as error:
                found[index] = error

        other = threading.Thread(target=call, args=(1,))
        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()
        other.start()
        call(0)
        other.join()
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)  # the other thread has a stream of its own
        with torch.no_grad():
            for tokens, output in zip(given, found, strict=True):
                if isinstance(output, BaseException):
                    raise output
                self.same(output, self.twin(tokens), "an output of two threads")

    @torch.no_grad()
    def update(self) -> None:
        name = self.rng.choice(list(self.twin.state_dict()))
        target = self.twin.state_dict()[name]
        new = self.draw(*target.shape) / 8
        target.copy_(new)
        if self.rng.random() < 0.5:
            self.handle.update(name, new)
        else:
            self.module.state_dict()[name].copy_(new)
        self.same(self.module.state_dict()[name], target, f"{name} after an update")
        self.step()

    @torch.no_grad()
    def load(self) -> None:
        for tensor in self.twin.parameters():
            tensor.copy_(self.draw(*tensor.shape) / 8)
        self.module.load_state_dict(self.twin.state_dict())
        self.step()

    def adapters(self) -> None:
        """Low-rank additions to each layer, trained through frozen, offloaded weights."""
        tokens, gradients = self.tokens(), []
        drawn = [(self.draw(self.width, 4), self.draw(4, self.width) / 8) for _ in self.twin.layers]
        for module in (self.twin, self.module):
            module.requires_grad_(False)
            trained = [tuple(t.clone().requires_grad_() for t in pair) for pair in drawn]
            hooks = [
                layer.register_forward_hook(lambda _, given, out, a=a, b=b: out + given[0] @ a @ b)
                for layer, (a, b) in zip(module.layers, trained, strict=True)
            ]
            try:
                module(tokens).square().mean().backward()
            finally:
                for hook in hooks:
                    hook.remove()
            gradients.append([t.grad for pair in trained for t in pair])
        for wanted, found in zip(*gradients, strict=True):
            self.same(found, wanted, "a gradient")

    def resize(self) -> None:
        self.handle.resize_(self.budget())
        self.step()

    def sleep(self) -> None:
        self.handle.sleep()
        name = self.rng.choice(list(self.twin.state_dict()))
        self.same(self.module.state_dict()[name], self.twin.state_dict()[name], f"{name} asleep")
        if self.rng.random() < 0.5:
            self.handle.resize_(self.budget())
        self.handle.wake()
        self.step()

    def again(self) -> None:
        self.close()
        self.offload()
        self.step()

    def layer_fails(self) -> None:
        layer = self.rng.choice(self.module.layers)
        layer.raises = True
        try:
            self.module(self.tokens())
            raise AssertionError("the layer did not fail")
        except ArithmeticError:
            self.refused["layer"] += 1
        finally:
            layer.raises = False
        self.step()

    def refuse(self) -> None:
        """An allocation is refused in the middle of a change: everything is as it was, and the next one works."""
        call, n = self.rng.choice(Refusals.CALLS), self.rng.randrange(1, 9)
        change = self.rng.choice([self.resize, self.sleep, self.again, self.share])
        try:
            with self.refusals.nth(call, n):
                change()
        except (OffloadError, torch.OutOfMemoryError):
            self.refused[call] += 1
        if self.handle.restored:
            self.offload()
        if self.handle.asleep:
            self.handle.wake()
        self.step()

    def share(self) -> None:
        """A second module on meta, over a checkpoint in shared memory, which a write moves out of it."""
        name = f"soak {os.getpid()} {self.name}"
        with dlpo.share(self.twin.state_dict(), name), dlpo.open_shared(name) as checkpoint:
            with torch.device("meta"):
                module = Model(self.width, 6)
            options: dict[str, Any] = {"mode": "auto" if self.rng.random() < 0.7 else "copy", "policy": all_staged}
            handle = offload_(module, self.total, device=self.device, checkpoint=checkpoint, **options)
        tokens = self.tokens()
        with torch.no_grad():
            self.same(module(tokens), self.twin(tokens), "an output from shared memory")
            handle.update("layers.1.up.weight", self.twin.layers[1].up.weight + 1)
            self.same(module.layers[1].up.weight, self.twin.layers[1].up.weight + 1, "a weight out of shared memory")
        handle.restore_()


class JaxLane(Lane):
    """A tree that is streamed through one program, updated, overwritten, and offloaded anew."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        import jax
        import numpy as np

        from dlpoffload.jax import offload
        from dlpoffload.jax.arrays import jax_device

        jax.config.update("jax_default_matmul_precision", "highest")  # as in the tests: nothing is rounded to TF32
        self.jax, self.np, self.offload = jax, np, offload
        self.at = jax_device(dlpo.open_driver(self.device))
        self.random = np.random.default_rng(self.rng.randrange(1 << 31))
        self.leaves = {f"layers.{i}.{n}": self.values(n) for i in range(6) for n in "wb"}
        self.nbytes = sum(leaf.nbytes for leaf in self.leaves.values())
        self.begin()
        self.compiled = jax.jit(self.handle.streamed(self.forward))
        self.actions = {
            "step": (8, self.step),
            "update": (3, self.update),
            "overwrite": (2, self.overwrite),
            "other tree": (1, self.other_tree),
        }

    def values(self, part: str) -> Any:
        shape = (self.width, self.width) if part == "w" else (self.width,)
        return (self.random.standard_normal(shape) / 8).astype(self.np.float32)

    def begin(self) -> None:
        tree = {"layers": [{n: self.leaves[f"layers.{i}.{n}"] for n in "wb"} for i in range(6)]}
        options = {"device": self.device, "policy": all_staged, "units": ["layers.*"]}
        self.tree, self.handle = self.offload(tree, self.nbytes // 2, **options)

    def forward(self, tree: Any, x: Any) -> Any:
        for layer in tree["layers"]:
            x = x + self.jax.numpy.tanh(x @ layer["w"] + layer["b"])
        return x

    def resident(self) -> Any:
        put = self.jax.device_put
        return {"layers": [{n: put(self.leaves[f"layers.{i}.{n}"], self.at) for n in "wb"} for i in range(6)]}

    def step(self) -> None:
        x = self.jax.device_put(self.random.standard_normal((3, self.width)).astype(self.np.float32), self.at)
        wanted, found = (self.np.asarray(self.compiled(tree, x)) for tree in (self.resident(), self.tree))
        self.equal(found, wanted, "an output")

    def equal(self, found: Any, wanted: Any, what: str) -> None:
        if found.tobytes() != wanted.tobytes():
            raise AssertionError(f"{self.name}: {what} differs from the resident twin's, after {', '.join(self.log)}")
        self.compared += wanted.nbytes

    def update(self) -> None:
        name = self.rng.choice(list(self.leaves))
        self.leaves[name] = self.values(name[-1])
        self.tree = self.handle.update(name, self.leaves[name])
        self.step()

    def overwrite(self) -> None:
        name = self.rng.choice(list(self.leaves))
        self.leaves[name] = self.values(name[-1])
        self.handle.overwrite_(name, self.leaves[name])
        self.step()

    def other_tree(self) -> None:
        """A second tree beside the first, which lives as long as its arrays."""
        first, tree, handle = self.leaves, self.tree, self.handle
        self.leaves = {name: self.values(name[-1]) for name in first}
        self.begin()
        for name, leaf in self.leaves.items():
            _, index, part = name.split(".")
            self.equal(self.np.asarray(self.tree["layers"][int(index)][part]), leaf, name)
        self.handle.close()
        self.leaves, self.tree, self.handle = first, tree, handle

    def close(self) -> None:
        self.handle.close()
        self.tree = self.compiled = None


LANES: dict[str, type[Lane]] = {"torch a": TorchLane, "torch b": TorchLane, "jax": JaxLane}
