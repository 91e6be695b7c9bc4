"""Small models as plain functions of pytrees, and what compares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 64
BLOCK_NBYTES = 4 * (WIDTH * WIDTH + WIDTH)


def blocks(rng: np.random.Generator, count: int) -> dict[str, Any]:
    """A list of blocks as NumPy arrays."""
    return {
        "layers": [
            {
                "w": (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32),
                "b": rng.standard_normal(WIDTH).astype(np.float32),
            }
            for _ in range(count)
        ]
    }


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The same blocks as one stack."""
    return {"layers": jax.tree.map(lambda *rows: np.stack(rows), *params["layers"])}


def block(layer: dict[str, Any], x: Any) -> Any:
    """One block: the weight is used in a lower precision, as mixed-precision models do."""
    w = layer["w"].astype(jnp.bfloat16).astype(jnp.float32)
    return x + jnp.tanh(x @ w + layer["b"])


def unrolled(params: dict[str, Any], x: Any) -> Any:
    """A Python loop over blocks."""
    for layer in params["layers"]:
        x = block(layer, x)
    return x


def jitted(params: dict[str, Any], x: Any) -> Any:
    """A loop over calls of one jitted block."""
    for layer in params["layers"]:
        x = _jitted_block(layer, x)
    return x


_jitted_block = jax.jit(block)


def remat(params: dict[str, Any], x: Any) -> Any:
    """A loop over checkpointed blocks."""
    for layer in params["layers"]:
        x = jax.checkpoint(block)(layer, x)
    return x


def whole_remat(params: dict[str, Any], x: Any) -> Any:
    """All blocks in one checkpoint."""
    return jax.checkpoint(unrolled)(params, x)


def scan(params: dict[str, Any], x: Any) -> Any:
    """A scan over a stack, with an output at each turn."""
    return jax.lax.scan(lambda x, layer: (block(layer, x), x.sum()), x, params["layers"])


def remat_scan(params: dict[str, Any], x: Any) -> Any:
    """A scan over a stack whose body is checkpointed."""
    body = jax.checkpoint(lambda x, layer: (block(layer, x), x.sum()))
    return jax.lax.scan(body, x, params["layers"])


def reverse_scan(params: dict[str, Any], x: Any) -> Any:
    """A scan from the last layer to the first, over inputs beside the stack."""
    count = len(params["layers"]["w"])

    def body(x: Any, given: Any) -> Any:
        layer, offset = given
        return block(layer, x + offset), x.mean()

    offsets = jnp.arange(count, dtype=jnp.float32)
    return jax.lax.scan(body, x, (params["layers"], offsets), reverse=True)


LOOPS: list[Callable[..., Any]] = [unrolled, jitted, remat, whole_remat]
SCANS: list[Callable[..., Any]] = [scan, remat_scan, reverse_scan]


def resident(tree: Any) -> Any:
    """The same tree in the memory of its device, or of the default one: left alone a copy stays in the host's."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return jnp.array(leaf)
        device = next(iter(leaf.devices()))
        memory = jax.sharding.SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        return jax.device_put(leaf, memory, may_alias=False)

    return jax.tree.map(copied, tree)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the bit."""
    mine, other = jax.tree.flatten(a), jax.tree.flatten(b)
    assert mine[1] == other[1]
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(mine[0], other[0], strict=True)
    )


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    """Assert that two trees are equal within rounding."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)
