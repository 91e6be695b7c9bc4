"""How much host memory this process can really have: the kernel's figure, and every cgroup above us.

Pure reading of ``/proc`` and ``/sys``. What is read where, and what it means: ``proc_meminfo(5)``, and
``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst`` of the Linux documentation.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import HostMemoryError
from .spec import format_nbytes

__all__ = ["CgroupLimit", "HostLimits", "Room", "check_host_budget", "host_limits", "reserve_of"]

PAGE_TABLE_ENTRY_NBYTES = 8
RESERVE_NBYTES = 512 << 20
V1_UNLIMITED = 1 << 62
"""cgroup v1 writes "no limit" as the largest page-aligned 63-bit number; nothing real comes near it."""


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """One memory limit of one cgroup that this process lives in.

    Attributes
    ----------
    path : str
        The cgroup, as its hierarchy names it; ``"/"`` in a container is the container.
    file : str
        The file that holds the limit: ``memory.max``, ``memory.high`` or ``memory.limit_in_bytes``.
    limit_nbytes : int
        The limit.
    usage_nbytes : int
        What is charged to the cgroup now, page cache included.
    reclaimable_nbytes : int
        Of it, page cache of files, dropped before anything is refused. A checkpoint that was read fills it.
    """

    path: str
    file: str
    limit_nbytes: int
    usage_nbytes: int
    reclaimable_nbytes: int

    @property
    def available_nbytes(self) -> int:
        """What can still be allocated under this limit."""
        return max(0, self.limit_nbytes - max(0, self.usage_nbytes - self.reclaimable_nbytes))

    def __str__(self) -> str:
        return f'{self.file} of cgroup "{self.path}"'


@dataclass(frozen=True, slots=True)
class Room:
    """What one limit leaves to be pinned.

    Attributes
    ----------
    name : str
        The limit.
    available_nbytes : int
        What it says is free.
    reserve_nbytes : int
        What is left to the system all the same.
    pinned_file_nbytes : int
        Pages of files that this process has pinned, which the limit counts as free.
    cgroup : CgroupLimit or None
        The cgroup, when it is a cgroup's.
    """

    name: str
    available_nbytes: int
    reserve_nbytes: int
    pinned_file_nbytes: int
    cgroup: CgroupLimit | None

    @property
    def nbytes(self) -> int:
        """Bytes that may be pinned now."""
        return max(0, self.available_nbytes - self.reserve_nbytes - self.pinned_file_nbytes)


def reserve_of(total_nbytes: int) -> int:
    """What is left to the system, and to the rest of the process, under a limit: 1/64 of it, at most 512 MiB."""
    return min(total_nbytes // 64, RESERVE_NBYTES)


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What the system says of host memory, at one moment. None stands for what it does not say.

    Attributes
    ----------
    mem_total_nbytes : int or None
        Memory of the machine.
    mem_available_nbytes : int or None
        The kernel's own estimate of what new allocations can have without swapping (MemAvailable).
    cgroups : tuple of CgroupLimit
        Every limit from our own cgroup up to the root; empty without limits.
    memlock_nbytes : int or None
        The soft RLIMIT_MEMLOCK; None also when it is unlimited. It bounds ``mlock``, not registration with
        the CUDA driver, so nothing here is refused for it.
    is_wsl : bool
        Windows Subsystem for Linux: memory is what ``.wslconfig`` makes it, and pinning is bounded further.
    page_nbytes : int
        The page size.
    huge_page_nbytes : int or None
        The default huge page size.
    huge_pages_total, huge_pages_free : int or None
        Pages in the hugetlb pool; transparent huge pages do not need it.
    transparent_huge_pages : str or None
        ``"always"``, ``"madvise"`` or ``"never"``.
    """

    mem_total_nbytes: int | None
    mem_available_nbytes: int | None
    cgroups: tuple[CgroupLimit, ...]
    memlock_nbytes: int | None
    is_wsl: bool
    page_nbytes: int
    huge_page_nbytes: int | None
    huge_pages_total: int | None
    huge_pages_free: int | None
    transparent_huge_pages: str | None

    @property
    def cgroup(self) -> CgroupLimit | None:
        """The cgroup limit with the least room left; None without limits."""
        return min(self.cgroups, key=lambda c: c.available_nbytes, default=None)

    @property
    def total_nbytes(self) -> int | None:
        """Memory of the machine or the smallest cgroup limit, whichever is less: the total that counts."""
        totals = [c.limit_nbytes for c in self.cgroups]
        if self.mem_total_nbytes is not None:
            totals.append(self.mem_total_nbytes)
        return min(totals, default=None)

    @property
    def available_nbytes(self) -> int | None:
        """The smallest of the figures: what can be allocated now. None when the system says nothing."""
        return min((nbytes for _, nbytes in self._figures()), default=None)

    @property
    def binding_limit(self) -> str:
        """The name of the limit that `available_nbytes` comes from; empty when the system says nothing."""
        return min(self._figures(), key=lambda figure: figure[1], default=("", 0))[0]

    def room(self, pinned_file_nbytes: int = 0) -> Room | None:
        """What may be pinned: the smallest of the figures, less a reserve and less pinned pages of files."""
        totals = {str(cgroup): cgroup for cgroup in self.cgroups}
        rooms = []
        for name, available in self._figures():
            cgroup = totals.get(name)
            total = cgroup.limit_nbytes if cgroup else self.mem_total_nbytes
            rooms.append(Room(name, available, reserve_of(total or available), pinned_file_nbytes, cgroup))
        return min(rooms, key=lambda room: room.nbytes, default=None)

    def _figures(self) -> Iterator[tuple[str, int]]:
        if self.mem_available_nbytes is not None:
            yield "free memory (MemAvailable)", self.mem_available_nbytes
        elif self.mem_total_nbytes is not None:
            yield "physical memory", self.mem_total_nbytes
        for cgroup in self.cgroups:
            yield str(cgroup), cgroup.available_nbytes


