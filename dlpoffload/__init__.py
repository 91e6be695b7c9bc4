"""`dlpoffload`: host memory for model weights, exactly as large as they are, handed out as DLPack.

Importing this package loads no framework and calls no driver; the adapters are `dlpoffload.torch` and
`dlpoffload.jax`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "errors": (
        "AliasError",
        "CheckpointError",
        "ClosedError",
        "CudaError",
        "DeviceMemoryError",
        "DriverNotFoundError",
        "GradientError",
        "HostMemoryError",
        "MissingFrameworkError",
        "OffloadError",
        "PlanError",
        "RegistrationError",
        "SlotError",
        "SpecError",
    ),
    "spec": ("DType", "TensorSpec", "dtype", "format_nbytes", "lay_out", "parse_nbytes"),
    "view": ("Label", "View"),
    "producers": ("view_of",),
    "memory": ("DeviceBuffer", "HostBuffer"),
    "accounting": (
        "LiveMemory",
        "live_buffers",
        "live_memory",
        "owned_by",
        "pinned_nbytes",
        "trace_allocations",
    ),
    "planning": ("Placement", "Plan", "Unit", "plan"),
    "store": ("HostStore", "open_shared", "share"),
    "checkpoint": ("align",),
    "transfer": ("Prefetcher", "SlotRing"),
    "driver": ("default_device", "open_driver"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from .accounting import LiveMemory as LiveMemory
    from .accounting import live_buffers as live_buffers
    from .accounting import live_memory as live_memory
    from .accounting import owned_by as owned_by
    from .accounting import pinned_nbytes as pinned_nbytes
    from .accounting import trace_allocations as trace_allocations
    from .checkpoint import align as align
    from .driver import default_device as default_device
    from .driver import open_driver as open_driver
    from .errors import AliasError as AliasError
    from .errors import CheckpointError as CheckpointError
    from .errors import ClosedError as ClosedError
    from .errors import CudaError as CudaError
    from .errors import DeviceMemoryError as DeviceMemoryError
    from .errors import DriverNotFoundError as DriverNotFoundError
    from .errors import GradientError as GradientError
    from .errors import HostMemoryError as HostMemoryError
    from .errors import MissingFrameworkError as MissingFrameworkError
    from .errors import OffloadError as OffloadError
    from .errors import PlanError as PlanError
    from .errors import RegistrationError as RegistrationError
    from .errors import SlotError as SlotError
    from .errors import SpecError as SpecError
    from .memory import DeviceBuffer as DeviceBuffer
    from .memory import HostBuffer as HostBuffer
    from .planning import Placement as Placement
    from .planning import Plan as Plan
    from .planning import Unit as Unit
    from .planning import plan as plan
    from .producers import view_of as view_of
    from .spec import DType as DType
    from .spec import TensorSpec as TensorSpec
    from .spec import dtype as dtype
    from .spec import format_nbytes as format_nbytes
    from .spec import lay_out as lay_out
    from .spec import parse_nbytes as parse_nbytes
    from .store import HostStore as HostStore
    from .store import open_shared as open_shared
    from .store import share as share
    from .transfer import Prefetcher as Prefetcher
    from .transfer import SlotRing as SlotRing
    from .view import Label as Label
    from .view import View as View


def __getattr__(name: str) -> Any:
    """Load a public name's module when the name is first used (PEP 562)."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f'module "{__name__}" has no attribute "{name}"')
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
