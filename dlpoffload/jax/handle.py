"""`OffloadHandle`: what there is to say to an offloaded tree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..errors import AliasError, ClosedError, SpecError
from ..memory import HostBuffer
from ..planning import Placement, Plan
from ..store.layout import near_to
from .arrays import device_array
from .leaves import Leaf
from .placing import Home, Placed, check_spec
from .report import ProgramReport, Report
from .streaming import Staging, streamed

__all__ = ["OffloadHandle"]


class OffloadHandle:
    """An offloaded tree. Made by `offload`.

    *Lifetime*: arrays of trees that were given out keep their bytes, whatever becomes of the handle.
    """

    def __init__(self, leaves: Sequence[Leaf], structure: Any, plan: Plan, placed: Placed, *, slots: int) -> None:
        self._plan = plan
        self._structure = structure
        self._lock = threading.RLock()
        self._names = [leaf.name for leaf in leaves]
        self._tied = {leaf.name: leaf.tied_to for leaf in leaves if leaf.spec is not None}
        self._kept = {leaf.name: leaf.kept for leaf in leaves if leaf.spec is None}
        self._values = [leaf.value if leaf.spec is None else placed.arrays[leaf.tied_to] for leaf in leaves]
        self._placed: Placed | None = placed
        self._updates: dict[str, int] = {}
        programs: dict[str, ProgramReport] = {}
        self._programs = programs
        # Not through the handle: functions are kept by caches of compiled programs, and must not keep arrays.
        homes = {name: placed.homes[first] for name, first in self._tied.items()}
        self._staging = Staging(homes, self._tied, slots, lambda made: programs.update({made.name: made}))
        placed.arrays = {}

    @property
    def plan(self) -> Plan:
        """Which leaf lives where, and why. Rows of a stack stand one by one."""
        return self._plan

    @property
    def device(self) -> str:
        """The device that the tree is for."""
        return self._open().driver.device

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._placed is None

    @property
    def tree(self) -> Any:
        """The tree as the last `update` left it."""
        self._open()
        return jax.tree.unflatten(self._structure, self._values)

    def _open(self) -> Placed:
        if self._placed is None:
            raise ClosedError("this handle is closed; trees that it gave out live on, offload anew for the rest")
        return self._placed

    # -------------------------------------------------------------------------------------- streaming
    def streamed(self, fun: Callable[..., Any], *, argnum: int = 0) -> Callable[..., Any]:
        """Make a function whose staged weights pass through the ring, for use inside `jax.jit`.

        `fun` is an ordinary JAX function of the tree, the loss and its gradient included: a loop over a list of blocks,
        a scan over a stack, a Flax model. It is traced once, and each unit is copied to the device before its first
        use, ordered by `jax.lax.optimization_barrier` behind the last use of the unit whose place it takes: at most
        `slots` units are on the device at any time. See docs/jax.md for what is done to a scan.

        *Aliasing*: what `fun` returns of its weights unchanged is the host leaf itself.

        Parameters
        ----------
        argnum
            Which positional argument is the tree.

        Raises
        ------
        SpecError
            When called: the argument is not the tree.
        PlanError
            When called: one operation needs more units than there are slots.
        GradientError
            When differentiated: a gradient is asked for a staged or mapped leaf.
        """
        self._open()
        return streamed(fun, self._staging, argnum)

    # ----------------------------------------------------------------------------------------- report
    def report(self) -> Report:
        """Say what was offloaded, and what the programs traced so far copy at each call."""
        placed = self._open()
        with self._lock:
            return Report(
                device=placed.driver.device,
                description=placed.driver.description,
                plan=self._plan,
                pinned_nbytes=placed.host_nbytes + sum(self._updates.values()),
                aliased_nbytes=placed.aliased_nbytes,
                device_nbytes=self._plan.device_nbytes,
                kept=dict(self._kept),
                updated=tuple(name for name in self._updates),
                programs=tuple(self._programs.values()),
            )

    # ----------------------------------------------------------------------------------------- writes
    def update(self, name: str, value: Any) -> Any:
        """Give a leaf new values: a new tree, which is `tree` from now on.

        *Aliasing*: the new leaf has bytes of its own (a resident one may be `value` itself); trees given out before
        keep their values. *Lifetime*: the old bytes live as long as a tree has them, and as their unit's slab.

        Parameters
        ----------
        name
            The leaf's path, as in `plan` and `report`; tied leaves are one.
        value
            An array of the same shape and dtype.

        Raises
        ------
        SpecError
            No such leaf, shape or dtype differ, or the value is traced, deleted, or sharded over several devices.
        HostMemoryError, DeviceMemoryError
            Memory was refused; nothing has changed.
        """
        placed, home = self._open(), self._home(name)
        check_spec(name, home.spec, value)
        if home.placement is Placement.DEVICE:
            array = device_array(value, placed.device)
        else:
            buffer = HostBuffer.copy_of(value, device=placed.driver.device)
            array = placed.hold(self._tied[name], buffer.host_view(home.spec.shape, home.spec.dtype))
        with self._lock:
            first = self._tied[name]
            self._values = [
                array if self._tied.get(other) == first else known
                for other, known in zip(self._names, self._values, strict=True)
            ]
            if home.placement is not Placement.DEVICE:
                self._updates[first] = home.spec.nbytes
            return self.tree

    def overwrite_(self, name: str, value: Any) -> None:
        """Copy new values into a host leaf's bytes, under every tree that has them: JAX calls its arrays immutable.

        *Aliasing*: none with `value` afterwards; every array over these bytes changes. *Ordering*: waits first until
        the device is idle. What JAX has copied to the host before (``numpy.asarray`` of the leaf) may stay as it was.

        Raises
        ------
        SpecError
            No such leaf, or shape or dtype differ.
        AliasError
            The leaf is resident, or its bytes are read-only: use `update`.
        """
        placed, home = self._open(), self._home(name)
        check_spec(name, home.spec, value)
        if home.placement is Placement.DEVICE:
            raise AliasError(f'"{name}" is resident, and its memory is JAX\'s own; use update("{name}", …)')
        placed.overwrite(self._tied[name], value)

    def _home(self, name: str) -> Home:
        first = self._tied.get(name)
        if first is None:
            why = f": {self._kept[name]}" if name in self._kept else near_to(name, self._tied)
            raise SpecError(f'"{name}" is no offloaded leaf among {len(self._tied)}{why}')
        return self._open().homes[first]

    def close(self) -> None:
        """Drop what the handle holds. Idempotent. Host memory is freed when the last array over it is gone."""
        self._placed = None
        self._values = []

    def __enter__(self) -> OffloadHandle:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
