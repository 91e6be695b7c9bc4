"""`Current`: a context that is made current for a block, and the former one put back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

__all__ = ["Current"]


class Current:
    """`CudaDriver.current`: a class, because a generator costs several times the check itself."""

    __slots__ = ("_pop", "_push", "_pushed")

    def __init__(self, push: Callable[[], bool], pop: Callable[[], None]) -> None:
        self._push = push
        self._pop = pop
        self._pushed = False

    def __enter__(self) -> None:
        self._pushed = self._push()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pushed:
            self._pop()
