"""The bound on staged weights as a property of the program's graph: it holds however XLA orders what it may order.

Of the copies that are alive at one time, look at the one that began last. Each other one has a reader that has not run
yet, so that reader is no ancestor of this copy. So if every copy has at most ``slots - 1`` earlier copies with a reader
that is not among its ancestors, never more than ``slots`` are alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dlpoffload.planning import all_staged

jax = pytest.importorskip("jax")
jnp = jax.numpy
dj = pytest.importorskip("dlpoffload.jax")
execute = pytest.importorskip("dlpoffload.jax.execute")
models = pytest.importorskip("jax_models")

DEPTH = 6
CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
Node = tuple[str, set[int]]


def nodes_of(closed: Any) -> list[Node]:
    """Every operation of a program, calls taken apart, with the operations that it reads from."""
    nodes: list[Node] = []

    def walk(jaxpr: Any, arguments: list[int | None]) -> list[int | None]:
        made: dict[Any, int | None] = dict.fromkeys(jaxpr.constvars)
        made.update(zip(jaxpr.invars, arguments, strict=True))

        def node(variable: Any) -> int | None:
            return None if hasattr(variable, "val") else made[variable]

        for equation in jaxpr.eqns:
            inputs = [node(variable) for variable in equation.invars]
            name = equation.primitive.name
            if name in CALLS:
                inner = equation.params[CALLS[name]]
                outputs = walk(getattr(inner, "jaxpr", inner), inputs)
            elif name == "device_put" and len(inputs) > 1:  # several at once
                outputs = []
                for one in inputs:
                    nodes.append((name, {one} - {None}))
                    outputs.append(len(nodes) - 1)
            else:
                nodes.append((name, set(inputs) - {None}))
                outputs = [len(nodes) - 1] * len(equation.outvars)
            made.update(zip(equation.outvars, outputs, strict=True))
        return [node(variable) for variable in jaxpr.outvars]

    walk(closed.jaxpr, [None] * len(closed.jaxpr.invars))
    return nodes


def most_alive(closed: Any, leaves: int) -> int:
    """How many copies can be alive at once, in units of `leaves` leaves."""
    nodes = nodes_of(closed)
    ancestors: list[set[int]] = []
    for _, inputs in nodes:
        ancestors.append(set().union(inputs, *(ancestors[i] for i in inputs)))
    readers: list[set[int]] = [set() for _ in nodes]
    for index, (_, inputs) in enumerate(nodes):
        for i in inputs:
            readers[i].add(index)

    def last_readers(node: int) -> set[int]:
        """Who reads it, or a cast of it."""
        found: set[int] = set()
        for reader in readers[node]:
            found |= last_readers(reader) if nodes[reader][0] == "convert_element_type" else {reader}
        return found

    copies = [index for index, (name, _) in enumerate(nodes) if name == "device_put"]
    groups = [copies[i : i + leaves] for i in range(0, len(copies), leaves)]
    most = 0
    for k, group in enumerate(groups):
        done = set.intersection(*(ancestors[copy] for copy in group))
        others = sum(not set().union(*(last_readers(copy) for copy in former)) <= done for former in groups[:k])
        most = max(most, others + 1)
    assert groups
    return most


def block(layer: dict[str, Any], x: Any) -> Any:
    """Uses both leaves in forward and in backward."""
    return x + jnp.tanh(x * layer["b"] @ layer["w"].astype(jnp.bfloat16).astype(jnp.float32))


def in_order(order: list[int]) -> Callable[..., Any]:
    def fun(params: Any, x: Any) -> Any:
        outputs = []
        for i in order:
            x = block(params["layers"][i], x)
            outputs.append(x.sum())
        return x, outputs

    return fun


def offloaded(rng: np.random.Generator, device: str, slots: int) -> Any:
    budget = slots * models.BLOCK_NBYTES
    params = models.blocks(rng, DEPTH)
    return dj.offload(params, budget, device=device, policy=all_staged, slots=slots, units=["layers.*"])


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("seed_of_order", range(4))
def test_no_order_of_xla_holds_more_than_the_ring(
    rng: np.random.Generator, at: Any, device: str, slots: int, seed_of_order: int
) -> None:
    tree, handle = offloaded(rng, device, slots)
    order = list(range(DEPTH))
    if seed_of_order:
        order = np.random.default_rng(seed_of_order).integers(0, DEPTH, 12).tolist()
    fun = in_order(order)
    x = jnp.ones((2, models.WIDTH))
    assert most_alive(jax.make_jaxpr(handle.streamed(fun))(tree, x), 2) == min(slots, len(set(order)))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_nor_does_a_derivative(rng: np.random.Generator, at: Any, device: str, slots: int, around: bool) -> None:
    """Also where the cotangent is a constant, and says nothing of whether forward is through."""
    tree, handle = offloaded(rng, device, slots)
    x = jnp.ones((2, models.WIDTH))

    def loss(params: Any, x: Any) -> Any:
        return in_order(list(range(DEPTH)))(params, x)[0].sum()

    gradient = jax.grad(handle.streamed(loss), 1) if around else handle.streamed(jax.grad(loss, 1))
    assert most_alive(jax.make_jaxpr(gradient)(tree, x), 2) == slots


def test_without_barriers_all_of_them_may_be_there(
    rng: np.random.Generator, at: Any, device: str, monkeypatch: Any
) -> None:
    """The test above can fail."""
    tree, handle = offloaded(rng, device, 2)
    monkeypatch.setattr(execute, "tie", lambda weights, results: (list(weights), list(results)))
    fun = handle.streamed(in_order(list(range(DEPTH))))
    assert most_alive(jax.make_jaxpr(fun)(tree, jnp.ones((2, models.WIDTH))), 2) == DEPTH
