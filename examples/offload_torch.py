"""Offload a PyTorch model under a budget of device memory, run it, and get the same bits."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dlpoffload.torch import offload_


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 256, depth: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 2000)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


torch.manual_seed(0)
model = Model().eval()
resident = copy.deepcopy(model)
nbytes = sum(p.nbytes for p in model.parameters())

handle = offload_(model, device_budget=nbytes * 4 // 10)  # in place; on the GPU where there is one
print(handle.plan)

resident = resident.to(handle.device)
with torch.no_grad():
    for _ in range(5):
        tokens = torch.randint(0, 2000, (2, 16), device=handle.device)
        assert torch.equal(model(tokens), resident(tokens)), "offloading changed a bit"
print(handle.report())

handle.restore_()  # ordinary memory again
tokens = tokens.cpu()
assert torch.equal(model(tokens), resident.cpu()(tokens))
print(f"five calls, bitwise equal to the resident model, on {handle.device}")
