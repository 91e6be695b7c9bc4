"""Offload a pytree of JAX weights under a budget of device memory, run it, train through it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dlpoffload.jax import inspect_compiled, offload

rng = np.random.default_rng(0)
WIDTH, DEPTH = 256, 12


def weights(*shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)


params = {
    "embed": weights(2000, WIDTH),
    "layers": [{"up": weights(WIDTH, 4 * WIDTH), "down": weights(4 * WIDTH, WIDTH)} for _ in range(DEPTH)],
}
lora = {"a": weights(WIDTH, 8), "b": np.zeros((8, WIDTH), np.float32)}


def forward(params, lora, tokens):
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"] + x @ lora["a"] @ lora["b"]
    return x


nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
tree, handle = offload(params, device_budget=nbytes * 4 // 10, units=["layers.*"])  # a new tree; GPU or CPU
print(handle.plan)

tokens = rng.integers(0, 2000, (2, 16))
run = jax.jit(handle.streamed(forward))  # an ordinary function; its staged weights pass through the ring
y = run(tree, lora, tokens)
resident = jax.jit(forward)(jax.tree.map(jnp.array, params), lora, tokens)
assert jnp.allclose(y, jax.device_put(resident, y.sharding), atol=1e-4)
print(inspect_compiled(run.lower(tree, lora, tokens).compile()))


def loss(params, lora, tokens):
    return (forward(params, lora, tokens) ** 2).mean()


gradient = jax.jit(handle.streamed(jax.grad(loss, argnums=1)))  # to the adapter, through frozen weights
print(jax.tree.map(jnp.shape, gradient(tree, lora, tokens)))

new = handle.update("layers.3.up", weights(WIDTH, 4 * WIDTH))  # a new tree; the old one keeps its values
assert not jnp.array_equal(run(new, lora, tokens), y)
assert jnp.array_equal(run(tree, lora, tokens), y)
print(handle.report())
