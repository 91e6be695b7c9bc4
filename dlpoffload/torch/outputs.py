"""Outputs of a unit that alias its slot: their bytes would become another unit's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from .compiling import uncompiled
from .subclasses import inner_tensors, rebuilt, wraps_others

__all__ = ["detached_from", "lies_in"]


def lies_in(tensor: torch.Tensor, storage: int) -> bool:
    """Whether a tensor has elements in the storage at an address."""
    if wraps_others(tensor):
        return any(lies_in(inner, storage) for _, inner in inner_tensors(tensor))
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return False
    return bool(tensor.untyped_storage().data_ptr() == storage)


@uncompiled
def detached_from(output: Any, slot: torch.Tensor, own: Collection[int]) -> tuple[Any, int]:
    """Replace tensors that lie in `slot` by copies, in tensors, tuples, lists, dicts and dataclasses.

    Returns the output and how many were replaced. The unit's own tensor objects, whose ids are in `own`, stay: they
    go home with it.
    """
    storage = slot.untyped_storage().data_ptr()
    found = 0

    def visit(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.Tensor):
            if id(value) in own or not lies_in(value, storage):
                return value
            found += 1
            if wraps_others(value):
                inside = [inner for _, inner in inner_tensors(value) if lies_in(inner, storage)]
                return rebuilt(value, {id(inner): _copy_of(inner) for inner in inside})
            return _copy_of(value)
        if isinstance(value, dict):
            for key, item in list(value.items()):
                replaced = visit(item)
                if replaced is not item:
                    value[key] = replaced
            return value
        if isinstance(value, list):
            for index, item in enumerate(value):
                replaced = visit(item)
                if replaced is not item:
                    value[index] = replaced
            return value
        if isinstance(value, tuple):
            items = [visit(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                item = getattr(value, field.name)
                replaced = visit(item)
                if replaced is not item:
                    object.__setattr__(value, field.name, replaced)
        return value

    return visit(output), found


def _copy_of(value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its strides: what reads it may take other kernels, and other bits, for other strides."""
    packed = value
    for dim, (length, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if stride == 0 and length > 1:
            packed = packed.narrow(dim, 0, 1)
    made = torch.empty_strided(packed.shape, packed.stride(), dtype=value.dtype, device=value.device)
    return made.copy_(packed).expand(value.shape)
