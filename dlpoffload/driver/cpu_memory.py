"""Memory of the CPU driver: the C library's, and tables of what lies where, to check what CUDA checks."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any, Final, NamedTuple

__all__ = ["PAGE", "Range", "Ranges", "allocate", "fill", "free", "is_mapped", "move"]

PAGE: Final = mmap.PAGESIZE
_MS_ASYNC: Final = 1


class Range(NamedTuple):
    """Addresses from `start` up to, but without, `end`, made by a call that was given, or gave, `pointer`."""

    start: int
    end: int
    pointer: int
    read_only: bool = False


class Ranges:
    """Disjoint ranges, found by any address in them."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[Range] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, new: Range) -> None:
        at = bisect.bisect(self._starts, new.start)
        self._starts.insert(at, new.start)
        self._ranges.insert(at, new)
        self.nbytes += new.end - new.start

    def find(self, address: int) -> Range | None:
        """The range that holds `address`."""
        at = bisect.bisect(self._starts, address) - 1
        return self._ranges[at] if at >= 0 and address < self._ranges[at].end else None

    def overlap(self, start: int, end: int) -> Range | None:
        """A range that has an address of [start, end)."""
        at = bisect.bisect_left(self._starts, end) - 1
        return self._ranges[at] if at >= 0 and start < self._ranges[at].end else None

    def holds(self, pointer: int) -> bool:
        """Whether a range was made at exactly `pointer`."""
        found = self.find(pointer)
        return found is not None and found.pointer == pointer

    def remove(self, pointer: int) -> bool:
        """Remove the range that was made at `pointer`; False when there is none."""
        if not self.holds(pointer):
            return False
        at = bisect.bisect(self._starts, pointer) - 1
        self.nbytes -= self._ranges[at].end - self._ranges[at].start
        del self._starts[at], self._ranges[at]
        return True


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    # Called through CDLL, which gives up the GIL for the time of the call.
    function = getattr(_libc, name)
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]


_libc = ctypes.CDLL(None, use_errno=True)
_memalign = _function("posix_memalign", ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)
_msync = _function("msync", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_free = _function("free", None, ctypes.c_void_p)
_memmove = _function("memmove", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memset = _function("memset", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


def allocate(nbytes: int) -> int:
    """Allocate `nbytes` at the start of a page.

    Raises
    ------
    OSError
        The system refused.
    """
    pointer = ctypes.c_void_p()
    result = _memalign(ctypes.byref(pointer), PAGE, nbytes)
    if result or pointer.value is None:
        raise OSError(result, os.strerror(result))
    return pointer.value


def free(pointer: int) -> None:
    _free(pointer)


def move(destination: int, source: int, nbytes: int) -> None:
    """Copy bytes, without the GIL."""
    _memmove(destination, source, nbytes)


def fill(destination: int, value: int, nbytes: int) -> None:
    """Set bytes to one value, without the GIL."""
    _memset(destination, value, nbytes)


def is_mapped(start: int, end: int) -> bool:
    """Whether every page of [start, end) is mapped; `start` lies on a page's border."""
    # MS_ASYNC does nothing on Linux since 2.6.19, except to say ENOMEM for what is not mapped (msync(2)).
    return bool(_msync(start, end - start, _MS_ASYNC) == 0)
