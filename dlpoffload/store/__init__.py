"""Named tensors in exact pinned memory, in mapped checkpoints, and in memory that processes share."""

from __future__ import annotations

from .host_store import HostStore
from .mixed import map_some, replaced
from .sharing import open_shared, share

__all__ = ["HostStore", "map_some", "open_shared", "replaced", "share"]
