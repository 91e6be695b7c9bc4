"""`state_dict` inside a running unit: the true weights, not the slot that they are in for a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .staging import StagedMember, StagedUnit

__all__ = ["guard_state_dicts"]


def guard_state_dicts(units: Iterable[StagedUnit]) -> list[RemovableHandle]:
    """Make `state_dict` of every module that holds staged tensors return their homes while the unit runs."""
    held: dict[nn.Module, list[tuple[str, StagedUnit, StagedMember]]] = {}
    for unit in units:
        for staged in unit.members:
            for module, attribute, _ in staged.member.places:
                held.setdefault(module, []).append((attribute, unit, staged))
    return [
        module.register_state_dict_post_hook(_Homes(tensors))  # type: ignore[no-untyped-call]
        for module, tensors in held.items()
    ]


class _Homes:
    def __init__(self, tensors: list[tuple[str, StagedUnit, StagedMember]]) -> None:
        self.tensors = tensors

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for attribute, unit, staged in self.tensors:
            found = state_dict.get(prefix + attribute)
            # With keep_vars the Parameter itself is asked for, and goes home with its unit.
            if unit.active and found is not None and found is not staged.tensor:
                state_dict[prefix + attribute] = staged.home
