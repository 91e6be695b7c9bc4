"""Staged units at run time: entering a unit points its parameters into a slot, leaving it points them back home.

Home is the view over the unit's host bytes. So whatever happens outside a unit's forward, reads, in-place writes,
`state_dict`, meets the true bytes on the right device, slower but never wrong.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import AliasError, SlotError
from ..slab import Slab
from ..transfer import Lease, Prefetcher
from ..view import View
from .outputs import detached_from
from .saved import saved_outside
from .state import guard_state_dicts
from .tensors import current_stream, tensor_in, tensor_over
from .tree import Member
from .wrapped import WrappedForward

__all__ = ["StagedMember", "StagedUnit", "Stager", "home_tensor", "version_of"]


def version_of(tensor: torch.Tensor) -> int:
    """The counter that torch raises at every in-place write; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


def home_tensor(view: View, member: Member) -> torch.Tensor:
    """View a member's bytes inside the view of its entry."""
    return tensor_over(view.view((member.spec.nbytes,), "uint8", byte_offset=member.byte_offset), member.spec)


@dataclass(eq=False, slots=True)
class StagedMember:
    """A tensor of a staged unit: the object that the module holds, its home, and what was left there."""

    member: Member
    entry: str
    slab_offset: int
    home: torch.Tensor
    version: int

    @property
    def tensor(self) -> torch.Tensor:
        """The Parameter or buffer object."""
        return self.member.tensor


@dataclass(eq=False, slots=True)
class StagedUnit:
    """A module whose tensors are staged together.

    Attributes
    ----------
    generation : int
        How often the unit's bytes changed; what autograd saved before refers to older ones.
    active : list of Lease
        Of the calls that are inside the unit's forward now; the first one's slot is where the parameters point.
    """

    name: str
    modules: list[nn.Module]
    slab: Slab
    members: list[StagedMember]
    slot_tensors: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    generation: int = 0
    active: list[Lease] = field(default_factory=list)


class StagedForward(WrappedForward):
    """A unit's forward, between entering and leaving it: paired on every way out, also when it is called directly."""

    def __init__(self, stager: Stager, unit: StagedUnit, module: nn.Module) -> None:
        super().__init__(module)
        self.stager = stager
        self.unit = unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stager, unit = self.stager, self.unit
        if not self.installed:
            return self.inner(*args, **kwargs)
        lease = stager.enter(unit)
        try:
            if lease.slot is None:
                return self.inner(*args, **kwargs)
            slot = stager.slots[lease.slot.index]
            with saved_outside(stager, slot, unit):
                output = self.inner(*args, **kwargs)
            output, found = detached_from(output, slot)
            stager.aliased_outputs += found
            return output
        finally:
            stager.leave(unit, lease)


class StepForward(WrappedForward):
    """The whole module's forward, between the borders of a step."""

    def __init__(self, stager: Stager, root: nn.Module) -> None:
        super().__init__(root)
        self.stager = stager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stager = self.stager
        if not self.installed:
            return self.inner(*args, **kwargs)
        stager.prefetcher.begin_step(stream=current_stream(stager.device))
        try:
            return self.inner(*args, **kwargs)
        finally:
            stager.prefetcher.end_step(stream=current_stream(stager.device))


