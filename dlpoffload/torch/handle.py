"""`OffloadHandle`: what there is to say to an offloaded module."""

from __future__ import annotations

import threading
from typing import Any, Final, NoReturn

import torch
from torch import nn

from ..errors import ClosedError, OffloadError, SpecError
from ..planning import Plan
from ..transfer import Link, measure_link
from .placed import Placed
from .report import Report, snapshot
from .tensors import current_stream
from .tree import Entry, Member

__all__ = ["OffloadHandle"]

_LINK_NBYTES: Final = 256 << 20
_MARK: Final = "_dlpoffload_handle"
_links: dict[str, Link] = {}


class OffloadHandle:
    """An offloaded module. Made by `offload_`.

    *Lifetime*: the module stays offloaded when the handle is dropped.

    Attributes
    ----------
    module : torch.nn.Module
    """

    def __init__(self, module: nn.Module, placed: Placed) -> None:
        self.module = module
        self._placed = placed
        self._plan = placed.plan
        self._lock = threading.RLock()
        self._restored = False
        self._members = {
            place[2]: (entry, member)
            for entry in placed.entries.values()
            for member in entry.members
            for place in member.places
        }
        for inside in module.modules():
            inside.__dict__[_MARK] = self

    @staticmethod
    def of(module: nn.Module) -> OffloadHandle | None:
        """The handle of an offloaded module, or of the one that it is a part of."""
        found = module.__dict__.get(_MARK)
        return found if isinstance(found, OffloadHandle) else None

    @property
    def plan(self) -> Plan:
        """Which tensor lives where, and why."""
        return self._plan

    @property
    def device(self) -> str:
        """The device that the module runs on."""
        return self._placed.driver.device

    @property
    def restored(self) -> bool:
        """Whether `restore_` was called."""
        return self._restored

    def _open(self) -> Placed:
        if self._restored:
            raise ClosedError("this module was restored, and is not offloaded any more; call offload_ again")
        return self._placed

    # --------------------------------------------------------------------------------------- report
    def report(self, *, link: bool = True) -> Report:
        """Say what was offloaded and what the copies did since.

        Parameters
        ----------
        link
            Measure the link's own rate (once for each device and process; it takes 256 MiB on both sides meanwhile),
            so that the copies' rate can be held against it.
        """
        placed = self._open()
        with self._lock:
            stager = placed.stager
            stats = snapshot(None if stager is None else stager.ring.read_stats())
            measured = None
            if link and stats.copies:
                measured = _links.get(self.device)
                if measured is None:
                    measured = _links[self.device] = measure_link(placed.driver, nbytes=_LINK_NBYTES, repeat=5)
            return Report(
                device=self.device,
                description=placed.driver.description,
                plan=self._plan,
                pinned_nbytes=0 if placed.store is None else placed.store.pinned_nbytes,
                device_nbytes=self._plan.device_nbytes,
                stats=stats,
                link=measured,
                mapped_home=placed.mapped,
                adopted=() if stager is None else tuple(stager.adopted),
                aliased_outputs=0 if stager is None else stager.aliased_outputs,
            )

    # --------------------------------------------------------------------------------------- writes
    def update(self, name: str, tensor: torch.Tensor) -> None:
        """Copy new values into a parameter or buffer, wherever it lives; tied names are one tensor.

        *Aliasing*: none with `tensor` afterwards. *Ordering*: waits for what is enqueued on the current stream and
        for copies out of the tensor's host bytes; the module's next call sees the new bytes.

        Raises
        ------
        SpecError
            No such name, or shape or dtype differ.
        """
        placed = self._open()
        entry, member = self._member(name)
        if tuple(tensor.shape) != member.spec.shape or tensor.dtype != member.tensor.dtype:
            raise SpecError(
                f'"{name}" is {member.spec}, but the update is {tensor.dtype}{list(tensor.shape)}; '
                "shape and dtype must be equal"
            )
        with self._lock, torch.inference_mode(False), torch.no_grad():
            placed.write(entry, member, tensor)

    def changed(self, name: str) -> None:
        """Say that a tensor's bytes were written in a way that torch does not see: through ``.data``, by a kernel.

        *Ordering*: copies enqueued from now on wait for what is enqueued on the current stream.
        """
        placed = self._open()
        entry, _ = self._member(name)
        if placed.stager is not None:
            placed.stager.changed(entry.name, current_stream(placed.device))

    def _member(self, name: str) -> tuple[Entry, Member]:
        found = self._members.get(name)
        if found is None:
            near = ", ".join(f'"{known}"' for known in list(self._members)[:4])
            raise SpecError(f'no parameter or buffer "{name}" in this module; it has {len(self._members)}, such as {near}')
        return found

    # ------------------------------------------------------------------------------------------ end
    def restore_(self) -> nn.Module:
        """Give the module back as it was: every tensor in ordinary memory on the device where it was before.

        Values are those of now. Needs that memory to be free. Idempotent.

        Raises
        ------
        SlotError
            A unit is running.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not self._restored:
                self._placed.undo()
                self._restored = True
                for inside in self.module.modules():
                    inside.__dict__.pop(_MARK, None)
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise OffloadError(
            f"an offloaded {type(self.module).__name__} cannot be copied by deepcopy: the copy would stage the "
            "original's weights; restore_() first, or build a second model and load its state_dict"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OffloadError(
            f"an offloaded {type(self.module).__name__} cannot be pickled: its weights live in pinned host memory of "
            "this process; save model.state_dict() (safetensors), or restore_() first"
        )

    def __repr__(self) -> str:
        state = "restored" if self._restored else f"on {self.device}"
        return f"<OffloadHandle of {type(self.module).__name__}, {state}>"
