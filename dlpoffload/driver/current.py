"""`Current`: a context that is made current for a block, and the former one put back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

__all__ = ["Current", "inside"]


class _Inside(threading.local):
    """Whose innermost block this thread is in."""

    whose: object = None


inside = _Inside()


class Current:
    """`CudaDriver.current`: a class, because a generator costs several times the check itself.

    A block directly inside of one of the same driver does not look which context is current: it is that one's. Inside
    of another driver's block it does, whatever is around that.
    """

    __slots__ = ("_before", "_pop", "_push", "_pushed", "_whose")

    def __init__(self, whose: object, push: Callable[[], bool], pop: Callable[[], None]) -> None:
        self._whose = whose
        self._push = push
        self._pop = pop
        self._pushed = False
        self._before: object = None

    def __enter__(self) -> None:
        self._before = inside.whose
        if self._before is not self._whose:
            self._pushed = self._push()
        inside.whose = self._whose

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        inside.whose = self._before
        if self._pushed:
            self._pop()
