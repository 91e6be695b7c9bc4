"""Staged units at run time: entering a unit points its parameters into a slot, leaving it points them back home.

Home is the view over the unit's host bytes. So whatever happens outside a unit's forward, reads, in-place writes,
`state_dict`, meets the true bytes on the right device, slower but never wrong.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback as eval_frame
from torch.utils.hooks import RemovableHandle

from ..errors import AliasError, SlotError
from ..transfer import Lease, Prefetcher
from .backward import BackwardStager
from .casts import casts_forgotten
from .codes import SharedCodes, compiled_of
from .compiling import border, uncompiled
from .gate import Gate
from .gradients import guard_outputs, refuse_gradients
from .guarded import expose
from .moved import CopiedOut, move_out, move_written
from .outputs import detached_from
from .saved import saved_outside
from .slots import data_in, users_of
from .tensors import copy_elements, current_stream, host_copy_of, place_of
from .traced import refuse_lost_writes, refuse_tracing, said_of
from .tree import Member
from .units import Data, StagedMember, StagedUnit, home_tensor
from .watched import exchange_data, forget_given, plain_data, rewatch, was_read
from .wrapped import WrappedForward

__all__ = ["StagedForward", "Stager"]


class StagedForward(WrappedForward):
    """A unit's forward, between entering and leaving it: paired on every way out, also when it is called directly."""

    def __init__(self, stager: Stager, unit: StagedUnit, module: nn.Module) -> None:
        super().__init__(module)
        self.stager = stager
        self.unit = unit

    def put_over(self, inner: Callable[..., Any], before: Any, gate: Gate) -> None:
        """As of `WrappedForward`."""
        super().put_over(inner, before, gate)
        self.shared = self.stager.codes.add(self)

    @border
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.gate:
            return self._staged(*args, **kwargs) if self.installed else self.passed_on(args, kwargs)

    @border
    def _staged(self, *args: Any, **kwargs: Any) -> Any:
        stager, unit = self.stager, self.unit
        lease = stager.enter(unit)
        escaped = False
        try:
            if lease.slot is None:
                with casts_forgotten():
                    output = self.inner(*args, **kwargs)
            else:
                slot = stager.slots[lease.slot.index]
                with saved_outside(stager, slot, unit), casts_forgotten():
                    output = self.inner(*args, **kwargs)
                output, found = detached_from(output, slot, unit.own)
                stager.aliased_outputs += found
            if unit.overlapping and eval_frame() is not None:
                refuse_lost_writes(unit, mapped=lease.slot is None)
        except RuntimeError as error:
            if (said := said_of(unit, error)) is not error:
                raise said from error
            raise
        finally:
            escaped = stager.leave(unit, lease)
        if escaped:
            raise AliasError(
                f'something keeps a view of the weights of "{unit.name}" beyond its forward (an attribute, a list, an '
                "object that is returned, the ctx of a Function); its bytes become another unit's. clone() what is "
                "kept, use save_for_backward, or place that unit on the device"
            )
        if (shared := self.shared) is not None and len(compiled_of(shared.code)) != shared.compiled:
            self.shared = shared if shared.look(self) else None
        if torch.is_grad_enabled():
            guard_outputs(output, unit.named())
        return output


