"""Choose a driver by the device's name. Nothing here touches a driver until `open_driver` is called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

from ..errors import DriverNotFoundError, SpecError
from .protocol import Capabilities, Driver, PointerInfo

__all__ = ["Capabilities", "Driver", "PointerInfo", "default_device", "installed", "open_driver"]

_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")
_installed: dict[str, Driver] = {}


@lru_cache(maxsize=1)
def default_device() -> str:
    """``"cuda:0"`` where there is a CUDA device, else ``"cpu"``."""
    from . import cuda

    try:
        return "cuda:0" if cuda.device_count() else "cpu"
    except DriverNotFoundError:
        return "cpu"


def open_driver(device: str | int | None = None) -> Driver:
    """The driver of one device; the same object for the same device.

    Parameters
    ----------
    device : str or int, optional
        ``"cuda:1"``, ``"cuda"`` (the first), ``"cpu"``, or the ordinal of a CUDA device. The default is the
        first CUDA device, or the CPU driver where there is none.

    Raises
    ------
    SpecError
        The name means nothing.
    DriverNotFoundError
        A CUDA device was asked for and there is no such device, or no driver. Never falls back to the CPU.
    """
    if device is None:
        device = default_device()
    elif isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    if isinstance(device, str) and device in _installed:
        return _installed[device]
    match = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if match is None:
        raise SpecError(f'device={device!r} is no device name; use "cuda:0", "cuda:1", … or "cpu"')
    name = "cpu" if device == "cpu" else f"cuda:{int(match.group(1) or 0)}"
    if name in _installed:
        return _installed[name]
    return _open_cpu() if name == "cpu" else _open_cuda(int(match.group(1) or 0))


@contextmanager
def installed(driver: Driver) -> Iterator[Driver]:
    """Let `open_driver` give this driver for its device's name, on every thread, inside the block.

    For tests: a CPU driver with limits or an adversary, or one that fails when it is told to. What was made with it
    keeps it after the block.
    """
    former = _installed.get(driver.device)
    _installed[driver.device] = driver
    try:
        yield driver
    finally:
        del _installed[driver.device]
        if former is not None:
            _installed[driver.device] = former


@lru_cache(maxsize=1)
def _open_cpu() -> Driver:
    from .cpu import CpuDriver

    return CpuDriver()


@cache
def _open_cuda(ordinal: int) -> Driver:
    from .cuda import CudaDriver

    return CudaDriver(ordinal)
