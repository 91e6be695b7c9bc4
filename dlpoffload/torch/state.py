"""`state_dict` inside a running unit: the true weights, not the slot that they are in for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .guarded import home_view
from .outputs import lies_in
from .overrides import LeftOut, Override
from .subclasses import inner_at, rebuilt

if TYPE_CHECKING:
    from .staging import Stager
    from .units import StagedMember, StagedUnit

__all__ = ["Homes", "Saving", "guard_state_dicts", "homes_of"]


def guard_state_dicts(stager: Stager, units: Iterable[StagedUnit]) -> list[RemovableHandle]:
    """Make `state_dict` of every module that holds staged tensors return their homes while the unit runs."""
    return [
        module.register_state_dict_post_hook(homes)  # type: ignore[no-untyped-call]
        for module, homes in homes_of(stager, units).items()
    ]


def homes_of(stager: Stager, units: Iterable[StagedUnit]) -> dict[nn.Module, Homes]:
    """For every module that holds staged tensors, what puts their homes into a state_dict."""
    held: dict[nn.Module, list[tuple[str, StagedUnit, StagedMember]]] = {}
    for unit in units:
        for staged in unit.members:
            for module, attribute, _ in staged.member.places:
                held.setdefault(module, []).append((attribute, unit, staged))
    return {module: Homes(stager, tensors) for module, tensors in held.items()}


class Saving(Override):
    """Stands in the place of a module's `_save_to_state_dict`: no unit is left while a view of its slot is in the dict.

    Another thread would take that for a view that outlives its unit's forward.
    """

    def __init__(self, module: nn.Module, homes: Homes) -> None:
        self.module = module
        self.homes = homes
        self.save: Callable[[dict[str, Any], str, bool], None] = module._save_to_state_dict

    def __call__(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self.homes.stager.lock:
            self.save(destination, prefix, keep_vars)
            self.homes(self.module, destination, prefix, {})


class Homes:
    """Puts homes in the place of what lies in slots."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LeftOut:
        return LeftOut(None)

    def __init__(self, stager: Stager, tensors: list[tuple[str, StagedUnit, StagedMember]]) -> None:
        self.tensors = tensors
        self.stager = stager
        self.storages = [slot.untyped_storage().data_ptr() for slot in stager.slots]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        with self.stager.lock:
            for attribute, unit, staged in self.tensors:
                key = prefix + attribute.split(".")[0]
                found = state_dict.get(key)
                # With keep_vars it is the Parameter itself, which goes home with its unit.
                if not isinstance(found, torch.Tensor) or found is staged.member.of_module[1]:
                    continue
                inner = inner_at(found, attribute)
                if inner is None or not any(lies_in(inner, storage) for storage in self.storages):
                    continue
                # What the unit's forward has written so far is not at home yet.
                written = unit.active and staged.member.version != staged.version
                home = inner.clone() if written else home_view(staged.tensor, staged.home)
                state_dict[key] = home if inner is found else rebuilt(found, {id(inner): home})
