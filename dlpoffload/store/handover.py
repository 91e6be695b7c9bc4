"""Hand a descriptor to other processes of the same user that know nothing but a name.

The name is an abstract address of a Unix socket: no file stands for it, and the kernel drops it with the process that
has it. It is taken before the work begins, so that others wait for a process that works and are told when that one
dies; the descriptor is passed once there is something to pass, to whoever the kernel says is the same user.

Source: ``unix(7)``: abstract addresses, SCM_RIGHTS, SO_PEERCRED.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import Final

from ..errors import CheckpointError, OffloadError, SpecError

__all__ = ["Handover", "received"]

_ADDRESS_NBYTES: Final = 107
_BACKLOG: Final = 4096
"""Processes that may wait for the descriptor; the system has a bound of its own (net.core.somaxconn)."""
_GREETING: Final = b"dlpoffload 1"
_RETRY_S: Final = (0.005, 0.25)
_NOBODY: Final = (errno.ECONNREFUSED, errno.EAGAIN)
"""Nobody has the name, or more wait there than may."""


class Handover:
    """A name, and a thread that hands a descriptor to whoever asks for it. *Lifetime*: until `close`.

    Raises
    ------
    SpecError
        The name means nothing.
    CheckpointError
        Another process of this user has it.
    """

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        address = _address(name)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(address)
            self._listener.listen(_BACKLOG)
        except OSError as error:
            self._listener.close()
            raise CheckpointError(
                f'"{name}" cannot be shared: {error.strerror}; another process shares that name already, so open it '
                "there (open_shared), or choose another"
            ) from error
        _handovers.add(self)

    def serve(self, descriptor: int) -> None:
        """Begin to hand out a descriptor, which stays the caller's and open."""
        self._thread = threading.Thread(
            target=_serve, args=(self._listener, descriptor), name="dlpoffload-share", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Give the name up. Who waits by then is served, or told if there is nothing to serve. Idempotent."""
        if self._pid == os.getpid():  # a forked child has the same socket, and must not end it for its parent
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join()
        self._listener.close()


_handovers: weakref.WeakSet[Handover] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # While a child holds the socket the name outlives its parent, and nobody answers there.
    for handover in list(_handovers):
        handover.close()
    _handovers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _serve(listener: socket.socket, descriptor: int) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBADF):
                return  # closed
            time.sleep(_RETRY_S[-1])  # no descriptor is free, or the other side has gone
            continue
        with connection, suppress(OSError):
            if _peer(connection)[1] == os.geteuid():
                socket.send_fds(connection, [_GREETING], [descriptor])


def received(name: str, timeout_s: float) -> int:
    """Ask for the descriptor under a name, and wait until it is there; it is the caller's to close.

    Raises
    ------
    CheckpointError
        Nobody has the name, or another user; the process that has it ends before there is something to pass, or has
        nothing in time.
    """
    deadline = time.monotonic() + timeout_s
    with _connected(name, deadline, timeout_s) as connection:
        pid, uid = _peer(connection)
        if uid != os.geteuid():
            raise CheckpointError(
                f'"{name}" is held by process {pid} of user {uid}, and this process is user {os.geteuid()}\'s; share '
                "and open it as one user"
            )
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            greeting, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
        except TimeoutError as error:
            raise CheckpointError(
                f'"{name}" was not filled within {timeout_s:g} s by process {pid}, which is still there; wait longer '
                "(timeout_s)"
            ) from error
        except OSError:
            greeting, descriptors = b"", []
        if greeting == _GREETING and descriptors:
            return int(descriptors[0])
    for descriptor in descriptors:
        os.close(descriptor)
    raise CheckpointError(
        f'"{name}" was never filled: process {pid} ended, or failed, or gave the name up before it was; see what '
        "became of it, and share it again"
    )


def _connected(name: str, deadline: float, timeout_s: float) -> socket.socket:
    address, pause = _address(name), _RETRY_S[0]
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            connection.connect(address)
        except OSError as error:
            connection.close()
            if error.errno not in _NOBODY and not isinstance(error, TimeoutError):
                raise CheckpointError(f'"{name}" cannot be asked for: {error.strerror}') from error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
        if time.monotonic() + pause > deadline:
            raise CheckpointError(
                f'no process of this user shares anything under the name "{name}", and none came within {timeout_s:g} '
                "s; it shares as long as the checkpoint that `share` gave it is open"
            )
        time.sleep(pause)
        pause = min(2 * pause, _RETRY_S[-1])


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel knows them."""
    nbytes = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, nbytes))
    return pid, uid


def _address(name: str) -> bytes:
    if sys.platform != "linux":
        raise OffloadError("sharing memory between processes by name needs the abstract sockets of Linux")
    if isinstance(name, str) and name and "/" not in name and "\0" not in name:
        # What UTF-8 has not is of no use to another process, which has to say it.
        with suppress(UnicodeEncodeError):
            address = f"\0dlpoffload/{os.geteuid()}/{name}".encode()
            if len(address) <= _ADDRESS_NBYTES:
                return address
    raise SpecError(
        f"{name!r} is no name to share under; use one of at most {_ADDRESS_NBYTES - 24} bytes without slashes"
    )
