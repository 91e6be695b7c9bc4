"""What DLPack calls devices, which of them a view names, and the checks of what a consumer asks for."""

from __future__ import annotations

from enum import Enum
from typing import Final

from .errors import AliasError
from .spec import TensorSpec, format_nbytes, parse_nbytes

__all__ = [
    "CPU",
    "CUDA",
    "CUDA_HOST",
    "DEVICE_NAMES",
    "LEGACY_STREAM",
    "NO_ORDER",
    "Label",
    "check_stream",
    "checked_device",
    "checked_range",
    "device_text",
]

CPU: Final = 1
CUDA: Final = 2
CUDA_HOST: Final = 3
DEVICE_NAMES: Final = {CPU: "kDLCPU", CUDA: "kDLCUDA", CUDA_HOST: "kDLCUDAHost"}
LEGACY_STREAM: Final = 1
NO_ORDER: Final = -1


class Label(Enum):
    """What a view says of its device. Consumers differ in what they take: see docs/interchange.md.

    Attributes
    ----------
    CPU
        Host memory. Every consumer on the CPU takes it.
    PINNED
        Page-locked host memory (kDLCUDAHost). JAX takes it without a copy as ``pinned_host``; torch refuses it.
    PINNED_AS_CPU
        ``__dlpack_device__`` says page-locked, the capsule says CPU. torch, NumPy and JAX all take it, and torch
        exports its own pinned tensors like that.
    DEVICE
        The device's own address (kDLCUDA). On the CPU driver the device is the CPU.
    """

    CPU = "cpu"
    PINNED = "pinned"
    PINNED_AS_CPU = "pinned_as_cpu"
    DEVICE = "device"


def checked_range(spec: TensorSpec, byte_offset: int, pointer: int, nbytes: int, what: str) -> int:
    """The offset of a tensor in `nbytes` bytes at `pointer`, after checking that it lies inside and is aligned."""
    offset = parse_nbytes(byte_offset, "byte_offset")
    if offset + spec.nbytes > nbytes:
        raise AliasError(
            f"a view of {spec} at byte_offset={offset} ends at byte {offset + spec.nbytes}, but this "
            f"{what} has {format_nbytes(nbytes)}; use a smaller shape or a larger buffer"
        )
    if spec.dtype.itembits % 8 == 0 and (pointer + offset) % min(spec.dtype.itemsize, 16):
        raise AliasError(
            f"byte_offset={offset} of a {what} at {pointer:#x} is not aligned to the {spec.dtype.itemsize} bytes "
            f"of a {spec.dtype}; carve() lays tensors out aligned"
        )
    return offset


def check_stream(stream: int | None, device: tuple[int, int]) -> None:
    if stream is None:
        return
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < NO_ORDER:
        raise AliasError(f"stream={stream!r}; the array API standard knows None and whole numbers from -1 on")
    if device[0] == CPU:
        raise AliasError(f"stream={stream} for {device_text(device)}, which has no streams; pass None")
    if device[0] == CUDA and stream == 0:
        raise AliasError(
            "stream=0 is ambiguous and the array API standard disallows it for CUDA; "
            "pass 1 (legacy default), 2 (per thread default), a handle, or -1 for no ordering"
        )


def checked_device(device: tuple[int, int]) -> tuple[int, int]:
    kind, number = int(device[0]), int(device[1])
    if kind not in DEVICE_NAMES or number < 0 or (number and kind != CUDA):
        raise AliasError(
            f"dl_device={device} is no device of this library; "
            f"known are {', '.join(f'{name} ({value})' for value, name in DEVICE_NAMES.items())}"
        )
    return kind, number


def device_text(device: tuple[int, int]) -> str:
    return f"({DEVICE_NAMES[device[0]]}, {device[1]})"
