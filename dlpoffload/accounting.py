"""What memory is alive: how much, of which kind, for whom, and from which line."""

from __future__ import annotations

from dataclasses import dataclass

from .lifetime import live, owned_by, trace_allocations
from .registrations import pinned_nbytes

__all__ = ["LiveMemory", "live_buffers", "live_memory", "owned_by", "pinned_nbytes", "trace_allocations"]


@dataclass(frozen=True, slots=True)
class LiveMemory:
    """One buffer that is not freed yet.

    Attributes
    ----------
    kind : str
        ``"pinned"``, ``"mapped file"``, ``"pageable"`` or ``"device"``.
    nbytes : int
        Its bytes.
    owner : str
        For whom it was made, for example ``HostStore.copy_of "model.safetensors"``; empty for a buffer by itself.
    origin : str
        File and line that asked for it; empty unless `trace_allocations` was on by then.
    """

    kind: str
    nbytes: int
    owner: str
    origin: str


def live_memory() -> list[LiveMemory]:
    """Every buffer that is not freed yet, closed ones under live views included, the oldest first."""
    return [LiveMemory(r.kind, r.nbytes, r.owner, r.origin) for r in live() if r.kind != "import"]


def live_buffers() -> list[tuple[str, int]]:
    """Kind and bytes of every buffer that is not freed yet; `live_memory` says more."""
    return [(found.kind, found.nbytes) for found in live_memory()]
