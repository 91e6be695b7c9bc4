"""A module's forward, replaced on the instance."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from ..errors import OffloadError
from .gate import Gate
from .overrides import LeftOut

__all__ = ["HeldForward", "SleepingForward", "WrappedForward", "exchange"]


class WrappedForward:
    """Base of what stands in the place of a module's forward: its calls pass a gate.

    It belongs to one module of one offloaded model, so it is not copied along with it.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> LeftOut:
        return LeftOut(copy.deepcopy(self.before, memo))

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before: Any = None
        self.installed = False
        self.inside_another = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what it stands around, each kind in its own way."""
        raise NotImplementedError

    @property
    def __code__(self) -> Any:
        # torch.export asks a forward for it.
        return cast(Any, inspect.unwrap(cast(Any, self).__wrapped__)).__code__

    def install(self, gate: Gate) -> None:
        """Take the place of the module's forward as it is now, or act again inside of what somebody wrapped around."""
        if self.inside_another:
            self.installed = True
            return
        self.put_over(self.module.forward, self.module.__dict__.get("forward"), gate)
        self.module.__dict__["forward"] = self

    def put_over(self, inner: Callable[..., Any], before: Any, gate: Gate) -> None:
        """Stand around `inner` from now on, and leave `before` in the module when taken off."""
        self.gate, self.inner, self.before = gate, inner, before
        # inspect.signature, which some libraries ask of a forward, follows __wrapped__. Its __dict__ is not taken over:
        # where a module is wrapped twice, that of the other wrapper would replace what we just set.
        functools.update_wrapper(self, self.inner, updated=())
        self.installed = True

    def passed_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call what stands in this one's place, which was taken off while a caller was on the way to it."""
        now = self.module.__dict__.get("forward")
        if isinstance(now, WrappedForward) and now is not self and not self.inside_another:
            return now(*args, **kwargs)
        return self.inner(*args, **kwargs)

    def remove(self) -> None:
        """Put the former forward back; where somebody wrapped this one since, stay and only pass through."""
        self.inside_another = self.installed and self.module.__dict__.get("forward") is not self
        self.installed = False
        if self.module.__dict__.get("forward") is self:
            _put(self.module, self.before)


class SleepingForward(WrappedForward):
    """That of a module that sleeps."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.installed:
            raise OffloadError(f"this {type(self.module).__name__} sleeps, with nothing on the device; wake() it first")
        return self.inner(*args, **kwargs)


class HeldForward(WrappedForward):
    """That of a module whose tensors are moved: calls of other threads wait, and go to what stands there then."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.gate:
            return self.inner(*args, **kwargs) if self.installed else self.passed_on(args, kwargs)


def exchange(old: Sequence[WrappedForward], new: Sequence[WrappedForward], gate: Gate) -> None:
    """Take some forwards off and put others on: no caller meets a module without the ones or the others.

    Each in the order in which they stand around each other, the innermost first.
    """
    former_of, coming_of = _by_module(old), _by_module(new)
    for module in former_of | coming_of:
        former, coming = former_of.get(module, []), coming_of.get(module, [])
        if not former or module.__dict__.get("forward") is not former[-1]:  # somebody stands around them
            for forward in reversed(former):
                forward.remove()
            for forward in coming:
                forward.install(gate)
            continue
        inner, before = former[0].inner, former[0].before
        for forward in coming:
            forward.put_over(inner, before, gate)
            inner = before = forward
        _put(module, before)
        for forward in former:
            forward.installed = False


def _by_module(forwards: Sequence[WrappedForward]) -> dict[nn.Module, list[WrappedForward]]:
    found: dict[nn.Module, list[WrappedForward]] = {}
    for forward in forwards:
        found.setdefault(forward.module, []).append(forward)
    return found


def _put(module: nn.Module, forward: Any) -> None:
    """Give a module a forward of its own, or let it have that of its class."""
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward
