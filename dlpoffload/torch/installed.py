"""Everything that is put on a module while it is offloaded, in one place, so that all of it comes off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .copying import refuse_copy, refuse_pickle
from .gradients import refuse_gradients
from .moved import guard_loading
from .moving import GuardedApply
from .overrides import Overrides
from .placed import Placed
from .root import RootForward, SteppedForward
from .staging import StagedForward
from .state import guard_state_dicts
from .wrapped import SleepingForward, WrappedForward

__all__ = ["MARK", "Installed"]

MARK = "_dlpoffload_handle"
"""The instance attribute by which a module knows its handle."""


class Installed:
    """The forwards, hooks and attributes of one offloaded module; none of them when making it fails."""

    def __init__(
        self, module: nn.Module, placed: Placed, handle: object, deep_copy: Any, *, asleep: bool = False
    ) -> None:
        self._placed = placed
        stager = placed.stager
        units = [] if stager is None else list(stager.units.values())
        self.forwards: list[WrappedForward] = []
        if stager is not None:
            self.forwards += [StagedForward(stager, unit, m) for unit in units for m in unit.modules]
        if asleep:
            self.forwards += [SleepingForward(inside) for inside in module.modules()]
        else:
            self.forwards.append((RootForward if stager is None else SteppedForward)(placed, module))
        self._units = units
        self._hooks: list[RemovableHandle] = []
        self._overrides = Overrides()
        try:
            self._override(module, placed, handle, deep_copy)
            self._put_on()
        except BaseException:
            self.remove()
            raise

    def _override(self, module: nn.Module, placed: Placed, handle: object, deep_copy: Any) -> None:
        for inside in module.modules():
            self._overrides.put(inside, MARK, handle)
            self._overrides.put(inside, "_apply", GuardedApply(placed, inside))
            self._overrides.put(inside, "__deepcopy__", deep_copy if inside is module else refuse_copy)
            self._overrides.put(inside, "__reduce_ex__", refuse_pickle)

    def _put_on(self) -> None:
        for forward in self.forwards:
            forward.install()
        if self._placed.stager is not None:
            self._hooks += guard_state_dicts(self._placed.stager, self._units)
        self._hooks += guard_loading(self._placed)
        self._hooks += refuse_gradients(member.of_module for member in self._placed.offloaded())

    def _take_off(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for forward in reversed(self.forwards):
            forward.remove()

    def remove(self) -> None:
        """Take everything off."""
        self._take_off()
        self._overrides.take()
        # The handle may outlive this, and the ring's slots must not.
        self.forwards.clear()
        self._units.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take everything off for the length of a block."""
        self._take_off()
        try:
            with self._overrides.suspended():
                yield
        finally:
            self._put_on()
