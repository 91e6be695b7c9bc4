"""Build a model larger than its budget: on meta, from a checkpoint of another layout; or layer by layer."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import nn

from dlpoffload.checkpoint import concat
from dlpoffload.torch import Offloader, offload_

WIDTH, DEPTH = 256, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # stored as three
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v)


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


torch.manual_seed(0)
names = [f"model.{i}.{name}" for i in range(DEPTH) for name in ("q", "k", "v", "out")]
save_file({name: torch.randn(WIDTH, WIDTH) / 16 for name in names}, "model.safetensors")
budget = 4 * WIDTH * WIDTH * len(names) // 3

with torch.device("meta"):  # no bytes yet, on no device
    model = Model([Block() for _ in range(DEPTH)])
qkv = concat("model.*.q", "model.*.k", "model.*.v", dim=0)
recipe = {"layers.*.qkv.weight": qkv, "layers.*.out.weight": "model.*.out"}
handle = offload_(model, budget, checkpoint="model.safetensors", recipe=recipe)  # each byte straight to its home
print(handle.plan)

offloader = Offloader(budget)  # as a serving stack builds its layers: one at a time
other = Model(offloader.wrap(Block() for _ in range(DEPTH)))
for parameter, weight in zip(other.parameters(), model.state_dict().values(), strict=True):
    parameter.data.copy_(weight)  # its own loader
offloader.offload_(other)  # the plan of the whole; streamed layers stay where they are

with torch.no_grad():
    x = torch.randn(8, WIDTH, device=handle.device)
    assert torch.equal(model(x), other(x))
print(f"built twice on {handle.device}, {handle.report().pinned_nbytes} bytes pinned, the same bits")
