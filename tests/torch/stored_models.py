"""What the tests of building share: models on meta, what a checkpoint holds of them, and what must not change."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import torch
from models import Case, tensors_of
from safetensors.torch import save_file
from torch import Tensor, nn

from dlpoffload import lifetime, live_buffers

__all__ = ["looks", "on_meta", "pinned", "saved", "stored"]


def on_meta(case: Case, reference: nn.Module) -> nn.Module:
    """The model on meta, but for what no checkpoint stores."""
    with torch.device("meta"):
        model = case.build().train(case.training)
    real = dict(reference.named_buffers(remove_duplicate=False))
    for name, _ in list(model.named_buffers(remove_duplicate=False)):
        if name not in stored(reference):
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = copy.deepcopy(real[name])
    for name, parameter in reference.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model


def stored(module: nn.Module) -> dict[str, Tensor]:
    """What a plain checkpoint holds: every tensor under every name, each with bytes of its own.

    Without those that are expanded, which torch cannot load either.
    """
    return {name: t.detach().clone().contiguous() for name, t in module.state_dict().items() if not _is_expanded(t)}


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and length > 1 for length, stride in zip(tensor.shape, tensor.stride(), strict=True))


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def looks(module: nn.Module) -> dict[str, Any]:
    """What must be the same after an error: objects, classes, attributes, kinds of memory."""
    return {
        name: (id(t), type(t), dict(t.__dict__), t.requires_grad, t.device, t.dtype, t.shape, t.stride())
        for name, t in tensors_of(module).items()
    }


def pinned() -> int:
    """Pinned bytes that are alive, once what is gone is freed."""
    gc.collect()
    lifetime.drain()
    return sum(nbytes for kind, nbytes in live_buffers() if kind == "pinned")
