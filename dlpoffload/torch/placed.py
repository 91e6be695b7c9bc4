"""A module's tensors, each in the place that the plan gave it; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from ..driver import Driver
from ..errors import PlanError, SpecError
from ..memory import DeviceBuffer
from ..planning import Placement, Plan
from ..store import HostStore, replaced
from ..transfer import Prefetcher, SlotRing
from ..view import View
from .guarded import guard
from .mapping import slot_nbytes
from .moved import copied_out, copy_out
from .origin import Former, Origin
from .shells import real_of
from .staging import Stager
from .subclasses import inner_tensors, rebuilt
from .tensors import Place, bytes_of, empty_bytes, host_copy_of, overwrite, place_of, tensor_in, torch_device
from .tree import Entry, Member, Outer
from .units import StagedMember, StagedUnit, home_tensor
from .watched import exchange_data, plain_data, unwatch, watch

__all__ = ["Placed", "copy_span"]


class Placed:
    """Puts every entry in its place, one after the other, so that originals are freed on the way.

    When one fails, what was moved is moved back, and nothing stays allocated.

    Attributes
    ----------
    pinned : bool
        Whether the host bytes are pinned. Pageable ones are copied through the driver's own bounce buffer.
    pageable_because : str
        Why they are not pinned.
    mapped : bool
        Whether the device maps the host bytes. Where it does not, staged tensors are at home on the CPU between uses.
    stager : Stager or None
        None when nothing is staged.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: list[Entry],
        decided: Plan,
        driver: Driver,
        *,
        pinned: bool = True,
        former: Former | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.module = module
        self.plan = decided
        self.driver = driver
        self.device = torch_device(driver)
        self.pinned = pinned
        self.pageable_because = "" if pinned else "asked for"
        self.because = ""  # why host bytes are not a file's own pages
        self.mapped = pinned and driver.capabilities().map_host_memory
        self.entries = {entry.name: entry for entry in entries}
        self._unit_of = {name: unit.name for unit in decided.streamed_units for name in unit.tensors}
        self.stager: Stager | None = None
        self._origin = origin or Origin()
        self.store = self._allocate_store(former)
        self._slot_nbytes = slot_nbytes(decided, self.store)
        self._before = former.devices if former is not None else {}
        self._former: dict[int, tuple[Entry, torch.device]] = {}
        self.retired = False
        self._stayed: set[int] = set()  # until it has settled: entries that it left where they were at home before
        self._relabelled: list[tuple[Outer, torch.Tensor]] = []
        self._homes: dict[int, Place] = {}  # where the data of each member is
        try:
            # The ring first: what cannot run must fail before a weight has moved.
            slots = [empty_bytes(self._slot_nbytes, self.device) for _ in range(decided.slots)]
            self._origin.fill(self)
            for entry in entries:
                if not self._origin.place(self, entry):
                    self._place(entry)
            self._relabel()
            if decided.slots:
                self._stage(slots)
            for member in self.offloaded():
                watch(member.tensor)
            for entry in entries:
                if self.is_read_only(entry):
                    for member in entry.members:
                        guard(member.tensor, member.name, plain_data(member.tensor))
        except BaseException:
            self.undo()
            raise

    # ------------------------------------------------------------------------------------- placing
    def _allocate_store(self, former: Former | None) -> HostStore | None:
        decided = self.plan
        mapped = decided.names(Placement.HOST_MAPPED)
        if mapped and not self.mapped:
            why = "cannot map host memory" if self.pinned else "cannot map pageable memory"
            raise PlanError(
                f'{self.driver.device} {why}, but the plan maps {len(mapped)} tensors, such as "{mapped[0]}"; '
                "say stage_unmapped=True to stage them instead"
            )
        names = [name for name in decided.specs if decided.placements[name] is not Placement.DEVICE]
        if not names:
            return None
        specs = {name: decided.specs[name] for name in names}
        units = {unit.name: unit.tensors for unit in decided.streamed_units} | dict(self._origin.units(decided))
        if former is not None and former.store is not None:
            staying = {e.name for e in self.entries.values() if former.homes.get(e.name) == _places(e)}
            taken = replaced(former.store, specs, staying, units=units, pinned=self.pinned)
            former.store = None  # the slabs that remain live as long as tensors are at home in them
            return taken
        store = self._origin.store(self, specs, units)
        if store is None:
            store = HostStore.allocate(specs, units=units, device=self.driver.device, pinned=self.pinned)
            store.because = self.because
        return store

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device: residents and ring."""
        return self.plan.device_nbytes + self.plan.slots * (self._slot_nbytes - self.plan.slot_nbytes)

    def quiet(self) -> AbstractContextManager[None]:
        """See `Stager.quiet`."""
        return nullcontext() if self.stager is None else self.stager.quiet()

    def is_read_only(self, entry: Entry) -> bool:
        """Whether an entry lies in a mapped file."""
        return self.store is not None and entry.name in self.store and self.store.is_read_only(entry.name)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host memory that the tensors are at home in."""
        return 0 if self.store is None else self.store.host_nbytes

    def offloaded(self) -> Iterator[Member]:
        """Everything whose bytes are at home on the host."""
        for entry in self.entries.values():
            if self.plan.placements[entry.name] is not Placement.DEVICE and entry.spec.nbytes:
                yield from entry.members

    def outers(self) -> list[Outer]:
        """What wraps the tensors that were placed."""
        members = (member for entry in self.entries.values() for member in entry.members)
        return list({id(member.outer): member.outer for member in members if member.outer is not None}.values())

    def tensors(self) -> dict[int, tuple[Entry, Member]]:
        """Entry and member by the id of the tensor object, of everything that was placed."""
        return {id(member.tensor): (entry, member) for entry in self.entries.values() for member in entry.members}

    def former(self) -> Former:
        """What there is to know of this for placing the module anew."""
        devices = {
            id(member.tensor): device
            for entry, device in self._former.values()
            for member in entry.members
            if self._is_ours(member)
        }
        homes = {entry.name: [self._homes.get(id(m)) for m in entry.members] for entry in self.entries.values()}
        return Former(devices, self.store, homes)

    def _place(self, entry: Entry) -> None:
        if self.plan.placements[entry.name] is Placement.DEVICE or not entry.spec.nbytes:
            if all(m.tensor.device == self.device and id(m.tensor) not in self._before for m in entry.members):
                self._homes.update((id(member), place_of(member.tensor)) for member in entry.members)
                return
            self._move(entry, empty_bytes(entry.spec.nbytes, self.device))
            return
        assert self.store is not None
        homes = self.homes(entry.name)
        if _places(entry) != [place_of(home) for home in homes]:
            host = from_dlpack(self.store.host_view(entry.name).view((entry.spec.nbytes,), "uint8"))
            for member in entry.members:
                copy_span(member, host)
        else:
            self._stayed.add(id(entry))
        self._moved(entry)
        for member, home in zip(entry.members, homes, strict=True):
            self._point(member, home)

    def homes(self, name: str) -> list[torch.Tensor]:
        """Views of the host bytes of an entry, one for each of its members."""
        view = self._home_view(self.entries[name])
        return [home_tensor(view, member) for member in self.entries[name].members]

    def _home_view(self, entry: Entry) -> View:
        assert self.store is not None
        if not self.mapped:
            return self.store.host_view(entry.name)
        if self.is_read_only(entry) and (unit := self._unit_of.get(entry.name)) is not None:
            # Kernels read it in a slot, aligned; where it lies in its file it may be off 16 bytes.
            return self.store.slab(unit).device_view(entry.name, read_only=True)
        return self.store.device_view(entry.name, read_only=self.is_read_only(entry))

    def _move(self, entry: Entry, flat: torch.Tensor) -> None:
        """Copy an entry's bytes into `flat`, and point its tensors there."""
        for member in entry.members:
            copy_span(member, flat)
        self._moved(entry)
        for member in entry.members:
            self._point(member, tensor_in(flat, member.byte_offset, member.spec))

    def _moved(self, entry: Entry) -> None:
        tensor = entry.members[0].tensor
        self._former.setdefault(id(entry), (entry, self._before.get(id(tensor), tensor.device)))

    def _point(self, member: Member, data: torch.Tensor) -> None:
        exchange_data(member.tensor, data)
        self._homes[id(member)] = place_of(data)

    def _is_ours(self, member: Member) -> bool:
        """Whether a member has the bytes that it was offloaded with, not others that somebody gave it (``.data =``)."""
        return place_of(member.tensor) == self._homes.get(id(member))

    def _relabel(self) -> None:
        """Make tensors that wrap others anew where they name another device than what is inside is on now."""
        inside = self.tensors()
        for outer in self.outers():
            if outer.tensor.device == self.device:
                continue
            made = rebuilt(outer.tensor)
            if made.device != self.device or not all(id(inner) in inside for _, inner in inner_tensors(made)):
                raise SpecError(
                    f'"{outer.name}" is a {type(made).__name__}, which cannot be made anew on {self.device} around its '
                    f"tensors; move the module there before offloading it"
                )
            self._relabelled.append((outer, outer.tensor))
            outer.tensor = _put(outer, made)

    def data_of(self, entry: Entry, member: Member) -> tuple[torch.Tensor, bool]:
        """A member's data, its home where its unit runs now; and whether it is in the bytes that we gave it."""
        unit = None if self.stager is None else self.stager.unit_of(entry.name)
        with nullcontext() if self.stager is None else self.stager.lock:
            if unit is not None and unit.active:
                return next(staged.home for staged in unit.members if staged.member is member), True
            return plain_data(member.tensor), self._is_ours(member)

    def is_elsewhere(self, entry: Entry, member: Member) -> bool:
        """Whether a tensor that no unit stages was given other memory (``.data =``): nothing takes that over."""
        return self.plan.placements[entry.name] is not Placement.HOST_STAGED and not self.data_of(entry, member)[1]

    def _stage(self, slots: list[torch.Tensor]) -> None:
        assert self.store is not None
        units = self.plan.streamed_units
        free = list(slots)

        def allocate(nbytes: int) -> DeviceBuffer:
            return DeviceBuffer.register(free.pop(0), device=self.driver.device)

        ring = SlotRing(
            {unit.name: self.store.slab(unit.name) for unit in units},
            slots=len(slots),
            device=self.driver.device,
            # Off 16 bytes kernels would compute other bits from the file itself than from a slot.
            when_full="map" if self._unit_of.keys() & set(self.store.unaligned) else "map_read_only",
            allocate=allocate,
        )
        self.stager = Stager(Prefetcher(ring), slots, self.device, self.homes, partial(copied_out, self))
        self._named = {path: real_of(module) for path, module in self.module.named_modules()}
        for unit in units:
            self.stager.add(self._unit(unit.name, unit.tensors))

    def _unit(self, name: str, tensors: tuple[str, ...]) -> StagedUnit:
        assert self.store is not None
        slab = self.store.slab(name)
        entries = [self.entries[tensor] for tensor in tensors]
        members = [
            StagedMember(
                member,
                entry.name,
                slab.byte_offsets[entry.name] + member.byte_offset,
                home=plain_data(member.tensor),
                version=member.version,
            )
            for entry in entries
            for member in entry.members
            if member.spec.nbytes
        ]
        read_only = [m.tensor for entry in entries if self.is_read_only(entry) for m in entry.members]
        return StagedUnit(name, self._modules(name, entries), slab, members, read_only)

    def _modules(self, name: str, entries: list[Entry]) -> list[nn.Module]:
        """The modules whose forward uses a unit: the one of that name, else all that hold its tensors."""
        named = self._named.get(name)
        if named is not None:
            return [named]
        places = [place[0] for entry in entries for member in entry.members for place in member.places]
        return list(dict.fromkeys(places))

    # --------------------------------------------------------------------------------------- writes
    def write(self, entry: Entry, member: Member, tensor: torch.Tensor) -> None:
        """Write a tensor's elements over a member's, wherever they live."""
        if self.stager is not None and (unit := self.stager.unit_of(entry.name)) is not None:
            self.stager.write(unit, member, tensor)
            return
        placement = self.plan.placements[entry.name]
        if placement is Placement.DEVICE or not entry.spec.nbytes or not self._is_ours(member):
            overwrite(member.tensor, tensor)
            return
        assert self.store is not None
        copy_out(self, entry)
        source = host_copy_of(tensor)
        # Kernels enqueued before may still read the mapped bytes, on whatever stream the module was called.
        self.driver.synchronize()
        home_tensor(self.store.host_view(entry.name), member).copy_(source)
        torch.autograd.graph.increment_version(member.of_module[1])

    # ---------------------------------------------------------------------------------------- back
    def settle(self) -> None:
        """Say that the module is offloaded: from now on `undo` gives it ordinary memory, and not what it came with."""
        for entry, device in self._origin.settle():
            self._former[id(entry)] = entry, device
        self._stayed.clear()
        self._origin = Origin()

    def retire(self) -> None:
        """End staging; every tensor stays at home.

        Raises
        ------
        SlotError
            A unit is running. Nothing has changed then.
        CudaError
            Work failed, and nothing has changed; or it is `retired`, and the driver would not destroy what belonged to
            the ring.
        """
        if self.stager is not None:
            self.stager.check_closable()
        if self._former:
            self.driver.synchronize()  # kernels that write mapped bytes, on whatever stream
        try:
            if self.stager is not None:
                self.stager.close()
        finally:
            if self.stager is None or self.stager.closed:
                self.stager = None
                self._unmark()

    def _unmark(self) -> None:
        self.retired = True
        while self._relabelled:
            outer, before = self._relabelled.pop()
            outer.tensor = _put(outer, before)
        for entry in self.entries.values():
            for member in entry.members:
                unwatch(member.tensor)

    def undo(self) -> None:
        """Give every tensor back the kind of memory that it had, with the bytes that it has now.

        One that somebody gave other bytes (``.data =``) keeps those.

        Raises
        ------
        SlotError
            A unit is running. Nothing has changed then.
        """
        self.retire()
        for key, (entry, device) in reversed(list(self._former.items())):
            if key not in self._stayed:
                others = [member for member in entry.members if not self._is_ours(member)]
                if len(others) < len(entry.members):
                    self._restore(entry, empty_bytes(entry.spec.nbytes, device))
                for member in others:
                    self._take_out(member, device)
            del self._former[key]
        self._origin.rollback()
        self._homes.clear()
        self.store = None

    def _restore(self, entry: Entry, flat: torch.Tensor) -> None:
        ours = [member for member in entry.members if self._is_ours(member)]
        for member in ours:
            copy_span(member, flat)
        for member in ours:
            exchange_data(member.tensor, tensor_in(flat, member.byte_offset, member.spec))

    def _take_out(self, member: Member, device: torch.device) -> None:
        """Copy a tensor that sees our bytes in another way than it was given them (``.data = .data.t()``)."""
        home = self._homes.get(id(member))
        if home is not None and member.tensor.data_ptr() == home[0]:
            exchange_data(member.tensor, plain_data(member.tensor).to(device, copy=True))


def _places(entry: Entry) -> list[Place | None]:
    return [place_of(member.tensor) for member in entry.members]


def _put(outer: Outer, tensor: torch.Tensor) -> torch.Tensor:
    """Put a tensor in every place where a module has `outer`'s still."""
    for module, attribute in outer.places:
        for table in (module._parameters, module._buffers):
            if table.get(attribute) is outer.tensor:
                cast(dict[str, Any], table)[attribute] = tensor
    return tensor


def copy_span(member: Member, flat: torch.Tensor) -> None:
    """Copy a member's bytes to their place in its entry's."""
    if member.spec.nbytes:
        flat[member.byte_offset : member.byte_offset + member.spec.nbytes].copy_(bytes_of(plain_data(member.tensor)))
