"""Offload a PyTorch module under a budget of device memory, in place.

An adapter decides nothing: it translates between tensors and specs or views, and swaps a module's tensors. Placement
is `planning`'s, order is `transfer`'s, bytes are `memory`'s.
"""

from __future__ import annotations

from ..errors import MissingFrameworkError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingFrameworkError(
        "dlpoffload.torch needs PyTorch 2.9 or newer: pip install 'dlpoffload[torch]'"
    ) from error

from .building import Offloader
from .handle import OffloadHandle
from .offload import offload_
from .report import ByDevice, Report
from .split import SplitHandle

__all__ = ["ByDevice", "OffloadHandle", "Offloader", "Report", "SplitHandle", "offload_"]
