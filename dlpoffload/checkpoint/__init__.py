"""Checkpoints in safetensors: which tensor lies where in which file, and reading them straight into place."""

from __future__ import annotations

from .aligning import Aligned, align
from .opening import Checkpoint, open_checkpoint
from .reading import Progress
from .shard import Shard, Stored, Watch

__all__ = ["Aligned", "Checkpoint", "Progress", "Shard", "Stored", "Watch", "align", "open_checkpoint"]
