"""`module.to()`, `.half()`, `.cuda()` and everything else that goes through `Module._apply`, after offloading.

What leaves a tensor where and what it is, works; on the host bytes, one tensor at a time. What would move an offloaded
tensor to another device, or change its dtype, is refused before anything has changed: the plan is made of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import OffloadError
from .gate import Gate
from .overrides import Override
from .subclasses import inner_tensors, wraps_others
from .tree import Entry, Member, Outer

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["GuardedApply"]


class _Held(NamedTuple):
    """An offloaded tensor, and who placed it."""

    placed: Placed
    entry: Entry
    member: Member


class GuardedApply(Override):
    """Stands in the place of one module's `_apply`; its tensors may be on several devices."""

    def __init__(self, parts: Sequence[Placed], module: nn.Module, gate: Gate) -> None:
        self.parts = parts
        self.module = module
        self.gate = gate

    def __call__(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        with self.gate:  # where another thread moves the memory, once it has
            now: Any = self.module._apply
            if now is self:
                self._apply_to_all(function, recurse)
            else:
                now(function, recurse)
        return self.module

    def _apply_to_all(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> None:
        if self.stale:
            raise OffloadError("the memory of this module is being moved; call that afterwards")
        modules = list(self.module.modules()) if recurse else [self.module]
        offloaded = {key: _Held(placed, *found) for placed in self.parts for key, found in placed.tensors().items()}
        held = _held(modules, offloaded)
        for found in {id(found.member.of_module[1]): found for found in held}.values():
            self._check(function, found)
        for module in modules:
            _apply_to_others(module, function, offloaded)
        with torch.no_grad():
            for outer in {id(f.member.outer): f.member.outer for f in held if f.member.outer is not None}.values():
                self._apply_to_outer(function, outer, offloaded)
            for found in held:
                if found.member.outer is None:
                    self._apply_to(function, found)

    def _check(self, function: Callable[[torch.Tensor], torch.Tensor], held: _Held) -> None:
        name, tensor = held.member.of_module
        probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        result = function(probe)
        if probe.device.type == "cpu" and probe.is_shared():  # type: ignore[no-untyped-call]
            raise OffloadError(f'"{name}" is offloaded, and this call would move it to shared memory; restore_() first')
        if tensor.dim() in (4, 5):
            shaped = torch.empty((2,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
            last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            if tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
                shaped = shaped.contiguous(memory_format=last)
            if function(shaped).stride() != shaped.stride():
                raise OffloadError(
                    f'"{name}" is offloaded with strides {tensor.stride()}, and this call would change its memory '
                    "format; restore_() first, then change it and offload again"
                )
        if result.dtype != probe.dtype or result.device != probe.device:
            raise OffloadError(
                f'"{name}" is offloaded as {probe.dtype} for {held.placed.driver.device}, and this call would '
                f"make it {result.dtype} on {result.device}; restore_() first, then change it and offload again"
            )

    def _apply_to(self, function: Callable[[torch.Tensor], torch.Tensor], held: _Held) -> None:
        # Its home where a unit runs: a view of the slot would outlive that.
        before = held.placed.data_of(held.entry, held.member)[0].detach()
        after = function(before)
        if after.numel() and after.data_ptr() != before.data_ptr():
            held.placed.write(held.entry, held.member, after)

    def _apply_to_outer(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        outer: Outer,
        offloaded: dict[int, _Held],
    ) -> None:
        """As `_apply_to`; what the function makes of a tensor that wraps others is written part by part."""
        after = function(outer.tensor.detach())
        made = dict(inner_tensors(after)) if wraps_others(after) else {}
        parts = {path: offloaded[id(inner)] for path, inner in inner_tensors(outer.tensor)}
        same = made.keys() == parts.keys() and all(
            made[path].shape == held.member.tensor.shape and made[path].dtype == held.member.tensor.dtype
            for path, held in parts.items()
        )
        if not same:
            raise OffloadError(
                f'"{outer.name}" is offloaded as a {type(outer.tensor).__name__} of {", ".join(parts)}, and this call '
                f"makes other parts of it; restore_() first, then change it and offload again"
            )
        for path, held in parts.items():
            if made[path].numel() and made[path].data_ptr() != held.member.tensor.data_ptr():
                held.placed.write(held.entry, held.member, made[path])


def _apply_to_others(
    module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], offloaded: dict[int, _Held]
) -> None:
    """As `Module._apply` does it, for tensors that came after the offloading, such as an adapter's."""
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    with torch.no_grad():
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or _offloaded_in(tensor, offloaded):
                    continue
                result = function(tensor)
                if isinstance(tensor, nn.Parameter):
                    tensor.data = result
                    if tensor.grad is not None:
                        tensor.grad.data = function(tensor.grad)
                else:
                    table[name] = result


def _held(modules: list[nn.Module], offloaded: dict[int, _Held]) -> list[_Held]:
    found: dict[int, _Held] = {}
    for module in modules:
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None:
                    found.update(_offloaded_in(tensor, offloaded))
    return list(found.values())


def _offloaded_in(tensor: torch.Tensor, offloaded: dict[int, _Held]) -> dict[int, _Held]:
    """What was offloaded of a module's tensor: itself, or the tensors inside of it."""
    inside = [inner for _, inner in inner_tensors(tensor)] if wraps_others(tensor) else [tensor]
    return {id(inner): offloaded[id(inner)] for inner in inside if id(inner) in offloaded}
