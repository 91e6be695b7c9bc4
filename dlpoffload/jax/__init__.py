"""Offload JAX pytrees under a budget of device memory: a new tree, and functions that stage its weights.

An adapter decides nothing: it translates between arrays and specs or views, and says to XLA in which order weights are
copied. Placement is `planning`'s, bytes are `memory`'s; inside a `jit` the ring is XLA's, bounded by barriers.
"""

from __future__ import annotations

from ..errors import MissingFrameworkError

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise MissingFrameworkError("dlpoffload.jax needs JAX 0.10.2 or newer: pip install 'dlpoffload[jax]'") from error

from .arrays import array_view
from .blocks import scan_blocks, stream_blocks
from .compiled import CompiledReport, inspect_compiled
from .handle import OffloadHandle
from .offload import offload
from .report import ProgramReport, Report
from .staging import COMPILER_OPTIONS

__all__ = [
    "COMPILER_OPTIONS",
    "CompiledReport",
    "OffloadHandle",
    "ProgramReport",
    "Report",
    "array_view",
    "inspect_compiled",
    "offload",
    "scan_blocks",
    "stream_blocks",
]
