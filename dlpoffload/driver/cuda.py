"""The CUDA driver, through `cuda.bindings.driver`: the one place that knows it.

Every result passes `check`. Every call that needs a context passes `CudaDriver._call`, which sees to it that
the device's primary context is current on the calling thread, whichever thread that is, and leaves the thread
as it was.

Written against the signatures of cuda-bindings 12.9 and 13: a call returns a tuple, the result first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, Final

from ..errors import CudaError, DriverNotFoundError
from ..limits import host_limits
from . import refusals
from .current import Current, inside
from .protocol import Capabilities, PointerInfo
from .refusals import cuda_error
from .topology import numa_node_of

__all__ = ["CudaDriver", "check", "device_count", "driver_version"]

_SUCCESS: Final = 0

_PORTABLE, _DEVICEMAP, _READ_ONLY = 0x01, 0x02, 0x08  # CU_MEMHOSTALLOC_* and CU_MEMHOSTREGISTER_* agree
_NON_BLOCKING: Final = 1  # CU_STREAM_NON_BLOCKING
_EVENT_DEFAULT, _DISABLE_TIMING = 0, 2  # CU_EVENT_*


# ---------------------------------------------------------------------------------------------- finding it
def _import_bindings() -> ModuleType:
    import cuda.bindings.driver

    module: ModuleType = cuda.bindings.driver
    return module


def _initialise() -> ModuleType:
    """The bindings, with the driver initialised."""
    try:
        cuda = _import_bindings()
    except ImportError as error:
        raise _not_found(
            "import cuda.bindings.driver",
            "CUDA_ERROR_NOT_INITIALIZED",
            f"{error}; CUDA is reached through cuda-bindings: pip install cuda-bindings",
        ) from error
    try:
        result = cuda.cuInit(0)
    except RuntimeError as error:  # DynamicLibNotFoundError (13), or "Failed to dlopen libcuda.so.1" (12)
        raise _not_found(
            "cuInit",
            "CUDA_ERROR_NOT_INITIALIZED",
            f'{error}; install the NVIDIA driver (in a container: its runtime), or use device="cpu"',
        ) from error
    try:
        check(cuda, "cuInit", result)
    except CudaError as error:
        if error.name in ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY"):
            raise _not_found(
                "cuInit",
                error.name,
                'no CUDA device can be seen (is CUDA_VISIBLE_DEVICES empty?); or use device="cpu"',
            ) from error
        raise
    return cuda


def _not_found(call: str, name: str, detail: str) -> DriverNotFoundError:
    return DriverNotFoundError(call, refusals.CODES[name], name, detail)


def device_count() -> int:
    """How many CUDA devices this process can see.

    Raises
    ------
    DriverNotFoundError
        There is no driver, no device, or cuda-bindings is not installed.
    """
    cuda = _initialise()
    return int(check(cuda, "cuDeviceGetCount", cuda.cuDeviceGetCount()))


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver serves, as (major, minor).

    Raises
    ------
    DriverNotFoundError
        There is no driver, no device, or cuda-bindings is not installed.
    """
    cuda = _initialise()
    version = int(check(cuda, "cuDriverGetVersion", cuda.cuDriverGetVersion()))
    return version // 1000, version % 1000 // 10


def check(cuda: ModuleType, call: str, result: tuple[Any, ...], detail: str = "") -> Any:
    """What a call returned, without its result: nothing, a value, or a tuple of values.

    Raises
    ------
    CudaError
        The result is no success.
    """
    if result[0] == _SUCCESS:
        return result[1] if len(result) == 2 else result[1:] or None
    code = int(result[0])
    known, name = cuda.cuGetErrorName(result[0])
    text = name.decode() if known == _SUCCESS else f"CUresult {code}"
    raise CudaError(call, code, text, "; ".join(filter(None, (detail, refusals.HINTS.get(text, "")))))


