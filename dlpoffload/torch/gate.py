"""`Gate`: calls of an offloaded module wait while its memory is moved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from ..errors import SlotError
from .compiling import uncompiled

__all__ = ["Gate"]


class _Here(threading.local):
    """How many calls of the module this thread is inside of."""

    depth: int = 0


class Gate:
    """``with gate:`` around a call; ``with gate.moving(...):`` around what moves tensors and puts other forwards on.

    Nobody waits for a call to end, which may take what it likes and wait for the mover itself: moving is refused then.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._mover: int | None = None
        self._here = _Here()

    @uncompiled
    def __enter__(self) -> None:
        here = self._here
        if not here.depth:
            with self._changed:
                self._wait()
                self._inside += 1
        here.depth += 1

    @uncompiled
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        here = self._here
        here.depth -= 1
        if not here.depth:
            with self._changed:
                self._inside -= 1

    @contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """Let no other thread in for the length of a block.

        Raises
        ------
        SlotError
            Other threads are inside of a call.
        """
        with self._changed:
            self._wait()
            if others := self._inside - bool(self._here.depth):
                raise SlotError(
                    f"{others} other threads are inside of a call of this module, so it cannot be {what}; let them end "
                    "first"
                )
            former, self._mover = self._mover, threading.get_ident()
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            with self._changed:
                self._mover = former
                self._changed.notify_all()

    def _wait(self) -> None:
        """Until no other thread moves."""
        while self._mover not in (None, threading.get_ident()):
            self._changed.wait()
