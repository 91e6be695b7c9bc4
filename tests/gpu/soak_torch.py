"""The lane of torch: a module that is called, written, resized, put to sleep, restored, and refused memory."""

from __future__ import annotations

import copy
import os
import threading
from typing import Any

import torch
from soak_lanes import Lane, Refusals
from torch import Tensor, nn
from torch.nn import functional

import dlpoffload as dlpo
from dlpoffload.errors import OffloadError
from dlpoffload.planning import all_mapped, all_staged
from dlpoffload.torch import OffloadHandle, offload_

__all__ = ["TorchLane"]


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
