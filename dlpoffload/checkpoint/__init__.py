"""Checkpoints in safetensors: which tensor lies where in which file, and reading them straight into place."""

from __future__ import annotations

from .assembly import Assembly
from .opening import Checkpoint, open_checkpoint
from .reading import Progress
from .recipe import Recipe, assemblies, concat, differences, narrow, part

__all__ = [
    "Assembly",
    "Checkpoint",
    "Progress",
    "Recipe",
    "assemblies",
    "concat",
    "differences",
    "narrow",
    "open_checkpoint",
    "part",
]
