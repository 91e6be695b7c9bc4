"""Staging: copy units into a ring of device slots ahead of their use, ordered by events alone."""

from __future__ import annotations

from .lease import Lease
from .link import Link, measure_link
from .prefetcher import Prefetcher
from .ring import SlotRing
from .stats import TransferStats

__all__ = ["Lease", "Link", "Prefetcher", "SlotRing", "TransferStats", "measure_link"]
