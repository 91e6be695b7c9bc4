"""Map a range of a file, shared and read-only, and pin it: the page cache itself is what the device reads.

Never MAP_PRIVATE: pinning such a mapping with the read-only flag hangs inside the driver for ever.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from . import _native, lifetime
from .blocks import Block, check_pinning, pinned_block
from .driver import Driver
from .errors import RegistrationError
from .memfile import is_in_memory
from .pages import host_threads
from .promises import Promise
from .readers import Readers
from .registrations import Registration, registrations

__all__ = ["check_mappable", "map_file_range"]

_PAGE: Final = mmap.PAGESIZE
_PIECE_NBYTES: Final = 256 << 20
_READ_NBYTES: Final = 4 << 20
_REMEDY: Final = "read it with HostStore.copy_of"


def check_mappable(driver: Driver, path: Path) -> None:
    """Raise RegistrationError where the device cannot read pages that are mapped read-only."""
    able = driver.capabilities()
    if not able.read_only_host_register:
        raise RegistrationError(
            f'"{path}" cannot be mapped for {driver.device}: the device cannot pin read-only memory '
            f"(READ_ONLY_HOST_REGISTER_SUPPORTED); {_REMEDY}"
        )


def map_file_range(
    path: Path,
    descriptor: int,
    byte_offset: int,
    nbytes: int,
    driver: Driver,
    *,
    host_budget: int | None = None,
    done: Callable[[int], None] | None = None,
) -> tuple[Block, int]:
    """Map the pages that hold a range of a file, read them in where they are cold, and pin them.

    Parameters
    ----------
    path
        What to call the file; it is the descriptor that is mapped.
    done
        Told the bytes of each piece that is in memory.

    Returns
    -------
    Block, int
        Whole pages, read-only, and where in them the range starts.

    Raises
    ------
    RegistrationError
        The file system maps no files, the pages cannot be pinned, or the file ends before the range does. It names
        `HostStore.copy_of`; nothing stays mapped or pinned.
    HostMemoryError
        The pages are charged in full, and the machine has not that much.
    """
    check_mappable(driver, path)
    start = byte_offset // _PAGE * _PAGE
    length = byte_offset + nbytes - start
    # Memory that is a file, too, is no page cache: it was used before it was pinned.
    there = is_in_memory(descriptor)
    promise = Promise()
    check_pinning(length, driver, host_budget, there_nbytes=length if there else 0, promise=promise)
    try:
        block = _mapped_block(path, descriptor, start, length, driver, there, done)
    finally:
        promise.keep()
    return block, byte_offset - start


def _mapped_block(
    path: Path,
    descriptor: int,
    start: int,
    length: int,
    driver: Driver,
    there: bool,
    done: Callable[[int], None] | None,
) -> Block:
    try:
        # Not by Python's own mmap, which keeps a descriptor for each mapping: a large checkpoint has many chunks.
        pointer = _native.map_file(descriptor, start, length)
    except OSError as error:
        raise RegistrationError(f'"{path}" cannot be mapped: {error.strerror}; {_REMEDY}') from error
    unmap = partial(_native.unmap, pointer, length)
    try:
        _populate(path, descriptor, pointer, start, length, done)
        used = _pin(path, pointer, length, driver, there)
    except BaseException:
        if registrations.stuck(pointer, pointer + length, driver):
            lifetime.keep("mapped file", length, unmap)
        else:
            unmap()
        raise

    def release() -> None:
        with lifetime.lock:
            registrations.release(used)
        unmap()  # only now: what is registered must not be unmapped

    return pinned_block(pointer, length, driver, used, release, kind="mapped file", read_only=True)


def _pin(path: Path, pointer: int, length: int, driver: Driver, there: bool) -> list[Registration]:
    try:
        with lifetime.lock:
            return registrations.acquire(pointer, pointer + length, driver, read_only=True, in_page_cache=not there)
    except RegistrationError as error:
        raise RegistrationError(
            f'"{path}" is mapped, but {driver.device} cannot pin its pages (not every file system lets them be '
            f"pinned): {error}; {_REMEDY}"
        ) from error


def _populate(
    path: Path, descriptor: int, pointer: int, start: int, length: int, done: Callable[[int], None] | None
) -> None:
    """Bring pages in on several threads. What is there already costs little more than looking."""
    threads = host_threads()
    for at in range(0, length, _PIECE_NBYTES):
        nbytes = min(_PIECE_NBYTES, length - at)
        try:
            _native.populate(pointer + at, nbytes, threads, write=False)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL):
                _check_ends(path, descriptor, start + at + nbytes)
                raise RegistrationError(
                    f'bytes {start + at} to {start + at + nbytes} of "{path}" cannot be had where they are mapped '
                    f"({error.strerror}): the disk does not give them, or a tmpfs with holes is full; {_REMEDY}"
                ) from error
            _read(path, descriptor, start + at, nbytes, threads)  # a kernel before 5.14
        if done is not None:
            done(nbytes)


def _check_ends(path: Path, descriptor: int, end: int) -> None:
    if (found := os.fstat(descriptor).st_size) < end:
        raise RegistrationError(f'"{path}" ends at byte {found}, and {end} are wanted; fetch it again')


def _read(path: Path, descriptor: int, start: int, nbytes: int, threads: int) -> None:
    """Read a range and drop it, which leaves it in the page cache."""

    def read(at: int) -> int:
        return len(os.pread(descriptor, min(_READ_NBYTES, start + nbytes - at), at))

    with Readers(threads) as readers:
        try:
            for at in range(start, start + nbytes, _READ_NBYTES):
                readers.submit(partial(read, at))
            found = sum(readers.results(readers.pending, block=True))
        except OSError as error:
            raise RegistrationError(f'"{path}" cannot be read: {error.strerror}; check the disk') from error
    if found < nbytes:
        _check_ends(path, descriptor, start + nbytes)
        raise RegistrationError(f'"{path}" changed while it was read; fetch it again')
