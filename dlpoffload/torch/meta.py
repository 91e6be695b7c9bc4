"""Tensors on meta made real in place: the objects stay, so that whoever refers to them has them with their bytes."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..errors import SpecError

__all__ = ["check_realisable", "realise", "unrealise"]


def check_realisable(tensor: torch.Tensor, name: str) -> None:
    """Raise SpecError where a tensor on meta has what would not come along, or cannot be written."""
    has = {
        "a computation that made it": not tensor.is_leaf,
        "a gradient": tensor.is_leaf and tensor.grad is not None,
        "hooks": bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None)),
        "autograd holding on to it": cast(Any, tensor)._use_count() > 1,
    }
    if found := [what for what, there in has.items() if there]:
        raise SpecError(
            f'"{name}" is on meta and has {" and ".join(found)}, which would be lost when it is given bytes; offload '
            "the module first, and do that afterwards"
        )


def realise(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Make a tensor on meta an empty one on `device`. The object, its class and attributes stay.

    Gives the twin that is on meta in its place, for `unrealise`. Not by ``.data``: torch refuses to change the kind of
    device. Nor by `torch.utils.swap_tensors`, which exchanges class and attributes as well, and refuses objects that
    have weak references: an ``nn.LSTM`` has one to each of its weights, and they are to stay.
    """
    twin = torch.empty(0, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
    cast(Any, torch._C)._swap_tensor_impl(tensor, twin)
    return twin


def unrealise(tensor: torch.Tensor, twin: torch.Tensor) -> None:
    """Put a tensor back on meta."""
    cast(Any, torch._C)._swap_tensor_impl(tensor, twin)
