"""The process's own memory map, asked before memory that somebody else mapped is pinned.

Pinning a private mapping with the read-only flag hangs for ever inside the driver, and without the flag a read-only
one is refused late; so such memory is refused here, before the driver is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .errors import RegistrationError
from .spec import format_nbytes

__all__ = ["Access", "Mapping", "check_registrable", "mappings"]


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of ``/proc/self/maps``."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str

    @property
    def is_private(self) -> bool:
        """Mapped MAP_PRIVATE: a write copies the page first."""
        return self.permissions.endswith("p")

    @property
    def is_writable(self) -> bool:
        """The process may write to it."""
        return "w" in self.permissions


def mappings(start: int, end: int, maps: Path = Path("/proc/self/maps")) -> Iterator[Mapping]:
    """The mappings that share a page with [start, end), in order; none where the system has no such file."""
    if not maps.exists():
        return
    with maps.open() as lines:
        for line in lines:
            span, permissions, _offset, _device, inode, *path = line.split(maxsplit=5)
            low, _, high = span.partition("-")
            mapping = Mapping(int(low, 16), int(high, 16), permissions, int(inode), path[0].strip() if path else "")
            if mapping.start >= end:
                return
            if mapping.end > start:
                yield mapping


class Access(Enum):
    """How memory is mapped, as far as pinning it in place depends on it."""

    WRITABLE = "writable"
    SHARED_FILE = "shared, writable mapping of a file"
    READ_ONLY = "read-only"


def check_registrable(pointer: int, nbytes: int, maps: Path = Path("/proc/self/maps")) -> Access:
    """Say how memory is mapped, and refuse what must not be pinned in place.

    Raises
    ------
    RegistrationError
        Part of it is mapped read-only, and part of it privately.
    """
    found = list(mappings(pointer, pointer + nbytes, maps))
    private = [mapping for mapping in found if mapping.is_private]
    if not all(mapping.is_writable for mapping in found):
        if private:
            raise RegistrationError(
                f"{format_nbytes(nbytes)} at {pointer:#x} lie in a private, read-only mapping of "
                f'"{private[0].path or "anonymous memory"}", which the driver cannot pin without hanging; map it '
                "shared (mmap.MAP_SHARED), or read it with HostBuffer.copy_of"
            )
        return Access.READ_ONLY
    return Access.SHARED_FILE if found and not private else Access.WRITABLE
