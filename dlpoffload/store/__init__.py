"""Named tensors in exact pinned memory."""

from __future__ import annotations

from .host_store import HostStore

__all__ = ["HostStore"]
