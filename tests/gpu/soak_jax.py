"""The lane of JAX: a tree that is streamed through one program, updated, overwritten, and offloaded anew."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from soak_lanes import Lane

import dlpoffload as dlpo
from dlpoffload.jax import offload
from dlpoffload.jax.arrays import jax_device
from dlpoffload.planning import all_staged

__all__ = ["JaxLane"]


class JaxLane(Lane):
    """A tree that is streamed through one program, updated, overwritten, and offloaded anew."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        jax.config.update("jax_default_matmul_precision", "highest")  # as in the tests: nothing is rounded to TF32
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
        return (self.random.standard_normal(shape) / 8).astype(np.float32)

    def begin(self) -> None:
        tree = {"layers": [{n: self.leaves[f"layers.{i}.{n}"] for n in "wb"} for i in range(6)]}
        options = {"device": self.device, "policy": all_staged, "units": ["layers.*"]}
        self.tree, self.handle = offload(tree, self.nbytes // 2, **options)

    def forward(self, tree: Any, x: Any) -> Any:
        for layer in tree["layers"]:
            x = x + jax.numpy.tanh(x @ layer["w"] + layer["b"])
        return x

    def resident(self) -> Any:
        put = jax.device_put
        return {"layers": [{n: put(self.leaves[f"layers.{i}.{n}"], self.at) for n in "wb"} for i in range(6)]}

    def step(self) -> None:
        x = jax.device_put(self.random.standard_normal((3, self.width)).astype(np.float32), self.at)
        wanted, found = (np.asarray(self.compiled(tree, x)) for tree in (self.resident(), self.tree))
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
            self.equal(np.asarray(self.tree["layers"][int(index)][part]), leaf, name)
        self.handle.close()
        self.leaves, self.tree, self.handle = first, tree, handle

    def close(self) -> None:
        self.handle.close()
        self.tree = self.compiled = None
