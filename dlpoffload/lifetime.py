"""Who keeps memory alive, and who frees it.

Memory is freed by Python code (it calls the driver) but is given up anywhere: in a deleter that a framework calls on
a thread of its own, in a capsule's destructor while an exception is pending, after the interpreter began to end. So
the giving-up is native and only counts (`_native.Owner`); the token of an owner that nobody uses any more lands on a
reclaim list, and the freeing is done here: by our own calls (`drain`) and by one reclaim thread. Once the interpreter
ends the list is left to the process's exit.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass

from . import _native
from ._native import Owner

__all__ = [
    "Owner",
    "Resource",
    "drain",
    "keep",
    "live",
    "lock",
    "own",
    "owned_by",
    "paused",
    "release_now",
    "trace_allocations",
    "undo",
]


_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Resource:
    """Memory that is not freed yet: what it is, how large, and how to free it.

    Attributes
    ----------
    owner : str
        For whom it was made, in the words of `owned_by`.
    origin : str
        File and line that asked for it, where `trace_allocations` is on; else empty.
    """

    kind: str
    nbytes: int
    release: Callable[[], None]
    owner: str = ""
    origin: str = ""


_owner: ContextVar[str] = ContextVar("dlpoffload_owner", default="")
_asked: ContextVar[str | None] = ContextVar("dlpoffload_asked", default=None)
_tracing = os.environ.get("DLPOFFLOAD_TRACE", "") not in ("", "0")


@contextmanager
def owned_by(owner: str) -> Iterator[None]:
    """Let memory made inside the block, on this thread, be accounted to `owner`; the outermost block counts."""
    token = _owner.set(_owner.get() or owner)
    try:
        yield
    finally:
        _owner.reset(token)


def trace_allocations(on: bool) -> None:
    """Remember for each buffer made from now on which file and line asked for it.

    Off by default, unless the environment says ``DLPOFFLOAD_TRACE=1``.
    """
    global _tracing
    _tracing = on


def context_of_thread() -> Context:
    """What a thread is to run in so that memory is accounted to whoever starts it, and to the line that did."""
    context = copy_context()
    context.run(_asked.set, _origin())
    return context


def _origin() -> str:
    """The nearest caller outside of this package."""
    if not _tracing:
        return ""
    if (asked := _asked.get()) is not None:
        return asked
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


lock = threading.RLock()
"""Held while memory is freed and while it is registered.

One lock for both, and re-entrant: the garbage collector may run a finalizer that closes a buffer in the middle of
either, on the thread that holds it.
"""

# Single operations on these are atomic, so that an import need not wait for a release that waits for the device.
_resources: dict[int, Resource] = {}
_kept: list[Resource] = []
_inherited: list[Resource] = []
_tokens = itertools.count(1)
_pending: deque[int] = deque()
_pauses = 0
_thread: threading.Thread | None = None
_thread_pid = 0
_thread_lock = threading.RLock()
_stopping = False


def own(kind: str, nbytes: int, release: Callable[[], None]) -> _native.Owner:
    """Make the owner of one piece of memory.

    Parameters
    ----------
    kind
        What it is, for accounting: "pinned", "mapped file", "pageable", "device", "import".
    nbytes
        Its bytes.
    release
        Frees the memory. Called once, on the thread that drains, after the owner and everything that it counts are
        gone; at once when no owner can be made. It must not refer to the owner.
    """
    try:
        _start_thread()
        token = next(_tokens)
        owner = _native.Owner(token)
    except BaseException as error:
        undo(kind, nbytes, release, error)
        raise
    _resources[token] = Resource(kind, nbytes, release, _owner.get(), _origin())
    return owner


def undo(kind: str, nbytes: int, release: Callable[[], None], error: BaseException) -> None:
    """Free what was made before `error` was raised, which is what the caller is to hear.

    Where that fails, too, the error gets a note, and the memory is kept.
    """
    try:
        release()
    except Exception as refused:
        error.add_note(f"and what was made before could not be freed, so it stays allocated: {refused}")
        keep(kind, nbytes, release)


def keep(kind: str, nbytes: int, release: Callable[[], None]) -> None:
    """Keep memory that the driver would not take back, with all that `release` refers to, and count it in `live`."""
    _kept.append(Resource(kind, nbytes, release, _owner.get(), _origin()))


def release_now(owner: _native.Owner) -> bool:
    """Give an owner up and free its memory on this thread.

    What `release` raises is raised here, and the memory then stays allocated and stays in `live`: it may still be
    registered, and must not be mapped anew.

    Returns
    -------
    bool
        False when something still uses the memory: it is freed when the last user is gone.
    """
    with lock:  # held over the release, so that no other thread returns from a drain with this memory half freed
        owner.release()
        if owner.users:
            return False
        _release(owner.token)
    drain()
    return True


def drain() -> None:
    """Free everything on the reclaim list, unless a capture is under way (`paused`)."""
    with lock:
        if _pauses:
            return
        while True:
            # Again and again: a release may drop the last use of something else. And not into a local list: an
            # interrupt in the middle must not lose the rest.
            _pending.extend(_native.reclaim_drain())
            if not _pending:
                return
            try:
                _release(_pending.popleft())
            except Exception as error:
                # There is no caller to raise to: the last user of this memory is gone already.
                error.add_note("while freeing memory that nobody uses any more; it stays allocated")
                _Unraisable(error)


def live() -> list[Resource]:
    """Everything that is not freed yet, oldest first, after what could not be freed."""
    return [*_kept, *_resources.copy().values()]


@contextmanager
def paused() -> Iterator[None]:
    """Hold reclaims back while a graph is captured: unregistering memory on another thread breaks the capture.

    Waits for a release that is under way.
    """
    global _pauses
    with lock:
        _pauses += 1
    try:
        yield
    finally:
        with lock:
            _pauses -= 1
        _native.reclaim_wake()


def _release(token: int) -> None:
    resource = _resources.pop(token, None)
    if resource is None:
        return  # release_now was quicker
    try:
        resource.release()
    except BaseException:
        _kept.append(resource)
        raise


class _Unraisable:
    """Hands an error to `sys.unraisablehook`, whose default takes no arguments but the interpreter's own."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


def _start_thread() -> None:
    global _thread, _thread_pid
    if _stopping or _thread_pid == os.getpid():
        return  # after a fork the child has the object, but not the thread
    with _thread_lock:
        if _thread_pid == os.getpid():
            return
        _thread = threading.Thread(target=_reclaim, name="dlpoffload-reclaim", daemon=True)
        _thread_pid = os.getpid()
        try:
            _thread.start()
        except BaseException:
            _thread_pid = 0
            raise


def _reclaim() -> None:
    while not _stopping:
        if _native.reclaim_wait(60.0):
            drain()
            if _pauses:
                # The list is not empty, so the wait would return at once; the end of the pause wakes it again.
                threading.Event().wait(0.01)


def _stop() -> None:
    global _stopping
    _stopping = True
    if _thread is not None and _thread_pid == os.getpid():
        _native.reclaim_wake()
        _thread.join()


def _after_fork_in_child() -> None:
    # Another thread may have held the locks at the fork. What the parent owned is the parent's to free: the child never
    # releases it, and keeps what it refers to, since views of a producer's memory are good in the child, too.
    global lock, _thread_lock, _pauses
    lock = threading.RLock()
    _thread_lock = threading.RLock()
    _pauses = 0
    _inherited.extend([*_kept, *_resources.values()])
    _pending.clear()
    _kept.clear()
    _resources.clear()


atexit.register(_stop)
os.register_at_fork(after_in_child=_after_fork_in_child)
