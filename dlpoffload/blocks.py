"""Blocks of memory with an owner: mapped pages, registered ranges, device memory.

A block is freed when its owner and everything that uses it are gone: first the last reader, then the registration,
then the mapping. `memory` wraps blocks in buffers; `view` uses them for the copies that a consumer asked for.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from . import _native, lifetime
from .driver import Driver
from .errors import CudaError, HostMemoryError, RegistrationError
from .limits import PAGE_TABLE_ENTRY_NBYTES, check_host_budget, host_limits
from .maps import Access
from .pages import Pages, PinOptions, map_pages, populate, refused
from .promises import Promise, promised, promising
from .registrations import (
    MAX_REGISTRATION,
    Registration,
    borders,
    pinned_file_nbytes,
    pinned_nbytes,
    registrations,
)
from .spec import format_nbytes
from .wall import check_wall

__all__ = [
    "Block",
    "adopt_device",
    "allocate_device",
    "allocate_pageable",
    "allocate_pinned",
    "check_pinning",
    "check_taking",
    "mapped_pages",
    "pin_pages",
    "pinned_block",
    "register",
    "unmap_pages",
]

_UNCHECKED: Final = 1 << 20
_PAGE: Final = mmap.PAGESIZE


@dataclass(eq=False, slots=True)
class Block:
    """One piece of memory and its owner; `host_pointer` or `device_pointer` is None where that side cannot reach.

    Attributes
    ----------
    borders : tuple of int
        Host addresses inside where one registration ends and the next begins: no single copy may cross one.
    notes : tuple of str
        What could not be had when it was allocated.
    """

    owner: _native.Owner
    driver: Driver | None
    nbytes: int
    host_pointer: int | None
    device_pointer: int | None
    pinned: bool
    read_only: bool = False
    borders: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def pieces(self, byte_offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Byte offset and bytes of the copies that move a range of this block, none across a border."""
        end = byte_offset + nbytes
        for border in (b - (self.host_pointer or 0) for b in self.borders):
            if byte_offset < border < end:
                yield byte_offset, border - byte_offset
                byte_offset = border
        yield byte_offset, end - byte_offset


def check_pinning(
    nbytes: int,
    driver: Driver,
    host_budget: int | None = None,
    *,
    there_nbytes: int = 0,
    promise: Promise | None = None,
) -> None:
    """Refuse, with the figures, what this machine or `host_budget` has not; before anything is mapped.

    Of the bytes about to be pinned, `there_nbytes` are memory already that the system counts as used: for them it only
    has to give page tables. With a `promise` they count as gone from now on, until it is kept or dropped: two threads
    are never promised the same bytes.
    """
    lifetime.drain()  # first: what waits to be freed is not missing
    with promising:
        (others, others_new), pinned, limits = promised(), pinned_nbytes(), host_limits()
        new_nbytes = nbytes - there_nbytes + there_nbytes // _PAGE * PAGE_TABLE_ENTRY_NBYTES
        check_host_budget(
            nbytes if host_budget is not None else new_nbytes,
            limits,
            pinned_nbytes=pinned,
            pinned_file_nbytes=pinned_file_nbytes(),
            promised_nbytes=others if host_budget is not None else others_new,
            host_budget=host_budget,
        )
        check_wall(nbytes, pinned, driver, limits)
        if promise is not None:
            promise.make(nbytes, new_nbytes)


def check_taking(nbytes: int) -> None:
    """The same for memory that is taken and not pinned."""
    check_host_budget(nbytes, pinned_file_nbytes=pinned_file_nbytes(), promised_nbytes=promised()[1])


@contextmanager
def mapped_pages(nbytes: int, driver: Driver, options: PinOptions, promise: Promise) -> Iterator[Pages]:
    """Map anonymous pages after a look at the limits, and unmap them when the block raises."""

    def check() -> None:
        check_pinning(nbytes, driver, options.host_budget, promise=promise)

    try:
        pages = map_pages(nbytes, driver, options, check)
        try:
            yield pages
        except BaseException as error:
            lifetime.undo("pinned", nbytes, partial(unmap_pages, pages, nbytes, driver), error)
            raise
    except BaseException:
        promise.keep()  # now: whoever keeps the error keeps the promise
        raise


def unmap_pages(pages: Pages, nbytes: int, driver: Driver) -> None:
    """Unmap pages, unless the driver would not take a registration back: what is registered must not be mapped anew."""
    if stuck := registrations.stuck(pages.pointer, pages.pointer + nbytes, driver):
        raise RegistrationError(
            f"{format_nbytes(nbytes)} at {pages.pointer:#x} stay allocated: not all of them could be unpinned [{stuck}]"
        )
    _native.unmap(pages.pointer, pages.mapped_nbytes)


def pin_pages(pages: Pages, byte_offset: int, nbytes: int, driver: Driver, promise: Promise) -> list[Registration]:
    """Populate and register a range of anonymous pages; HostMemoryError when the machine has not that much."""
    populate(pages, byte_offset, nbytes)
    start = pages.pointer + byte_offset
    try:
        with lifetime.lock:
            used = registrations.acquire(start, start + nbytes, driver, read_only=False)
            promise.keep(nbytes)
            return used
    except RegistrationError as cause:
        raise HostMemoryError(
            f"{format_nbytes(nbytes)} of host memory could not be pinned for {driver.device}: {cause}", nbytes=nbytes
        ) from cause


