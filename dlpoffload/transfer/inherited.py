"""The end of a ring: dropped, at exit, and in a forked child."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ring import SlotRing

__all__ = ["at_the_end"]

_rings: weakref.WeakSet[SlotRing] = weakref.WeakSet()


def at_the_end(ring: SlotRing, dispose: Callable[..., None], *arguments: Any) -> weakref.finalize[..., SlotRing]:
    """Let a ring that is dropped be disposed of; at exit the process frees everything, and a child frees nothing."""
    ended = weakref.finalize(ring, dispose, *arguments)
    ended.atexit = False
    _rings.add(ring)
    return ended


def _after_fork_in_child() -> None:
    for ring in list(_rings):
        ring._lock = threading.RLock()  # another thread may have held it
        if ring.driver.platform == "cuda":  # which a child cannot call; the CPU driver has threads of its own there
            ring._closed = True
            ring._dispose.detach()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
