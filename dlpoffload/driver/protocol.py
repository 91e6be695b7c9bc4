"""What the core asks of a machine: one small protocol, two drivers behind it.

A `Driver` is bound to one device. Pointers are integers. Streams and events are integers too (a CUDA handle,
or a key of the CPU driver); stream 0 is the default stream: the legacy stream of CUDA, the calling thread on
the CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Capabilities", "Driver", "PointerInfo"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can do, by the driver's own attributes.

    Attributes
    ----------
    map_host_memory : bool
        Host memory can have a device pointer (CAN_MAP_HOST_MEMORY).
    host_register : bool
        Memory that exists can be pinned in place (HOST_REGISTER_SUPPORTED).
    read_only_host_register : bool
        So can read-only memory (READ_ONLY_HOST_REGISTER_SUPPORTED).
    host_pointer_is_device_pointer : bool
        A registered address is the same on the device (CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM).
    pageable_memory_access : bool
        Kernels read ordinary host memory (PAGEABLE_MEMORY_ACCESS).
    host_page_tables : bool
        They do so through the host's page tables (PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES): coherent
        memory.
    integrated : bool
        Device and host share one memory (INTEGRATED).
    """

    map_host_memory: bool
    host_register: bool
    read_only_host_register: bool
    host_pointer_is_device_pointer: bool
    pageable_memory_access: bool
    host_page_tables: bool
    integrated: bool

    @property
    def memory(self) -> Literal["separate", "coherent", "unified"]:
        """What host memory is to the device: whether copies to it pay."""
        return "unified" if self.integrated else "coherent" if self.host_page_tables else "separate"


@dataclass(frozen=True, slots=True)
class PointerInfo:
    """What the driver knows of an address: `kind` is "pageable", "pinned", "device" or "managed"."""

    kind: str
    device_id: int


class Driver(Protocol):
    """One device, seen through its driver. Every call raises from the tree in `errors`; none falls back."""

    platform: str
    """"cuda" or "cpu"."""
    device_id: int
    device: str
    """The name users pass: "cuda:0", "cpu"."""
    description: str
    """What to call it in a report, for example "NVIDIA H100 80GB HBM3"."""

    @property
    def numa_node(self) -> int | None:
        """The host's NUMA node that the device is nearest to; None where the system does not say."""
        ...

    def capabilities(self) -> Capabilities: ...

    def device_memory_info(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make this device's context current on the calling thread; the former one is put back afterwards."""
        ...

    def relaxed(self) -> AbstractContextManager[None]:
        """Let this thread wait for events and query them while another thread captures a graph.

        Calls that allocate, register and free memory do so by themselves.
        """
        ...

    def synchronize(self) -> None:
        """Block the host until everything enqueued on the device, on whatever stream, has ended."""
        ...

    # ------------------------------------------------------------------------------------- host memory
    def host_alloc(self, nbytes: int) -> int:
        """Allocate pinned, mapped, portable host memory of exactly `nbytes` (> 0)."""
        ...

    def host_free(self, pointer: int) -> None:
        """Free it; returns only after copies enqueued out of it have ended."""
        ...

    def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
        """Pin and map memory in place: whole pages, portable. RegistrationError when refused."""
        ...

    def host_unregister(self, pointer: int) -> None:
        """Take back the registration that starts at `pointer`, after copies enqueued out of it have ended."""
        ...

    def host_device_pointer(self, pointer: int) -> int:
        """The device's address of pinned, mapped host memory. AliasError when it has none."""
        ...

    def pointer_info(self, pointer: int) -> PointerInfo: ...

    # ----------------------------------------------------------------------------------- device memory
    def device_alloc(self, nbytes: int) -> int: ...
    def device_free(self, pointer: int) -> None: ...

    # ------------------------------------------------------------------------------ streams and events
    def stream_create(self) -> int:
        """A stream that does not synchronise with the legacy default stream."""
        ...

    def stream_destroy(self, stream: int) -> None: ...
    def stream_synchronize(self, stream: int) -> None:
        """Block the host until everything enqueued on `stream` has ended."""
        ...

    def stream_wait_event(self, stream: int, event: int) -> None:
        """What is enqueued on `stream` from now on waits for the last `event_record` made before this call.

        On the CPU driver a wait of stream 0 blocks the calling thread, by contract: it is the compute stream.
        An event never recorded is no wait.
        """
        ...

    def capture_id(self, stream: int) -> int:
        """A number that names the graph capture `stream` takes part in; 0 when there is none."""
        ...

    def capture_hold(self, stream: int, argument: int, function: int) -> None:
        """Let what `stream` captures call a C function, once, when nobody can replay it any more.

        That is when the graph, its clones and everything instantiated from them are destroyed, and no replay runs.
        The function makes no driver call. When this raises, it is never called.
        """
        ...

    def event_create(self, *, timing: bool = False) -> int: ...
    def event_destroy(self, event: int) -> None: ...
    def event_record(self, event: int, stream: int) -> None: ...
    def event_query(self, event: int) -> bool:
        """Whether the last record of `event` has been reached (True when it was never recorded)."""
        ...

    def event_synchronize(self, event: int) -> None:
        """Block the host until the last record of `event` has been reached."""
        ...

    def event_elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two reached records of timing events."""
        ...

    # ------------------------------------------------------------------------------------------ copies
    def copy_async(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy on `stream`; host or device on either side."""
        ...

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copy and return when the bytes are there. Not ordered with any stream."""
        ...

    def fill_async(self, destination: int, value: int, nbytes: int, stream: int) -> None:
        """Enqueue a fill of device memory with one byte value."""
        ...
