"""`copy.deepcopy` of an offloaded module: an independent one, offloaded by the same plan."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn

from ..errors import OffloadError
from .overrides import LeftOut, Override
from .subclasses import rebuilt
from .tensors import copy_elements, tensor_in
from .tree import Member
from .watched import attributes_of, former_class

if TYPE_CHECKING:
    from .handle import OffloadHandle
    from .split import SplitHandle

__all__ = ["DeepCopy", "Mark", "PartCopy", "PickleRefusal", "refuse_copy", "refuse_pickle", "standing_aside"]


class _Here(threading.local):
    """The handles whose modules this thread is copying."""

    def __init__(self) -> None:
        self.handles: list[object] = []


_here = _Here()


@contextmanager
def standing_aside(handle: object) -> Iterator[None]:
    """Let this thread copy a handle's module as its class says, for the length of a block; others meet what is ours."""
    _here.handles.append(handle)
    try:
        yield
    finally:
        _here.handles.remove(handle)


def _stands_aside(handle: object) -> bool:
    return any(handle is each for each in _here.handles)


class Mark(Override):
    """The attribute by which a module knows its handle."""

    def __init__(self, handle: object) -> None:
        self.handle = handle


class DeepCopy(Override):
    """The `__deepcopy__` of one offloaded module.

    The copy's tensors are first made in ordinary host memory, then offloaded: nothing passes through the device but
    what the plan puts there.
    """

    def __init__(self, handle: OffloadHandle | SplitHandle) -> None:
        self.handle = handle

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        handle = self.handle
        if _stands_aside(handle):
            return _as_its_class_says(handle.module, memo)
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
            result = _without_ours(_as_its_class_says(handle.module, memo))
            for member in members:
                memo[id(member.tensor)].__dict__.update(copy.deepcopy(attributes_of(member.tensor), memo))
        handle.offload_like(result)
        return result


class PartCopy(Override):
    """The `__deepcopy__` of what lies inside an offloaded module."""

    def __init__(self, handle: object, module: nn.Module) -> None:
        self.handle = handle
        self.module = module

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        if not _stands_aside(self.handle):
            refuse_copy(memo)
        return _as_its_class_says(self.module, memo)


class PickleRefusal(Override):
    """The `__reduce_ex__` of an offloaded module and of all inside it."""

    def __call__(self, protocol: object) -> NoReturn:
        refuse_pickle(protocol)


def _as_its_class_says(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy`, but for the `__deepcopy__` and `__reduce_ex__` that are on the instance."""
    kind = type(module)
    if (by_class := getattr(kind, "__deepcopy__", None)) is not None:
        return cast(nn.Module, by_class(module, memo))
    reduced: Any = kind.__reduce_ex__(module, 4)
    make, arguments, state, elements, pairs = (*reduced, None, None, None)[:5]
    copied: Any = make(*copy.deepcopy(arguments, memo))
    memo[id(module)] = copied
    copied.__setstate__(copy.deepcopy(state, memo))  # as every nn.Module has
    for element in elements or ():
        copied.append(copy.deepcopy(element, memo))
    for key, value in pairs or ():
        copied[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
    return cast(nn.Module, copied)


def _without_ours(copied: nn.Module) -> nn.Module:
    """Take out what we left in the places of our forwards, attributes and hooks."""
    for module in copied.modules():
        for name, found in list(module.__dict__.items()):
            if not isinstance(found, LeftOut):
                continue
            while isinstance(found, LeftOut):
                found = found.before
            if found is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = found
        tables: tuple[dict[int, Any], ...] = (module._state_dict_hooks, module._load_state_dict_pre_hooks)
        for hooks in tables:  # torch wraps those of the second kind
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), LeftOut)]:
                del hooks[key]
    return copied


def refuse_copy(memo: dict[int, Any]) -> NoReturn:
    """What cannot be copied by itself."""
    raise OffloadError(
        "a part of an offloaded module cannot be copied by deepcopy: the copy would stage the original's weights; "
        "copy the whole offloaded module, or restore_() it first"
    )


def refuse_pickle(protocol: object) -> NoReturn:
    """What cannot be pickled."""
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