def allocate_pinned(nbytes: int, driver: Driver, options: PinOptions | None = None) -> Block:
    """Map, populate and register `nbytes` of anonymous memory: pinned and mapped, exactly as large as asked.

    Source: huge pages populated before they are registered are pinned about twice as fast as cuMemHostAlloc.
    """
    lifetime.drain()
    promise = Promise()
    with mapped_pages(nbytes, driver, options or PinOptions(), promise) as pages:
        used = pin_pages(pages, 0, nbytes, driver, promise)

    def release() -> None:
        with lifetime.lock:
            registrations.release(used)
        unmap_pages(pages, nbytes, driver)

    return pinned_block(pages.pointer, nbytes, driver, used, release, notes=tuple(pages.notes))


def register(pointer: int, nbytes: int, driver: Driver, *, read_only: bool, access: Access, keepalive: object) -> Block:
    """Pin memory in place, or adopt it when it is pinned already; `keepalive` is dropped after it is unpinned."""
    if access is Access.READ_ONLY:  # pages of a file, which pinning takes from everybody else
        check_pinning(nbytes, driver)
    lifetime.drain()
    kept = [keepalive]
    try:
        with lifetime.lock:
            used, read_only = _pin(pointer, nbytes, driver, read_only or access is Access.READ_ONLY, access)
    except BaseException:
        if registrations.stuck(pointer, pointer + nbytes, driver):
            lifetime.keep("pinned", nbytes, kept.clear)
        raise

    def release() -> None:
        with lifetime.lock:
            registrations.release(used)
        kept.clear()  # only now: what is registered must not be freed

    return pinned_block(pointer, nbytes, driver, used, release, read_only=read_only)


def _pin(pointer: int, nbytes: int, driver: Driver, read_only: bool, access: Access) -> tuple[list[Registration], bool]:
    """The registrations that cover these bytes, none when somebody else pinned them, and whether they are read-only."""
    if _pinned_by_others(pointer, nbytes, driver):
        return [], read_only
    end = pointer + nbytes
    only = access is Access.READ_ONLY
    try:
        return registrations.acquire(pointer, end, driver, read_only=only, in_page_cache=only), read_only
    except RegistrationError as error:
        cause = error.__cause__
        for_want_of_memory = isinstance(cause, CudaError) and cause.name == "CUDA_ERROR_OUT_OF_MEMORY"
        if access is not Access.SHARED_FILE or for_want_of_memory:
            raise
        # Most file systems' pages are pinned for reading only, even through a writable mapping; tmpfs's are not.
        return registrations.acquire(pointer, end, driver, read_only=True, in_page_cache=True), True


def pinned_block(
    pointer: int,
    nbytes: int,
    driver: Driver,
    used: list[Registration],
    release: Callable[[], None],
    *,
    kind: str = "pinned",
    read_only: bool = False,
    notes: tuple[str, ...] = (),
) -> Block:
    """The block of a range that `used` pins; `release` is called at once when there can be none."""
    try:
        device_pointer = _device_pointer(pointer, nbytes, driver, used)
    except BaseException as error:
        lifetime.undo(kind, nbytes, release, error)
        raise
    owner = lifetime.own(kind, nbytes, release)
    between = borders(used, pointer)
    return Block(owner, driver, nbytes, pointer, device_pointer, True, read_only, between, notes)


def _device_pointer(pointer: int, nbytes: int, driver: Driver, used: list[Registration]) -> int | None:
    """The device's address of a pinned range; None where the device cannot map host memory."""
    if not driver.capabilities().map_host_memory:
        return None
    first = driver.host_device_pointer(pointer)
    for border in borders(used, pointer):
        if driver.host_device_pointer(border) - first != border - pointer:
            raise RegistrationError(
                f"{format_nbytes(nbytes)} lie in more than one registration, and on {driver.device} their device "
                "addresses are not adjacent; use buffers that share no page, of at most "
                f"{format_nbytes(MAX_REGISTRATION)}"
            )
    return first


def _pinned_by_others(pointer: int, nbytes: int, driver: Driver) -> bool:
    """Whether somebody else (torch, CuPy, cuMemHostAlloc) pinned the whole range already."""
    if registrations.touching(pointer, pointer + nbytes, driver):
        return False
    ends = (pointer, pointer + nbytes - 1)
    return all(driver.pointer_info(end).kind == "pinned" for end in ends)


def allocate_pageable(nbytes: int, driver: Driver | None = None) -> Block:
    """Map anonymous memory that is not pinned. With a `driver`, copies enqueued out of it end before it is unmapped."""
    if nbytes >= _UNCHECKED:  # reading the limits takes longer than a small copy
        check_taking(nbytes)
    size = max(nbytes, 1)
    try:
        pointer = _native.map_anonymous(size, _PAGE, False)
    except OSError as error:
        raise refused(nbytes, "map", error) from error

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
    try:
        pointer = driver.device_alloc(nbytes)
    except CudaError as error:
        if not error.undone:
            lifetime.keep("device", nbytes, lambda: None)  # nobody knows where it is
        raise
    owner = lifetime.own("device", nbytes, lambda: driver.device_free(pointer))
    return Block(owner, driver, nbytes, None, pointer, pinned=False)
