"""Everything that is put on a module while it is offloaded, in one place, so that all of it comes off again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .borders import BorderForward, SplitForward
from .copying import Mark, PartCopy, PickleRefusal
from .gate import Gate
from .gradients import refuse_gradients
from .moved import guard_loading
from .moving import GuardedApply
from .overrides import Override, Overrides
from .placed import Placed
from .root import RootForward, SteppedForward
from .staging import StagedForward
from .state import Saving, guard_state_dicts, homes_of
from .tensors import torch_device
from .traced import ScriptRefusal
from .wrapped import HeldForward, SleepingForward, WrappedForward, exchange

if TYPE_CHECKING:
    from .device_map import Parts

__all__ = ["Installed", "InstalledOverParts", "handle_of", "holding"]

_MARK = "_dlpoffload_handle"
"""The instance attribute by which a module knows its handle."""


def handle_of(module: nn.Module) -> Any:
    """The handle of an offloaded module, or of the one that it is a part of; None where it is not offloaded."""
    mark = module.__dict__.get(_MARK)
    return mark.handle if isinstance(mark, Mark) else None


def _guard(overrides: Overrides, module: nn.Module, handle: object, applied: GuardedApply, copied: Override) -> None:
    """Put on a module what knows its handle, and what refuses or leads on what would take its tensors along."""
    overrides.put(module, _MARK, Mark(handle))
    overrides.put(module, "_apply", applied)
    overrides.put(module, "__deepcopy__", copied)
    overrides.put(module, "__reduce_ex__", PickleRefusal())
    overrides.put(module, "__prepare_scriptable__", ScriptRefusal())


class Installed:
    """The forwards, hooks and attributes of one offloaded module; none of them when making it fails."""

    def __init__(
        self,
        module: nn.Module,
        placed: Placed,
        handle: object,
        deep_copy: Any,
        gate: Gate,
        held: list[WrappedForward],
        *,
        asleep: bool = False,
    ) -> None:
        self._placed = placed
        self._gate = gate
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
        self.overrides = Overrides()
        self._saving = Overrides()
        try:
            self._override(module, placed, handle, deep_copy)
            self._put_on(held)
        except BaseException:
            self.remove()
            raise

    def _override(self, module: nn.Module, placed: Placed, handle: object, deep_copy: Any) -> None:
        for inside in module.modules():
            copied = deep_copy if inside is module else PartCopy(handle, inside)
            _guard(self.overrides, inside, handle, GuardedApply([placed], inside, self._gate), copied)
        if placed.stager is not None:
            for inside, homes in homes_of(placed.stager, self._units).items():
                self._saving.put(inside, "_save_to_state_dict", Saving(inside, homes))

    def _put_on(self, held: list[WrappedForward]) -> None:
        exchange(held, self.forwards, self._gate)
        held.clear()
        if self._placed.stager is not None:
            self._hooks += guard_state_dicts(self._placed.stager, self._units)
        self._hooks += guard_loading(self._placed)
        self._hooks += refuse_gradients(member.of_module for member in self._placed.offloaded())

    def remove(self) -> None:
        """Take everything off."""
        exchange(self.hold(), [], self._gate)
        self.overrides.take()

    def hold(self) -> list[WrappedForward]:
        """Take everything off, and have other threads' calls of what was put on wait at the gate, by these forwards.

        What guards the module (`_apply`, copies, pickling) stays until others are put in its place, or `remove`.
        """
        while self._hooks:
            self._hooks.pop().remove()
        self._saving.take()
        held: list[WrappedForward] = [HeldForward(module) for module in dict.fromkeys(f.module for f in self.forwards)]
        exchange(self.forwards, held, self._gate)
        self.overrides.retire()
        # The handle may outlive this, and the ring's slots must not.
        self.forwards.clear()
        self._units.clear()
        return held


@contextmanager
def holding(installed: Installed | InstalledOverParts, held: list[WrappedForward], gate: Gate) -> Iterator[None]:
    """Take everything off for the length of a block, in which something else may be put in the place of `held`."""
    held += installed.hold()
    try:
        yield
    finally:
        exchange(held, [], gate)
        held.clear()
        installed.overrides.take()  # where nothing else was put


class InstalledOverParts:
    """The same for a module over several devices: what is above its parts, and around them. Put on after theirs."""

    def __init__(
        self,
        parts: Parts,
        placed: Sequence[Placed],
        handle: object,
        deep_copy: Any,
        gate: Gate,
        held: list[WrappedForward],
        *,
        asleep: bool = False,
    ) -> None:
        self._root = root = parts.root
        self._gate = gate
        devices = {each.driver.device: torch_device(each.driver) for each in placed}
        inside = {id(module) for tree in parts.roots.values() for module in tree.modules()}
        above = [module for module in root.modules() if id(module) not in inside]
        self.forwards: list[WrappedForward] = []
        if asleep:
            self.forwards += [SleepingForward(module) for module in above]
        else:
            self.forwards += [BorderForward(module, devices[device]) for module, device in parts.borders()]
            self.forwards.append(SplitForward(parts, devices[parts.home], placed))
        self.overrides = Overrides()
        try:
            for module in above:
                _guard(self.overrides, module, handle, GuardedApply(placed, module, gate), PartCopy(handle, module))
            for module in root.modules():
                if id(module) in inside:  # what else is theirs the parts guard
                    self.overrides.put(module, _MARK, Mark(handle))
            self.overrides.put(root, "__deepcopy__", deep_copy)
            exchange(held, self.forwards, gate)
            held.clear()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off. Idempotent."""
        exchange(self.hold(), [], self._gate)
        self.overrides.take()

    def hold(self) -> list[WrappedForward]:
        """See `Installed.hold`; the parts hold back what is theirs."""
        # Where the root is a part itself, that part's forward stays until it is held.
        alone = self.forwards and not isinstance(self.forwards[-1].before, WrappedForward)
        held: list[WrappedForward] = [HeldForward(self._root)] if alone else []
        exchange(self.forwards, held, self._gate)
        self.forwards.clear()
        self.overrides.retire()
        return held
