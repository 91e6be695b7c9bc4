"""Moving a tensor out of a mapped checkpoint, because it is to be written; and what a report says of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import SlotError
from .guarded import is_guarded, release
from .overrides import LeftOut
from .tensors import current_stream, place_of
from .tree import Entry
from .watched import exchange_data

if TYPE_CHECKING:
    from .placed import Placed
    from .staging import Stager
    from .units import StagedMember, StagedUnit

__all__ = ["CopiedOut", "copy_out", "guard_loading", "host_facts", "move_out", "move_written"]

CopiedOut = Callable[[str], list[torch.Tensor]]
"""Copies an entry out of its file, and gives the new homes of its members."""


def copy_out(placed: Placed, entry: Entry) -> bool:
    """Move an entry out of its mapped file into memory of its own, unless that has been done."""
    if not placed.is_read_only(entry):
        return False
    stager = placed.stager
    unit = None if stager is None else stager.unit_of(entry.name)
    if unit is not None and stager is not None:
        with stager.lock:
            if unit.active:
                raise SlotError(
                    f'unit "{unit.name}" is running; copy "{entry.name}" out of its file between two calls of it'
                )
            stager.look_over(unit)
            move_out(stager, unit, entry.name, current_stream(stager.device))
        return True
    ours = [placed._is_ours(member) for member in entry.members]
    for member, home, mine in zip(entry.members, copied_out(placed, entry.name), ours, strict=True):
        if mine:
            exchange_data(member.tensor, home, forget=True)
    return True


def copied_out(placed: Placed, name: str) -> list[torch.Tensor]:
    """See `CopiedOut`."""
    entry, store = placed.entries[name], placed.store
    assert store is not None
    store.copy_out(name)
    homes = placed.homes(name)
    for member, home in zip(entry.members, homes, strict=True):
        placed._homes[id(member)] = place_of(home)
        release(member.tensor)
    return homes


def move_out(stager: Stager, unit: StagedUnit, entry: str, stream: int) -> None:
    """Move an entry of a unit out of its file; its tensors that are at home get the new one."""
    if stager.ring.driver.capture_id(stream):
        raise SlotError(
            f'"{entry}" lies in a mapped checkpoint and is written while a graph is captured, which would go on '
            f'copying from the file; call handle.copy_out("{entry}") before the capture'
        )
    mine = [staged for staged in unit.members if staged.entry == entry]
    at_home = [staged.at_home for staged in mine]
    for staged, home, was_there in zip(mine, stager.copied_out(entry), at_home, strict=True):
        if was_there:
            exchange_data(staged.tensor, home, forget=True)
        unit.give_home(staged, home)
        unit.read_only = [tensor for tensor in unit.read_only if tensor is not staged.tensor]


def move_written(stager: Stager, unit: StagedUnit, written: Sequence[StagedMember], stream: int) -> None:
    """Move what a unit's forward wrote in its slot, before it is brought home."""
    try:
        for entry in {staged.entry for staged in written if is_guarded(staged.tensor)}:
            move_out(stager, unit, entry, stream)
    except BaseException:
        stager.ring.changed_on_stream(unit.name, stream=stream)  # what was written is lost
        raise


def host_facts(placed: Placed) -> dict[str, Any]:
    """What a report says of the memory: how much, by mode and why, what lies in files, and what does not."""
    store, host_nbytes = placed.store, placed.host_nbytes
    own = [name for name in store or () if store and not (store.is_read_only(name) or name in store.moved)]
    return {
        "device": placed.driver.device,
        "description": placed.driver.description,
        "pinned_nbytes": host_nbytes if placed.pinned else 0,
        "pageable_nbytes": 0 if placed.pinned else host_nbytes,
        "pageable_because": placed.pageable_because,
        "device_nbytes": placed.device_nbytes,
        "mapped_home": placed.mapped,
        "mode": "copy" if store is None else store.mode,
        "because": "" if store is None else store.because,
        "file_nbytes": 0 if store is None else store.file_nbytes,
        "moved": () if store is None else tuple(store.moved),
        "copied": tuple(own) if store is not None and store.mode == "map" else (),
    }


def guard_loading(placed: Placed) -> list[RemovableHandle]:
    """Make `load_state_dict` move what it is about to write out of the file first."""
    held: dict[nn.Module, list[tuple[str, Entry]]] = {}
    for entry in placed.entries.values():
        if placed.is_read_only(entry):
            for member in entry.members:
                for module, attribute, _ in member.places:
                    held.setdefault(module, []).append((attribute, entry))
    return [
        module.register_load_state_dict_pre_hook(_MovedFirst(placed, at))  # type: ignore[no-untyped-call]
        for module, at in held.items()
    ]


class _MovedFirst:
    def __deepcopy__(self, memo: dict[int, Any]) -> LeftOut:
        return LeftOut(None)

    def __init__(self, placed: Placed, at: list[tuple[str, Entry]]) -> None:
        self.placed = placed
        self.at = at

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("assign_to_params_buffers", False):
            return  # writes nothing: other objects take the places
        with torch.inference_mode(False), torch.no_grad():
            for attribute, entry in self.at:
                given, present = state_dict.get(prefix + attribute), getattr(module, attribute, None)
                if isinstance(given, torch.Tensor) and present is not None and given.shape == present.shape:
                    copy_out(self.placed, entry)
