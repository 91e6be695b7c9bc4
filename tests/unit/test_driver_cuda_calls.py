"""The CUDA driver over a fake `cuda.bindings.driver`: every call, every error, the context in balance."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dlpoffload.driver import cuda
from dlpoffload.driver.cuda import CudaDriver, device_count
from dlpoffload.errors import (
    AliasError,
    CudaError,
    DeviceMemoryError,
    DriverNotFoundError,
    HostMemoryError,
    OffloadError,
    RegistrationError,
)


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_STUB_LIBRARY = 34
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906


class Handle:
    """What the bindings return for a handle or a pointer: an object that becomes an int."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


CONTEXT = 0xC0
OTHER_CONTEXT = 0xC1


class FakeCuda:
    """Records calls, keeps a context stack for each thread, and answers as it is told.

    `answers` maps a call to what it returns: a result, or a tuple, or an exception to raise.
    """

    CUresult = CUresult
    CUmemorytype = enum.IntEnum("CUmemorytype", {"CU_MEMORYTYPE_HOST": 1, "CU_MEMORYTYPE_DEVICE": 2})
    CUstreamCaptureStatus = enum.IntEnum(
        "CUstreamCaptureStatus",
        {f"CU_STREAM_CAPTURE_STATUS_{n}": i for i, n in enumerate(("NONE", "ACTIVE", "INVALIDATED"))},
    )
    CUstreamCaptureMode = enum.IntEnum(
        "CUstreamCaptureMode",
        {f"CU_STREAM_CAPTURE_MODE_{n}": i for i, n in enumerate(("GLOBAL", "THREAD_LOCAL", "RELAXED"))},
    )
    CUuserObject_flags = SimpleNamespace(CU_USER_OBJECT_NO_DESTRUCTOR_SYNC=1)
    CUhostFn = int
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY=19,
        CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED=99,
        CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED=113,
        CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM=91,
        CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS=88,
        CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES=100,
        CU_DEVICE_ATTRIBUTE_INTEGRATED=18,
    )
    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE=2,
        CU_POINTER_ATTRIBUTE_IS_MANAGED=8,
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9,
    )

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.contexts_at: dict[str, int] = {}
        self.stacks: dict[int, list[int]] = {}
        self.mode = self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        self.attributes: dict[int, int] = {}
        self.answers: dict[str, Any] = {
            "cuDeviceGetCount": (0, 2),
            "cuDeviceGetName": (0, b"Fake H100\0\0\0"),
            "cuDevicePrimaryCtxRetain": (0, Handle(CONTEXT)),
            "cuMemHostAlloc": (0, 0x1000),
            "cuMemHostGetDevicePointer": (0, Handle(0x2000)),
            "cuMemAlloc": (0, Handle(0x3000)),
            "cuMemGetInfo": (0, 100, 1000),
            "cuStreamCreate": (0, Handle(0x40)),
            "cuEventCreate": (0, Handle(0x50)),
            "cuEventElapsedTime": (0, 1.5),
            "cuStreamIsCapturing": (0, self.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE),
        }

    @property
    def stack(self) -> list[int]:
        return self.stacks.setdefault(threading.get_ident(), [])

    def __getattr__(self, call: str) -> Callable[..., Any]:
        if not call.startswith("cu") or call.endswith("_v3"):
            raise AttributeError(call)

        def function(*arguments: Any) -> Any:
            self.calls.append((call, *arguments))
            self.contexts_at[call] = self.stack[-1] if self.stack else 0
            answer = self.answers.get(call)
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, CUresult):
                return answer, None
            return answer if answer is not None else self._play(call, *arguments)

        return function

    def _play(self, call: str, *arguments: Any) -> tuple[Any, ...]:
        match call, arguments:
            case "cuGetErrorName", (code,):
                return (0, code.name.encode()) if isinstance(code, CUresult) else (1, None)
            case "cuDeviceGet", (ordinal,):
                return 0, Handle(ordinal)
            case "cuDeviceGetAttribute", (attribute, _):
                return 0, self.attributes.get(attribute, 0)
            case "cuCtxGetCurrent", ():
                return 0, Handle(self.stack[-1] if self.stack else 0)
            case "cuCtxPushCurrent", (context,):
                self.stack.append(int(context))
            case "cuCtxPopCurrent", ():
                return 0, Handle(self.stack.pop())
            case "cuThreadExchangeStreamCaptureMode", (mode,):
                former, self.mode = self.mode, mode
                return 0, former
        return (0,)

    def made(self, call: str) -> list[tuple[Any, ...]]:
        return [arguments for name, *arguments in self.calls if name == call]  # type: ignore[misc]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "_import_bindings", lambda: fake)
    return fake


