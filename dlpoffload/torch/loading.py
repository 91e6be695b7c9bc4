"""Loading on the way home: a checkpoint's bytes are read to where a module's tensors will live, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from ..blocks import check_pinning, check_taking
from ..checkpoint import Recipe
from ..memory import HostBuffer
from ..planning import Placement, Plan
from ..producers import view_of
from ..spec import TensorSpec, aligned
from ..store import HostStore
from .mapping import Mode, mapped_store
from .matching import Load, matched
from .meta import realise, unrealise
from .origin import Origin, Units
from .sources import Slabs, Source
from .tensors import empty_bytes, tensor_in
from .tree import Entry, Member, collect
from .units import home_tensor
from .watched import exchange_data, plain_data

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["FromCheckpoint"]

_CPU = torch.device("cpu")
_READABLE = ("cpu",)
"""Kinds of device whose memory files are read into; to the others it goes over the host."""


@dataclass(frozen=True, slots=True)
class FromCheckpoint:
    """Offload a module whose weights are read from somewhere else; tensors may be on meta.

    Attributes
    ----------
    loads : dict of str to Load or None
        By entry what is read, of a module whose parts are offloaded one by one: it is matched once, as a whole.
    """

    source: Source
    recipe: Recipe | None
    strict: bool
    mode: Mode = "copy"
    meta: bool = True
    former: Mapping[int, torch.device] = field(default_factory=dict)
    loads: Mapping[str, Load] | None = None

    def origin(self, module: nn.Module, entries: list[Entry], *, pinned: bool) -> Loading:
        """Match the module with the source; nothing has changed when that fails."""
        if self.loads is None:
            return Loading(self.source, self._matched(module, entries), self.mode)
        loads = [self.loads[entry.name].into(entry) for entry in entries if entry.name in self.loads]
        return Loading(self.source, loads, self.mode)

    def of_parts(self, module: nn.Module, plans: Iterable[Plan]) -> FromCheckpoint:
        """The same for the parts of a module; nothing has changed when the whole does not fit the source or host."""
        loads = {load.entry.name: load for load in self._matched(module, collect(module, meta=True))}
        if self.mode == "copy":
            check_taking(  # its part is charged to each device's driver again, when it is placed
                sum(
                    spec.nbytes
                    for plan in plans
                    for name, spec in plan.specs.items()
                    if plan.placements[name] is not Placement.DEVICE and name in loads
                )
            )
        return replace(self, loads=loads)

    def _matched(self, module: nn.Module, entries: list[Entry]) -> list[Load]:
        return matched(module, entries, self.source.specs, self.recipe, strict=self.strict)


class Loading(Origin):
    """Reads what goes to the host straight into the store, and the residents one after the other over the host."""

    def __init__(self, source: Source, loads: list[Load], mode: Mode = "copy") -> None:
        self._source = source
        self._mode = mode
        self._loads = {id(load.entry): load for load in loads}
        self._flats: dict[int, torch.Tensor] = {}  # of each resident, its bytes on the device
        self._twins: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._placed: list[tuple[Entry, torch.device]] = []

    # --------------------------------------------------------------------------------------- mapping
    def store(self, placed: Placed, specs: Mapping[str, TensorSpec], units: Units) -> HostStore | None:
        """One over the checkpoint's own pages, where that was asked for."""
        if self._mode == "copy":
            placed.because = "asked for"
            return None
        return mapped_store(self._source, list(self._loads.values()), self._mode, placed, specs, units)

    # --------------------------------------------------------------------------------------- reading
    def fill(self, placed: Placed) -> None:
        """Read everything that comes whole."""
        whole = [load for load in self._loads.values() if load.whole is not None]
        resident = [load for load in whole if _is_resident(placed, load.entry)]
        at_home = {load.entry.name for load in whole if not placed.is_read_only(load.entry)}
        at_home -= {load.entry.name for load in resident}
        if at_home and placed.store is not None:
            # All of it at once: sooner than after minutes of reading.
            nbytes = sum(placed.plan.specs[name].nbytes for name in at_home)
            if placed.pinned:
                check_pinning(nbytes, placed.driver)
            else:
                check_taking(nbytes)
            self._read(placed.store.memoryviews(at_home), whole)
        for load in resident:
            self._flats[id(load.entry)] = empty_bytes(load.entry.spec.nbytes, placed.device)
        if placed.device.type in _READABLE:
            self._read(self._slabs(resident), resident)
        else:
            self._bounce(placed, resident)

    def _read(self, slabs: Slabs, loads: list[Load]) -> None:
        made = {load.entry.name: load.whole for load in loads if load.whole is not None}
        self._source.read_into(slabs, assemblies=made)

    def _slabs(self, loads: list[Load]) -> Iterator[tuple[memoryview, Mapping[str, int]]]:
        for load in loads:
            if load.entry.spec.nbytes:
                yield view_of(self._flats[id(load.entry)]).memoryview(), {load.entry.name: 0}

    def _bounce(self, placed: Placed, loads: list[Load]) -> None:
        """Read residents into host memory of the size of the largest, as many at once as fit, and copy them over."""
        nbytes = max((load.entry.spec.nbytes for load in loads), default=0)
        if not nbytes:
            return
        with HostBuffer.allocate(nbytes, device=placed.driver.device, pinned=placed.pinned) as buffer:
            for group in _groups(loads, nbytes):
                byte_offsets = {load.entry.name: start for load, start in group}
                self._read([(buffer.memoryview(), byte_offsets)], [load for load, _ in group])
                host = from_dlpack(buffer.host_view((nbytes,), "uint8"))
                for load, start in group:
                    self._flats[id(load.entry)].copy_(host[start : start + load.entry.spec.nbytes])
                del host

    # --------------------------------------------------------------------------------------- placing
    def place(self, placed: Placed, entry: Entry) -> bool:
        """Point the tensors of an entry that was read to its bytes, and read what does not come whole."""
        load = self._loads.get(id(entry))
        if load is None:
            return False
        flat = self._flats.pop(id(entry), None)
        if flat is None and _is_resident(placed, entry):
            flat = empty_bytes(entry.spec.nbytes, placed.device)
        homes = [_home(placed, entry, member, flat) for member in entry.members]
        if load.whole is None:
            for member, home in zip(entry.members, homes, strict=True):
                if not member.tensor.is_meta:
                    _host(placed, entry, member, home).copy_(plain_data(member.tensor))
        self._placed.append((entry, _former(entry)))
        for member, home in zip(entry.members, homes, strict=True):
            if member.tensor.is_meta:
                self._twins.append((member.tensor, realise(member.tensor, home.device)))
            else:
                self._before.append((member.tensor, plain_data(member.tensor)))
            placed._point(member, home)
        for member, assembly in load.parts:
            bytes_ = empty_bytes(assembly.spec.nbytes, _CPU)
            if assembly.spec.nbytes:
                slab = view_of(bytes_).memoryview()
                self._source.read_into([(slab, {member.name: 0})], assemblies={member.name: assembly})
            home = homes[entry.members.index(member)]
            _host(placed, entry, member, home).copy_(tensor_in(bytes_, 0, assembly.spec))
        return True

    # ------------------------------------------------------------------------------------------ ends
    def rollback(self) -> None:
        """Put back on meta what was there, and give the others the bytes that they had."""
        self._flats.clear()
        while self._twins:
            unrealise(*self._twins.pop())
        while self._before:
            exchange_data(*self._before.pop())
        self._placed.clear()

    def settle(self) -> Iterable[tuple[Entry, torch.device]]:
        """Let go of what was on meta, and of the bytes that were read over."""
        self._twins.clear()
        self._before.clear()
        return self._placed


def _former(entry: Entry) -> torch.device:
    device = entry.members[0].tensor.device
    return _CPU if device.type == "meta" else device


def _is_resident(placed: Placed, entry: Entry) -> bool:
    return placed.plan.placements[entry.name] is Placement.DEVICE or not entry.spec.nbytes


def _home(placed: Placed, entry: Entry, member: Member, flat: torch.Tensor | None) -> torch.Tensor:
    if flat is not None:
        return tensor_in(flat, member.byte_offset, member.spec)
    return home_tensor(placed._home_view(entry), member)


def _host(placed: Placed, entry: Entry, member: Member, home: torch.Tensor) -> torch.Tensor:
    """The tensor to write: the host's own view of mapped bytes."""
    if _is_resident(placed, entry) or placed.store is None:
        return home
    return home_tensor(placed.store.host_view(entry.name), member)


def _groups(loads: list[Load], nbytes: int) -> Iterator[list[tuple[Load, int]]]:
    group: list[tuple[Load, int]] = []
    end = 0
    for load in loads:
        start = aligned(end)
        if group and start + load.entry.spec.nbytes > nbytes:
            yield group
            group, start = [], 0
        group.append((load, start))
        end = start + load.entry.spec.nbytes
    if group:
        yield group
