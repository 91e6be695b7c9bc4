"""Seals of a file that is memory: what nobody can do to it any more.

Source: "File sealing" in ``F_ADD_SEALS(2const)``.
"""

from __future__ import annotations

import fcntl

__all__ = ["is_sealed", "seals_of"]


def seals_of(descriptor: int) -> int | None:
    """The seals of a file; None where it can have none, because it is no memory."""
    if not hasattr(fcntl, "F_GET_SEALS"):
        return None
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # EINVAL, of any other file system
        return None


def is_sealed(descriptor: int) -> bool:
    """Whether a file can be neither written, cut off nor made longer, so that it is what it will always be."""
    seals = seals_of(descriptor)
    if seals is None:
        return False
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    return seals & wanted == wanted