@pytest.fixture
def driver(fake: FakeCuda) -> CudaDriver:
    return CudaDriver(1)


# ------------------------------------------------------------------------------------------- finding it


def test_what_it_says_of_itself(driver: CudaDriver, fake: FakeCuda) -> None:
    assert (driver.platform, driver.device, driver.device_id) == ("cuda", "cuda:1", 1)
    assert driver.description == "Fake H100"
    assert device_count() == 2
    assert fake.made("cuInit") == [[0], [0]]
    assert len(fake.made("cuDevicePrimaryCtxRetain")) == 1
    assert driver.device_memory_info() == (100, 1000)


@pytest.mark.parametrize(
    ("ordinal", "count", "found"), [(2, 2, '"cuda:0" to "cuda:1"'), (1, 1, '"cuda:0"'), (0, 0, "none")]
)
def test_a_device_that_does_not_exist(fake: FakeCuda, ordinal: int, count: int, found: str) -> None:
    fake.answers["cuDeviceGetCount"] = (0, count)
    with pytest.raises(DriverNotFoundError, match=f'"cuda:{ordinal}" was asked for.* {found}; '):
        CudaDriver(ordinal)
    with pytest.raises(DriverNotFoundError, match='"cuda:-1" was asked for'):
        CudaDriver(-1)
    assert fake.made("cuDevicePrimaryCtxRetain") == []


def test_a_machine_without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> ModuleType:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(cuda, "_import_bindings", missing)
    with pytest.raises(DriverNotFoundError, match=r"No module named 'cuda'; .*pip install cuda-bindings"):
        device_count()


def test_a_machine_without_a_driver(fake: FakeCuda) -> None:
    fake.answers["cuInit"] = RuntimeError("Failed to dlopen libcuda.so.1")
    for call in (device_count, lambda: CudaDriver(0)):
        with pytest.raises(DriverNotFoundError, match=r'libcuda\.so\.1; install the NVIDIA driver.*"cpu"'):
            call()


def test_a_machine_without_a_device(fake: FakeCuda) -> None:
    for result in (CUresult.CUDA_ERROR_NO_DEVICE, CUresult.CUDA_ERROR_STUB_LIBRARY):
        fake.answers["cuInit"] = result
        with pytest.raises(DriverNotFoundError, match="CUDA_VISIBLE_DEVICES") as caught:
            device_count()
        assert (caught.value.call, caught.value.code) == ("cuInit", result)


def test_a_driver_that_is_there_but_broken_is_no_reason_to_go_on_without(fake: FakeCuda) -> None:
    fake.answers["cuInit"] = CUresult.CUDA_ERROR_NOT_INITIALIZED
    with pytest.raises(CudaError, match="forked child") as caught:
        device_count()
    assert not isinstance(caught.value, DriverNotFoundError)


# ------------------------------------------------------------------------------------------- the context