# ---------------------------------------------------------------------------------------------- the driver
class CudaDriver:
    """One CUDA device, through its primary context, which the frameworks use too.

    Parameters
    ----------
    ordinal : int
        The device, counted as CUDA_VISIBLE_DEVICES has it.

    Raises
    ------
    DriverNotFoundError
        There is no driver, or no such device.
    """

    platform = "cuda"

    def __init__(self, ordinal: int) -> None:
        self._cuda = cuda = _initialise()
        count = int(check(cuda, "cuDeviceGetCount", cuda.cuDeviceGetCount()))
        if not 0 <= ordinal < count:
            found = f'"cuda:0" to "cuda:{count - 1}"' if count > 1 else '"cuda:0"' if count else "none"
            raise _not_found(
                "cuDeviceGet",
                "CUDA_ERROR_INVALID_DEVICE",
                f'device "cuda:{ordinal}" was asked for, and of {count} devices found there is {found}; '
                "name one of these, or look at CUDA_VISIBLE_DEVICES",
            )
        self.device_id = ordinal
        self.device = f"cuda:{ordinal}"
        self._handle = check(cuda, "cuDeviceGet", cuda.cuDeviceGet(ordinal))
        name = check(cuda, "cuDeviceGetName", cuda.cuDeviceGetName(256, self._handle))
        self.description = name.split(b"\0")[0].decode()
        self._capabilities: Capabilities | None = None
        # Retained until the process ends: buffers outlive whoever opened the driver.
        self._context = check(cuda, "cuDevicePrimaryCtxRetain", cuda.cuDevicePrimaryCtxRetain(self._handle))
        self._context_address = int(self._context)

    # -------------------------------------------------------------------------------------- the context
    def _push(self) -> bool:
        """Make the context current; False when it is already."""
        cuda = self._cuda
        if int(check(cuda, "cuCtxGetCurrent", cuda.cuCtxGetCurrent())) == self._context_address:
            return False
        check(cuda, "cuCtxPushCurrent", cuda.cuCtxPushCurrent(self._context))
        return True

    def _pop(self) -> None:
        check(self._cuda, "cuCtxPopCurrent", self._cuda.cuCtxPopCurrent())

    def _call(self, call: str, *arguments: Any, detail: str = "") -> Any:
        """Make one driver call in the device's context, and check its result."""
        if inside.whose is self:
            return self._checked(call, *arguments, detail=detail)
        with self.current():
            result = self._result(call, *arguments)
        return check(self._cuda, call, result, detail)

    def _checked(self, call: str, *arguments: Any, detail: str = "") -> Any:
        """The same in whatever context is current."""
        return check(self._cuda, call, self._result(call, *arguments), detail)

    def _result(self, call: str, *arguments: Any) -> tuple[Any, ...]:
        function: Callable[..., tuple[Any, ...]] = getattr(self._cuda, call)
        try:
            return function(*arguments)
        except OverflowError as error:
            raise cuda_error(call, "CUDA_ERROR_INVALID_VALUE", f"{error}: {arguments}") from error
        except RuntimeError as error:  # the bindings are newer than the driver
            raise cuda_error(call, "CUDA_ERROR_NOT_FOUND", f"{error}; update the NVIDIA driver") from error

    def current(self) -> AbstractContextManager[None]:
        return Current(self, self._push, self._pop)

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        call = "cuThreadExchangeStreamCaptureMode"
        former = self._call(call, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield
        finally:
            self._call(call, former)

    def _relaxed(self, call: str, *arguments: Any) -> Any:
        """Call what would break a capture on another thread, though it has nothing to do with it: memory's calls."""
        with self.current(), self.relaxed():
            return self._checked(call, *arguments)

    def _make(self, call: str, *arguments: Any, undo: str) -> Any:
        """Call what makes something, and take it back should the thread not be put back afterwards."""
        made: list[Any] = []
        try:
            with self.current(), self.relaxed():
                made.append(self._checked(call, *arguments))
        except CudaError as error:
            for value in made:
                try:
                    self._call(undo, arguments[0] if value is None else value)
                except CudaError as refused:
                    error.undone = False
                    error.add_note(f"and it could not be taken back: {refused}")
            raise
        return made[0]

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    # --------------------------------------------------------------------------------------- the device
    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            self._capabilities = Capabilities(
                map_host_memory=self._attribute("CAN_MAP_HOST_MEMORY"),
                host_register=self._attribute("HOST_REGISTER_SUPPORTED"),
                read_only_host_register=self._attribute("READ_ONLY_HOST_REGISTER_SUPPORTED"),
                host_pointer_is_device_pointer=self._attribute("CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"),
                pageable_memory_access=self._attribute("PAGEABLE_MEMORY_ACCESS"),
                host_page_tables=self._attribute("PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES"),
                integrated=self._attribute("INTEGRATED"),
            )
        return self._capabilities

    def _attribute(self, name: str) -> bool:
        attribute = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return bool(self._call("cuDeviceGetAttribute", attribute, self._handle, detail=name))

    @property
    def numa_node(self) -> int | None:
        return numa_node_of(self._call("cuDeviceGetPCIBusId", 16, self._handle))

    def device_memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    # -------------------------------------------------------------------------------------- host memory
    def host_alloc(self, nbytes: int) -> int:
        call = "cuMemHostAlloc"
        if nbytes <= 0:
            raise refusals.invalid_nbytes(call, nbytes)
        try:
            return int(self._make(call, nbytes, _PORTABLE | _DEVICEMAP, undo="cuMemFreeHost"))
        except CudaError as cause:
            if not refusals.is_refusal(cause):
                raise
            limits = host_limits()
            raise refusals.host_memory_refused(cause, nbytes, limits.binding_limit, limits.available_nbytes) from cause

    def host_free(self, pointer: int) -> None:
        self._relaxed("cuMemFreeHost", pointer)

    def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
        flags = _PORTABLE | _DEVICEMAP | (_READ_ONLY if read_only else 0)
        try:
            self._make("cuMemHostRegister", pointer, nbytes, flags, undo="cuMemHostUnregister")
        except CudaError as cause:
            if not refusals.is_refusal(cause):
                raise
            raise refusals.registration_refused(cause, pointer, nbytes) from cause

    def host_unregister(self, pointer: int) -> None:
        try:
            self._relaxed("cuMemHostUnregister", pointer)
        except CudaError as cause:
            if not refusals.is_refusal(cause):
                raise
            raise refusals.registration_refused(cause, pointer, None) from cause

    def host_device_pointer(self, pointer: int) -> int:
        try:
            return int(self._call("cuMemHostGetDevicePointer", pointer, 0))
        except CudaError as cause:
            if not refusals.is_refusal(cause):
                raise
            raise refusals.no_device_pointer(cause, self.device, pointer) from cause

    def pointer_info(self, pointer: int) -> PointerInfo:
        attributes = self._cuda.CUpointer_attribute
        call = "cuPointerGetAttribute"
        try:
            memory_type = int(self._call(call, attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer))
        except CudaError as error:
            if error.name != "CUDA_ERROR_INVALID_VALUE":
                raise
            return PointerInfo("pageable", -1)  # so the driver says that it does not know the address
        device_id = int(self._call(call, attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer))
        if self._call(call, attributes.CU_POINTER_ATTRIBUTE_IS_MANAGED, pointer):
            return PointerInfo("managed", device_id)
        on_host = memory_type == int(self._cuda.CUmemorytype.CU_MEMORYTYPE_HOST)
        return PointerInfo("pinned" if on_host else "device", device_id)

    # ------------------------------------------------------------------------------------ device memory
    def device_alloc(self, nbytes: int) -> int:
        call = "cuMemAlloc"
        if nbytes <= 0:
            raise refusals.invalid_nbytes(call, nbytes)
        try:
            return int(self._make(call, nbytes, undo="cuMemFree"))
        except CudaError as cause:
            if not refusals.is_refusal(cause):
                raise
            free, total = self.device_memory_info()
            raise refusals.device_memory_refused(cause, self.device, nbytes, free, total) from cause

    def device_free(self, pointer: int) -> None:
        self._relaxed("cuMemFree", pointer)

    # ------------------------------------------------------------------------------- streams and events
    def stream_create(self) -> int:
        return int(self._make("cuStreamCreate", _NON_BLOCKING, undo="cuStreamDestroy"))

    def stream_destroy(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def stream_synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def capture_id(self, stream: int) -> int:
        none = self._cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        if self._call("cuStreamIsCapturing", stream) == none:
            return 0
        return int(self._capture_info(stream)[0])

    def capture_hold(self, stream: int, argument: int, function: int) -> None:
        graph = self._capture_info(stream)[1]
        destroy = self._cuda.CUhostFn(function)
        no_sync = self._cuda.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        with self.current():
            held = self._checked("cuUserObjectCreate", argument, destroy, 1, no_sync)
            # The graph gets a count of its own. Should that be refused, ours is never given up, and the function not
            # called: so nothing else may fail in between.
            self._checked("cuGraphRetainUserObject", graph, held, 1, 0)
            self._checked("cuUserObjectRelease", held, 1)

    def _capture_info(self, stream: int) -> tuple[Any, Any]:
        """Id and graph of the capture that is under way."""
        # In 12 the plain name refuses graphs whose edges carry data and _v3 does not; 13 has only the latter.
        call = "cuStreamGetCaptureInfo"
        third = f"{call}_v3"
        status, capture, graph, *_ = self._call(third if hasattr(self._cuda, third) else call, stream)
        if status != self._cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:
            hint = refusals.HINTS["CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"]
            raise cuda_error(call, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", hint)
        return capture, graph

    def event_create(self, *, timing: bool = False) -> int:
        flags = _EVENT_DEFAULT if timing else _DISABLE_TIMING
        return int(self._make("cuEventCreate", flags, undo="cuEventDestroy"))

    def event_destroy(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def event_record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def event_query(self, event: int) -> bool:
        with self.current():
            result = self._result("cuEventQuery", event)
        if result[0] == self._cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check(self._cuda, "cuEventQuery", result)
        return True

    def event_synchronize(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def event_elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    # ------------------------------------------------------------------------------------------- copies
    def copy_async(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyAsync", destination, source, nbytes, stream)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        self._call("cuMemcpy", destination, source, nbytes)
        # Out of pageable memory, and within the device, cuMemcpy returns before the bytes have arrived (CUDA
        # driver API, "API synchronization behavior").
        self._call("cuStreamSynchronize", 0)

    def fill_async(self, destination: int, value: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", destination, value, nbytes, stream)
