"""Blocks of memory with an owner: mapped pages, registered ranges, device memory.

A block is freed when its owner and everything that uses it are gone: first the last reader, then the registration,
then the mapping. `memory` wraps blocks in buffers; `view` uses them for the copies that a consumer asked for.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from . import _native, lifetime
from .driver import Driver
from .errors import HostMemoryError, RegistrationError
from .limits import check_host_budget
from .maps import Access
from .spec import aligned, format_nbytes

__all__ = [
    "MAX_REGISTRATION",
    "Block",
    "adopt_device",
    "allocate_device",
    "allocate_pageable",
    "allocate_pinned",
    "pinned_nbytes",
    "register",
]

MAX_REGISTRATION: Final = 64 << 30
"""Bytes in one registration at most: driver 580 and later refuse 512 GiB or more in one."""

_HUGE_PAGE: Final = 2 << 20
_UNCHECKED: Final = 1 << 20
_PAGE: Final = mmap.PAGESIZE


@dataclass(eq=False, slots=True)
class Block:
    """One piece of memory and its owner; `host_pointer` or `device_pointer` is None where that side cannot reach."""

    owner: _native.Owner
    driver: Driver | None
    nbytes: int
    host_pointer: int | None
    device_pointer: int | None
    pinned: bool
    read_only: bool = False


@dataclass(eq=False, slots=True)
class _Registration:
    start: int
    end: int
    driver: Driver
    read_only: bool
    count: int = 0


@dataclass(slots=True)
class _Registrations:
    """Every range of pages that we pinned, so that ranges that share pages share one counted registration.

    Used under `lifetime.lock`.
    """

    ranges: list[_Registration] = field(default_factory=list)

    def acquire(self, start: int, end: int, driver: Driver, *, read_only: bool) -> list[_Registration]:
        """Count every registration that covers pages of [start, end), making those that are missing."""
        start, end = _whole_pages(start, end)
        held = self.touching(start, end, driver)
        if not read_only and any(r.read_only for r in held):
            raise RegistrationError(
                f"the pages of {format_nbytes(end - start)} at {start:#x} are registered read-only already; "
                "close the read-only buffer first, or register this one read-only as well"
            )
        for registration in held:
            registration.count += 1  # before the driver is called: a finalizer may release others meanwhile
        made: list[_Registration] = []
        try:
            for gap_start, gap_end in _gaps(start, end, held):
                driver.host_register(gap_start, gap_end - gap_start, read_only=read_only)
                made.append(_Registration(gap_start, gap_end, driver, read_only, count=1))
                self.ranges.append(made[-1])
        except BaseException:
            self.release(held + made)
            raise
        return sorted(held + made, key=lambda r: r.start)

    def release(self, used: list[_Registration]) -> None:
        """Give up one count of each; what the driver will not unregister stays in the table, and is raised."""
        refused: Exception | None = None
        for registration in reversed(used):
            registration.count -= 1
            if registration.count == 0:
                try:
                    registration.driver.host_unregister(registration.start)
                except Exception as error:
                    refused = refused or error
                else:
                    self.ranges.remove(registration)
        if refused is not None:
            raise refused

    def touching(self, start: int, end: int, driver: Driver) -> list[_Registration]:
        """Those of this driver that share a page with [start, end), in order."""
        start, end = _whole_pages(start, end)
        same = (r for r in self.ranges if r.driver.platform == driver.platform)
        return sorted((r for r in same if r.start < end and start < r.end), key=lambda r: r.start)

    def nbytes(self) -> int:
        return sum(r.end - r.start for r in self.ranges.copy())


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    return start // _PAGE * _PAGE, aligned(end, _PAGE)


def _gaps(start: int, end: int, held: list[_Registration]) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that no registration covers, each at most `MAX_REGISTRATION` long."""
    borders = [(r.start, r.end) for r in held] + [(end, end)]
    at = start
    for taken_start, taken_end in borders:
        while at < taken_start:
            stop = min(at + MAX_REGISTRATION, taken_start)
            yield at, stop
            at = stop
        at = max(at, taken_end)


_registrations = _Registrations()
# What the parent registered is not registered in a child.
os.register_at_fork(after_in_child=_registrations.ranges.clear)


def pinned_nbytes() -> int:
    """Bytes of host memory that this process has pinned through `dlpoffload`, in whole pages."""
    return _registrations.nbytes()


def allocate_pinned(nbytes: int, driver: Driver) -> Block:
    """Map, populate and register `nbytes` of anonymous memory: pinned and mapped, exactly as large as asked.

    Source: huge pages populated before they are registered are pinned about twice as fast as cuMemHostAlloc.
    """
    lifetime.drain()  # first: what waits to be freed is not missing
    check_host_budget(nbytes)
    pointer = _map(nbytes, driver)
    try:
        with lifetime.lock:
            used = _registrations.acquire(pointer, pointer + nbytes, driver, read_only=False)
    except RegistrationError as refused:
        _native.unmap(pointer, nbytes)
        raise HostMemoryError(
            f"{format_nbytes(nbytes)} of host memory could not be pinned for {driver.device}: {refused}", nbytes=nbytes
        ) from refused
    except BaseException:
        _native.unmap(pointer, nbytes)
        raise

    def release() -> None:
        with lifetime.lock:
            _registrations.release(used)
        _native.unmap(pointer, nbytes)  # only after that: what is still registered must not be mapped anew

    return _pinned_block(pointer, nbytes, driver, used, release, read_only=False)