CALLS: list[tuple[str, Callable[[CudaDriver], object], str, tuple[Any, ...], object]] = [
    ("host_alloc", lambda d: d.host_alloc(64), "cuMemHostAlloc", (64, 3), 0x1000),
    ("host_free", lambda d: d.host_free(7), "cuMemFreeHost", (7,), None),
    ("host_register", lambda d: d.host_register(7, 64), "cuMemHostRegister", (7, 64, 3), None),
    (
        "host_register read-only",
        lambda d: d.host_register(7, 64, read_only=True),
        "cuMemHostRegister",
        (7, 64, 3 | 8),
        None,
    ),
    ("host_unregister", lambda d: d.host_unregister(7), "cuMemHostUnregister", (7,), None),
    ("host_device_pointer", lambda d: d.host_device_pointer(7), "cuMemHostGetDevicePointer", (7, 0), 0x2000),
    ("device_alloc", lambda d: d.device_alloc(64), "cuMemAlloc", (64,), 0x3000),
    ("device_free", lambda d: d.device_free(7), "cuMemFree", (7,), None),
    ("device_memory_info", lambda d: d.device_memory_info(), "cuMemGetInfo", (), (100, 1000)),
    ("stream_create", lambda d: d.stream_create(), "cuStreamCreate", (1,), 0x40),
    ("stream_destroy", lambda d: d.stream_destroy(7), "cuStreamDestroy", (7,), None),
    ("stream_synchronize", lambda d: d.stream_synchronize(7), "cuStreamSynchronize", (7,), None),
    ("stream_wait_event", lambda d: d.stream_wait_event(7, 8), "cuStreamWaitEvent", (7, 8, 0), None),
    ("capture_id", lambda d: d.capture_id(7), "cuStreamIsCapturing", (7,), 0),
    ("event_create", lambda d: d.event_create(), "cuEventCreate", (2,), 0x50),
    ("event_create timing", lambda d: d.event_create(timing=True), "cuEventCreate", (0,), 0x50),
    ("event_destroy", lambda d: d.event_destroy(8), "cuEventDestroy", (8,), None),
    ("event_record", lambda d: d.event_record(8, 2), "cuEventRecord", (8, 2), None),
    ("event_query", lambda d: d.event_query(8), "cuEventQuery", (8,), True),
    ("event_synchronize", lambda d: d.event_synchronize(8), "cuEventSynchronize", (8,), None),
    ("event_elapsed_ms", lambda d: d.event_elapsed_ms(8, 9), "cuEventElapsedTime", (8, 9), 1.5),
    ("copy_async", lambda d: d.copy_async(5, 6, 64, 7), "cuMemcpyAsync", (5, 6, 64, 7), None),
    ("copy", lambda d: d.copy(5, 6, 64), "cuMemcpy", (5, 6, 64), None),
    ("fill_async", lambda d: d.fill_async(5, 9, 64, 7), "cuMemsetD8Async", (5, 9, 64, 7), None),
    ("synchronize", lambda d: d.synchronize(), "cuCtxSynchronize", (), None),
]
call_cases = pytest.mark.parametrize(
    ("method", "call", "arguments", "value"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS]
)


@call_cases
def test_a_call_is_made_in_the_devices_context(
    driver: CudaDriver,
    fake: FakeCuda,
    method: Callable[[CudaDriver], object],
    call: str,
    arguments: tuple[Any, ...],
    value: object,
) -> None:
    for stack in ([], [OTHER_CONTEXT], [CONTEXT]):
        fake.stack[:] = stack
        fake.calls.clear()
        assert method(driver) == value
        assert fake.made(call) == [list(arguments)]
        assert fake.contexts_at[call] == CONTEXT
        assert fake.stack == stack
        assert bool(fake.made("cuCtxPushCurrent")) == (stack != [CONTEXT])


@call_cases
@pytest.mark.parametrize("result", [CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, 12345])
def test_a_call_that_fails_raises_and_leaves_no_context(
    driver: CudaDriver,
    fake: FakeCuda,
    method: Callable[[CudaDriver], object],
    call: str,
    arguments: tuple[Any, ...],
    value: object,
    result: int,
) -> None:
    fake.answers[call] = (result, None)
    fake.stack[:] = [OTHER_CONTEXT]
    with pytest.raises(CudaError) as caught:
        method(driver)
    assert type(caught.value) is CudaError
    assert (caught.value.call, caught.value.code) == (call, result)
    assert caught.value.name == (result.name if isinstance(result, CUresult) else "CUresult 12345")
    assert ("the CUDA context is lost" in str(caught.value)) == isinstance(result, CUresult)
    assert fake.stack == [OTHER_CONTEXT]


def test_a_call_from_another_thread_finds_its_context(driver: CudaDriver, fake: FakeCuda) -> None:
    with driver.current():
        thread = threading.Thread(target=lambda: driver.host_free(7))
        thread.start()
        thread.join()
        assert fake.stack == [CONTEXT]
    assert fake.contexts_at["cuMemFreeHost"] == CONTEXT
    assert all(stack == [] for stack in fake.stacks.values())


