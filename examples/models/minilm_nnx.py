"""The encoder of all-MiniLM-L6-v2 (BERT, mean pooling) as an nnx module, and its weights out of torch's file."""

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import safe_open

WIDTH, HEADS, LAYERS = 384, 12, 6
TORCH = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
    "word": "embeddings.word_embeddings",
    "place": "embeddings.position_embeddings",
    "kind": "embeddings.token_type_embeddings",
}


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.query, self.key, self.value, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.norm, self.norm2 = (nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs) for _ in range(2))

    def __call__(self, x, mask):
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        mixed = nnx.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = self.norm(x + self.out(mixed.reshape(x.shape)))
        return self.norm2(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.word, self.place, self.kind = (nnx.Embed(rows, WIDTH, rngs=rngs) for rows in (30522, 512, 2))
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])

    def __call__(self, tokens, mask):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.norm(self.word(tokens) + self.place(places) + self.kind(jnp.zeros_like(tokens)))
        for layer in self.layers:
            x = layer(x, mask > 0)
        total = (x * mask[..., None]).sum(1)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def weights(path, model):
    """The leaves of `model` in their order, read one at a time."""
    with safe_open(path, "numpy") as file:
        for keys, _ in jax.tree.leaves_with_path(model):
            *at, module, leaf = (
                str(getattr(key, "name", getattr(key, "idx", ""))) for key in keys[:-1]
            )  # not ".value"
            name = f"encoder.layer.{at[-1]}.{TORCH[module]}" if at else TORCH[module]
            name = "embeddings.LayerNorm" if (at, module) == ([], "norm") else name
            tensor = file.get_tensor(f"{name}.{'bias' if leaf == 'bias' else 'weight'}")
            yield tensor.T if leaf == "kernel" else tensor
