"""What is alive in this process, by its own accounts and by the system's: memory, mappings, threads, descriptors."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from fake import FakeCuda

import dlpoffload as dlpo
from dlpoffload import lifetime

__all__ = ["Alive", "look", "settle"]

_WAIT_S = 1.0
_RANGE = re.compile(
    rb"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?:(?!^VmFlags)[^\n]*\n)+VmFlags:(?P<flags>[^\n]*)$", re.MULTILINE
)


@dataclass(frozen=True)
class Alive:
    """One look."""

    pinned_nbytes: int
    buffers: Counter[tuple[str, int]]
    driver: tuple[tuple[str, int], ...]
    handles: int
    """Streams, events and objects of graphs."""
    mapped_nbytes: int
    """Of anonymous pages that are kept from forked children, which is what is pinned."""
    mapped_files: tuple[str, ...]
    threads: tuple[str, ...]
    descriptors: tuple[str, ...]

    def differences(self, before: Alive) -> dict[str, str]:
        """By field, what is not as it was before."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(before, field.name)]
        return {name: f"{name}: {getattr(before, name)} became {getattr(self, name)}" for name in names}

    @property
    def registered_nbytes(self) -> int:
        """By the driver's own table."""
        return dict(self.driver)["registered_nbytes"]


def look(fake: FakeCuda, folder: Path, *, whole: bool = True) -> Alive:
    """See what is alive. `folder` is where files lie that may be mapped.

    Not `whole` leaves out handles, and graphs that a ring looks after, of which what lives on may have made some; and
    the sizes of mappings, which take long to find.
    """
    live = fake.live()
    handles = live.pop("streams") + live.pop("events") + live.pop("user_objects")
    return Alive(
        dlpo.pinned_nbytes(),
        Counter(row for row in dlpo.live_buffers() if whole or row[0] != "graph"),
        tuple(live.items()),
        handles if whole else 0,
        _pinned_nbytes() if whole else 0,
        _mapped_files(str(folder)),
        tuple(sorted(thread.name for thread in threading.enumerate() if thread.name != "dlpoffload-reclaim")),
        _descriptors(),
    )


def settle(fake: FakeCuda, folder: Path, wanted: Alive, wait_s: float = _WAIT_S, *, whole: bool = True) -> Alive:
    """Look until it is as wanted, or until it has had the time: other threads may still free something."""
    deadline = time.monotonic() + wait_s
    while True:
        gc.collect()
        lifetime.drain()
        found = look(fake, folder, whole=whole)
        if found == wanted or time.monotonic() >= deadline:
            return found
        time.sleep(0.005)


def _mapped_files(folder: str) -> tuple[str, ...]:
    """Mappings of files in the folder, and of those in memory."""
    ours = folder.encode(), b"/memfd:dlpoffload"
    maps = Path("/proc/self/maps").read_bytes()
    lines = maps.splitlines() if any(path in maps for path in ours) else []
    return tuple(sorted(line.rpartition(b"/")[2].decode() for line in lines if any(path in line for path in ours)))


def _pinned_nbytes() -> int:
    smaps = Path("/proc/self/smaps").read_bytes()
    if b" dc" not in smaps:
        return 0
    return sum(_size(found) for found in _RANGE.finditer(smaps) if b" dc" in found.group("flags"))


def _size(found: re.Match[bytes]) -> int:
    return int(found.group("end"), 16) - int(found.group("start"), 16)


def _descriptors() -> tuple[str, ...]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the one that listed them
    return tuple(sorted(found))
