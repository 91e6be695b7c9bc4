"""`Current`: a context that is made current for a block, and the former one put back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

__all__ = ["Current", "Depth"]


class Depth(threading.local):
    """How many blocks of one driver this thread is in."""

    blocks = 0


class Current:
    """`CudaDriver.current`: a class, because a generator costs several times the check itself.

    Only the outermost block looks which context is current: nothing inside of one makes another current.
    """

    __slots__ = ("_depth", "_pop", "_push", "_pushed")

    def __init__(self, depth: Depth, push: Callable[[], bool], pop: Callable[[], None]) -> None:
        self._depth = depth
        self._push = push
        self._pop = pop
        self._pushed = False

    def __enter__(self) -> None:
        depth = self._depth
        if not depth.blocks:
            self._pushed = self._push()
        depth.blocks += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth.blocks -= 1
        if self._pushed:
            self._pop()
