"""Whether host and device see each other's writes, tried on a live device through its driver alone.

No framework and no kernel of ours: the device reads and writes with its copy engine, at addresses of views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

from .driver import Driver
from .memory import DeviceBuffer, HostBuffer

__all__ = ["wrong_bytes"]


def wrong_bytes(driver: Driver, nbytes: int) -> dict[str, int]:
    """Write through one side of a device view that is older than the write, read through the other; compare.

    Returns
    -------
    dict
        Wrong bytes of ``"host_writes_device_reads"`` and of ``"device_writes_host_reads"``; zeros are health.
    """
    with (
        driver.current(),
        HostBuffer.allocate(nbytes, device=driver.device) as buffer,
        HostBuffer.allocate(nbytes, device=driver.device) as witness,
        DeviceBuffer.allocate(nbytes, device=driver.device) as there,
        _held(driver.stream_create(), driver.stream_destroy) as stream,
    ):
        return _wrong_bytes(driver, buffer, witness, there.device_pointer, stream)


def _wrong_bytes(driver: Driver, buffer: HostBuffer, witness: HostBuffer, there: int, stream: int) -> dict[str, int]:
    view = buffer.device_view((buffer.nbytes,), "uint8")
    wrong = {}
    for seed, (name, writer, source, destination, reader) in enumerate(
        (
            ("host_writes_device_reads", buffer, view.pointer, witness.host_pointer, witness),
            ("device_writes_host_reads", witness, witness.host_pointer, view.pointer, buffer),
        )
    ):
        wanted = Random(seed).randbytes(buffer.nbytes)
        writer.memoryview()[:] = wanted
        driver.copy_async(there, source, buffer.nbytes, stream)
        driver.copy_async(destination, there, buffer.nbytes, stream)
        driver.stream_synchronize(stream)
        found = bytes(reader.memoryview())
        wrong[name] = 0 if found == wanted else sum(a != b for a, b in zip(found, wanted, strict=True))
    return wrong


@contextmanager
def _held(handle: int, release: Callable[[int], None]) -> Iterator[int]:
    try:
        yield handle
    finally:
        release(handle)
