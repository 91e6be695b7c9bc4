"""`copy.deepcopy` of an offloaded module: an independent one, offloaded by the same plan."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import OffloadError
from .tensors import tensor_in
from .tree import Member

if TYPE_CHECKING:
    from .handle import OffloadHandle

__all__ = ["DeepCopy", "refuse_copy", "refuse_pickle"]


class DeepCopy:
    """The `__deepcopy__` of one offloaded module.

    The copy's tensors are first made in ordinary host memory, then offloaded: nothing passes through the device but
    what the plan puts there.
    """

    def __init__(self, handle: OffloadHandle) -> None:
        self.handle = handle

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        handle = self.handle
        with handle.uninstalled() as placed, torch.inference_mode(False), torch.no_grad():
            for entry in placed.entries.values():
                flat = torch.empty(entry.spec.nbytes, dtype=torch.uint8)
                for member in entry.members:
                    memo[id(member.tensor)] = _host_copy(member, flat)
            result = copy.deepcopy(handle.module, memo)
        handle.offload_like(result)
        return result


def refuse_copy(memo: dict[int, Any]) -> NoReturn:
    """The `__deepcopy__` of what lies inside an offloaded module."""
    raise OffloadError(
        "a part of an offloaded module cannot be copied by deepcopy: the copy would stage the original's weights; "
        "copy the whole offloaded module, or restore_() it first"
    )


def refuse_pickle(protocol: object) -> NoReturn:
    """The `__reduce_ex__` of an offloaded module and of all inside it."""
    raise OffloadError(
        "an offloaded module cannot be pickled: its weights live in pinned host memory of this process; "
        "save its state_dict() (torch.save or safetensors), or restore_() it first"
    )


def _host_copy(member: Member, flat: torch.Tensor) -> torch.Tensor:
    """A member's elements in ordinary memory; tied ones overlap there as they did."""
    tensor = member.tensor
    plain = tensor_in(flat, member.byte_offset, member.spec)
    plain.copy_(tensor.detach())
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
