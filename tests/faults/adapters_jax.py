"""Operations of the JAX adapter: a tree of three layers, whose results are compared bit by bit with resident ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from adapters import Bench, Case
from operations import operation

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.jax import OffloadHandle, offload
from dlpoffload.planning import all_mapped, all_staged

WIDTH, DEPTH = 64, 3
UNIT = 4 * (WIDTH * WIDTH + WIDTH)
Leaves = list[dict[str, Any]]


def block(layer: Any, x: Any) -> Any:
    return x + jax.numpy.tanh(x @ layer["w"] + layer["b"])


def forward(tree: Any, x: Any) -> Any:
    for layer in tree["layers"]:
        x = block(layer, x)
    return x


jitted = jax.jit(forward)


class Pair:
    """A tree, and what its leaves are."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.leaves: Leaves = [
            {"w": random.standard_normal((WIDTH, WIDTH)).astype(np.float32), "b": np.full(WIDTH, i, np.float32)}
            for i in range(DEPTH)
        ]
        self.x = jax.numpy.ones((2, WIDTH))
        self.tree: Any = None
        self.handle: OffloadHandle | None = None

    @property
    def source(self) -> Any:
        return {"layers": [{n: leaf.copy() for n, leaf in layer.items()} for layer in self.leaves]}

    def offload(self, **options: Any) -> None:
        options = {"device": "cpu", "policy": all_staged} | options
        if options["policy"] is not all_mapped:
            options["units"] = ["layers.*"]
        tree = options.pop("tree", None) or self.source
        self.tree, self.handle = offload(tree, 2 * UNIT, **options)

    def check(self) -> None:
        """What the tree holds is what it should, and a program computes of it what it does of resident leaves."""
        if self.tree is None:
            return
        assert self.handle is not None
        for layer, wanted in zip(self.tree["layers"], self.leaves, strict=True):
            for name in wanted:
                assert np.array_equal(np.asarray(layer[name]), wanted[name]), f"{name} differs"
        run = jitted  # one program for all: streaming makes no driver calls, XLA copies
        resident = jax.tree.map(jax.numpy.array, self.source)
        assert np.array_equal(np.asarray(run(self.tree, self.x)), np.asarray(run(resident, self.x))), "a result differs"

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()
        self.tree = self.handle = None

    def case(self, act: Callable[[], Any], again: Callable[[], Any] | None = None) -> Case:
        return Case(act, self.check, self.close, again)


@operation("jax: offload, staged")
def offload_staged(bench: Bench) -> Case:
    pair = Pair()
    return pair.case(pair.offload)


@operation("jax: offload, mapped")
def offload_mapped(bench: Bench) -> Case:
    pair = Pair()
    return pair.case(lambda: pair.offload(policy=all_mapped))


@operation("jax: offload, some resident")
def offload_some(bench: Bench) -> Case:
    pair = Pair()
    return pair.case(lambda: pair.offload(policy=dlpo.planning.balanced))


@operation("jax: offload, arrays donated")
def offload_donated(bench: Bench) -> Case:
    pair = Pair()
    return pair.case(lambda: pair.offload(tree=jax.tree.map(jax.numpy.array, pair.source), donate=True))


@operation("jax: offload, leaves one by one")
def offload_leaves(bench: Bench) -> Case:
    pair = Pair()
    shapes = jax.eval_shape(lambda: pair.source)
    return pair.case(lambda: pair.offload(tree=shapes, leaves=iter(jax.tree.leaves(pair.source))))


@operation("jax: update")
def update(bench: Bench) -> Case:
    pair = Pair()
    pair.offload()
    new = pair.leaves[1]["w"] + 1

    def act() -> None:
        assert pair.handle is not None
        pair.tree = pair.handle.update("layers.1.w", new)
        pair.leaves[1]["w"] = new

    return pair.case(act)


@operation("jax: overwrite_")
def overwrite(bench: Bench) -> Case:
    pair = Pair()
    pair.offload()
    new = pair.leaves[1]["w"] + 1

    def act() -> None:
        assert pair.handle is not None
        pair.handle.overwrite_("layers.1.w", new)

    def check() -> None:
        if np.array_equal(np.asarray(pair.tree["layers"][1]["w"]), new):
            pair.leaves[1]["w"] = new
        pair.check()

    return Case(act, check, pair.close)


@operation("jax: close, and the arrays dropped", releases=True)
def close(bench: Bench) -> Case:
    pair = Pair()
    pair.offload()

    def act() -> None:
        pair.close()
        gc.collect()
        lifetime.drain()

    return pair.case(act)
