"""`Readers`: a few threads that read, for one caller that waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

__all__ = ["Readers"]


class Readers:
    """Threads that make calls in the order given; none is left when the ``with`` block ends.

    Not a `ThreadPoolExecutor`: that takes no work once the main thread has ended, though other threads still run. They
    are daemons, for else the interpreter would wait for them, and with them for all that a thread in the background
    still has to read. Where no thread can be started the caller makes the calls.

    Attributes
    ----------
    pending : int
        Calls whose results were not taken yet.
    """

    def __init__(self, most: int) -> None:
        self.pending = 0
        self._most = most
        self._threads: list[threading.Thread] = []
        self._calls: SimpleQueue[Callable[[], int] | None] = SimpleQueue()
        self._ended: SimpleQueue[int | BaseException] = SimpleQueue()

    def submit(self, call: Callable[[], int]) -> None:
        """Let a thread make a call."""
        if len(self._threads) < self._most:
            self._start()
        if self._threads:
            self._calls.put(call)
        else:
            self._ended.put(call())
        self.pending += 1

    def results(self, most: int, *, block: bool) -> Iterator[int]:
        """What calls gave that have ended, of so many when `block`. Raises what a call raised."""
        for _ in range(most):
            try:
                result = self._ended.get(block)
            except Empty:
                return
            self.pending -= 1
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:
                    del result  # which holds this frame by its traceback
            yield result

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"dlpoffload-read_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # too many of them, or the interpreter ends (since Python 3.12)
            self._most = len(self._threads)
        else:
            self._threads.append(thread)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._ended.put(call())
            except BaseException as error:  # the caller raises it
                self._ended.put(error)
            del call  # lets go of the memory while it waits for the next one

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while True:  # what nobody has begun
            try:
                self._calls.get_nowait()
            except Empty:
                break
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
