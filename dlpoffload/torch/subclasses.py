"""Tensor subclasses that wrap others, such as quantised weights with their scales: what `__tensor_flatten__` parts.

Such a tensor has no memory. What is offloaded are the plain tensors inside of it, under its name and theirs
(``"layers.0.weight.scale"``); the outer object goes on holding them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["find", "inner_at", "inner_tensors", "rebuilt", "wraps_others"]


def wraps_others(tensor: object) -> bool:
    """Whether a tensor is made of others, and says of which."""
    kind = type(tensor)
    return kind is not torch.Tensor and kind is not nn.Parameter and is_traceable_wrapper_subclass(tensor)


def inner_tensors(outer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors inside of one that wraps others, at any depth, by their dotted paths."""
    for name in cast(Any, outer).__tensor_flatten__()[0]:
        inner = getattr(outer, name)
        if wraps_others(inner):
            yield from ((f"{name}.{path}", found) for path, found in inner_tensors(inner))
        elif isinstance(inner, torch.Tensor):
            yield name, inner


def rebuilt(outer: torch.Tensor, others: Mapping[int, torch.Tensor] = MappingProxyType({})) -> torch.Tensor:
    """Make such a tensor anew, with `others` for plain tensors inside, by their ids. A Parameter stays one."""
    kind = cast(Any, type(outer))
    names, context = cast(Any, outer).__tensor_flatten__()
    parts: dict[str, Any] = {}
    for name in names:
        inner = getattr(outer, name)
        if wraps_others(inner):
            parts[name] = rebuilt(inner, others)
        else:
            parts[name] = others.get(id(inner), inner)
    made: torch.Tensor = kind.__tensor_unflatten__(parts, context, outer.size(), outer.stride())
    if isinstance(outer, nn.Parameter):
        # Not nn.Parameter(made): that detaches, and would hold others than the tensors given here.
        cast(Any, made)._is_param = True
        made.requires_grad_(outer.requires_grad)
    return made


def find(module: nn.Module, attribute: str) -> torch.Tensor | None:
    """A module's own parameter or buffer, or the plain tensor at a path inside of it."""
    name = attribute.split(".")[0]
    found = module._parameters.get(name, module._buffers.get(name))
    return None if found is None else inner_at(found, attribute)


def inner_at(tensor: torch.Tensor, attribute: str) -> torch.Tensor | None:
    """What a path that begins with a module's attribute, ``"weight.scale"``, leads to inside of that tensor."""
    found: Any = tensor
    for part in attribute.split(".")[1:]:
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None
