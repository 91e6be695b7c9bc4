"""Files that are memory and have no name (memfd): one process fills and seals one, and hands its descriptor on.

What is sealed can be neither written, cut off nor made longer, by nobody. It is gone with the last descriptor and the
last mapping, however their processes end: nothing is left in ``/dev/shm``.

Source: ``memfd_create(2)``, and "File sealing" in ``F_ADD_SEALS(2const)``.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import time
from typing import Final

from . import _native, lifetime
from .blocks import Block, check_taking
from .errors import CheckpointError, HostMemoryError, OffloadError
from .pages import host_threads, refused
from .seals import is_sealed, seals_of
from .spec import format_nbytes

__all__ = ["check_sealed", "create_file", "is_in_memory", "map_to_fill", "seal"]

_MFD_NOEXEC_SEAL: Final = 8
"""Linux 6.3; Python names it since 3.13 only, and never where the headers it was built with do not."""
_SEAL_TRIES: Final = 40
_SEAL_WAIT_S: Final = 0.05


def create_file(name: str, nbytes: int) -> int:
    """Allocate an anonymous file of zeros, of mode 0600, whose length is sealed. `name` is what ``/proc`` shows.

    Raises
    ------
    OffloadError
        The system has no such files.
    HostMemoryError
        The machine has not that much to give.
    """
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        raise OffloadError("sharing memory between processes needs memfd_create, which only Linux has")
    check_taking(nbytes)
    try:
        descriptor = _create(name)
    except OSError as error:
        raise HostMemoryError(f"the system makes no files in memory: {error.strerror}", nbytes=nbytes) from error
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(descriptor)
        raise refused(nbytes, "share", error) from error
    return descriptor


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)  # a kernel before 6.3


def map_to_fill(descriptor: int, nbytes: int) -> Block:
    """Map such a file, writable, with all of its pages there; it is unmapped with the block.

    Raises
    ------
    HostMemoryError
        The system has not that much.
    """
    try:
        mapping = mmap.mmap(descriptor, nbytes)
    except OSError as error:
        raise refused(nbytes, "map", error) from error
    pointer = _native.buffer_pointer(mapping)
    try:
        _native.dont_fork(pointer, nbytes)  # a child that had it mapped, too, would keep it from being sealed
        _native.populate(pointer, nbytes, host_threads())
    except OSError as error:
        mapping.close()
        raise refused(nbytes, "populate", error) from error
    owner = lifetime.own("shared", nbytes, mapping.close)
    return Block(owner, None, nbytes, pointer, None, pinned=False)


def seal(descriptor: int) -> int:
    """Forbid every write, from now on and to everybody; gives a descriptor that reads only.

    Raises
    ------
    OffloadError
        It is mapped to be written somewhere.
    """
    for left in reversed(range(_SEAL_TRIES)):
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
            break
        except OSError as error:
            # The kernel refuses, too, while somebody holds a page for a moment (compaction, a read under way).
            if error.errno != errno.EBUSY or not left:
                raise OffloadError(
                    f"shared memory cannot be sealed: {error.strerror}; something in this process, or a child that it "
                    "forked, has it mapped writable"
                ) from error
            time.sleep(_SEAL_WAIT_S)
    # Mapped shared through a descriptor that can write, sealed memory was refused before Linux 6.7.
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def check_sealed(descriptor: int, what: str) -> None:
    """Raise CheckpointError unless it is this user's file in memory, whole, and can never change."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{what} is no file; pass what `share` made")
    if status.st_uid != os.geteuid():
        raise CheckpointError(
            f"{what} belongs to user {status.st_uid}, and this process is user {os.geteuid()}'s; share it as one user"
        )
    if not is_sealed(descriptor):
        raise CheckpointError(
            f"{what} of {format_nbytes(status.st_size)} is not sealed: whoever fills it is not done, or `share` did "
            "not make it; wait for it with open_shared and its name"
        )


def is_in_memory(descriptor: int) -> bool:
    """Whether a file is nothing but memory (memfd, tmpfs), and all of it is there.

    Its pages are no page cache that could be dropped: the system counts them as used already, pinned or not.
    """
    status = os.fstat(descriptor)
    return seals_of(descriptor) is not None and status.st_blocks * 512 >= status.st_size
