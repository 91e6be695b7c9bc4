"""Pin one buffer chunk by chunk on a thread, so that its front can be used while its end is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from . import _native, lifetime
from .background import Background, Progress
from .blocks import Block, mapped_pages, pin_pages, unmap_pages
from .driver import Driver
from .errors import RegistrationError, SpecError
from .pages import Pages, PinOptions
from .promises import Promise
from .registrations import MAX_REGISTRATION, Registration, registrations
from .spec import format_nbytes

__all__ = ["allocate_chunked"]

_WHOLE: Final = 2 << 20


def allocate_chunked(
    nbytes: int, driver: Driver, options: PinOptions, chunk_nbytes: int, progress: Progress | None
) -> tuple[Block, Background]:
    """Map `nbytes` and prepare to populate and register them in chunks of `chunk_nbytes`; the caller starts it."""
    if chunk_nbytes == 0 or chunk_nbytes % _WHOLE or chunk_nbytes > MAX_REGISTRATION:
        raise SpecError(
            f"chunk_nbytes={chunk_nbytes}; a chunk is a multiple of 2 MiB, at most {format_nbytes(MAX_REGISTRATION)}"
        )
    used: list[Registration] = []
    promise = Promise()
    with mapped_pages(nbytes, driver, options, promise) as pages:
        if pages.is_hugetlb and chunk_nbytes % pages.page_nbytes:
            raise SpecError(
                f"chunk_nbytes={chunk_nbytes} is no multiple of a page of {format_nbytes(pages.page_nbytes)}"
            )

    def release() -> None:
        with lifetime.lock:
            registrations.release(used)
        unmap_pages(pages, nbytes, driver)

    owner = lifetime.own("pinned", nbytes, release)
    between = tuple(pages.pointer + at for at in range(chunk_nbytes, nbytes, chunk_nbytes))
    block = Block(owner, driver, nbytes, pages.pointer, None, pinned=True, borders=between, notes=tuple(pages.notes))
    # The thread is a user of the memory: it is not freed before the thread has ended.
    steps = _chunks(block, pages, chunk_nbytes, used, promise, owner.reference())
    return block, Background(steps, nbytes, progress)


def _chunks(
    block: Block,
    pages: Pages,
    chunk_nbytes: int,
    used: list[Registration],
    promise: Promise,
    _user: _native.Reference,
) -> Iterator[tuple[int, Callable[[], None]]]:
    try:
        for at in range(0, block.nbytes, chunk_nbytes):
            nbytes = min(chunk_nbytes, block.nbytes - at)
            yield nbytes, partial(_pin, block, pages, at, nbytes, used, promise)
    finally:
        promise.keep()


def _pin(block: Block, pages: Pages, at: int, nbytes: int, used: list[Registration], promise: Promise) -> None:
    driver = block.driver
    assert driver is not None
    used += pin_pages(pages, at, nbytes, driver, promise)
    if not driver.capabilities().map_host_memory:
        return
    pointer = driver.host_device_pointer(pages.pointer + at)
    if block.device_pointer is None:
        block.device_pointer = pointer
    elif pointer - block.device_pointer != at:
        raise RegistrationError(
            f"on {driver.device} the device addresses of two chunks are not adjacent; allocate without background=True"
        )