class Stager:
    """Enters and leaves units. One for each offloaded module."""

    def __init__(self, prefetcher: Prefetcher, slots: list[torch.Tensor], device: torch.device) -> None:
        self.prefetcher = prefetcher
        self.ring = prefetcher.ring
        self.device = device
        self.slots = slots
        self.aliased_outputs = 0
        self.units: dict[str, StagedUnit] = {}
        self.forwards: list[WrappedForward] = []
        self.adopted: list[str] = []
        self._guards: list[RemovableHandle] = []
        self._unit_of: dict[str, StagedUnit] = {}
        self._lock = threading.RLock()

    # ------------------------------------------------------------------------------------- install
    def wrap(self, root: nn.Module, units: list[StagedUnit]) -> None:
        """Put staging around the forward of every unit, and the borders of a step around that of `root`."""
        for unit in units:
            self.units[unit.name] = unit
            self._unit_of.update((staged.entry, unit) for staged in unit.members)
            self.forwards += [StagedForward(self, unit, module) for module in unit.modules]
        self.forwards.append(StepForward(self, root))
        self._guards = guard_state_dicts(units)
        for forward in self.forwards:
            forward.install()

    def unwrap(self) -> None:
        """Take all of that back."""
        while self._guards:
            self._guards.pop().remove()
        while self.forwards:
            self.forwards.pop().remove()

    # --------------------------------------------------------------------------------- enter, leave
    def enter(self, unit: StagedUnit) -> Lease:
        """Stage a unit and point its tensors into the slot."""
        stream = current_stream(self.device)
        with self._lock:
            if unit.active:
                lease = unit.active[0].share(stream)
                lease.wait()
            else:
                self._look_over(unit, stream)
                lease = self.prefetcher.enter(unit.name, stream=stream)
                if lease.slot is not None:
                    for staged, tensor in zip(unit.members, self._tensors(unit, lease.slot.index), strict=True):
                        staged.tensor.data = tensor
            unit.active.append(lease)
            return lease

    def leave(self, unit: StagedUnit, lease: Lease) -> None:
        """Point a unit's tensors back home, after its last caller has left it."""
        with self._lock:
            unit.active.remove(lease)
            try:
                if lease.slot is not None and not unit.active:
                    self._go_home(unit, lease)
            finally:
                self.prefetcher.leave(lease)

    def _tensors(self, unit: StagedUnit, index: int) -> list[torch.Tensor]:
        tensors = unit.slot_tensors.get(index)
        if tensors is None:
            with torch.inference_mode(False), torch.no_grad():
                tensors = unit.slot_tensors[index] = [
                    tensor_in(self.slots[index], staged.slab_offset, staged.member.spec) for staged in unit.members
                ]
        return tensors

    def _look_over(self, unit: StagedUnit, stream: int) -> None:
        """Before entering: take in what happened to the unit's tensors since it was left."""
        written = False
        for staged in unit.members:
            self._check_places(unit, staged)
            if staged.tensor.data_ptr() != staged.home.data_ptr():
                self.adopt(unit, staged, staged.tensor.data)
            version = version_of(staged.tensor)
            if version != staged.version:
                staged.version = version
                written = True
        if written:
            self.ring.changed_on_stream(unit.name, stream=stream)
            unit.generation += 1

    def _check_places(self, unit: StagedUnit, staged: StagedMember) -> None:
        """Take in a Parameter object that was put in the place of the one that was offloaded."""
        for module, attribute, name in staged.member.places:
            found = module._parameters.get(attribute, module._buffers.get(attribute))
            if found is staged.tensor or found is None:
                continue
            if len(staged.member.places) > 1:
                raise AliasError(
                    f'"{name}" was tied to {len(staged.member.places) - 1} other tensors when it was offloaded, and now '
                    "holds another tensor; restore_() the module before untying it"
                )
            staged.member.tensor = found

    def _go_home(self, unit: StagedUnit, lease: Lease) -> None:
        """On leaving: bring home what the unit's forward wrote into the slot, or put in its place."""
        assert lease.slot is not None
        written: list[StagedMember] = []
        adopted: list[tuple[StagedMember, torch.Tensor]] = []
        for staged, tensor in zip(unit.members, self._tensors(unit, lease.slot.index), strict=True):
            if staged.tensor.data_ptr() != tensor.data_ptr():
                adopted.append((staged, staged.tensor.data))
            else:
                version = version_of(staged.tensor)
                if version != staged.version:
                    staged.version = version
                    written.append(staged)
            staged.tensor.data = staged.home
        driver = self.ring.driver
        for staged in written:
            # In stream order behind the write itself; a tensor that overlaps another brings the same bytes twice.
            with driver.current():
                driver.copy_async(
                    unit.slab.host_pointer + staged.slab_offset,
                    lease.slot.device_pointer + staged.slab_offset,
                    staged.member.spec.nbytes,
                    lease.stream,
                )
            self.ring.stats.write_backs += 1
        if written:
            self.ring.changed_on_stream(unit.name, stream=lease.stream, valid=lease.slot)
            unit.generation += 1
        for staged, tensor in adopted:
            self.adopt(unit, staged, tensor)

    # --------------------------------------------------------------------------------------- writes
    def adopt(self, unit: StagedUnit, staged: StagedMember, tensor: torch.Tensor) -> None:
        """Copy a tensor that somebody put in a parameter's place into the host bytes, and point it home again."""
        if tensor.shape != staged.home.shape or tensor.dtype != staged.home.dtype:
            raise AliasError(
                f'"{staged.member.name}" was offloaded as {staged.member.spec} and now holds a '
                f"{tensor.dtype}{list(tensor.shape)}; restore_() the module before changing what its tensors are"
            )
        self.write(unit, staged.entry, staged.member, tensor)
        staged.tensor.data = staged.home
        staged.version = version_of(staged.tensor)
        self.adopted.append(staged.member.name)

    def write(self, unit: StagedUnit, entry: str, member: Member, tensor: torch.Tensor) -> None:
        """Write a tensor's elements into the host bytes, after everything enqueued that reads them."""
        with self._lock:
            if unit.active:
                raise SlotError(f'unit "{unit.name}" is running; update "{member.name}" between two calls of it')
            source = tensor.detach().to("cpu")
            self.ring.driver.stream_synchronize(current_stream(self.device))
            self.ring.before_host_write(unit.name)
            home_tensor(unit.slab.host_view(entry), member).copy_(source)
            self.ring.changed(unit.name)
            unit.generation += 1

    def changed(self, entry: str, stream: int) -> None:
        """Take note that work enqueued on `stream` wrote an entry's bytes."""
        unit = self.unit_of(entry)
        if unit is not None:
            with self._lock:
                self.ring.changed_on_stream(unit.name, stream=stream)
                unit.generation += 1

    def unit_of(self, entry: str) -> StagedUnit | None:
        """The unit that stages an entry."""
        return self._unit_of.get(entry)

    def take_in(self) -> None:
        """Take in what happened to tensors outside of their units, before they are moved away."""
        with self._lock:
            for unit in self.units.values():
                self._look_over(unit, current_stream(self.device))
