"""Checkpoints in safetensors: which tensor lies where in which file, and reading them straight into place."""

from __future__ import annotations

from .opening import Checkpoint, open_checkpoint
from .reading import Progress

__all__ = ["Checkpoint", "Progress", "open_checkpoint"]
