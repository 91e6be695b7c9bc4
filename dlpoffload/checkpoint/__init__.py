"""Checkpoints in safetensors: which tensor lies where in which file, and reading them straight into place."""

from __future__ import annotations

from .aligning import Aligned, align
from .assembly import Assembly
from .opening import Checkpoint, open_checkpoint
from .reading import Progress
from .recipe import Recipe, assemblies, concat, differences, narrow, part
from .shard import Shard, Stored, Watch, stored_as
from .writing import FileLayout, ToStore, lay_out_file

__all__ = [
    "Aligned",
    "Assembly",
    "Checkpoint",
    "FileLayout",
    "Progress",
    "Recipe",
    "Shard",
    "Stored",
    "ToStore",
    "Watch",
    "align",
    "assemblies",
    "concat",
    "differences",
    "lay_out_file",
    "narrow",
    "open_checkpoint",
    "part",
    "stored_as",
]