def test_current_pushes_once_and_pops_whatever_happens(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.stack[:] = [OTHER_CONTEXT]

    def step() -> None:
        with driver.current(), driver.current():
            assert fake.stack == [OTHER_CONTEXT, CONTEXT]
            driver.event_record(8, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert fake.stack == [OTHER_CONTEXT]
    assert (len(fake.made("cuCtxPushCurrent")), len(fake.made("cuCtxPopCurrent"))) == (1, 1)


def test_a_context_that_cannot_be_pushed_is_an_error_and_no_call(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.answers["cuCtxPushCurrent"] = CUresult.CUDA_ERROR_NOT_INITIALIZED
    with pytest.raises(CudaError, match="cuCtxPushCurrent failed"):
        driver.host_free(7)
    assert fake.made("cuMemFreeHost") == fake.made("cuCtxPopCurrent") == []


def test_bindings_newer_than_the_driver_say_so(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.answers["cuMemsetD8Async"] = RuntimeError('Function "cuMemsetD8Async" not found')
    with pytest.raises(CudaError, match="update the NVIDIA driver"):
        driver.fill_async(5, 0, 1, 0)
    assert fake.stack == []


def test_numbers_that_do_not_fit_are_invalid_values(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.answers["cuMemcpyAsync"] = OverflowError("can't convert negative value to size_t")
    with pytest.raises(CudaError, match="negative value") as caught:
        driver.copy_async(5, 6, -1, 0)
    assert caught.value.name == "CUDA_ERROR_INVALID_VALUE"
    assert fake.stack == []


# ------------------------------------------------------------------------------------------- refusals


def refused(
    driver: CudaDriver, fake: FakeCuda, call: str, result: CUresult, method: Callable[[CudaDriver], object]
) -> OffloadError:
    fake.answers[call] = result
    with pytest.raises(OffloadError) as caught:
        method(driver)
    assert fake.stack == []
    cause = caught.value.__cause__
    assert isinstance(cause, CudaError)
    assert (cause.call, cause.code) == (call, result)
    assert result.name in str(caught.value)
    return caught.value


def test_host_memory_that_is_refused(driver: CudaDriver, fake: FakeCuda) -> None:
    result = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    error = refused(driver, fake, "cuMemHostAlloc", result, lambda d: d.host_alloc(1 << 40))
    assert isinstance(error, HostMemoryError)
    assert error.nbytes == 1 << 40
    assert error.limit
    assert error.limit in str(error)
    assert error.limit_nbytes is not None
    assert error.limit_nbytes > 0


def test_device_memory_that_is_refused(driver: CudaDriver, fake: FakeCuda) -> None:
    result = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    error = refused(driver, fake, "cuMemAlloc", result, lambda d: d.device_alloc(4096))
    assert isinstance(error, DeviceMemoryError)
    assert error.nbytes == 4096
    assert 'device "cuda:1"' in str(error)
    assert "100 bytes of 1000 bytes" in str(error)


@pytest.mark.parametrize(
    ("result", "remedy"),
    [
        (CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "take the other registration back"),
        (CUresult.CUDA_ERROR_INVALID_VALUE, "pass read_only=True"),
        (CUresult.CUDA_ERROR_NOT_PERMITTED, "permissions"),
        (CUresult.CUDA_ERROR_NOT_SUPPORTED, "copy it into memory"),
        (CUresult.CUDA_ERROR_OUT_OF_MEMORY, "register less"),
    ],
)
def test_registrations_that_are_refused(driver: CudaDriver, fake: FakeCuda, result: CUresult, remedy: str) -> None:
    error = refused(driver, fake, "cuMemHostRegister", result, lambda d: d.host_register(0x7000, 4096))
    assert isinstance(error, RegistrationError)
    assert "4096 bytes (4.00 KiB) at 0x7000 cannot be pinned" in str(error)
    assert remedy in str(error)


def test_a_registration_that_is_not_there(driver: CudaDriver, fake: FakeCuda) -> None:
    result = CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
    error = refused(driver, fake, "cuMemHostUnregister", result, lambda d: d.host_unregister(0x7000))
    assert isinstance(error, RegistrationError)
    assert "0x7000 cannot be unregistered: no registration starts" in str(error)


def test_memory_without_a_device_pointer(driver: CudaDriver, fake: FakeCuda) -> None:
    result = CUresult.CUDA_ERROR_INVALID_VALUE
    error = refused(driver, fake, "cuMemHostGetDevicePointer", result, lambda d: d.host_device_pointer(0x70))
    assert isinstance(error, AliasError)
    assert "register it first, or stage it" in str(error)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_allocation_of_nothing_is_asked_of_nobody(driver: CudaDriver, fake: FakeCuda, nbytes: int) -> None:
    for allocate in (driver.host_alloc, driver.device_alloc):
        with pytest.raises(CudaError, match=f"asked for {nbytes} bytes"):
            allocate(nbytes)
    assert fake.made("cuMemHostAlloc") == fake.made("cuMemAlloc") == []


# ----------------------------------------------------------------------------------- answers with a meaning


def test_each_capability_is_its_own_attribute_and_asked_once(driver: CudaDriver, fake: FakeCuda) -> None:
    fields = {
        "map_host_memory": 19,
        "host_register": 99,
        "read_only_host_register": 113,
        "host_pointer_is_device_pointer": 91,
        "pageable_memory_access": 88,
        "host_page_tables": 100,
        "integrated": 18,
    }
    for name, attribute in fields.items():
        fake.attributes = {attribute: 1}
        capabilities = CudaDriver(0).capabilities()
        assert [field for field in fields if getattr(capabilities, field)] == [name]
    driver.capabilities()
    fake.calls.clear()
    assert driver.capabilities() == driver.capabilities()
    assert fake.calls == []


@pytest.mark.parametrize(
    ("memory_type", "managed", "kind"),
    [(1, 0, "pinned"), (2, 0, "device"), (1, 1, "managed"), (2, 1, "managed")],
)
def test_pointers_are_told_apart(
    driver: CudaDriver,
    fake: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    memory_type: int,
    managed: int,
    kind: str,
) -> None:
    values = {2: memory_type, 8: managed, 9: 1}
    monkeypatch.setattr(fake, "cuPointerGetAttribute", lambda name, pointer: (0, values[name]), raising=False)
    info = driver.pointer_info(0x7000)
    assert (info.kind, info.device_id) == (kind, 1)


def test_a_pointer_that_the_driver_does_not_know_is_pageable(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.answers["cuPointerGetAttribute"] = CUresult.CUDA_ERROR_INVALID_VALUE
    assert driver.pointer_info(0x7000).kind == "pageable"
    fake.answers["cuPointerGetAttribute"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        driver.pointer_info(0x7000)


def test_an_event_that_is_not_reached(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.answers["cuEventQuery"] = CUresult.CUDA_ERROR_NOT_READY
    assert driver.event_query(8) is False


@pytest.mark.parametrize(
    "answer",
    [
        (0, 1, Handle(77), Handle(1), [], 0),  # 12: status, id, graph, dependencies, count
        (0, 1, Handle(77), Handle(1), [], [], 0),  # 13: edge data too
    ],
)
@pytest.mark.parametrize("version", ["", "_v3"])
def test_a_capture_is_named_by_its_id(
    driver: CudaDriver,
    fake: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[Any, ...],
    version: str,
) -> None:
    fake.answers["cuStreamIsCapturing"] = (0, 1)
    if version:
        fake.answers["cuStreamGetCaptureInfo"] = AssertionError("the newer one is there")
    monkeypatch.setattr(fake, f"cuStreamGetCaptureInfo{version}", lambda stream: answer, raising=False)
    assert driver.capture_id(7) == 77


def test_a_graph_holds_a_function(driver: CudaDriver, fake: FakeCuda) -> None:
    graph = Handle(1)
    fake.answers |= {"cuStreamGetCaptureInfo": (0, 1, Handle(77), graph, [], 0), "cuUserObjectCreate": (0, Handle(9))}
    driver.capture_hold(7, 0xA0, 0xF0)
    assert fake.made("cuUserObjectCreate") == [[0xA0, 0xF0, 1, 1]]
    [(held_by, held, count, flags)] = fake.made("cuGraphRetainUserObject")
    assert (held_by, int(held), count, flags) == (graph, 9, 1, 0)
    assert len(fake.made("cuUserObjectRelease")) == 1
    fake.answers["cuGraphRetainUserObject"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaError, match="cuGraphRetainUserObject"):
        driver.capture_hold(7, 0xA0, 0xF0)
    assert len(fake.made("cuUserObjectRelease")) == 1, "which would call the function"


def test_a_broken_capture_is_an_error(driver: CudaDriver, fake: FakeCuda) -> None:
    fake.answers["cuStreamIsCapturing"] = (0, 2)
    fake.answers["cuStreamGetCaptureInfo"] = (0, 2, None, None, [], 0)
    with pytest.raises(CudaError, match="end it and capture again"):
        driver.capture_id(7)
    fake.answers["cuStreamIsCapturing"] = (CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, None)
    with pytest.raises(CudaError, match="pass the capturing stream"):
        driver.capture_id(0)


def test_relaxed_swaps_the_capture_mode_and_swaps_it_back(driver: CudaDriver, fake: FakeCuda) -> None:
    modes = fake.CUstreamCaptureMode
    fake.mode = modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

    def background() -> None:
        with driver.relaxed():
            assert fake.mode == modes.CU_STREAM_CAPTURE_MODE_RELAXED
            with driver.relaxed():
                driver.host_unregister(7)
            assert fake.mode == modes.CU_STREAM_CAPTURE_MODE_RELAXED
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        background()
    assert fake.mode == modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert fake.stack == []


def test_a_copy_returns_when_the_bytes_are_there(driver: CudaDriver, fake: FakeCuda) -> None:
    driver.copy(5, 6, 64)
    order = [call for call, *_ in fake.calls if call in ("cuMemcpy", "cuStreamSynchronize")]
    assert order == ["cuMemcpy", "cuStreamSynchronize"]


# ----------------------------------------------------------------------------------- the real bindings


def test_the_names_and_numbers_are_those_of_the_installed_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    for result in CUresult:
        assert getattr(real.CUresult, result.name) == result
    for kind in ("CUmemorytype", "CUstreamCaptureStatus", "CUstreamCaptureMode"):
        for member in getattr(FakeCuda, kind):
            assert getattr(getattr(real, kind), member.name) == member
    for kind in ("CUdevice_attribute", "CUpointer_attribute"):
        for name, value in vars(getattr(FakeCuda, kind)).items():
            assert getattr(getattr(real, kind), name) == value
    from dlpoffload.driver.refusals import CODES, HINTS

    for name, code in CODES.items():
        assert getattr(real.CUresult, name) == code
    for name in HINTS:
        assert hasattr(real.CUresult, name)
    for prefix in ("CU_MEMHOSTALLOC", "CU_MEMHOSTREGISTER"):
        assert getattr(real, f"{prefix}_PORTABLE") == cuda._PORTABLE
        assert getattr(real, f"{prefix}_DEVICEMAP") == cuda._DEVICEMAP
    assert real.CU_MEMHOSTREGISTER_READ_ONLY == cuda._READ_ONLY
    assert real.CUstream_flags.CU_STREAM_NON_BLOCKING == cuda._NON_BLOCKING
    assert real.CUevent_flags.CU_EVENT_DISABLE_TIMING == cuda._DISABLE_TIMING
    assert real.CUevent_flags.CU_EVENT_DEFAULT == cuda._EVENT_DEFAULT
    for _, _, call, *_ in CALLS:
        assert callable(getattr(real, call))


def test_a_block_inside_of_another_drivers_makes_its_own_context_current() -> None:
    from dlpoffload.driver.current import Current

    stack: list[str] = []

    def block(whose: str) -> Current:
        def push() -> bool:
            if stack and stack[-1] == whose:
                return False
            stack.append(whose)
            return True

        return Current(whose, push, lambda: assert_popped(whose))

    def assert_popped(whose: str) -> None:
        assert stack.pop() == whose

    with block("one"):
        with block("one"):
            assert stack == ["one"]
        with block("other"):
            assert stack == ["one", "other"]
            with block("one"):
                assert stack == ["one", "other", "one"]
            assert stack == ["one", "other"]
        with pytest.raises(KeyError), block("other"):
            raise KeyError
        assert stack == ["one"]
    assert stack == []
