"""The exception tree, on one page.

A message says what was asked, what was found and what to do, with names in quotes and bytes before GiB.

::

    OffloadError(Exception)
    ├── CudaError                       a driver call failed
    │   └── DriverNotFoundError         no driver on this machine
    ├── HostMemoryError(MemoryError)    host memory was refused
    ├── DeviceMemoryError(MemoryError)  device memory was refused
    ├── GradientError(RuntimeError)     a gradient would reach an offloaded parameter
    ├── RegistrationError               these bytes cannot be pinned in place
    ├── AliasError(BufferError)         a view was asked of bytes that cannot be aliased
    ├── ClosedError(RuntimeError)       used after close, or closed under a live view
    ├── SlotError(RuntimeError)         a staging slot is missing, too small or still leased
    ├── SpecError(ValueError)           a shape, dtype, byte count or device that means nothing
    ├── PlanError(ValueError)           no plan satisfies what was asked
    ├── CheckpointError(ValueError)     a checkpoint is damaged, truncated or incomplete
    └── MissingFrameworkError(ImportError)
"""

from __future__ import annotations

__all__ = [
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
]


class OffloadError(Exception):
    """Base of every error that `dlpoffload` raises on purpose."""


class CudaError(OffloadError):
    """A driver call failed.

    Attributes
    ----------
    call : str
        The driver function, for example ``"cuMemHostRegister"``.
    code : int
        The ``CUresult`` value.
    name : str
        Its name, for example ``"CUDA_ERROR_OUT_OF_MEMORY"``.
    undone : bool
        Whether what was asked for is not there. False of memory that was registered all the same, and stays so.
    """

    def __init__(self, call: str, code: int, name: str, detail: str = "") -> None:
        self.call = call
        self.code = code
        self.name = name
        self.undone = True
        super().__init__(f"{call} failed with {name} ({code})" + (f": {detail}" if detail else ""))


class DriverNotFoundError(CudaError):
    """No CUDA driver, or no CUDA device, on this machine."""


class HostMemoryError(OffloadError, MemoryError):
    """Host memory was refused.

    Attributes
    ----------
    nbytes : int
        The bytes asked for.
    limit : str
        The limit that was hit, in words; empty when the system did not say.
    limit_nbytes : int or None
        Its figure in bytes.
    """

    def __init__(self, message: str, *, nbytes: int, limit: str = "", limit_nbytes: int | None = None) -> None:
        self.nbytes = nbytes
        self.limit = limit
        self.limit_nbytes = limit_nbytes
        super().__init__(message)


class DeviceMemoryError(OffloadError, MemoryError):
    """Device memory was refused.

    Attributes
    ----------
    nbytes : int
        The bytes asked for.
    """

    def __init__(self, message: str, *, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(message)


class GradientError(OffloadError, RuntimeError):
    """A gradient would reach an offloaded parameter."""


class RegistrationError(OffloadError):
    """These bytes cannot be pinned in place."""


class AliasError(OffloadError, BufferError):
    """A view was asked of bytes that cannot be aliased that way."""


class ClosedError(OffloadError, RuntimeError):
    """Used after `close`, or closed under live views."""


class SlotError(OffloadError, RuntimeError):
    """No staging slot can serve the request."""


class SpecError(OffloadError, ValueError):
    """A shape, dtype, byte count, label or device name that means nothing."""


class PlanError(OffloadError, ValueError):
    """No plan satisfies the budget, or a pattern matched nothing.

    Attributes
    ----------
    smallest_budget : int or None
        Bytes of the smallest device budget that would do; None when the budget is not at fault.
    """

    def __init__(self, message: str, *, smallest_budget: int | None = None) -> None:
        self.smallest_budget = smallest_budget
        super().__init__(message)


class CheckpointError(OffloadError, ValueError):
    """A checkpoint file is damaged, truncated, incomplete or changed."""


class MissingFrameworkError(OffloadError, ImportError):
    """A framework that this adapter needs is not installed; the message says the pip line."""
