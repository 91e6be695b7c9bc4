"""`OffloadHandle`: what there is to say to an offloaded module."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ClosedError, OffloadError, SpecError
from ..lifetime import drain
from ..planning import Plan
from .copying import DeepCopy, refuse_copy, refuse_pickle, standing_aside
from .gate import Gate
from .installed import Installed, handle_of, holding
from .moved import copy_out, host_facts
from .offloading import Offloading, retired
from .origin import Start
from .placed import Placed
from .report import Report, link_of, snapshot
from .subclasses import find, inner_tensors, wraps_others
from .tensors import check_update, current_stream, overwrite
from .tree import Entry, Member, parts_of
from .wrapped import WrappedForward

__all__ = ["OffloadHandle"]


class OffloadHandle:
    """An offloaded module. Made by `offload_`.

    *Lifetime*: the module stays offloaded when the handle is dropped.

    Attributes
    ----------
    module : torch.nn.Module
    """

    def __init__(
        self,
        module: nn.Module,
        offloading: Offloading,
        start: Start | None = None,
        *,
        settle: bool = True,
        gate: Gate | None = None,
    ) -> None:
        self.module = module
        self._gate = gate or Gate()  # one for all parts of a module over several devices
        self._held: list[WrappedForward] = []  # while tensors are moved
        self._offloading = offloading
        self._lock = threading.RLock()
        self._restored = False
        self._awake: Plan | None = None  # while asleep, the plan to wake to
        self._install(offloading.place(module, start=start), settle=settle)

    def _install(self, placed: Placed, *, asleep: bool = False, settle: bool = True) -> None:
        self._placed = placed
        self._plan = placed.plan
        try:
            self._installed = Installed(
                self.module, placed, self, DeepCopy(self), self._gate, self._held, asleep=asleep
            )
        except BaseException:
            with torch.inference_mode(False), torch.no_grad():
                placed.undo()
            raise
        if settle:  # else the module is one of several parts, and is as it was when another fails
            placed.settle()
        self._names = {
            name: (entry, member, holder, attribute)
            for entry in placed.entries.values()
            for member in entry.members
            for name, (holder, attribute) in member.names.items()
        }

    @staticmethod
    def of(module: nn.Module) -> OffloadHandle | None:
        """The handle of an offloaded module, or of the one that it is a part of."""
        return found if isinstance(found := handle_of(module), OffloadHandle) else None

    @property
    def plan(self) -> Plan:
        """Which tensor lives where, and why."""
        return self._plan

    @property
    def device(self) -> str:
        """The device that the module runs on."""
        return self._placed.driver.device

    @property
    def asleep(self) -> bool:
        """Whether the module sleeps: nothing of it on the device, and no call of it."""
        return self._awake is not None

    @property
    def restored(self) -> bool:
        """Whether `restore_` was called."""
        return self._restored

    def _open(self) -> Placed:
        if self._restored:
            raise ClosedError("this module was restored, and is not offloaded any more; call offload_ again")
        return self._placed

    def report(self, *, link: bool = True) -> Report:
        """Say what was offloaded and what the copies did since.

        Parameters
        ----------
        link
            Measure the link's own rate, to hold the copies' against: once a process; 256 MiB on both sides meanwhile.
        """
        placed = self._open()
        with self._lock:
            stager = placed.stager
            stats = snapshot(None if stager is None else stager.ring.read_stats())
            measured, unmeasured = link_of(placed.driver) if link and stats.copies else (None, "")
            return Report(
                plan=self._plan,
                **host_facts(placed),
                stats=stats,
                link=measured,
                link_unmeasured=unmeasured,
                adopted=() if stager is None else tuple(stager.adopted),
                replaced=tuple(
                    name
                    for name, (entry, member, holder, attribute) in self._names.items()
                    if find(holder, attribute) is not member.tensor or placed.is_elsewhere(entry, member)
                ),
                aliased_outputs=0 if stager is None else stager.aliased_outputs,
                asleep=self.asleep,
            )

    # --------------------------------------------------------------------------------------- writes
    def update(self, name: str, tensor: torch.Tensor) -> None:
        """Copy new values into a parameter or buffer, wherever it lives; tied names are one tensor.

        *Aliasing*: none with `tensor` afterwards. *Ordering*: waits for what is enqueued on the current stream and
        for copies out of the tensor's host bytes; the module's next call sees the new bytes.

        Raises
        ------
        SpecError
            No such name, shape or dtype differ, or `tensor` is no tensor with bytes of its own.
        """
        placed = self._open()
        if parts := self._parts(name):
            values = dict(inner_tensors(tensor)) if wraps_others(tensor) else {}
            if values.keys() != parts.keys():
                raise SpecError(
                    f'"{name}" wraps the tensors {", ".join(parts)}, but the update is a {type(tensor).__name__} of '
                    f"{', '.join(values) or 'none'}; give one of the same make, or update them one by one"
                )
            for path, part in parts.items():
                self._check(part, values[path])
            for path, part in parts.items():
                self.update(part, values[path])
            return
        entry, member, current = self._check(name, tensor)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if current is member.tensor:
                placed.write(entry, member, tensor)
            else:
                overwrite(current, tensor)
        torch.clear_autocast_cache()

    def copy_out(self, name: str) -> bool:
        """Copy a tensor out of a mapped checkpoint, so that it can be written in place; False where it can already."""
        placed = self._open()
        if parts := self._parts(name):
            return max([self.copy_out(part) for part in parts.values()])
        entry, _, _ = self._tensor(name)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return copy_out(placed, entry)

    def _check(self, name: str, tensor: torch.Tensor) -> tuple[Entry, Member, torch.Tensor]:
        entry, member, current = self._tensor(name)
        check_update(name, current, tensor)
        return entry, member, current

    def _parts(self, name: str) -> dict[str, str]:
        return parts_of(name, {known: (member, attribute) for known, (_, member, _, attribute) in self._names.items()})

    def changed(self, name: str) -> None:
        """Say that a tensor's bytes were written in a way that torch does not see: through ``.data``, by a kernel.

        *Ordering*: copies enqueued from now on wait for what is enqueued on the current stream.
        """
        placed = self._open()
        if parts := self._parts(name):
            for part in parts.values():
                self.changed(part)
            return
        entry, member, _ = self._tensor(name)
        if placed.stager is not None:
            placed.stager.changed(entry.name, member, current_stream(placed.device))

    def _tensor(self, name: str) -> tuple[Entry, Member, torch.Tensor]:
        """What was offloaded under a name, and the tensor that is there now."""
        found = self._names.get(name)
        if found is None:
            near = ", ".join(f'"{known}"' for known in list(self._names)[:4])
            raise SpecError(
                f'no parameter or buffer "{name}" among the {len(self._names)} of this module, such as {near}'
            )
        entry, member, holder, attribute = found
        current = find(holder, attribute)
        if current is None:
            raise SpecError(f'"{name}" was taken out of the module since it was offloaded')
        return entry, member, current

    # ----------------------------------------------------------------------------------- the module
    def refresh_(self) -> None:
        """Look the module over again, and plan and place what it holds now.

        The one call after tensors were added, removed, or became others: a step that repacks weights after loading,
        layers put in or taken out. The budget and the other arguments of `offload_` stay. Unit by unit, so that no more
        than one unit is in memory twice.

        Raises
        ------
        PlanError, SpecError
            What the module holds now cannot be offloaded; nothing has changed.
        SlotError
            A unit is running, or other threads are inside of a call; nothing has changed.
        HostMemoryError, DeviceMemoryError, CudaError
            Memory was refused, or a driver call failed; the module is restored, every tensor in ordinary memory.
        """
        with self._lock, self._gate.moving("refreshed"):
            former = self._open()
            self._check_awake("refreshed")
            with former.quiet():
                self._offloading.plan(self.module, pinned=former.pinned)
            undestroyed = retired(former)
            record, former.store = former.former(), None
            with self._holding():
                self._restored = True  # should memory be refused, that is the state that is left
                try:
                    if undestroyed is not None:
                        raise undestroyed
                    placed = self._offloading.place(self.module, record)
                except BaseException:
                    former.undo()  # what had not been placed anew yet
                    raise
                self._install(placed)
                self._restored = False

    # ---------------------------------------------------------------------------------- device memory
    def resize_(self, device_budget: int | str) -> None:
        """Plan anew under another budget, and move what lives elsewhere now.

        Slabs of units that are streamed before and after stay as they are, and so do units, where the new budget holds
        their ring. Device memory that is given up goes back to the device, not only to torch's cache. Of a sleeping
        module only the plan changes.

        *Ordering*: waits for the device.

        Raises
        ------
        PlanError, SpecError
            The budget cannot hold the ring, or does not parse.
        SlotError
            A unit is running, other threads are inside of a call, or a captured graph can still be replayed. Named.
        HostMemoryError, DeviceMemoryError, torch.OutOfMemoryError
            Memory was refused.

        After any error everything is as it was.
        """
        with self._lock, self._gate.moving("resized"):
            self._resize(*self._resized(device_budget))

    def _resized(self, device_budget: int | str) -> tuple[Offloading, Plan]:
        """What another budget makes of the plan. Changes nothing."""
        offloading = replace(self._offloading, device_budget=device_budget)
        units, former = (self._awake or self._plan).units, self._open()
        with former.quiet():
            return offloading, offloading.plan(self.module, pinned=former.pinned, former=units)[1]

    def _resize(self, offloading: Offloading, decided: Plan) -> None:
        if self._awake is not None:
            self._awake = decided
        else:
            self._change(decided)
        self._offloading = offloading

    def sleep(self) -> None:
        """Give up all device memory: residents go to the host, pinned as the rest, and the ring is freed. Idempotent.

        The module cannot be called until `wake`; its weights can be read and written as ever.

        *Ordering*: waits for the device.

        Raises
        ------
        SlotError
            A unit is running, other threads are inside of a call, or a captured graph can still be replayed. Named.
        HostMemoryError
            The residents find no room on the host.

        After any error everything is as it was.
        """
        with self._lock, self._gate.moving("put to sleep"):
            former = self._open()
            if self._awake is None:
                with former.quiet():
                    awake = self._offloading.current(self.module, self._plan, pinned=former.pinned)
                self._change(awake.asleep(), asleep=True)
                self._awake = awake

    def wake(self) -> None:
        """Take the device memory back, and be callable again. Idempotent. Graphs are to be captured anew.

        Raises
        ------
        DeviceMemoryError, torch.OutOfMemoryError
            The device has no room: free some, or `resize_` first. The module still sleeps.
        """
        with self._lock, self._gate.moving("woken"):
            former = self._open()
            if self._awake is not None:
                self._change(self._offloading.current(self.module, self._awake, pinned=former.pinned))
                self._awake = None

    def _change(self, decided: Plan, *, asleep: bool = False) -> None:
        """Place the module's tensors by another plan; by the present one again where memory is refused."""
        former = self._open()
        undestroyed = retired(former)
        with self._holding():
            self._restored = True
            try:
                if undestroyed is not None:
                    raise undestroyed
                placed = self._offloading.move(former, decided)
            except BaseException as error:
                # What had not moved yet is at home still: it takes no more than before, once what is new is let go of.
                traceback.clear_frames(error.__traceback__)
                drain()
                placed = self._offloading.move_back(former, asleep=self.asleep)
                self._install(placed, asleep=self.asleep)
                self._restored = False
                raise
            former.store = None
            self._install(placed, asleep=asleep)
            self._restored = False
        drain()
        if placed.device.type == "cuda":
            torch.cuda.empty_cache()

    def _holding(self) -> AbstractContextManager[None]:
        return holding(self._installed, self._held, self._gate)

    def _check_awake(self, what: str) -> None:
        if self.asleep:
            raise OffloadError(f"this module sleeps and cannot be {what}; wake() it first")

    # -------------------------------------------------------------------------------------- copies, end
    @contextmanager
    def copyable(self) -> Iterator[Sequence[Placed]]:
        """Let this thread deep-copy the module for the length of a block, while others may run it."""
        with self._lock:
            placed = self._open()
            self._check_awake("copied")
            with standing_aside(self):
                yield [placed]

    def offload_like(self, module: nn.Module) -> OffloadHandle:
        """Offload another module with the same arguments."""
        return OffloadHandle(module, self._offloading)

    def restore_(self) -> nn.Module:
        """Give the module back as it was: every tensor in ordinary memory on the device where it was before.

        Values are those of now. Needs that memory to be free. Idempotent.

        Raises
        ------
        SlotError
            A unit is running, or other threads are inside of a call.
        CudaError
            Work failed, and nothing has changed; or the driver would not destroy what belonged to the ring, and the
            module is restored.
        """
        with self._lock, self._gate.moving("restored"):
            if not self._restored:
                undestroyed = retired(self._placed)
                with self._holding():
                    self._placed.undo()
                self._restored = True
                self._awake = None
                if undestroyed is not None:
                    raise undestroyed
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse_copy(memo)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_pickle(protocol)

    def __repr__(self) -> str:
        state = "restored" if self._restored else f"asleep, of {self.device}" if self.asleep else f"on {self.device}"
        return f"<OffloadHandle of {type(self.module).__name__}, {state}>"
