"""The whole module's forward: the borders of a step, and a look at who would get a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .compiling import border, uncompiled
from .gradients import guard_outputs
from .tensors import current_stream
from .wrapped import WrappedForward

if TYPE_CHECKING:
    from .placed import Placed
    from .staging import Stager

__all__ = ["RootForward", "SteppedForward"]


class RootForward(WrappedForward):
    """Stands in the place of the offloaded module's own forward. Dynamo traces through it."""

    def __init__(self, placed: Placed, root: nn.Module) -> None:
        super().__init__(root)
        self.placed = placed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._guarded(self.inner(*args, **kwargs))
        with self.gate:
            return self._guarded(self.inner(*args, **kwargs)) if self.installed else self.passed_on(args, kwargs)

    def _guarded(self, output: Any) -> Any:
        # Compiled, it is the hooks on the parameters that refuse, after others may have accumulated.
        if self.installed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            guard_outputs(output, [member.of_module for member in self.placed.offloaded()])
        return output


class SteppedForward(RootForward):
    """That of a module with staged units. Dynamo breaks at its borders."""

    @border
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.gate:
            stager = self.placed.stager
            if not self.installed or stager is None:
                return self.passed_on(args, kwargs)
            begin_step(stager)
            try:
                output = self.inner(*args, **kwargs)
            finally:
                if self.installed:  # a hook may have restored the module
                    end_step(stager)
            return self._guarded(output)


@uncompiled
def begin_step(stager: Stager) -> None:
    """A pass over the units begins on the current stream."""
    stager.prefetcher.begin_step(stream=current_stream(stager.device))


@uncompiled
def end_step(stager: Stager) -> None:
    """It ends."""
    stager.prefetcher.end_step(stream=current_stream(stager.device))
