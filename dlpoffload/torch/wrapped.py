"""A module's forward, replaced on the instance."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from ..errors import OffloadError

__all__ = ["LeftOut", "SleepingForward", "WrappedForward"]


class LeftOut:
    """What a deep copy of an offloaded module has where something of ours was, until `copying` takes it out.

    Attributes
    ----------
    before
        A copy of what had been there before ours; None for nothing.
    """

    def __init__(self, before: object) -> None:
        self.before = before


class WrappedForward:
    """Base of what stands in the place of a module's forward.

    It belongs to one module of one offloaded model, so it is not copied along with it.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> LeftOut:
        return LeftOut(copy.deepcopy(self.before, memo))

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.installed = False
        self.inside_another = False

    @property
    def __code__(self) -> Any:
        # torch.export asks a forward for it.
        return cast(Any, inspect.unwrap(cast(Any, self).__wrapped__)).__code__

    def install(self) -> None:
        """Take the place of the module's forward as it is now, or act again inside of what somebody wrapped around."""
        if self.inside_another:
            self.installed = True
            return
        self.inner: Callable[..., Any] = self.module.forward
        self.before = self.module.__dict__.get("forward")
        # inspect.signature, which some libraries ask of a forward, follows __wrapped__. Its __dict__ is not taken over:
        # where a module is wrapped twice, that of the other wrapper would replace what we just set.
        functools.update_wrapper(cast("Callable[..., Any]", self), self.inner, updated=())
        self.module.__dict__["forward"] = self
        self.installed = True

    def remove(self) -> None:
        """Put the former forward back; where somebody wrapped this one since, stay and only pass through."""
        self.inside_another = self.installed and self.module.__dict__.get("forward") is not self
        self.installed = False
        if self.module.__dict__.get("forward") is self:
            if self.before is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.before


class SleepingForward(WrappedForward):
    """That of a module that sleeps."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.installed:
            raise OffloadError(f"this {type(self.module).__name__} sleeps, with nothing on the device; wake() it first")
        return self.inner(*args, **kwargs)
