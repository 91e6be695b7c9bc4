"""The wall of WSL: how much the driver pins there, measured, since nothing on the system says it.

Under the Windows Subsystem for Linux pinned memory ends long before memory does, between half a GiB and half of the
machine by what users report, and the driver says so only by refusing. So it is asked, in steps, before a weight moves.
Source: CUDA on WSL User Guide, "Known Limitations for Linux CUDA Applications".
"""

from __future__ import annotations

from typing import Final

from .driver import Driver
from .errors import HostMemoryError
from .limits import HostLimits
from .spec import format_nbytes

__all__ = ["WALL", "check_wall", "find_wall"]

WALL: Final = "the WSL wall (what the driver pins under Windows)"
_STEP_NBYTES: Final = 64 << 20

_proven: dict[str, int] = {}
_walls: dict[str, int] = {}


def find_wall(most_nbytes: int, pinned_nbytes: int, driver: Driver) -> int | None:
    """Measure where the wall is, by pinning at most `most_nbytes` and giving them back; None when it is not there."""
    if driver.device not in _walls and pinned_nbytes + most_nbytes > _proven.get(driver.device, 0):
        _measure(pinned_nbytes + most_nbytes, pinned_nbytes, driver)
    return _walls.get(driver.device)


def check_wall(nbytes: int, pinned_nbytes: int, driver: Driver, limits: HostLimits) -> None:
    """Under WSL, refuse what the driver would refuse half way; elsewhere do nothing.

    Parameters
    ----------
    nbytes
        Bytes about to be pinned.
    pinned_nbytes
        Bytes that are pinned already.

    Raises
    ------
    HostMemoryError
        The driver pins less than that; it says how much, measured.
    """
    if not limits.is_wsl:
        return
    wall = find_wall(nbytes, pinned_nbytes, driver)
    if wall is not None and pinned_nbytes + nbytes > wall:
        raise HostMemoryError(
            f"asked for {format_nbytes(nbytes)} of pinned host memory with {format_nbytes(pinned_nbytes)} pinned "
            f"already, and {WALL} is {format_nbytes(wall)}, measured; ask for less, allow pageable memory "
            "(pinned=False), or run under Linux itself",
            nbytes=nbytes,
            limit=WALL,
            limit_nbytes=wall,
        )


def _measure(wanted: int, pinned_nbytes: int, driver: Driver) -> None:
    """Pin steps until there are as many bytes as wanted, or the driver refuses; then give all of it back."""
    held: list[int] = []
    reached = pinned_nbytes
    try:
        while reached < wanted:
            step = min(_STEP_NBYTES, wanted - reached)
            held.append(driver.host_alloc(step))
            reached += step
        _proven[driver.device] = wanted
    except HostMemoryError:
        _walls[driver.device] = max(reached, _proven.get(driver.device, 0))
    finally:
        while held:
            driver.host_free(held.pop())
