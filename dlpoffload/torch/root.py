"""The whole module's forward: the borders of a step, and a look at who would get a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .gradients import guard_outputs
from .tensors import current_stream
from .wrapped import WrappedForward

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["RootForward"]


class RootForward(WrappedForward):
    """Stands in the place of the offloaded module's own forward."""

    def __init__(self, placed: Placed, root: nn.Module) -> None:
        super().__init__(root)
        self.placed = placed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stager = self.placed.stager
        if not self.installed or stager is None:
            output = self.inner(*args, **kwargs)
        else:
            stager.prefetcher.begin_step(stream=current_stream(stager.device))
            try:
                output = self.inner(*args, **kwargs)
            finally:
                if self.installed:  # a hook may have restored the module
                    stager.prefetcher.end_step(stream=current_stream(stager.device))
        if self.installed and torch.is_grad_enabled():
            guard_outputs(output, (member.of_module for member in self.placed.offloaded()))
        return output
