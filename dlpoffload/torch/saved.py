"""What autograd saves of a staged unit: a place in the host bytes, not a place in a slot.

`F.linear` saves ``weight.t()``, which aliases the slot. When the slot is refilled before backward the gradient would
be wrong without a word. So such tensors are packed as where they lie in the slab, and staged again on
unpacking, see `backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import AliasError
from .compiling import uncompiled
from .outputs import lies_in
from .subclasses import wraps_others

if TYPE_CHECKING:
    from .staging import Stager
    from .units import StagedUnit

__all__ = ["Staged", "saved_outside"]


@dataclass(frozen=True, slots=True)
class Staged:
    """A tensor that lay in a unit's slot: where its bytes are in the slab, and how often they had changed."""

    unit: StagedUnit
    generations: tuple[int, ...]
    byte_offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool
    negated: bool

    def check(self) -> None:
        """Refuse to give out other bytes than those that forward used."""
        if self.unit.generations(self.byte_offset, self.nbytes) != self.generations:
            raise AliasError(
                f'weights of unit "{self.unit.name}" were changed between forward and backward, so the gradient cannot '
                "be computed; run backward before the update, or forward again"
            )

    def inside(self, flat: torch.Tensor, byte_offset: int) -> torch.Tensor:
        """The tensor in a flat tensor of bytes, from `byte_offset` on."""
        tensor = flat[byte_offset : byte_offset + self.nbytes].view(self.dtype).as_strided(self.shape, self.strides)
        if self.conjugated:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.negated else tensor


@dataclass(frozen=True, slots=True)
class _Kept:
    """Any other tensor: torch checks no versions where hooks pack, so we do."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True, slots=True)
class _Passed:
    """Any other tensor, packed by the hooks around ours: checkpoints, `save_on_cpu`."""

    packed: Any
    unpack: Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Wrapping:
    """A tensor that wraps others, of which some lay in the slot, in parts that are packed each."""

    kind: Any
    parts: dict[str, Any]
    context: Any
    shape: torch.Size
    strides: tuple[int, ...]


@uncompiled
def saved_outside(stager: Stager, slot: torch.Tensor, unit: StagedUnit) -> AbstractContextManager[Any]:
    """Pack what autograd saves of the slot inside the block."""
    if not torch.is_grad_enabled():
        return nullcontext()
    hooks = _Hooks(stager, slot, unit)
    return torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack)


class _Hooks:
    """For one call of a unit. Inside of what `torch.compile` made of its forward they run as they are."""

    def __init__(self, stager: Stager, slot: torch.Tensor, unit: StagedUnit) -> None:
        self.stager = stager
        self.slot = slot
        self.unit = unit
        self.storage = slot.untyped_storage().data_ptr()
        # torch calls the innermost hooks only, so ours call those around them.
        self.outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)

    @uncompiled
    def pack(self, tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor  # a part that is none
        if lies_in(tensor, self.storage):
            if not wraps_others(tensor):
                return _place_of(tensor, self.slot, self.unit)
            names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            parts = {name: self.pack(getattr(tensor, name)) for name in names}
            return _Wrapping(type(tensor), parts, context, tensor.size(), tensor.stride())
        if self.outer is not None:
            return _Passed(self.outer[0](tensor), self.outer[1])
        # Not the tensor itself: where it is its own node's output, the two would keep each other alive.
        return _Kept(tensor.detach(), tensor._version)

    @uncompiled
    def unpack(self, saved: Any) -> Any:
        if isinstance(saved, _Wrapping):
            parts = {name: self.unpack(part) for name, part in saved.parts.items()}
            return saved.kind.__tensor_unflatten__(parts, saved.context, saved.shape, saved.strides)
        if not isinstance(saved, Staged | _Kept | _Passed):
            return saved
        if isinstance(saved, Staged):
            self.stager.look_over(saved.unit)
            return self.stager.backward.staged_again(saved)
        if isinstance(saved, _Passed):
            return saved.unpack(saved.packed)
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{saved.tensor.dtype}{list(saved.tensor.shape)} is at version {saved.tensor._version}; expected "
                f"version {saved.version} instead"
            )
        return saved.tensor


def _place_of(tensor: torch.Tensor, slot: torch.Tensor, unit: StagedUnit) -> Staged:
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    offset, nbytes = tensor.data_ptr() - slot.data_ptr(), span * tensor.element_size()
    return Staged(
        unit,
        unit.generations(offset, nbytes),
        offset,
        nbytes,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.is_conj(),
        tensor.is_neg(),
    )
