"""`SplitHandle`: what there is to say to a module that is offloaded over several devices.

For each device there is an `OffloadHandle` over the tree of what is on it (see `shells`), with a ring, a budget and
host memory of its own. Here is what holds them together: all of them change, or none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ClosedError, OffloadError, PlanError, SpecError
from ..planning import Plan
from .copying import DeepCopy, refuse_copy, refuse_pickle, standing_aside
from .device_map import Budgets, DeviceMap, Parts, by_device
from .gate import Gate
from .handle import OffloadHandle
from .installed import InstalledOverParts, handle_of, holding
from .loading import FromCheckpoint
from .offloading import Offloading
from .placed import Placed
from .report import ByDevice, Report
from .wrapped import WrappedForward

__all__ = ["SplitHandle"]


class SplitHandle:
    """A module that is offloaded over several devices. Made by `offload_` with a ``device_map``.

    *Lifetime*: the module stays offloaded when the handle is dropped.

    Attributes
    ----------
    module : torch.nn.Module
    """

    def __init__(
        self,
        module: nn.Module,
        device_map: DeviceMap,
        offloadings: Mapping[str, Offloading],
        start: FromCheckpoint | None = None,
    ) -> None:
        self.module = module
        self._map = device_map
        self._offloadings = dict(offloadings)
        self._lock = threading.RLock()
        self._restored = False
        self._handles: dict[str, OffloadHandle] = {}
        self._gate = Gate()
        self._held: list[WrappedForward] = []  # while tensors are moved
        meta = start is not None
        self._parts = parts = Parts(module, device_map, meta=meta)
        ready, plans = self._ready(parts), []
        with torch.inference_mode(False), torch.no_grad():
            for device, offloading in ready.items():
                pinned = offloading.pageable != "always"
                with _said_of(device):
                    plans.append(offloading.plan(parts.roots[device], pinned=pinned, meta=meta)[1])
            start = None if start is None else start.of_parts(module, plans)
        with ExitStack() as undo:
            for device, offloading in ready.items():
                with _said_of(device):
                    made = OffloadHandle(parts.roots[device], offloading, start, settle=False, gate=self._gate)
                self._handles[device] = made
                undo.callback(made.restore_)
            self._install()
            undo.pop_all()
        for made in self._handles.values():
            made._placed.settle()

    def _ready(self, parts: Parts) -> dict[str, Offloading]:
        """For each device what was asked for it, and which names are not its own."""
        names = {name for found in parts.names.values() for name in found}
        return {
            device: replace(self._offloadings[device], elsewhere=frozenset(names.difference(found)))
            for device, found in parts.names.items()
        }

    def _install(self) -> None:
        placed = [handle._placed for handle in self._handles.values()]
        self._installed = InstalledOverParts(
            self._parts, placed, self, DeepCopy(self), self._gate, self._held, asleep=self.asleep
        )

    @staticmethod
    def of(module: nn.Module) -> SplitHandle | None:
        """The handle of an offloaded module, or of the one that it is a part of."""
        found = handle_of(module)
        return found if isinstance(found, SplitHandle) else None

    @property
    def plan(self) -> ByDevice[Plan]:
        """Which tensor lives where, and why, by device."""
        return ByDevice({device: handle.plan for device, handle in self._handles.items()})

    @property
    def device(self) -> str:
        """The device of the module's own forward; inputs are moved there."""
        return self._parts.home

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices, in the order of the map."""
        return tuple(self._handles)

    @property
    def asleep(self) -> bool:
        """Whether the module sleeps: nothing of it on any device, and no call of it."""
        return any(handle.asleep for handle in self._handles.values())

    @property
    def restored(self) -> bool:
        """Whether `restore_` was called."""
        return self._restored

    def _open(self) -> Iterable[OffloadHandle]:
        if self._restored:
            raise ClosedError("this module was restored, and is not offloaded any more; call offload_ again")
        return self._handles.values()

    def report(self, *, link: bool = True) -> ByDevice[Report]:
        """Say, by device, what was offloaded and what the copies did since; see `OffloadHandle.report`."""
        with self._lock:
            self._open()
            return ByDevice({device: handle.report(link=link) for device, handle in self._handles.items()})

    # --------------------------------------------------------------------------------------- writes
    def update(self, name: str, tensor: torch.Tensor) -> None:
        """Copy new values into a parameter or buffer, wherever it lives; see `OffloadHandle.update`."""
        with self._lock:
            self._with(name).update(name, tensor)

    def copy_out(self, name: str) -> bool:
        """Copy a tensor out of a mapped checkpoint; see `OffloadHandle.copy_out`."""
        with self._lock:
            return self._with(name).copy_out(name)

    def changed(self, name: str) -> None:
        """Say that a tensor's bytes were written in a way that torch does not see; see `OffloadHandle.changed`."""
        with self._lock:
            self._with(name).changed(name)

    def _with(self, name: str) -> OffloadHandle:
        self._open()
        known = self._parts.device_of_name
        if name not in known:
            near = ", ".join(f'"{other}"' for other in list(known)[:4])
            raise SpecError(f'no parameter or buffer "{name}" among the {len(known)} of this module, such as {near}')
        return self._handles[known[name]]

    # ----------------------------------------------------------------------------------- the module
    def refresh_(self) -> None:
        """Look the module over again, and plan and place what it holds now; see `OffloadHandle.refresh_`.

        Map, budgets and the other arguments of `offload_` stay.

        Raises
        ------
        PlanError, SpecError
            What the module holds now cannot be offloaded by this map, or a tensor was put where the map says another
            device; nothing has changed.
        SlotError
            A unit is running, or a captured graph can still be replayed; nothing has changed.
        HostMemoryError, DeviceMemoryError, CudaError
            Memory was refused, or a driver call failed; the module is restored, every tensor in ordinary memory.
        """
        with self._lock, self._gate.moving("refreshed"):
            self._open()
            if self.asleep:
                raise OffloadError("this module sleeps and cannot be refreshed; wake() it first")
            parts = Parts(self.module, self._map)
            self._check_same(parts)
            ready = self._ready(parts)
            for device, handle in self._handles.items():
                with _said_of(device):
                    ready[device].plan(parts.roots[device], pinned=handle._placed.pinned)
            with self._closable(), self._holding():
                try:
                    for device, handle in self._handles.items():
                        handle.module, handle._offloading = parts.roots[device], ready[device]
                        with _said_of(device):
                            handle.refresh_()
                except BaseException as error:
                    self._restore(error)
                    raise
                self._parts = parts
                self._install()

    def _check_same(self, parts: Parts) -> None:
        for device, handle in self._handles.items():
            for key, (entry, _) in handle._placed.tensors().items():
                now = parts.device_of_tensor.get(key, device)
                if now != device:
                    raise PlanError(
                        f'"{entry.name}" was offloaded to "{device}", and stands where device_map says "{now}" now; '
                        "restore_() the module and offload it again"
                    )

    # ---------------------------------------------------------------------------------- device memory
    def resize_(self, device_budget: Budgets) -> None:
        """Plan anew under other budgets, for some of the devices or all; see `OffloadHandle.resize_`.

        *Ordering*: waits for the devices.

        Raises
        ------
        PlanError, SpecError
            A budget cannot hold its ring, or is of a device that the module is not on.
        SlotError
            A unit is running, or a captured graph can still be replayed. Named.
        HostMemoryError, DeviceMemoryError, torch.OutOfMemoryError
            Memory was refused.

        After any error everything is as it was, on every device.
        """
        with self._lock, self._gate.moving("resized"):
            self._open()
            if not isinstance(device_budget, Mapping):
                raise PlanError(
                    f"this module is on {', '.join(self.devices)}, so device_budget={device_budget!r} must say for "
                    'which: {"cuda:0": "20GiB"}'
                )
            budgets = by_device(device_budget)
            unknown = [device for device in budgets if device not in self._handles]
            if unknown:
                raise PlanError(f'device_budget names "{unknown[0]}", but the module is on {", ".join(self.devices)}')
            asked: dict[OffloadHandle, tuple[Offloading, Plan]] = {}
            for device, budget in budgets.items():
                with _said_of(device):
                    asked[self._handles[device]] = self._handles[device]._resized(budget)
            former = {handle: (handle._offloading, handle._awake or handle.plan) for handle in asked}
            with self._closable(), self._changing():
                _all_or_none(
                    list(asked), lambda handle: handle._resize(*asked[handle]), lambda h: h._resize(*former[h])
                )
            for device, budget in budgets.items():
                self._offloadings[device] = replace(self._offloadings[device], device_budget=budget)

    def sleep(self) -> None:
        """Give up all memory on every device; see `OffloadHandle.sleep`. Idempotent.

        After any error everything is as it was, on every device.
        """
        self._turn(asleep=True)

    def wake(self) -> None:
        """Take the memory of every device back, and be callable again; see `OffloadHandle.wake`. Idempotent.

        After any error the module still sleeps, on every device.
        """
        self._turn(asleep=False)

    def _turn(self, *, asleep: bool) -> None:
        with self._lock, self._gate.moving("put to sleep" if asleep else "woken"):
            turning = [handle for handle in self._open() if handle.asleep is not asleep]
            if not turning:
                return
            acts = (OffloadHandle.sleep, OffloadHandle.wake) if asleep else (OffloadHandle.wake, OffloadHandle.sleep)
            with self._closable(), self._changing():
                _all_or_none(turning, *acts)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Take off what holds the parts together for the length of a block."""
        with self._holding():
            try:
                yield
            finally:
                self._install()

    def _holding(self) -> AbstractContextManager[None]:
        return holding(self._installed, self._held, self._gate)

    @contextmanager
    def _closable(self) -> Iterator[None]:
        """Keep every unit from running for the length of a block. SlotError, before it, where one runs already."""
        stagers = [handle._placed.stager for handle in self._handles.values()]
        with ExitStack() as locks:
            for stager in stagers:
                if stager is not None:
                    locks.enter_context(stager.lock)
            for stager in stagers:
                if stager is not None:
                    stager.check_closable()
            yield

    # ------------------------------------------------------------------------------------ copies, end
    @contextmanager
    def copyable(self) -> Iterator[Sequence[Placed]]:
        """Let this thread deep-copy the module for the length of a block, while others may run it."""
        with self._lock, ExitStack() as copying:
            handles = self._open()
            copying.enter_context(standing_aside(self))
            yield [placed for handle in handles for placed in copying.enter_context(handle.copyable())]

    def offload_like(self, module: nn.Module) -> SplitHandle:
        """Offload another module with the same arguments."""
        return SplitHandle(module, self._map, self._offloadings)

    def restore_(self) -> nn.Module:
        """Give the module back as it was: every tensor in ordinary memory on the device where it was before.

        Values are those of now. Needs that memory to be free. Idempotent.

        Raises
        ------
        SlotError
            A unit is running, or a captured graph can still be replayed. Nothing has changed then.
        CudaError
            Work failed, and nothing has changed; or a driver would not destroy what belonged to a ring, and all is
            restored.
        """
        with self._lock, self._gate.moving("restored"):
            if not self._restored:
                with self._closable():
                    for handle in self._handles.values():
                        handle._placed.driver.synchronize()  # what failed on one device is heard before any is restored
                    with self._holding():
                        self._restore(None)
        return self.module

    def _restore(self, because: BaseException | None) -> None:
        """Restore every part, whichever of them raises: the first error, or that for which all this is done."""
        first = because
        for handle in self._handles.values():
            try:
                handle.restore_()
            except Exception as refused:
                if first is None:
                    first = refused
                else:
                    first.add_note(f"and what is on {handle.device}: {refused}")
        self._restored = all(handle.restored for handle in self._handles.values())
        if first is not None and because is None:
            raise first

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse_copy(memo)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_pickle(protocol)

    def __repr__(self) -> str:
        where = ", ".join(self.devices)
        state = "restored" if self._restored else f"asleep, of {where}" if self.asleep else f"on {where}"
        return f"<SplitHandle of {type(self.module).__name__}, {state}>"


@contextmanager
def _said_of(device: str) -> Iterator[None]:
    """Let a PlanError inside the block say which device it is about."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f'on "{device}": {error}', smallest_budget=error.smallest_budget) from error


def _all_or_none(
    handles: Sequence[OffloadHandle],
    act: Callable[[OffloadHandle], None],
    undo: Callable[[OffloadHandle], None],
) -> None:
    """Change every part; where one refuses, change those before it back."""
    done: list[OffloadHandle] = []
    try:
        for handle in handles:
            act(handle)
            done.append(handle)
    except BaseException as error:
        for handle in reversed(done):
            try:
                undo(handle)
            except Exception as refused:
                error.add_note(f"what is on {handle.device} could not be changed back: {refused}")
        raise
