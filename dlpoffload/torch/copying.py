"""`copy.deepcopy` of an offloaded module: an independent one, offloaded by the same plan."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import OffloadError
from .subclasses import rebuilt
from .tensors import copy_elements, tensor_in
from .tree import Member
from .watched import attributes_of, former_class
from .wrapped import LeftOut

if TYPE_CHECKING:
    from .handle import OffloadHandle
    from .split import SplitHandle

__all__ = ["DeepCopy", "refuse_copy", "refuse_pickle"]


class DeepCopy:
    """The `__deepcopy__` of one offloaded module.

    The copy's tensors are first made in ordinary host memory, then offloaded: nothing passes through the device but
    what the plan puts there.
    """

    def __init__(self, handle: OffloadHandle | SplitHandle) -> None:
        self.handle = handle

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        handle = self.handle
        with handle.copyable() as parts, torch.inference_mode(False), torch.no_grad():
            members: list[Member] = []
            for placed in parts:
                for entry in placed.entries.values():
                    members += entry.members
                    flat = torch.empty(entry.spec.nbytes, dtype=torch.uint8)
                    for member in entry.members:
                        memo[id(member.tensor)] = _host_copy(member, *placed.data_of(entry, member), flat)
                for outer in placed.outers():
                    memo[id(outer.tensor)] = rebuilt(outer.tensor, memo)
            result = _without_ours(copy.deepcopy(handle.module, memo))
            for member in members:
                memo[id(member.tensor)].__dict__.update(copy.deepcopy(attributes_of(member.tensor), memo))
        handle.offload_like(result)
        return result


def _without_ours(copied: nn.Module) -> nn.Module:
    """Take out what our forwards and hooks left in their places."""
    for module in copied.modules():
        found = module.__dict__.get("forward")
        while isinstance(found, LeftOut):
            found = found.before
            module.__dict__["forward"] = found
        if "forward" in module.__dict__ and found is None:
            del module.__dict__["forward"]
        tables: tuple[dict[int, Any], ...] = (module._state_dict_hooks, module._load_state_dict_pre_hooks)
        for hooks in tables:  # torch wraps those of the second kind
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), LeftOut)]:
                del hooks[key]
    return copied


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


def _host_copy(member: Member, data: torch.Tensor, ours: bool, flat: torch.Tensor) -> torch.Tensor:
    """A member's elements in ordinary memory; tied ones overlap there as they did."""
    tensor, kind = member.tensor, former_class(member.tensor)
    plain = tensor_in(flat, member.byte_offset, member.spec) if ours else torch.empty_like(data, device="cpu")
    copy_elements(plain, data)
    if kind is torch.Tensor:
        return plain
    made: torch.Tensor = torch.Tensor._make_subclass(kind, plain, tensor.requires_grad)
    return made
