"""Every range of pages that this process pinned, so that ranges that share pages share one counted registration."""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from .driver import Driver
from .errors import CudaError, RegistrationError
from .spec import aligned, format_nbytes

__all__ = [
    "MAX_REGISTRATION",
    "Registration",
    "borders",
    "pinned_file_nbytes",
    "pinned_nbytes",
    "registrations",
    "uncrossed",
]

MAX_REGISTRATION: Final = 64 << 30
"""Bytes in one registration at most: driver 580 and later refuse 512 GiB or more in one."""

_PAGE: Final = mmap.PAGESIZE


@dataclass(eq=False, slots=True)
class Registration:
    """One call of the driver that pinned pages; `in_page_cache` where they are a file's.

    Attributes
    ----------
    stuck : str
        Why the driver would not take it back; empty when nobody asked it to, or it did.
    """

    start: int
    end: int
    driver: Driver
    read_only: bool
    in_page_cache: bool
    count: int = 0
    stuck: str = ""


@dataclass(slots=True)
class _Registrations:
    """The table. Used under `lifetime.lock`.

    Of one platform no two ranges overlap, so they are found by bisection: there may be one for each of many tensors.
    """

    nbytes: int = 0
    file_nbytes: int = 0
    _of: dict[str, list[Registration]] = field(default_factory=dict)

    @property
    def ranges(self) -> list[Registration]:
        """Every registration."""
        return [registration for ranges in list(self._of.values()) for registration in ranges]

    def clear(self) -> None:
        """Forget all of them."""
        self.nbytes = self.file_nbytes = 0
        self._of.clear()

    def _add(self, new: Registration) -> None:
        bisect.insort(self._of.setdefault(new.driver.platform, []), new, key=_start)
        self._count(new, 1)

    def _remove(self, old: Registration) -> None:
        ranges = self._of[old.driver.platform]
        del ranges[bisect.bisect_left(ranges, old.start, key=_start)]
        self._count(old, -1)

    def _count(self, registration: Registration, sign: int) -> None:
        nbytes = sign * (registration.end - registration.start)
        self.nbytes += nbytes
        self.file_nbytes += nbytes if registration.in_page_cache else 0

    def acquire(
        self, start: int, end: int, driver: Driver, *, read_only: bool, in_page_cache: bool = False
    ) -> list[Registration]:
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
        made: list[Registration] = []
        try:
            for gap_start, gap_end in _gaps(start, end, held):
                new = Registration(gap_start, gap_end, driver, read_only, in_page_cache, count=1)
                try:
                    driver.host_register(gap_start, gap_end - gap_start, read_only=read_only)
                except CudaError as error:
                    if not error.undone:
                        new.count, new.stuck = 0, str(error)
                        self._add(new)
                    raise
                made.append(new)
                self._add(new)
        except BaseException as error:
            try:
                self.release(held + made)
            except Exception as refused:
                error.add_note(f"and what was pinned before could not be unpinned: {refused}")
            raise
        return sorted(held + made, key=lambda r: r.start)

    def release(self, used: list[Registration]) -> None:
        """Give up one count of each; what the driver will not unregister stays in the table, and is raised."""
        refused: Exception | None = None
        for registration in reversed(used):
            registration.count -= 1
            if registration.count == 0:
                try:
                    registration.driver.host_unregister(registration.start)
                except Exception as error:
                    registration.stuck = str(error)
                    refused = refused or error
                else:
                    self._remove(registration)
        if refused is not None:
            raise refused

    def stuck(self, start: int, end: int, driver: Driver) -> str:
        """Why the driver would not take back a registration of pages of [start, end); empty where it did.

        Such pages must not be unmapped while the process lives.
        """
        return next((r.stuck for r in self.touching(start, end, driver) if r.count <= 0), "")

    def touching(self, start: int, end: int, driver: Driver) -> list[Registration]:
        """Those of this driver that share a page with [start, end), in order."""
        start, end = _whole_pages(start, end)
        ranges = self._of.get(driver.platform, [])
        return ranges[bisect.bisect_right(ranges, start, key=_end) : bisect.bisect_left(ranges, end, key=_start)]


_start: Final = attrgetter("start")
_end: Final = attrgetter("end")


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    return start // _PAGE * _PAGE, aligned(end, _PAGE)


def _gaps(start: int, end: int, held: list[Registration]) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that no registration covers, each at most `MAX_REGISTRATION` long."""
    at = start
    for taken_start, taken_end in [(r.start, r.end) for r in held] + [(end, end)]:
        while at < taken_start:
            stop = min(at + MAX_REGISTRATION, taken_start)
            yield at, stop
            at = stop
        at = max(at, taken_end)


registrations: Final = _Registrations()

# What the parent registered is not registered in a child.
os.register_at_fork(after_in_child=registrations.clear)


def uncrossed(pointer: int, nbytes: int, driver: Driver) -> Iterator[tuple[int, int]]:
    """Byte offset and bytes of the copies that move a range of host memory, none across two registrations."""
    at = 0
    for border in borders(registrations.touching(pointer, pointer + nbytes, driver), pointer):
        yield at, border - pointer - at
        at = border - pointer
    yield at, nbytes - at


def borders(used: list[Registration], pointer: int) -> tuple[int, ...]:
    """Addresses behind `pointer` where one registration ends and the next begins: no copy may cross them."""
    return tuple(r.start for r in used if r.start > pointer)


def pinned_nbytes() -> int:
    """Bytes of host memory that this process has pinned through `dlpoffload`, in whole pages, mapped files included."""
    return registrations.nbytes


def pinned_file_nbytes() -> int:
    """Of them, pages of files: the kernel counts those as free, and cannot have them back."""
    return registrations.file_nbytes
