"""What a driver's refusals mean: which results of which calls, and which error of the tree each becomes."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from ..errors import AliasError, CudaError, DeviceMemoryError, HostMemoryError, RegistrationError
from ..spec import format_nbytes

__all__ = [
    "CODES",
    "HINTS",
    "LOST",
    "cuda_error",
    "device_memory_refused",
    "host_memory_refused",
    "invalid_nbytes",
    "is_refusal",
    "no_device_pointer",
    "registration_refused",
]

CODES: Final = {
    "CUDA_ERROR_INVALID_VALUE": 1,
    "CUDA_ERROR_OUT_OF_MEMORY": 2,
    "CUDA_ERROR_NOT_INITIALIZED": 3,
    "CUDA_ERROR_DEINITIALIZED": 4,
    "CUDA_ERROR_STUB_LIBRARY": 34,
    "CUDA_ERROR_NO_DEVICE": 100,
    "CUDA_ERROR_INVALID_DEVICE": 101,
    "CUDA_ERROR_INVALID_HANDLE": 400,
    "CUDA_ERROR_NOT_FOUND": 500,
    "CUDA_ERROR_NOT_READY": 600,
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 712,
    "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED": 713,
    "CUDA_ERROR_LAUNCH_FAILED": 719,
    "CUDA_ERROR_NOT_PERMITTED": 800,
    "CUDA_ERROR_NOT_SUPPORTED": 801,
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
}
"""The results that our own code gives (CUDA driver API, ``CUresult``)."""

LOST: Final = {
    "CUDA_ERROR_ECC_UNCORRECTABLE": "the device's memory is damaged",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE": "the link between devices failed",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel used memory that is not there",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "a kernel took longer than the system allows",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": "somebody destroyed the device's context",
    "CUDA_ERROR_ASSERT": "an assertion in a kernel failed",
    "CUDA_ERROR_HARDWARE_STACK_ERROR": "a kernel broke its call stack",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "a kernel met an instruction that is none",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "a kernel used an address that is not aligned",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE": "a kernel used an address of another kind of memory",
    "CUDA_ERROR_INVALID_PC": "a kernel jumped to where no code is",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel failed",
    "CUDA_ERROR_CONTAINED": "the device contained an error of its memory",
}
"""Results after which a context is of no use: all its later calls give them, too (CUDA driver API, ``CUresult``)."""

HINTS: Final = {
    "CUDA_ERROR_NOT_INITIALIZED": "a forked child cannot use CUDA; start it with the spawn method",
    "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": (
        "the legacy default stream cannot be used while another stream captures; pass the capturing stream"
    ),
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "an earlier call broke the capture; end it and capture again",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "the call cannot be part of a graph capture; make it before",
    "CUDA_ERROR_STREAM_CAPTURE_ISOLATION": (
        "an event or stream from outside a graph capture was used in it; use those made inside"
    ),
    **{
        name: f"{why}; the CUDA context is lost, and every later call fails alike: restart the process"
        for name, why in LOST.items()
    },
}
"""What to do, for results that the user can do something about, wherever they come from."""

_REGISTRATION: Final = {
    # name: (what was found, what to do)
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": (
        "some of its pages are pinned already, by another registration or allocation",
        "use the memory as it is pinned, or take the other registration back first",
    ),
    "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED": (
        "no registration starts at this address",
        "pass the address that was registered, once",
    ),
    "CUDA_ERROR_INVALID_VALUE": (
        "the range is empty, not mapped, may not be written, or was pinned by the driver itself",
        "check address and length; pass read_only=True for memory that is mapped read-only",
    ),
    "CUDA_ERROR_NOT_PERMITTED": (
        "the system does not let this process pin memory",
        "check the container's limits and the driver's permissions",
    ),
    "CUDA_ERROR_NOT_SUPPORTED": (
        "this device cannot pin that kind of memory in place",
        "copy it into memory that the driver allocates",
    ),
    "CUDA_ERROR_OUT_OF_MEMORY": (
        "there is not enough memory that can be pinned",
        "register less, or free memory that is pinned now",
    ),
}

_REFUSALS: Final[dict[str, Container[str]]] = {
    # call: results that become an error of their own; all others are a CudaError
    "cuMemHostAlloc": ("CUDA_ERROR_OUT_OF_MEMORY",),  # HostMemoryError
    "cuMemAlloc": ("CUDA_ERROR_OUT_OF_MEMORY",),  # DeviceMemoryError
    "cuMemHostRegister": _REGISTRATION,  # RegistrationError
    "cuMemHostUnregister": _REGISTRATION,
    "cuMemHostGetDevicePointer": (  # AliasError
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        "CUDA_ERROR_NOT_SUPPORTED",
    ),
}


def is_refusal(error: CudaError) -> bool:
    """Whether the call was refused for a reason with an error of its own, rather than failed."""
    return error.name in _REFUSALS.get(error.call, ())


def cuda_error(call: str, name: str, detail: str = "") -> CudaError:
    """The error of a result that the driver layer itself gives."""
    return CudaError(call, CODES[name], name, detail)


def invalid_nbytes(call: str, nbytes: int) -> CudaError:
    """The error of an allocation of nothing; drivers disagree on it, so it is asked of none."""
    return cuda_error(call, "CUDA_ERROR_INVALID_VALUE", f"asked for {nbytes} bytes; ask for at least 1")


def registration_refused(cause: CudaError, pointer: int, nbytes: int | None) -> RegistrationError:
    """The error of a registration (or, without `nbytes`, of taking one back) that the driver refused."""
    what = f"{pointer:#x} cannot be unregistered"
    if nbytes is not None:
        what = f"{format_nbytes(nbytes)} at {pointer:#x} cannot be pinned in place"
    found, remedy = _REGISTRATION[cause.name]
    error = RegistrationError(f"{what}: {found}; {remedy} [{cause}]")
    return error


def host_memory_refused(cause: CudaError, nbytes: int, limit: str, limit_nbytes: int | None) -> HostMemoryError:
    """The error of host memory that the driver did not give; `limit` names what was hit, in words."""
    figure = "" if limit_nbytes is None else f" is {format_nbytes(limit_nbytes)}"
    found = f"{limit}{figure}" if limit else "the driver did not say which limit"
    error = HostMemoryError(
        f"{format_nbytes(nbytes)} of pinned host memory were refused: {found}; "
        f"ask for less, or raise that limit [{cause}]",
        nbytes=nbytes,
        limit=limit,
        limit_nbytes=limit_nbytes,
    )
    return error


def device_memory_refused(cause: CudaError, device: str, nbytes: int, free: int, total: int) -> DeviceMemoryError:
    """The error of device memory that the driver did not give."""
    error = DeviceMemoryError(
        f'{format_nbytes(nbytes)} on device "{device}" were refused: {format_nbytes(free)} of '
        f"{format_nbytes(total)} are free; lower the budget, or free device memory [{cause}]",
        nbytes=nbytes,
    )
    return error


def no_device_pointer(cause: CudaError, device: str, pointer: int) -> AliasError:
    """The error of a device pointer asked of host memory that has none."""
    error = AliasError(
        f'host memory at {pointer:#x} has no address on device "{device}": it is not pinned, or the device '
        f"cannot map host memory; register it first, or stage it by a copy [{cause}]"
    )
    return error
