"""Models as people write them: Flax Linen, nnx, Equinox; each as it is, offloaded, with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlpoffload.planning import Placement, all_staged

jax = pytest.importorskip("jax")
jnp = jax.numpy
dj = pytest.importorskip("dlpoffload.jax")
models = pytest.importorskip("jax_models")

WIDTH, DEPTH, VOCABULARY = 32, 4, 50


@pytest.fixture
def tokens(at: Any) -> Any:
    return jnp.arange(12).reshape(2, 6)


def copied(handle: Any, name: str) -> int:
    return sum(p.copied_nbytes for p in handle.report().programs if p.name == name)


def check(tree: Any, forward: Any, tokens: Any, device: str, budget_share: float = 0.5, **more: Any) -> Any:
    """Offload a tree, and hold its results against the resident ones."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))
    offloaded, handle = dj.offload(tree, int(nbytes * budget_share), device=device, **more)
    assert jax.tree.structure(offloaded) == jax.tree.structure(tree)
    result = jax.jit(handle.streamed(forward))(offloaded, tokens)
    models.close(result, jax.jit(forward)(tree, tokens))
    used = [name for name in handle.plan.names(Placement.HOST_STAGED) if not name.endswith("rngs.count")]
    staged = sum(handle.plan.specs[name].nbytes for name in used)
    assert staged > 0
    assert copied(handle, forward.__name__) == staged, "what the program does not read is not copied"
    return handle


def test_linen(tokens: Any, device: str) -> None:
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            y = linen.LayerNorm()(x)
            y = linen.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)(y)
            return x + linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(y)))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            x = linen.Embed(VOCABULARY, WIDTH)(tokens)
            for i in range(DEPTH):
                x = Block(name=f"layers_{i}")(x)
            return x

    model = Model()
    variables = model.init(jax.random.key(0), tokens)

    def linen_forward(variables: Any, tokens: Any) -> Any:
        return model.apply(variables, tokens)

    handle = check(variables, linen_forward, tokens, device)
    assert [unit.name for unit in handle.plan.units] == [f"params.layers_{i}" for i in range(DEPTH)]
    gradient = jax.jit(jax.grad(handle.streamed(lambda v, s: (model.apply(v, tokens) * s).sum()), argnums=1))
    whole = jax.grad(lambda s: (model.apply(variables, tokens) * s).sum())
    models.close(gradient(handle.tree, 2.0), whole(2.0), 1e-2)  # bfloat16


def nnx_model(nnx: Any) -> Any:
    class Block(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs, deterministic=True)

        def __call__(self, x: Any) -> Any:
            return x + self.dropout(self.down(nnx.gelu(self.up(self.norm(x)))))

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.layers = nnx.List([Block(rngs) for _ in range(DEPTH)])

        def __call__(self, tokens: Any) -> Any:
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return x

    return Model(nnx.Rngs(0))


def test_an_nnx_module(tokens: Any, device: str) -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx_model(nnx)

    def module_forward(model: Any, tokens: Any) -> Any:
        return model(tokens)

    handle = check(model, module_forward, tokens, device)
    assert isinstance(handle.tree, type(model))
    assert "layers.0.up.kernel" in handle.plan.specs
    assert any("PRNG" in why for why in handle.report().kept.values())


def test_an_nnx_state(tokens: Any, device: str) -> None:
    nnx = pytest.importorskip("flax.nnx")
    graph, state = nnx.split(nnx_model(nnx))

    def state_forward(state: Any, tokens: Any) -> Any:
        return nnx.merge(graph, state)(tokens)

    handle = check(state, state_forward, tokens, device)
    new = handle.update("layers.1.up.kernel", np.zeros((WIDTH, 4 * WIDTH), np.float32))
    assert not np.asarray(jax.tree.leaves(new["layers"][1]["up"]["kernel"])[0]).any()
    state["layers"][1]["up"]["kernel"] = state["layers"][1]["up"]["kernel"].replace(jnp.zeros((WIDTH, 4 * WIDTH)))
    models.close(jax.jit(handle.streamed(state_forward))(new, tokens), state_forward(state, tokens))


def test_an_abstract_nnx_module_is_filled(tokens: Any, device: str) -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx_model(nnx)
    abstract = nnx.eval_shape(lambda: nnx_model(nnx))
    values = iter(jax.tree.leaves(model))
    tree, handle = dj.offload(abstract, 1 << 16, device=device, leaves=values)
    models.close(jax.jit(handle.streamed(lambda m, t: m(t)))(tree, tokens), model(tokens))


def test_linen_scanned_layers(tokens: Any, device: str) -> None:
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return x + linen.Dense(WIDTH)(linen.relu(linen.Dense(4 * WIDTH)(x))), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            x = linen.Embed(VOCABULARY, WIDTH)(tokens)
            layers = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
            return layers(name="layers")(x, None)[0]

    model = Model()
    variables = model.init(jax.random.key(0), tokens)

    def scanned_forward(variables: Any, tokens: Any) -> Any:
        return model.apply(variables, tokens)

    handle = check(variables, scanned_forward, tokens, device, 0.6, stacked=["params.layers"])
    assert handle.plan.slots == 2


def test_equinox(tokens: Any, device: str) -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(WIDTH, WIDTH, WIDTH, DEPTH, key=jax.random.key(0))
    tree, handle = dj.offload(model, 4 * WIDTH * (WIDTH + 64) * 2, device=device, policy=all_staged, units=["layers.*"])
    x = jnp.ones((3, WIDTH))
    run = equinox.filter_jit(handle.streamed(lambda model, x: jax.vmap(model)(x)))
    models.close(run(tree, x), jax.vmap(model)(x))
    assert set(handle.report().kept) == {"activation", "final_activation"}
    assert handle.plan.nbytes(Placement.HOST_STAGED) == handle.plan.total_nbytes
