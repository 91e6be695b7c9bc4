"""`state_dict` inside a running unit: the true weights, not the slot that they are in for a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .outputs import lies_in
from .tensors import version_of

if TYPE_CHECKING:
    from .staging import StagedMember, StagedUnit, Stager

__all__ = ["guard_state_dicts"]


def guard_state_dicts(stager: Stager, units: Iterable[StagedUnit]) -> list[RemovableHandle]:
    """Make `state_dict` of every module that holds staged tensors return their homes while the unit runs."""
    held: dict[nn.Module, list[tuple[str, StagedUnit, StagedMember]]] = {}
    for unit in units:
        for staged in unit.members:
            for module, attribute, _ in staged.member.places:
                held.setdefault(module, []).append((attribute, unit, staged))
    return [
        module.register_state_dict_post_hook(_Homes(stager, tensors))  # type: ignore[no-untyped-call]
        for module, tensors in held.items()
    ]


class _Homes:
    def __init__(self, stager: Stager, tensors: list[tuple[str, StagedUnit, StagedMember]]) -> None:
        self.tensors = tensors
        self.stager = stager
        self.storages = [slot.untyped_storage().data_ptr() for slot in stager.slots]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        with self.stager.lock:
            for attribute, unit, staged in self.tensors:
                found = state_dict.get(prefix + attribute)
                # With keep_vars it is the Parameter itself, which goes home with its unit.
                if not isinstance(found, torch.Tensor) or found is staged.tensor:
                    continue
                if any(lies_in(found, storage) for storage in self.storages):
                    # What the unit's forward has written so far is not at home yet.
                    written = unit.active and version_of(staged.tensor) != staged.version
                    state_dict[prefix + attribute] = found.clone() if written else staged.home
