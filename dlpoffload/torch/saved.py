"""What autograd saves of a staged unit: a place in the host bytes, not a place in a slot.

`F.linear` saves ``weight.t()``, which aliases the slot. When the slot is refilled before backward the gradient would
be wrong without a word. So such tensors are packed as where they lie in the slab, and staged again on unpacking.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import AliasError
from ..spec import ALIGNMENT
from .tensors import current_stream

if TYPE_CHECKING:
    from .staging import StagedUnit, Stager

__all__ = ["saved_outside"]


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor that lay in a unit's slot: where its bytes are in the slab."""

    unit: StagedUnit
    generation: int
    byte_offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def saved_outside(stager: Stager, slot: torch.Tensor, unit: StagedUnit) -> AbstractContextManager[Any]:
    """Pack what autograd saves of the slot inside the block."""
    if not torch.is_grad_enabled():
        return nullcontext()
    storage = slot.untyped_storage().data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if tensor.layout is not torch.strided or not tensor.numel():
            return tensor
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        size = tensor.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        offset = tensor.data_ptr() - slot.data_ptr()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        return _Saved(unit, unit.generation, offset, span * size, tensor.dtype, shape, strides)

    def unpack(saved: torch.Tensor | _Saved) -> torch.Tensor:
        return saved if isinstance(saved, torch.Tensor) else _staged_again(stager, saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _staged_again(stager: Stager, saved: _Saved) -> torch.Tensor:
    unit = saved.unit
    if unit.generation != saved.generation:
        raise AliasError(
            f'the weights of unit "{unit.name}" were changed between forward and backward, so the gradient cannot be '
            "computed; run backward before the update, or forward again"
        )
    # Aligned as it was in the slot: kernels choose other code for other alignments, and the bits could differ.
    shift = saved.byte_offset % ALIGNMENT
    flat = torch.empty(shift + saved.nbytes, dtype=torch.uint8, device=stager.device)[shift:]
    driver = stager.ring.driver
    with driver.current():
        driver.copy_async(
            flat.data_ptr(), unit.slab.host_pointer + saved.byte_offset, saved.nbytes, current_stream(stager.device)
        )
    return flat.view(saved.dtype).as_strided(saved.shape, saved.strides)
