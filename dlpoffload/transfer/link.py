"""The link's own rate, measured in the same process, as the measure of what streaming reaches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from ..driver import Driver
from ..memory import DeviceBuffer, HostBuffer
from ..spec import parse_nbytes

__all__ = ["Link", "measure_link"]


@dataclass(frozen=True, slots=True)
class Link:
    """Rates of plain copies between pinned host memory and one device, in 10^9 bytes a second."""

    device: str
    nbytes: int
    host_to_device: float
    device_to_host: float


def measure_link(driver: Driver, *, nbytes: int | str = "1GiB", repeat: int = 20) -> Link:
    """Measure the link by driver copies of one pinned buffer: the median of `repeat`, after one to warm up.

    Needs `nbytes` of host and of device memory while it runs.
    """
    count = parse_nbytes(nbytes)
    with (
        driver.current(),
        HostBuffer.allocate(count, device=driver.device) as host,
        DeviceBuffer.allocate(count, device=driver.device) as device,
    ):
        down = _rate(driver, device.device_pointer, host.host_pointer, count, repeat)
        up = _rate(driver, host.host_pointer, device.device_pointer, count, repeat)
    return Link(driver.device, count, down, up)


def _rate(driver: Driver, destination: int, source: int, nbytes: int, repeat: int) -> float:
    stream = driver.stream_create()
    try:
        seconds = []
        for _ in range(repeat + 1):
            start = time.perf_counter()
            driver.copy_async(destination, source, nbytes, stream)
            driver.stream_synchronize(stream)
            seconds.append(time.perf_counter() - start)
        return nbytes / median(seconds[1:]) / 1e9
    finally:
        driver.stream_destroy(stream)
