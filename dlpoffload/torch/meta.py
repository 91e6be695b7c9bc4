"""Tensors on meta made real in place: the objects stay, so that whoever refers to them has them with their bytes."""

from __future__ import annotations

import copyreg
import weakref
from typing import Any, cast

import torch
from torch import utils

from ..errors import SpecError

__all__ = ["check_realisable", "realise", "unrealise"]


def check_realisable(tensor: torch.Tensor, name: str) -> None:
    """Raise SpecError where a tensor on meta carries what would not come along."""
    carried = {
        "a gradient": tensor.grad is not None if tensor.is_leaf else False,
        "hooks": bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None)),
        "weak references": bool(weakref.getweakrefs(tensor)),
        "a computation that made it": not tensor.is_leaf,
    }
    if found := [what for what, there in carried.items() if there]:
        raise SpecError(
            f'"{name}" is on meta and has {" and ".join(found)}, which a tensor with bytes in its place would not; '
            "offload the module first, and add those afterwards"
        )


def realise(tensor: torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
    """Make a tensor on meta an empty one on `device`. Class, attributes and `requires_grad` stay.

    Returns the twin that is on meta instead, for `unrealise`.
    """
    kind = type(tensor)
    twin = torch.empty(0, dtype=tensor.dtype, device=device)
    if kind is torch.Tensor:
        twin.requires_grad_(tensor.requires_grad)
    else:
        twin = torch.Tensor._make_subclass(kind, twin, tensor.requires_grad)
    twin.__dict__.update(tensor.__dict__)
    for slot in cast(Any, copyreg)._slotnames(kind):
        if hasattr(tensor, slot):
            setattr(twin, slot, getattr(tensor, slot))
    try:
        cast(Any, utils).swap_tensors(tensor, twin)
    except RuntimeError as error:
        raise SpecError(f'"{name}" on meta cannot be given bytes in place: {error}') from error
    return twin


def unrealise(tensor: torch.Tensor, twin: torch.Tensor) -> None:
    """Put a tensor back on meta."""
    cast(Any, utils).swap_tensors(tensor, twin)