def host_limits(root: str | os.PathLike[str] = "/") -> HostLimits:
    """Read the limits of host memory now.

    Parameters
    ----------
    root : path, optional
        Where ``proc`` and ``sys`` lie.
    """
    base = Path(root)
    meminfo = _fields(base / "proc/meminfo")
    total, available = meminfo.get("MemTotal"), meminfo.get("MemAvailable")
    if total is None:
        total, available = _sysconf_nbytes("SC_PHYS_PAGES"), _sysconf_nbytes("SC_AVPHYS_PAGES")
    memlock = re.search(r"^Max locked memory\s+(\d+)", _text(base / "proc/self/limits"), re.MULTILINE)
    thp = re.search(r"\[(\w+)\]", _text(base / "sys/kernel/mm/transparent_hugepage/enabled"))
    return HostLimits(
        mem_total_nbytes=total,
        mem_available_nbytes=available,
        cgroups=tuple(_cgroup_limits(base)),
        memlock_nbytes=int(memlock.group(1)) if memlock else None,
        is_wsl="microsoft" in _text(base / "proc/version").lower(),
        page_nbytes=mmap.PAGESIZE,
        huge_page_nbytes=meminfo.get("Hugepagesize"),
        huge_pages_total=meminfo.get("HugePages_Total"),
        huge_pages_free=meminfo.get("HugePages_Free"),
        transparent_huge_pages=thp.group(1) if thp else None,
    )