def register(pointer: int, nbytes: int, driver: Driver, *, read_only: bool, access: Access, keepalive: object) -> Block:
    """Pin memory in place, or adopt it when it is pinned already; `keepalive` is dropped after it is unpinned."""
    lifetime.drain()
    kept = [keepalive]
    with lifetime.lock:
        used, read_only = _pin(pointer, nbytes, driver, read_only or access is Access.READ_ONLY, access)

    def release() -> None:
        with lifetime.lock:
            _registrations.release(used)
        kept.clear()

    return _pinned_block(pointer, nbytes, driver, used, release, read_only=read_only)


def _pin(
    pointer: int, nbytes: int, driver: Driver, read_only: bool, access: Access
) -> tuple[list[_Registration], bool]:
    """The registrations that cover these bytes, none when somebody else pinned them, and whether they are read-only."""
    if _pinned_by_others(pointer, nbytes, driver):
        return [], read_only
    end = pointer + nbytes
    try:
        return _registrations.acquire(pointer, end, driver, read_only=access is Access.READ_ONLY), read_only
    except RegistrationError:
        if access is not Access.SHARED_FILE:
            raise
        # Most file systems' pages are pinned for reading only, even through a writable mapping; tmpfs's are not.
        return _registrations.acquire(pointer, end, driver, read_only=True), True


def _pinned_block(
    pointer: int,
    nbytes: int,
    driver: Driver,
    used: list[_Registration],
    release: Callable[[], None],
    *,
    read_only: bool,
) -> Block:
    try:
        device_pointer = _device_pointer(pointer, nbytes, driver, used)
    except BaseException:
        release()
        raise
    owner = lifetime.own("pinned", nbytes, release)
    return Block(owner, driver, nbytes, pointer, device_pointer, pinned=True, read_only=read_only)


def _map(nbytes: int, driver: Driver) -> int:
    huge = nbytes >= _HUGE_PAGE
    try:
        pointer = _native.map_anonymous(nbytes, _HUGE_PAGE if huge else _PAGE, huge)
    except OSError as error:
        raise _refused(nbytes, "map", error) from error
    try:
        if driver.platform == "cuda":
            # The kernel copies pinned pages at fork, since the device would not follow a copy on write.
            _native.dont_fork(pointer, nbytes)
        _native.populate(pointer, nbytes, min(4, os.cpu_count() or 1) if huge else 1)
    except OSError as error:
        _native.unmap(pointer, nbytes)
        raise _refused(nbytes, "populate", error) from error
    return pointer


def _refused(nbytes: int, verb: str, error: OSError) -> HostMemoryError:
    return HostMemoryError(
        f"the system would not {verb} {format_nbytes(nbytes)} of host memory: {error.strerror}; "
        "ask for less, or free memory first (`dlpoffload doctor` shows the limits)",
        nbytes=nbytes,
    )


def _device_pointer(pointer: int, nbytes: int, driver: Driver, used: list[_Registration]) -> int | None:
    """The device's address of a pinned range; None where the device cannot map host memory."""
    if not driver.capabilities().map_host_memory:
        return None
    first = driver.host_device_pointer(pointer)
    for border in (r.start for r in used if r.start > pointer):
        if driver.host_device_pointer(border) - first != border - pointer:
            raise RegistrationError(
                f"{format_nbytes(nbytes)} lie in more than one registration, and on {driver.device} their device "
                "addresses are not adjacent; use buffers that share no page, of at most "
                f"{format_nbytes(MAX_REGISTRATION)}"
            )
    return first


def _pinned_by_others(pointer: int, nbytes: int, driver: Driver) -> bool:
    """Whether somebody else (torch, CuPy, cuMemHostAlloc) pinned the whole range already."""
    if _registrations.touching(pointer, pointer + nbytes, driver):
        return False
    ends = (pointer, pointer + nbytes - 1)
    return all(driver.pointer_info(end).kind == "pinned" for end in ends)


def allocate_pageable(nbytes: int, driver: Driver | None = None) -> Block:
    """Map anonymous memory that is not pinned. With a `driver`, copies enqueued out of it end before it is unmapped."""
    if nbytes >= _UNCHECKED:  # reading the limits takes longer than a small copy
        check_host_budget(nbytes)
    size = max(nbytes, 1)
    try:
        pointer = _native.map_anonymous(size, _PAGE, False)
    except OSError as error:
        raise _refused(nbytes, "map", error) from error

    def release() -> None:
        if driver is not None:
            driver.synchronize()
        _native.unmap(pointer, size)

    owner = lifetime.own("pageable", nbytes, release)
    return Block(owner, driver, nbytes, pointer, None, pinned=False)


def adopt_device(pointer: int, nbytes: int, driver: Driver, *, read_only: bool, keepalive: object) -> Block:
    """Take device memory that somebody else allocated; `keepalive` is dropped at the end."""
    kept = [keepalive]
    owner = lifetime.own("device", nbytes, kept.clear)
    return Block(owner, driver, nbytes, None, pointer, pinned=False, read_only=read_only)


def allocate_device(nbytes: int, driver: Driver) -> Block:
    """Allocate device memory through the driver."""
    lifetime.drain()
    pointer = driver.device_alloc(nbytes)
    owner = lifetime.own("device", nbytes, lambda: driver.device_free(pointer))
    return Block(owner, driver, nbytes, None, pointer, pinned=False)
