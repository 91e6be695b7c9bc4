"""Named tensors in exact pinned memory."""

from __future__ import annotations

from .host_store import HostStore
from .mixed import map_some, replaced

__all__ = ["HostStore", "map_some", "replaced"]
