"""`Background`: pinning that goes on step by step on a thread, with progress, and that can be cancelled."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Literal

from .errors import ClosedError, OffloadError
from .lifetime import context_of_thread
from .spec import format_nbytes

__all__ = ["Background", "Progress"]

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes of the whole."""


class Background:
    """Work on a thread of its own, in steps of so many bytes each.

    Attributes
    ----------
    nbytes : int
        Bytes of all steps.
    """

    def __init__(
        self, steps: Iterable[tuple[int, Callable[[], object]]], nbytes: int, progress: Progress | None = None
    ) -> None:
        self.nbytes = nbytes
        self._steps = iter(steps)
        self._progress = progress
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._done_nbytes = 0
        self._error: BaseException | None = None
        self._ended = False
        context = context_of_thread()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="dlpoffload-pin", daemon=True)

    def start(self) -> None:
        """Let the thread begin."""
        _running.add(self)
        self._thread.start()

    @property
    def done_nbytes(self) -> int:
        """Bytes that are there by now."""
        return self._done_nbytes

    @property
    def state(self) -> Literal["running", "done", "cancelled", "failed"]:
        """How far it is."""
        with self._changed:
            if not self._ended:
                return "running"
            if self._error is not None:
                return "failed"
            return "done" if self._done_nbytes >= self.nbytes else "cancelled"

    def cancel(self) -> None:
        """Stop behind the step that is under way. Idempotent; what is there stays there."""
        self._cancelled.set()

    def cancel_with(self, owner: object) -> None:
        """Cancel when `owner` is dropped, or at the end of the process: nobody waits for the rest."""
        # Not by `self.cancel`: what a finalizer holds lives as long as its owner, and a traceback of the error that
        # wait() raised holds the frame, and with it the owner.
        weakref.finalize(owner, self._cancelled.set)

    def wait(self, nbytes: int | None = None, timeout_s: float | None = None) -> bool:
        """Block until the first `nbytes` are there; by default all, and the last call of `progress` is done, too.

        Returns
        -------
        bool
            False when the time ran out.

        Raises
        ------
        ClosedError
            It was cancelled before them.
        HostMemoryError, CheckpointError, …
            What the thread failed with.
        """
        wanted = self.nbytes if nbytes is None else min(nbytes, self.nbytes)
        if self._pid != os.getpid() and self._done_nbytes < wanted:
            raise ClosedError("a forked child has no thread that pins; allocate in the child, or wait before the fork")
        # From `progress` nobody waits for its own end, and in a forked child for that of a thread it has not.
        to_end = nbytes is None and self._thread is not threading.current_thread() and self._pid == os.getpid()
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._ended or (not to_end and self._done_nbytes >= wanted), timeout_s
            ):
                return False
            if self._done_nbytes >= wanted and (nbytes is not None or self._error is None):
                return True
            if self._error is not None:
                raise self._error.with_traceback(None)  # whose frames are those of the last wait
        raise ClosedError(
            f"pinning was cancelled after {format_nbytes(self._done_nbytes)} of {format_nbytes(self.nbytes)}, and "
            f"the first {format_nbytes(wanted)} were asked for; make a new one"
        )

    def join(self) -> None:
        """Block until the thread has ended, however it did."""
        if self._thread is not threading.current_thread() and self._pid == os.getpid():
            self._thread.join()

    def _run(self) -> None:
        try:
            for nbytes, step in self._steps:
                if self._cancelled.is_set():
                    break
                step()
                with self._changed:
                    self._done_nbytes += nbytes
                    self._changed.notify_all()
                if self._progress is not None:
                    self._progress(self._done_nbytes, self.nbytes)
        except BaseException as error:  # a thread has nobody else to raise an interrupt to
            if not isinstance(error, OffloadError):
                error.add_note("while pinning in the background; wait() raises it")
            self._error = error.with_traceback(None)  # whose frames would hold the memory
        finally:
            self._steps = iter(())  # lets go of the memory
            with self._changed:
                self._ended = True
                self._changed.notify_all()


_running: weakref.WeakSet[Background] = weakref.WeakSet()


def _stop_all() -> None:
    """End every thread before the interpreter ends, and the driver with it."""
    for background in list(_running):
        background.cancel()
    for background in list(_running):
        background.join()


atexit.register(_stop_all)
