"""The CPU driver: a discrete device played by ordinary memory and threads.

The same calls as CUDA, with the same checks, errors and order. "Device memory" comes from the C library,
pinned memory is a table of page ranges, and streams are worker threads (`cpu_streams`). CPU compute runs on
the calling thread, so that is what stream 0 is: work enqueued there runs at once, and its waits block the
caller.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

from ..errors import CudaError
from ..limits import host_limits
from ..maps import mappings
from . import cpu_memory as memory
from . import refusals
from .cpu_memory import PAGE, Range, Ranges
from .cpu_streams import Streams, StreamStats
from .protocol import Capabilities, PointerInfo
from .refusals import cuda_error

__all__ = ["CpuDriver"]

_DISCRETE: Final = Capabilities(
    map_host_memory=True,
    host_register=True,
    read_only_host_register=True,
    host_pointer_is_device_pointer=True,
    pageable_memory_access=False,
    host_page_tables=False,
    integrated=False,
)
_POISON: Final = (0xA5, 0xC3, 0x5A, 0xFF)


class CpuDriver:
    """The machine itself as a device.

    Parameters
    ----------
    host_limit_nbytes : int, optional
        Bytes that may be pinned, registrations counted in whole pages. The default is what the machine has.
    device_limit_nbytes : int, optional
        Bytes of "device memory". The default is what the machine has.
    adversary : int, optional
        A seed. Work then runs as late, or as early, as the order that the program stated lets it, fresh
        device memory is full of garbage, and so is the destination of each copy some time before the copy: a
        reader that does not wait for its copy, or a copy that does not wait for the last reader, gives a
        wrong result, and always the same for the same seed. For tests; what asks `event_query` in a loop and
        waits for nothing may never end.
    numa_node : int, optional
        The node that the device says it is near to.
    **capabilities : bool
        Fields of `Capabilities` to take away or add, for example ``map_host_memory=False``.

    Attributes
    ----------
    stats : StreamStats
        How often the host was held up.
    """

    platform = "cpu"
    device_id = 0
    device = "cpu"

    def __init__(
        self,
        *,
        host_limit_nbytes: int | None = None,
        device_limit_nbytes: int | None = None,
        adversary: int | None = None,
        numa_node: int | None = None,
        **capabilities: bool,
    ) -> None:
        self.numa_node = numa_node
        self.description = _cpu_name()
        physical = host_limits().total_nbytes
        if physical is None:
            physical = 1 << 62  # the system does not say; it refuses by itself
        self._host_limit = physical if host_limit_nbytes is None else host_limit_nbytes
        self._device_limit = physical if device_limit_nbytes is None else device_limit_nbytes
        self._capabilities = dataclasses.replace(_DISCRETE, **capabilities)
        self._device = Ranges()
        self._allocated = Ranges()  # by host_alloc
        self._registered = Ranges()  # whole pages
        self._streams = Streams(adversary)
        # Workers hold the machine, not the driver, so that a driver nobody holds can end them.
        weakref.finalize(self, self._streams.close).atexit = False

    @property
    def stats(self) -> StreamStats:
        return self._streams.stats

    def close(self) -> None:
        """Let every stream run out and its thread end."""
        self._streams.drain("cuCtxDestroy")
        self._streams.close()

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def device_memory_info(self) -> tuple[int, int]:
        with self._streams.lock:
            return self._device_limit - self._device.nbytes, self._device_limit

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def relaxed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        self._streams.synchronize()

    # ------------------------------------------------------------------------------------- host memory
    def host_alloc(self, nbytes: int) -> int:
        call = "cuMemHostAlloc"
        if nbytes <= 0:
            raise refusals.invalid_nbytes(call, nbytes)
        with self._streams.lock:
            try:
                if self._pinned_nbytes() + nbytes > self._host_limit:
                    raise cuda_error(call, "CUDA_ERROR_OUT_OF_MEMORY")
                pointer = _allocate(call, nbytes)
            except CudaError as cause:
                limit = "the driver's limit of pinned memory"
                raise refusals.host_memory_refused(cause, nbytes, limit, self._host_limit) from cause
            self._allocated.add(Range(pointer, pointer + nbytes, pointer))
            return pointer

    def host_free(self, pointer: int) -> None:
        self._free("cuMemFreeHost", self._allocated, pointer)

    def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
        start, end = pointer // PAGE * PAGE, -(-(pointer + nbytes) // PAGE) * PAGE
        with self._streams.lock:
            try:
                self._check_registration(pointer, nbytes, start, end, read_only)
            except CudaError as cause:
                raise refusals.registration_refused(cause, pointer, nbytes) from cause
            self._registered.add(Range(start, end, pointer, read_only))

    def _check_registration(self, pointer: int, nbytes: int, start: int, end: int, read_only: bool) -> None:
        call = "cuMemHostRegister"
        able = self._capabilities
        if not able.host_register or (read_only and not able.read_only_host_register):
            raise cuda_error(call, "CUDA_ERROR_NOT_SUPPORTED")
        if nbytes <= 0 or pointer <= 0 or not memory.is_mapped(start, end):
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE")
        mapped = list(mappings(start, end))
        if read_only and any(mapping.is_private and mapping.inode for mapping in mapped):
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE", "a private mapping of a file: CUDA would never return")
        if not read_only and not all(mapping.is_writable for mapping in mapped):
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE")
        if self._registered.overlap(start, end) or self._allocated.overlap(start, end):
            raise cuda_error(call, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED")
        if self._pinned_nbytes() + end - start > self._host_limit:
            raise cuda_error(call, "CUDA_ERROR_OUT_OF_MEMORY", f"the limit is {self._host_limit} bytes")

    def host_unregister(self, pointer: int) -> None:
        call = "cuMemHostUnregister"
        if not self._take(call, self._registered, pointer):
            cause = cuda_error(call, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED")
            raise refusals.registration_refused(cause, pointer, None) from cause

    def host_device_pointer(self, pointer: int) -> int:
        with self._streams.lock:
            if self._capabilities.map_host_memory and self._pinned(pointer):
                return pointer
        cause = cuda_error("cuMemHostGetDevicePointer", "CUDA_ERROR_INVALID_VALUE")
        raise refusals.no_device_pointer(cause, self.device, pointer) from cause

    def pointer_info(self, pointer: int) -> PointerInfo:
        with self._streams.lock:
            if self._device.find(pointer):
                return PointerInfo("device", self.device_id)
            if self._pinned(pointer):
                return PointerInfo("pinned", self.device_id)
            return PointerInfo("pageable", -1)

    # ----------------------------------------------------------------------------------- device memory
    def device_alloc(self, nbytes: int) -> int:
        call = "cuMemAlloc"
        if nbytes <= 0:
            raise refusals.invalid_nbytes(call, nbytes)
        with self._streams.lock:
            free, total = self.device_memory_info()
            try:
                if nbytes > free:
                    raise cuda_error(call, "CUDA_ERROR_OUT_OF_MEMORY")
                pointer = _allocate(call, nbytes)
            except CudaError as cause:
                raise refusals.device_memory_refused(cause, self.device, nbytes, free, total) from cause
            self._device.add(Range(pointer, pointer + nbytes, pointer))
            if (adversary := self._streams.adversary) is not None:
                memory.fill(pointer, adversary.choice(_POISON), nbytes)
            return pointer

    def device_free(self, pointer: int) -> None:
        self._free("cuMemFree", self._device, pointer)

    # ------------------------------------------------------------------------------ streams and events
    def stream_create(self) -> int:
        return self._streams.stream_create()

    def stream_destroy(self, stream: int) -> None:
        self._streams.stream_destroy(stream)

    def stream_synchronize(self, stream: int) -> None:
        self._streams.stream_synchronize(stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        self._streams.stream_wait_event(stream, event)

    def capture_id(self, stream: int) -> int:
        return 0

    def capture_hold(self, stream: int, argument: int, function: int) -> None:
        raise cuda_error("cuStreamGetCaptureInfo", "CUDA_ERROR_INVALID_VALUE", f"stream {stream} captures nothing")

    def enqueue(self, stream: int, call: Callable[[], object]) -> None:
        """Enqueue a callable: a CPU "kernel". What it raises is raised at the next wait for the stream.

        It may not itself wait for streams. On stream 0 it runs at once.
        """
        self._streams.enqueue("cuLaunchHostFunc", stream, call, foreign=True)

    def event_create(self, *, timing: bool = False) -> int:
        return self._streams.event_create(timing=timing)

    def event_destroy(self, event: int) -> None:
        self._streams.event_destroy(event)

    def event_record(self, event: int, stream: int) -> None:
        self._streams.event_record(event, stream)

    def event_query(self, event: int) -> bool:
        return self._streams.event_query(event)

    def event_synchronize(self, event: int) -> None:
        self._streams.event_synchronize(event)

    def event_elapsed_ms(self, start: int, end: int) -> float:
        return self._streams.event_elapsed_ms(start, end)

    # ------------------------------------------------------------------------------------------ copies
    def copy_async(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        call = "cuMemcpyAsync"
        self._check_range(call, destination, nbytes, write=True)
        self._check_range(call, source, nbytes)
        adversary = self._streams.adversary
        overlap = destination < source + nbytes and source < destination + nbytes
        if adversary is not None and stream != 0 and nbytes and not overlap:
            poison = adversary.choice(_POISON)
            self._streams.enqueue(call, stream, lambda: memory.fill(destination, poison, nbytes))
        self._streams.enqueue(call, stream, lambda: memory.move(destination, source, nbytes))

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        self._check_range("cuMemcpy", destination, nbytes, write=True)
        self._check_range("cuMemcpy", source, nbytes)
        memory.move(destination, source, nbytes)

    def fill_async(self, destination: int, value: int, nbytes: int, stream: int) -> None:
        call = "cuMemsetD8Async"
        self._check_range(call, destination, nbytes, write=True)
        if not 0 <= value <= 255:
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE", f"{value} is no byte")
        self._streams.enqueue(call, stream, lambda: memory.fill(destination, value, nbytes))

    # ----------------------------------------------------------------------------------------- helpers
    def _pinned_nbytes(self) -> int:
        return self._allocated.nbytes + self._registered.nbytes

    def _pinned(self, pointer: int) -> Range | None:
        return self._allocated.find(pointer) or self._registered.find(pointer)

    def _free(self, call: str, table: Ranges, pointer: int) -> None:
        if not self._take(call, table, pointer):
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE", f"nothing was allocated at {pointer:#x}")
        memory.free(pointer)

    def _take(self, call: str, table: Ranges, pointer: int) -> bool:
        """Remove what was made at `pointer`, once nothing enqueued uses it; False when there is none."""
        with self._streams.lock:
            if not table.holds(pointer):
                return False
            self._streams.drain(call)
            return table.remove(pointer)  # the drain gave up the lock: another thread may have been quicker

    def _check_range(self, call: str, pointer: int, nbytes: int, *, write: bool = False) -> None:
        """What CUDA checks of an address: not null, and not across the end of an allocation or a registration."""
        with self._streams.lock:
            known = self._device.find(pointer) or self._pinned(pointer)
            end = known.end if known else None
        problem = ""
        if nbytes < 0 or (pointer <= 0 and nbytes):
            problem = "are no memory"
        elif end is not None and pointer + nbytes > end:
            problem = f"cross the end of an allocation at {end:#x}"
        elif known is not None and known.read_only and write and nbytes:
            problem = "are registered read-only"
        if problem:
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE", f"{nbytes} bytes at {pointer:#x} {problem}")


def _allocate(call: str, nbytes: int) -> int:
    try:
        return memory.allocate(nbytes)
    except OSError as error:
        raise cuda_error(call, "CUDA_ERROR_OUT_OF_MEMORY", str(error)) from error


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else f"{platform.machine()} CPU"
