"""What `torch.autocast` keeps: a cast of every float32 weight that requires a gradient, until its context ends.

Of a module that is streamed that would be all of its weights, on the device. Where no gradient is taken, nothing else
depends on it: a weight that is cast again has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .compiling import uncompiled

__all__ = ["casts_forgotten"]


@uncompiled
def casts_forgotten() -> AbstractContextManager[None]:
    """Keep no casts of what is used inside the block, unless autograd holds them anyway."""
    if torch.is_grad_enabled() or not (torch._C._is_any_autocast_enabled() and torch.is_autocast_cache_enabled()):
        return nullcontext()
    return _uncached()


@contextmanager
def _uncached() -> Iterator[None]:
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)
