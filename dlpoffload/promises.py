"""Host memory that was found to be there and is not taken yet, so that it is not found again."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final

__all__ = ["Promise", "promised", "promising"]


class Promise:
    """Bytes that were found to be there and are not pinned yet: every other check counts them as gone.

    Attributes
    ----------
    nbytes : int
        Bytes about to be pinned.
    new_nbytes : int
        Of them, what the system still has to give.
    """

    def __init__(self) -> None:
        self.nbytes = self.new_nbytes = 0

    def make(self, nbytes: int, new_nbytes: int) -> None:
        """Promise these bytes. Used under `promising`, together with the check."""
        self.nbytes, self.new_nbytes = nbytes, new_nbytes
        _promises.add(self)

    def keep(self, nbytes: int | None = None) -> None:
        """So many of the bytes are pinned; or all of them are, or will not be."""
        left = 0 if nbytes is None else max(self.nbytes - nbytes, 0)
        self.nbytes, self.new_nbytes = left, min(self.new_nbytes, left)


_promises: Final[weakref.WeakSet[Promise]] = weakref.WeakSet()
promising: Final = threading.RLock()


def _after_fork_in_child() -> None:
    _promises.clear()  # the threads that would keep them are not here
    promising.release()


os.register_at_fork(before=promising.acquire, after_in_parent=promising.release, after_in_child=_after_fork_in_child)


def promised() -> tuple[int, int]:
    """Bytes of all promises that are not kept yet, and what the system still has to give of them."""
    with promising:
        there = list(_promises)
    return sum(promise.nbytes for promise in there), sum(promise.new_nbytes for promise in there)
