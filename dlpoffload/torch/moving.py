"""`module.to()`, `.half()`, `.cuda()` and everything else that goes through `Module._apply`, after offloading.

What leaves a tensor where and what it is, works; on the host bytes, one tensor at a time. What would move an offloaded
tensor to another device, or change its dtype, is refused before anything has changed: the plan is made of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import OffloadError
from .tree import Entry, Member

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["GuardedApply"]


class GuardedApply:
    """Stands in the place of one module's `_apply`."""

    def __init__(self, placed: Placed, module: nn.Module) -> None:
        self.placed = placed
        self.module = module

    def __call__(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        modules = list(self.module.modules()) if recurse else [self.module]
        offloaded = self.placed.tensors()
        held = _held(modules, offloaded)
        for _, member in held:
            self._check(function, member)
        for module in modules:
            _apply_to_others(module, function, offloaded)
        with torch.no_grad():
            for entry, member in held:
                self._apply_to(function, entry, member)
        return self.module

    def _check(self, function: Callable[[torch.Tensor], torch.Tensor], member: Member) -> None:
        tensor = member.tensor
        probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        result = function(probe)
        if result.dtype != probe.dtype or result.device != probe.device:
            raise OffloadError(
                f'"{member.name}" is offloaded as {probe.dtype} for {self.placed.driver.device}, and this call would '
                f"make it {result.dtype} on {result.device}; restore_() first, then change it and offload again"
            )

    def _apply_to(self, function: Callable[[torch.Tensor], torch.Tensor], entry: Entry, member: Member) -> None:
        before = member.tensor.detach()
        after = function(before)
        if after.numel() and after.data_ptr() != before.data_ptr():
            self.placed.write(entry, member, after)


def _apply_to_others(
    module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], offloaded: dict[int, Any]
) -> None:
    """As `Module._apply` does it, for tensors that came after the offloading, such as an adapter's."""
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    with torch.no_grad():
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or id(tensor) in offloaded:
                    continue
                result = function(tensor)
                if isinstance(tensor, nn.Parameter):
                    tensor.data = result
                    if tensor.grad is not None:
                        tensor.grad.data = function(tensor.grad)
                else:
                    table[name] = result


def _held(modules: list[nn.Module], offloaded: dict[int, tuple[Entry, Member]]) -> list[tuple[Entry, Member]]:
    found: dict[int, tuple[Entry, Member]] = {}
    for module in modules:
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None and id(tensor) in offloaded:
                    found[id(tensor)] = offloaded[id(tensor)]
    return list(found.values())
