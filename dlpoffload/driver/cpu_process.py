"""What becomes of threads when the process forks or ends: the CPU driver's machines are told in time."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Protocol

__all__ = ["Machine", "track"]


class Machine(Protocol):
    """Something with threads, whose state is consistent while `lock` is held."""

    lock: threading.RLock

    def stop(self) -> None:
        """The interpreter ends: end the threads, whatever is left to do."""
        ...

    def after_fork_in_child(self) -> None:
        """The threads are gone, and the lock is held by a thread that is gone too: make both anew."""
        ...


_machines: weakref.WeakSet[Machine] = weakref.WeakSet()
_held: list[Machine] = []  # over a fork


def track(machine: Machine) -> None:
    """Tell `machine` of forks and of the end, for as long as somebody else holds it."""
    _machines.add(machine)


def _before_fork() -> None:
    for machine in list(_machines):
        machine.lock.acquire()
        _held.append(machine)


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().lock.release()


def _after_fork_in_child() -> None:
    while _held:
        _held.pop().after_fork_in_child()


@atexit.register
def _stop_all() -> None:
    for machine in list(_machines):
        machine.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
