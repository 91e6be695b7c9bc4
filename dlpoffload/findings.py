"""What `doctor` looks at, and what it finds: plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .driver import Driver
from .errors import CudaError
from .limits import HostLimits
from .spec import format_nbytes

__all__ = ["Finding", "Machine", "readable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    status : str
        ``"ok"``, ``"note"`` (works, worth knowing), ``"missing"`` (not on this machine) or ``"failed"``
        (there, and does not work).
    says : tuple of str
        The finding in words, a line each.
    facts : dict
        The same, for machines: keys never change their meaning, bytes are ints.
    remedy : str
        What to do; empty when there is nothing to do.
    """

    status: str
    says: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the checks look at.

    Attributes
    ----------
    driver : Driver
        The driver of the device that is examined.
    device_names : sequence of str
        Every device, the CPU last.
    limits : HostLimits
        Host memory.
    cuda_problem : CudaError or None
        Why no CUDA device can be used; a `DriverNotFoundError` when there is none.
    cuda_version : tuple of int or None
        The newest CUDA that the driver serves, as (major, minor).
    """

    driver: Driver
    device_names: Sequence[str]
    limits: HostLimits
    cuda_problem: CudaError | None = None
    cuda_version: tuple[int, int] | None = None


def readable(nbytes: int | None) -> str:
    """``"23.15 GiB"``; facts hold the exact count."""
    if nbytes is None:
        return "not known"
    return format_nbytes(nbytes).partition(" (")[2].rstrip(")") or format_nbytes(nbytes)
