"""Anonymous pages to pin: the largest there are, near the device, and a note for each thing that could not be had."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from . import _native
from .driver import Driver
from .errors import HostMemoryError, SpecError
from .limits import host_limits
from .spec import aligned, format_nbytes, parse_nbytes

__all__ = ["HugePages", "Pages", "PinOptions", "host_threads", "map_pages", "pool_nbytes", "populate", "refused"]

HugePages = Literal["transparent", "hugetlb", "never"]

_HUGE_PAGE: Final = 2 << 20
_PAGE: Final = mmap.PAGESIZE
_ADDRESSABLE: Final = (1 << 63) - 1
_THREADS: Final = 8
_POOLS: Final = Path("/sys/kernel/mm/hugepages")
_NODES: Final = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class PinOptions:
    """How anonymous memory is pinned; see `HostBuffer.allocate` for what each means."""

    huge_pages: HugePages = "transparent"
    numa_node: int | None = None
    host_budget: int | None = None

    @classmethod
    def checked(cls, huge_pages: str, numa_node: int | None, host_budget: int | str | None) -> PinOptions:
        """The options as a caller gave them, or SpecError."""
        if huge_pages not in ("transparent", "hugetlb", "never"):
            raise SpecError(f'huge_pages={huge_pages!r}; use "transparent", "hugetlb" or "never"')
        if numa_node is not None:
            known = _nodes()
            if isinstance(numa_node, bool) or not hasattr(numa_node, "__index__") or numa_node not in known:
                names = ", ".join(map(str, known)) or "none"
                raise SpecError(f"numa_node={numa_node!r}, but this machine has the nodes {names}")
        budget = None if host_budget is None else parse_nbytes(host_budget, "host_budget")
        if budget is not None and budget > _ADDRESSABLE:
            raise SpecError(f"host_budget={budget} is more than 2^63 bytes, which no process can address; leave it out")
        return cls(huge_pages, numa_node, budget)  # type: ignore[arg-type]  # checked above


@dataclass(slots=True)
class Pages:
    """A mapping of anonymous memory, not yet populated.

    Attributes
    ----------
    pointer, mapped_nbytes : int
        Where it starts, and what `unmap` has to be given.
    page_nbytes : int
        The size of page that was asked for; the kernel may mix transparent ones.
    is_hugetlb : bool
        It comes from the pool of reserved huge pages.
    notes : list of str
        What could not be had, and what was taken in its place.
    """

    pointer: int
    mapped_nbytes: int
    page_nbytes: int
    is_hugetlb: bool = False
    notes: list[str] = field(default_factory=list)


def map_pages(nbytes: int, driver: Driver, options: PinOptions, check: Callable[[], None]) -> Pages:
    """Map `nbytes`, page size by page size until one is there, on the NUMA node that was asked for.

    Parameters
    ----------
    check
        Called before ordinary memory is mapped; the hugetlb pool is set apart from it already, and bounded by a
        `host_budget` only.

    Raises
    ------
    HostMemoryError
        The system maps no such memory; nothing stays mapped.
    """
    notes: list[str] = []
    hugetlb = options.huge_pages == "hugetlb"
    checked = not hugetlb or options.host_budget is not None
    if checked:
        check()
    pages = _hugetlb(nbytes, notes) if hugetlb else None
    if pages is None:
        if not checked:
            check()
        pages = _ordinary(nbytes, options, notes)
    try:
        if driver.platform == "cuda":
            # The kernel copies pinned pages at fork, since the device would not follow a copy on write.
            _native.dont_fork(pages.pointer, pages.mapped_nbytes)
        _prefer_node(pages, driver, options)
    except OSError as error:
        _native.unmap(pages.pointer, pages.mapped_nbytes)
        raise refused(nbytes, "keep from children", error) from error
    except BaseException:
        _native.unmap(pages.pointer, pages.mapped_nbytes)
        raise
    return pages


def _hugetlb(nbytes: int, notes: list[str]) -> Pages | None:
    """From the pool, the largest pages that are no larger than the memory itself; None when it has too few."""
    for size in (size for size in _pool_sizes() if size <= max(nbytes, _HUGE_PAGE)):
        try:
            pointer = _native.map_hugetlb(nbytes, size)
        except OSError as error:
            notes.append(f"hugetlb pages of {format_nbytes(size)} could not be had ({error.strerror})")
            continue
        mapped = aligned(nbytes, size)
        if mapped > aligned(nbytes, _PAGE):
            notes.append(f"hugetlb pages round {format_nbytes(nbytes)} up to {format_nbytes(mapped)}")
        return Pages(pointer, mapped, size, is_hugetlb=True, notes=notes)
    notes.append(f"the hugetlb pool has no pages for {format_nbytes(nbytes)}; transparent ones were taken")
    return None


def _ordinary(nbytes: int, options: PinOptions, notes: list[str]) -> Pages:
    huge = nbytes >= _HUGE_PAGE and options.huge_pages != "never"
    try:
        pointer = _native.map_anonymous(nbytes, _HUGE_PAGE if huge else _PAGE, huge)
    except OSError as error:
        raise refused(nbytes, "map", error) from error
    if huge and (setting := host_limits().transparent_huge_pages) not in ("always", "madvise"):
        notes.append(f"transparent huge pages are {setting or 'not there'}; small pages pin about half as fast")
        huge = False
    return Pages(pointer, aligned(nbytes, _PAGE), _HUGE_PAGE if huge else _PAGE, notes=notes)


def _prefer_node(pages: Pages, driver: Driver, options: PinOptions) -> None:
    node = options.numa_node
    if node is None and len(_nodes()) > 1:
        node = driver.numa_node
    if node is None:
        return
    try:
        _native.prefer_node(pages.pointer, pages.mapped_nbytes, node)
    except OSError as error:
        if options.numa_node is not None:
            raise HostMemoryError(
                f"numa_node={node} was asked for, and the system would not prefer it: {error.strerror}; leave it out "
                "(a container may forbid mbind)",
                nbytes=pages.mapped_nbytes,
            ) from error
        pages.notes.append(f"NUMA node {node} of {driver.device} could not be preferred ({error.strerror})")


def populate(pages: Pages, byte_offset: int, nbytes: int) -> None:
    """Fault pages in, on several threads without the GIL.

    Raises
    ------
    HostMemoryError
        The system has not that much; the mapping stays.
    """
    threads = host_threads() if pages.page_nbytes > _PAGE else 1
    try:
        _native.populate(pages.pointer + byte_offset, nbytes, threads)
    except OSError as error:
        raise refused(nbytes, "populate", error) from error


def host_threads() -> int:
    """Threads that fault pages in or copy: what this process may run on, at most 8."""
    return max(1, min(_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))


def refused(nbytes: int, verb: str, error: OSError) -> HostMemoryError:
    """The error of memory that the system did not give."""
    return HostMemoryError(
        f"the system would not {verb} {format_nbytes(nbytes)} of host memory: {error.strerror}; "
        "ask for less, or free memory first (`dlpoffload doctor` shows the limits)",
        nbytes=nbytes,
    )


def _pool_sizes() -> list[int]:
    """Sizes of reserved huge pages of which there are any, the largest first."""
    found = []
    for pool in _POOLS.glob("hugepages-*kB") if _POOLS.exists() else ():
        if int((pool / "nr_hugepages").read_text()) or int((pool / "nr_overcommit_hugepages").read_text()):
            found.append(int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10)
    return sorted(found, reverse=True)


def pool_nbytes() -> int:
    """Bytes of reserved huge pages that are free: the system counts them as used."""
    pools = _POOLS.glob("hugepages-*kB") if _POOLS.exists() else ()
    return sum(
        int((pool / "free_hugepages").read_text())
        * (int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10)
        for pool in pools
    )


def _nodes() -> list[int]:
    """NUMA nodes of this machine."""
    return sorted(int(node.name[4:]) for node in _NODES.glob("node[0-9]*"))