class Stager:
    """Enters and leaves units. One for each offloaded module."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        slots: list[torch.Tensor],
        device: torch.device,
        homes: Callable[[str], list[torch.Tensor]],
        out: CopiedOut,
    ) -> None:
        self.prefetcher = prefetcher
        self.ring = prefetcher.ring
        self.device = device
        self.slots = slots
        self.backward = BackwardStager(self.ring, slots, device)
        self.aliased_outputs = 0
        self.codes = SharedCodes()
        self.homes = homes
        self.copied_out = out
        self.units: dict[str, StagedUnit] = {}
        self.adopted: list[str] = []
        self._hooks: list[RemovableHandle] = []
        self._unit_of: dict[str, StagedUnit] = {}
        self.lock = threading.RLock()

    def add(self, unit: StagedUnit) -> None:
        """Take a unit in."""
        self.units[unit.name] = unit
        self._unit_of.update((staged.entry, unit) for staged in unit.members)

    # --------------------------------------------------------------------------------- enter, leave
    @uncompiled
    def enter(self, unit: StagedUnit) -> Lease:
        """Stage a unit and point its tensors into the slot."""
        refuse_tracing(unit.name)
        stream = current_stream(self.device)
        self.backward.recomputing()
        with self.lock:
            if unit.active:
                lease = unit.active[0].share(stream)
                lease.wait()
            else:
                lease = self._stage(unit, stream)
            unit.active.append(lease)
            return lease

    def _stage(self, unit: StagedUnit, stream: int) -> Lease:
        staged = False
        expose(unit.read_only, to_writes=True)
        try:
            self.look_over(unit)
            lease = self.prefetcher.enter(unit.name, stream=stream)
            if lease.slot is not None:
                data = self._data(unit, lease.slot.index)
                unit.users = users_of(data)
                unit.point(data)
                staged = True
            return lease
        finally:
            if not staged:
                expose(unit.read_only, to_writes=False)

    @uncompiled
    def leave(self, unit: StagedUnit, lease: Lease) -> bool:
        """Point a unit's tensors back home, after its last caller has left it.

        Returns whether something still refers to the slot that did not before: a view that escaped.
        """
        with self.lock:
            unit.active.remove(lease)
            escaped = False
            try:
                if lease.slot is None:
                    if any(staged.written_unseen for staged in unit.members):
                        self.ring.changed_on_stream(unit.name, stream=lease.stream)
                elif not unit.active:
                    try:
                        self._go_home(unit, lease)
                    finally:
                        expose(unit.read_only, to_writes=False)
                    escaped = lease.sole and self._escaped(unit, lease)
            finally:
                self.prefetcher.leave(lease)
            return escaped

    def _escaped(self, unit: StagedUnit, lease: Lease) -> bool:
        assert lease.slot is not None
        data = self._data(unit, lease.slot.index)
        if users_of(data) <= unit.users:
            return False
        gc.collect()  # a cycle that the forward left behind keeps nothing that anybody can reach
        return users_of(data) > unit.users

    def _data(self, unit: StagedUnit, index: int) -> Data:
        data = unit.slot_data.get(index)
        if data is None:
            data = unit.slot_data[index] = data_in(self.slots[index], unit.members)
        return data

    def look_over(self, unit: StagedUnit) -> None:
        """Take in what happened to a unit's tensors since it was left; nothing while it runs.

        A tensor object that was put in the place of ours stays where it is: it may be there for one call only
        (`torch.func.functional_call`), and its bytes are its owner's.
        """
        with self.lock:
            restored = self.ring.closed  # and this is a backward that comes late
            if unit.active or (not restored and unit.untouched(unit.homes)):
                return
            if not restored:
                self._watch_again(unit)
            foreign = [staged for staged in unit.members if not staged.at_home and not restored]
            if foreign:
                self._adopt(unit, [(staged, plain_data(staged.tensor)) for staged in foreign])
            # Read as data, it may have been written by means that torch does not see. That is no reason to refuse a
            # backward, as a write is, but one to copy again.
            read = [staged for staged in unit.members if was_read(staged.tensor)]
            written = [staged for staged in unit.members if staged.was_written()]
            if (written or read) and not restored:
                self.ring.changed_on_stream(unit.name, stream=current_stream(self.device))
            for staged in written:  # now that no slot has what was there before
                staged.version = staged.member.version
                unit.touch(staged)

    def _go_home(self, unit: StagedUnit, lease: Lease) -> None:
        """On leaving: bring home what the unit's forward wrote into the slot, or put in its place."""
        assert lease.slot is not None
        data = self._data(unit, lease.slot.index)
        if unit.untouched(data):
            unit.point(unit.homes)
            return
        self._watch_again(unit)
        written: list[StagedMember] = []
        foreign: list[tuple[StagedMember, torch.Tensor]] = []
        for staged, place in zip(unit.members, data.places, strict=True):
            if place_of(staged.tensor) != place:
                foreign.append((staged, plain_data(staged.tensor)))
            elif staged.was_written():
                staged.version = staged.member.version
                unit.touch(staged)
                written.append(staged)
            elif was_read(staged.tensor) or staged.written_unseen:
                written.append(staged)
            forget_given(staged.tensor, place[0])  # of the slot, where the tensor need not be any more
            exchange_data(staged.tensor, self._home(unit, staged), forget=True)
        driver = self.ring.driver
        if written:
            lease.wait_for_readers()  # who wrote may have left already, on another stream
        move_written(self, unit, written, lease.stream)
        for staged in written:
            # In stream order behind the write itself; a tensor that overlaps another brings the same bytes twice.
            with driver.current():
                for start, host_pointer, nbytes in unit.slab.copies(staged.slab_offset, staged.member.spec.nbytes):
                    driver.copy_async(host_pointer, lease.slot.device_pointer + start, nbytes, lease.stream)
            self.ring.stats.write_backs += 1
        if written:
            self.ring.changed_on_stream(unit.name, stream=lease.stream, valid=lease.slot)
        if foreign:
            self._adopt(unit, foreign)

    def _watch_again(self, unit: StagedUnit) -> None:
        for staged in unit.members:
            if rewatch(staged.tensor):
                name, tensor = staged.member.of_module
                self._hooks += refuse_gradients([(name, tensor)])
                tensor._backward_hooks = tensor._backward_hooks  # swap_tensors left torch's half with the other one

    def _home(self, unit: StagedUnit, staged: StagedMember) -> torch.Tensor:
        """A member's home; made anew where somebody moved its memory (``share_memory_`` of what `state_dict` gave)."""
        if place_of(staged.home) != staged.home_place:
            mine = [other for other in unit.members if other.entry == staged.entry]
            for other, home in zip(mine, self.homes(staged.entry), strict=True):
                unit.give_home(other, home)
        return staged.home

    # --------------------------------------------------------------------------------------- writes
    def _adopt(self, unit: StagedUnit, foreign: list[tuple[StagedMember, torch.Tensor]]) -> None:
        """Copy bytes that somebody gave our tensors (``.data =``) into the host bytes, and point them home again."""
        for staged, tensor in foreign:
            if tensor.shape != staged.home.shape or tensor.dtype != staged.home.dtype:
                raise AliasError(
                    f'"{staged.member.name}" was offloaded as {staged.member.spec} and now holds a '
                    f"{tensor.dtype}{list(tensor.shape)}; restore_() the module before changing what its tensors are"
                )
            if tensor.stride() != staged.home.stride() and tensor.numel() > 1:
                # Kernels choose other code for other strides, and the bits could differ from those of a resident one.
                raise AliasError(
                    f'"{staged.member.name}" was offloaded with strides {staged.home.stride()} and now has data with '
                    f"{tensor.stride()}; call refresh_() on the handle after giving tensors other strides"
                )
            if (shared := self._sharing(unit, staged, tensor)) is not None:
                raise AliasError(
                    f'"{staged.member.name}" was given the bytes of "{shared.member.name}" (.data =), which are '
                    "offloaded, too; clone() them, or call refresh_() on the handle, and the two share them from now on"
                )
        origins = {id(staged): tensor.data_ptr() - staged.slab_offset for staged, tensor in foreign}
        for staged, _ in foreign:
            for other in unit.members:
                tied = other.overlaps(staged.slab_offset, staged.member.spec.nbytes)
                if tied and origins.get(id(other)) != origins[id(staged)]:
                    raise AliasError(
                        f'"{staged.member.name}" shared its bytes with "{other.member.name}" when it was offloaded and '
                        "now has others; restore_() the module before untying them"
                    )
        for staged, tensor in foreign:
            exchange_data(staged.tensor, self._home(unit, staged))
            self._write(unit, staged, tensor)
            if staged.member.name not in self.adopted:
                self.adopted.append(staged.member.name)

    def _sharing(self, unit: StagedUnit, staged: StagedMember, tensor: torch.Tensor) -> StagedMember | None:
        """The other member whose home or slot a tensor lies in, that was no part of `staged` before."""
        address, nbytes = tensor.data_ptr(), staged.member.spec.nbytes
        tied = [other for other in unit.members if other.overlaps(staged.slab_offset, nbytes)]
        for other in (other for each in self.units.values() for other in each.members if other not in tied):
            starts = [other.home_place[0]]
            if other in unit.members:
                starts += [slot.data_ptr() + other.slab_offset for slot in self.slots]
            if any(start < address + nbytes and address < start + other.member.spec.nbytes for start in starts):
                return other
        return None

    def write(self, unit: StagedUnit, member: Member, tensor: torch.Tensor) -> None:
        """Write a tensor's elements into the host bytes, after everything enqueued that reads them."""
        with self.lock:
            if unit.active:
                raise SlotError(f'unit "{unit.name}" is running; update "{member.name}" between two calls of it')
            self.look_over(unit)
            self._write(unit, next(staged for staged in unit.members if staged.member is member), tensor)

    def _write(self, unit: StagedUnit, staged: StagedMember, tensor: torch.Tensor) -> None:
        source = host_copy_of(tensor)
        if any(tensor is staged.tensor for tensor in unit.read_only):
            move_out(self, unit, staged.entry, current_stream(self.device))
        self.ring.driver.stream_synchronize(current_stream(self.device))
        self.ring.before_host_write(unit.name)
        copy_elements(home_tensor(unit.slab.host_view(staged.entry), staged.member), source)
        self.ring.changed(unit.name)
        torch.autograd.graph.increment_version(staged.member.of_module[1])
        staged.version = staged.member.version
        unit.touch(staged)

    def changed(self, entry: str, member: Member, stream: int) -> None:
        """Take note that work enqueued on `stream` wrote a tensor's bytes."""
        unit = self.unit_of(entry)
        if unit is not None:
            with self.lock:
                self.ring.changed_on_stream(unit.name, stream=stream)
                unit.touch(next(staged for staged in unit.members if staged.member is member))

    def unit_of(self, entry: str) -> StagedUnit | None:
        """The unit that stages an entry."""
        return self._unit_of.get(entry)

    def check_closable(self) -> None:
        """Raise the SlotError that `close` would."""
        with self.lock:
            running = [unit.name for unit in self.units.values() if unit.active]
            if running:
                raise SlotError(f'unit "{running[0]}" is running; restore the module between two calls of it')
            if not self.ring.closed:
                self.ring.check_uncaptured("closed")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep every unit from running for the length of a block; SlotError, before it, where one runs already.

        While one runs its tensors are in a slot, as those of others were: by their addresses they would seem tied.
        """
        with self.lock:
            self.check_closable()
            yield

    def close(self) -> None:
        """End staging, and let go of slots and homes at once: the garbage collector may come much later.

        Raises
        ------
        SlotError
            A unit is running, or a captured graph can still be replayed. Nothing has changed then.
        CudaError
            Work that uses the slots failed, and nothing has changed; or the driver would not destroy what belongs to
            the ring, which is `closed` then.
        """
        with self.lock:
            self.check_closable()
            self.backward.abandon()
            try:
                self.ring.close()
            finally:
                if self.ring.closed:
                    self._let_go()

    @property
    def closed(self) -> bool:
        """Whether the ring is."""
        return self.ring.closed

    def _let_go(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for unit in self.units.values():
            unit.release()
        self.units.clear()
        self._unit_of.clear()
        self.slots.clear()
