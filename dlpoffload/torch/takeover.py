"""Taking over the slabs of wrapped layers: where a layer is a unit of the plan, its slab becomes the unit's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..lifetime import drain
from ..planning import Placement, Plan
from .layers import Layer
from .origin import Origin
from .tree import Entry
from .units import home_tensor

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["FromLayers"]


class FromLayers:
    """Offload a model of which layers lie in slabs already."""

    meta = False

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self.former: Mapping[int, torch.device] = {
            id(member.tensor): layer.former[id(member.tensor)]
            for layer in layers
            for member in layer.members()
            if layer.is_home(member)
        }

    def origin(self, module: nn.Module, entries: list[Entry], *, pinned: bool) -> TakeOver:
        """See `TakeOver`."""
        return TakeOver(self._layers, entries, pinned=pinned)


class TakeOver(Origin):
    """Keeps the bytes of a layer where they are, if the plan lays its tensors out in the same way."""

    def __init__(self, layers: list[Layer], entries: list[Entry], *, pinned: bool) -> None:
        self._layers = layers
        self._pinned = pinned
        self._entry_of = {id(member.tensor): entry for entry in entries for member in entry.members}
        self._slabs: dict[str, Layer] = {}
        self._kept: dict[int, Layer] = {}
        self._placed: list[tuple[Entry, torch.device]] = []

    def units(self, decided: Plan) -> Mapping[str, tuple[str, ...]]:
        """The mapped layers; their slabs, and those of the streamed, are taken over by `fill`."""
        # Empty tensors take no part in a layout, and are in no layer's slab.
        streamed = {
            tuple(name for name in unit.tensors if decided.specs[name].nbytes): unit.name
            for unit in decided.streamed_units
        }
        mapped = {}
        for layer in self._layers:
            names = self._names(layer)
            if names is None:
                continue
            if names in streamed:
                self._keep(streamed[names], layer)
            elif all(decided.placements[name] is Placement.HOST_MAPPED for name in names):
                unit = f"the wrapped {names[0]}"
                mapped[unit] = names
                self._keep(unit, layer)
        return mapped

    def _keep(self, unit: str, layer: Layer) -> None:
        self._slabs[unit] = layer
        self._kept.update((id(self._entry_of[id(member.tensor)]), layer) for member in layer.members())

    def _names(self, layer: Layer) -> tuple[str, ...] | None:
        """What a layer's entries are called in the model, in the order of its slab; None where they have changed."""
        if layer.buffer is None or layer.buffer.pinned is not self._pinned:
            return None
        names = []
        for own in layer.entries:
            entry = self._entry_of.get(id(own.members[0].tensor))
            if entry is None or entry.spec != own.spec or len(entry.members) != len(own.members):
                return None
            where = {id(member.tensor): member.byte_offset for member in own.members}
            if any(where.get(id(m.tensor)) != m.byte_offset or not layer.is_home(m) for m in entry.members):
                return None
            names.append(entry.name)
        return tuple(names)

    def fill(self, placed: Placed) -> None:
        """Hand slabs over to the store; the others are freed as their last tensor is moved."""
        placed.driver.synchronize()  # kernels that wrote weights through the mapped views, on whatever stream
        for unit, layer in self._slabs.items():
            assert placed.store is not None
            assert layer.buffer is not None
            placed.store.adopt(unit, layer.buffer)
        kept = {id(layer) for layer in self._slabs.values()}
        for layer in self._layers:
            if id(layer) not in kept:
                layer.buffer = None

    def place(self, placed: Placed, entry: Entry) -> bool:
        """Leave the tensors of a slab that was taken over where they are."""
        layer = self._kept.get(id(entry))
        if layer is None:
            drain()  # a slab that the tensor before was the last to leave
            return False
        home = placed._home_view(entry)
        for member in entry.members:
            placed._point(member, home_tensor(home, member))
        self._placed.append((entry, layer.former[id(entry.members[0].tensor)]))
        return True

    def settle(self) -> Iterable[tuple[Entry, torch.device]]:
        """What stayed where it was."""
        return self._placed
