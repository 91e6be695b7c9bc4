"""Outputs of a unit that alias its slot: their bytes would become another unit's."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

__all__ = ["detached_from"]


def detached_from(output: Any, slot: torch.Tensor) -> tuple[Any, int]:
    """Replace tensors that lie in `slot` by copies, in tensors, tuples, lists, dicts and dataclasses.

    Returns the output and how many were replaced. A Parameter returned as it is goes home with its unit and stays.
    """
    storage = slot.untyped_storage().data_ptr()
    found = 0

    def visit(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.Tensor):
            if isinstance(value, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
                return value
            if value.numel() and value.untyped_storage().data_ptr() == storage:
                found += 1
                return value.clone()
            return value
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
