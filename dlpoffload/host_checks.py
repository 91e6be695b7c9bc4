"""The checks of `doctor` that look at host memory: pages, limits, and what is pinned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Final

from .accounting import live_memory, pinned_nbytes
from .findings import Finding, Machine, readable
from .registrations import pinned_file_nbytes
from .spec import format_nbytes
from .wall import WALL, find_wall

__all__ = ["check_memory", "check_pages", "check_pinned"]

MOST_OWNERS: Final = 12


def check_pages(machine: Machine) -> Finding:
    """Page sizes and huge pages."""
    limits = machine.limits
    huge, transparent = limits.huge_page_nbytes, limits.transparent_huge_pages
    facts = {
        "page_nbytes": limits.page_nbytes,
        "huge_page_nbytes": huge,
        "huge_pages_total": limits.huge_pages_total,
        "huge_pages_free": limits.huge_pages_free,
        "transparent_huge_pages": transparent,
    }
    says = [
        f"pages of {readable(limits.page_nbytes)}, huge pages of {readable(huge)}",
        f"transparent huge pages: {transparent or 'not known'}",
    ]
    if limits.huge_pages_total:
        says.append(
            f"hugetlb pool: {limits.huge_pages_free} of {limits.huge_pages_total} pages free "
            "(kept back from everything else; not needed here)"
        )
    if transparent in ("always", "madvise"):
        return Finding("ok", tuple(says), facts)
    return Finding(
        "note",
        (*says, "pinning is about half as fast without them"),
        facts,
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)" if transparent else "",
    )


def check_memory(machine: Machine) -> Finding:
    """Host memory and its real limits."""
    limits = machine.limits
    cgroup = limits.cgroup
    facts = {
        "mem_total_nbytes": limits.mem_total_nbytes,
        "mem_available_nbytes": limits.mem_available_nbytes,
        "total_nbytes": limits.total_nbytes,
        "available_nbytes": limits.available_nbytes,
        "binding_limit": limits.binding_limit,
        "cgroup": None if cgroup is None else {**asdict(cgroup), "available_nbytes": cgroup.available_nbytes},
        "memlock_nbytes": limits.memlock_nbytes,
        "is_wsl": limits.is_wsl,
    }
    if limits.available_nbytes is None:
        return Finding("note", ("this system does not say how much memory it has",), facts)
    says = [
        f"{readable(limits.available_nbytes)} can be allocated now, bound by {limits.binding_limit}",
        f"machine {readable(limits.mem_total_nbytes)}, available {readable(limits.mem_available_nbytes)}",
    ]
    if cgroup is None:
        says.append("cgroup: no limit")
    else:
        says.append(
            f"{cgroup}: limit {readable(cgroup.limit_nbytes)}, used {readable(cgroup.usage_nbytes)}, "
            f"of which {readable(cgroup.reclaimable_nbytes)} page cache"
        )
    room = limits.room(pinned_file_nbytes())
    room_nbytes = 0 if room is None else room.nbytes
    facts |= {"room_nbytes": room_nbytes, "reserve_nbytes": 0 if room is None else room.reserve_nbytes}
    if room is not None:
        says.append(
            f"may be pinned now: {readable(room_nbytes)}, less {readable(room.reserve_nbytes)} left to the system "
            f"and {readable(room.pinned_file_nbytes)} of files that are pinned already"
        )
    if limits.memlock_nbytes is not None:
        memlock = readable(limits.memlock_nbytes)
        says.append(f"memlock {memlock}: bounds mlock only, not pinning by the driver")
    if not limits.is_wsl:
        return Finding("ok", tuple(says), facts)
    wall = find_wall(room_nbytes // 2, pinned_nbytes(), machine.driver)
    facts["wsl_wall_nbytes"] = wall
    found = f"{WALL} is {readable(wall)}" if wall else f"no wall was met up to {readable(room_nbytes // 2)}"
    says.append(f"WSL: its virtual machine bounds memory, and Windows bounds how much can be pinned; measured: {found}")
    return Finding("note", tuple(says), facts, 'raise "memory=" in .wslconfig if it is too little')


def check_pinned(machine: Machine) -> Finding:
    """What this process has pinned now, for whom, and from which line where that is traced."""
    nbytes, buffers = pinned_nbytes(), live_memory()
    says = [f"{format_nbytes(nbytes)} pinned by this process"]
    said = Counter((b.kind, b.owner, b.origin) for b in buffers)
    for (kind, owner, origin), count in said.most_common(MOST_OWNERS):
        held = sum(b.nbytes for b in buffers if (b.kind, b.owner, b.origin) == (kind, owner, origin))
        where = f" at {origin}" if origin else ""
        says.append(f"  {kind}: {format_nbytes(held)} in {count} for {owner or 'buffers by themselves'}{where}")
    facts = {"pinned_nbytes": nbytes, "live": [asdict(buffer) for buffer in buffers]}
    return Finding("ok", tuple(says), facts)