def check_host_budget(
    nbytes: int,
    limits: HostLimits | None = None,
    *,
    pinned_nbytes: int = 0,
    pinned_file_nbytes: int = 0,
    promised_nbytes: int = 0,
    host_budget: int | None = None,
) -> None:
    """Refuse, before anything is mapped, what the kernel would answer with the OOM killer.

    The memory may still be taken by another process a moment later; no check can know that.

    Parameters
    ----------
    nbytes : int
        Bytes about to be allocated and populated, or pages of a file about to be pinned: those are charged in full,
        since the kernel cannot have them back. The page tables that map them are counted on top.
    limits : HostLimits, optional
        Read now when left out.
    pinned_nbytes : int
        Bytes that this process has pinned already; they count against `host_budget`.
    pinned_file_nbytes : int
        Of them, pages of files, which the kernel and the cgroup still count as free.
    promised_nbytes : int
        Bytes that other threads of this process, or buffers that are pinned in the background, are about to take.
    host_budget : int, optional
        What this process may pin in all, in the place of everything that the system says.

    Raises
    ------
    HostMemoryError
        `nbytes` do not fit; it names the limit that binds, and the remedy.
    """
    if host_budget is not None:
        if pinned_nbytes + promised_nbytes + nbytes > host_budget:
            promised = f" and {format_nbytes(promised_nbytes)} being pinned" if promised_nbytes else ""
            raise HostMemoryError(
                f"asked for {format_nbytes(nbytes)} of host memory with {format_nbytes(pinned_nbytes)} pinned already"
                f"{promised}, and host_budget is {format_nbytes(host_budget)}; raise it, or ask for less",
                nbytes=nbytes,
                limit="host_budget",
                limit_nbytes=host_budget,
            )
        return
    if limits is None:
        limits = host_limits()
    page_tables = -(-nbytes // limits.page_nbytes) * PAGE_TABLE_ENTRY_NBYTES
    room = limits.room(pinned_file_nbytes)
    if room is None or promised_nbytes + nbytes + page_tables <= room.nbytes:
        return
    cgroup = room.cgroup
    if cgroup is not None:
        limit_nbytes = cgroup.limit_nbytes
        found = (
            f"{format_nbytes(cgroup.available_nbytes)} under {cgroup}, whose limit is {format_nbytes(limit_nbytes)} "
            f"with {format_nbytes(cgroup.usage_nbytes)} in use, of which "
            f"{format_nbytes(cgroup.reclaimable_nbytes)} are page cache and count as free"
        )
        remedy = (
            'raise the limit ("docker run --memory", "resources.limits.memory" in Kubernetes, '
            '"MemoryMax" in systemd, "--mem" in Slurm), pass host_budget= if you know better, or ask for less'
        )
    else:
        limit_nbytes = room.available_nbytes
        found = f"{format_nbytes(room.available_nbytes)} of {room.name}"
        remedy = "end what else uses memory on this machine, pass host_budget= if you know better, or ask for less"
    found += f", of which {format_nbytes(room.reserve_nbytes)} are left to the system"
    if pinned_file_nbytes:
        found += f" and {format_nbytes(pinned_file_nbytes)} are pages of files that this process has pinned"
    if promised_nbytes:
        found += f", and {format_nbytes(promised_nbytes)} are promised to what is being pinned now"
    if limits.is_wsl:
        remedy += '; under WSL the machine is as large as "memory=" in .wslconfig says'
    raise HostMemoryError(
        f"asked for {format_nbytes(nbytes)} of host memory (and {format_nbytes(page_tables)} of page tables "
        f"for it), found {found}; {remedy}",
        nbytes=nbytes,
        limit=room.name,
        limit_nbytes=limit_nbytes,
    )


# ------------------------------------------------------------------------------------------------ reading


def _text(path: Path) -> str:
    """The file's text; empty when there is no such file, or it may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """Lines such as ``MemTotal: 16384 kB`` or ``inactive_file 4096``, in bytes."""
    found = re.findall(r"^(\w+(?:\(\w+\))?):?\s+(\d+)( kB)?$", _text(path), re.MULTILINE)
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in found}


def _sysconf_nbytes(name: str) -> int | None:
    try:
        pages = os.sysconf(name)
    except (AttributeError, ValueError, OSError):  # not POSIX, an unknown name, a name without a value
        return None
    return pages * mmap.PAGESIZE if pages > 0 else None


def _cgroup_limits(base: Path) -> Iterator[CgroupLimit]:
    for mount, mount_root, own_path in _memory_hierarchies(base):
        # a container may show its own cgroup as the mount's root and still be told its path from the outside
        inside = PurePosixPath()
        if own_path.is_relative_to(mount_root) and ".." not in own_path.parts:
            inside = own_path.relative_to(mount_root)
        for part in (inside, *inside.parents):
            yield from _limits_of(mount / part, "/" + str(part).removeprefix("."))


def _memory_hierarchies(base: Path) -> Iterator[tuple[Path, PurePosixPath, PurePosixPath]]:
    """Where each hierarchy with a memory controller is mounted, the cgroup shown there, and our own."""
    own: dict[str, PurePosixPath] = {}
    for line in _text(base / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            own["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            own["cgroup"] = PurePosixPath(path)
    for line in _text(base / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(), filesystem.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in own:
            continue
        if kind[0] == "cgroup2" or "memory" in kind[2].split(","):
            where = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), fields[4])
            yield base / where.lstrip("/"), PurePosixPath(fields[3]), own[kind[0]]


def _limits_of(cgroup: Path, path: str) -> Iterator[CgroupLimit]:
    for file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        # no OOM killer above it, but every allocation stalls in reclaim, which pinned pages never satisfy
        ("memory.high", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, usage = _text(cgroup / file).strip(), _text(cgroup / usage_file).strip()
        if not limit.isdecimal() or int(limit) >= V1_UNLIMITED or not usage.isdecimal():
            continue
        stat = _fields(cgroup / "memory.stat")
        reclaimable = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        yield CgroupLimit(path, file, int(limit), int(usage), reclaimable)
