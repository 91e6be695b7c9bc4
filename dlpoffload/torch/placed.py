"""A module's tensors, each in the place that the plan gave it; and the way back."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from ..driver import Driver
from ..errors import PlanError
from ..memory import DeviceBuffer
from ..planning import Placement, Plan
from ..store import HostStore
from ..transfer import Prefetcher, SlotRing
from ..view import View
from .staging import StagedMember, StagedUnit, Stager, home_tensor, version_of
from .tensors import bytes_of, tensor_in, torch_device
from .tree import Entry, Member

__all__ = ["Placed"]


class Placed:
    """Puts every entry in its place, one after the other, so that originals are freed on the way.

    When one fails, what was moved is moved back, and nothing stays allocated.

    Attributes
    ----------
    mapped : bool
        Whether the device maps host memory. Where it does not, staged tensors are at home on the CPU between uses.
    stager : Stager or None
        None when nothing is staged.
    """

    def __init__(self, module: nn.Module, entries: list[Entry], decided: Plan, driver: Driver) -> None:
        self.module = module
        self.plan = decided
        self.driver = driver
        self.device = torch_device(driver)
        self.mapped = driver.capabilities().map_host_memory
        self.entries = {entry.name: entry for entry in entries}
        self.stager: Stager | None = None
        self.store = self._allocate_store()
        self._former: dict[int, tuple[Entry, torch.device]] = {}
        try:
            # The ring first: what cannot run must fail before a weight has moved.
            slots = [
                torch.empty(decided.slot_nbytes, dtype=torch.uint8, device=self.device) for _ in range(decided.slots)
            ]
            for entry in entries:
                self._place(entry)
            if decided.streamed_units:
                self._stage(slots)
        except BaseException:
            self.undo()
            raise

    # ------------------------------------------------------------------------------------- placing
    def _allocate_store(self) -> HostStore | None:
        decided = self.plan
        mapped = decided.names(Placement.HOST_MAPPED)
        if mapped and not self.mapped:
            raise PlanError(
                f"{self.driver.device} cannot map host memory, but the plan maps {len(mapped)} tensors; "
                "use policy=all_staged"
            )
        names = [name for name in decided.specs if decided.placements[name] is not Placement.DEVICE]
        if not names:
            return None
        return HostStore.allocate(
            {name: decided.specs[name] for name in names},
            units={unit.name: unit.tensors for unit in decided.streamed_units},
            device=self.driver.device,
        )

    def _place(self, entry: Entry) -> None:
        if self.plan.placements[entry.name] is Placement.DEVICE or not entry.spec.nbytes:
            if all(member.tensor.device == self.device for member in entry.members):
                return
            self._move(entry, torch.empty(entry.spec.nbytes, dtype=torch.uint8, device=self.device))
            return
        assert self.store is not None
        view = self.store.host_view(entry.name)
        host = from_dlpack(view.view((entry.spec.nbytes,), "uint8"))
        home = self._home_view(entry)
        for member in entry.members:
            _copy_span(member, host)
        self._former[id(entry)] = (entry, entry.members[0].tensor.device)
        for member in entry.members:
            member.tensor.data = home_tensor(home, member)

    def _home_view(self, entry: Entry) -> View:
        assert self.store is not None
        return self.store.device_view(entry.name) if self.mapped else self.store.host_view(entry.name)

    def _move(self, entry: Entry, flat: torch.Tensor) -> None:
        """Copy an entry's bytes into `flat`, and point its tensors there."""
        for member in entry.members:
            _copy_span(member, flat)
        self._former.setdefault(id(entry), (entry, entry.members[0].tensor.device))
        for member in entry.members:
            member.tensor.data = tensor_in(flat, member.byte_offset, member.spec)

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
            allocate=allocate,
        )
        self.stager = Stager(Prefetcher(ring), slots, self.device)
        self.stager.wrap(self.module, [self._unit(unit.name, unit.tensors) for unit in units])

    def _unit(self, name: str, tensors: tuple[str, ...]) -> StagedUnit:
        assert self.store is not None
        slab = self.store.slab(name)
        entries = [self.entries[tensor] for tensor in tensors]
        members = [
            StagedMember(
                member,
                entry.name,
                slab.byte_offsets[entry.name] + member.byte_offset,
                home=member.tensor.data,
                version=version_of(member.tensor),
            )
            for entry in entries
            for member in entry.members
            if member.spec.nbytes
        ]
        return StagedUnit(name, self._modules(name, entries), slab, members)

    def _modules(self, name: str, entries: list[Entry]) -> list[nn.Module]:
        """The modules whose forward uses a unit: the one of that name, else all that hold its tensors."""
        named = dict(self.module.named_modules()).get(name)
        if named is not None:
            return [named]
        places = [place[0] for entry in entries for member in entry.members for place in member.places]
        return list(dict.fromkeys(places))

    # --------------------------------------------------------------------------------------- writes
    def write(self, entry: Entry, member: Member, tensor: torch.Tensor) -> None:
        """Write a tensor's elements over a member's, wherever they live."""
        if self.plan.placements[entry.name] is Placement.DEVICE or not entry.spec.nbytes:
            member.tensor.data.copy_(tensor)
            return
        if self.stager is not None and (unit := self.stager.unit_of(entry.name)) is not None:
            self.stager.write(unit, entry.name, member, tensor)
            return
        assert self.store is not None
        source = tensor.detach().to("cpu")
        # Kernels enqueued before may still read the mapped bytes, on whatever stream the module was called.
        self.driver.synchronize()
        home_tensor(self.store.host_view(entry.name), member).copy_(source)

    # ---------------------------------------------------------------------------------------- back
    def undo(self) -> None:
        """Give every tensor back the kind of memory that it had, with the bytes that it has now."""
        if self.stager is not None:
            self.stager.take_in()
            self.stager.ring.close()
            self.stager.unwrap()
            self.stager = None
        for key, (entry, device) in reversed(list(self._former.items())):
            self._move(entry, torch.empty(entry.spec.nbytes, dtype=torch.uint8, device=device))
            del self._former[key]
        self.store = None


def _copy_span(member: Member, flat: torch.Tensor) -> None:
    if member.spec.nbytes:
        flat[member.byte_offset : member.byte_offset + member.spec.nbytes].copy_(bytes_of(member.tensor.data))
