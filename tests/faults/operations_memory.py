"""Operations of devices and of buffers."""

from __future__ import annotations

import mmap
from contextlib import ExitStack
from typing import Any, Final

from bench import DEVICE, NBYTES, Act, Bench, close, dropping, freed, nothing, operation

import dlpoffload as dlpo
from dlpoffload import _native, doctor, pages
from dlpoffload.driver import default_device, open_driver
from dlpoffload.driver.cuda import device_count, driver_version
from dlpoffload.transfer import measure_link

HUGE_NBYTES: Final = (3 << 20) + 4096  # in huge pages


# ------------------------------------------------------------------------------------------------- devices
@operation("open_driver")
def _open(bench: Bench) -> tuple[Act, Any]:
    def act() -> None:
        driver = open_driver(DEVICE)
        driver.capabilities()
        driver.device_memory_info()
        if driver.pointer_info(_native.buffer_pointer(bytearray(8))).kind != "pageable":
            raise AssertionError("what the driver does not know is pageable")

    return act, nothing


@operation("default_device")
def _default(bench: Bench) -> tuple[Act, Any]:
    def act() -> None:
        if (default_device(), device_count(), driver_version()) != (DEVICE, 1, (13, 0)):
            raise AssertionError("the fake's device was not found")

    return act, nothing


@operation("doctor", releases=True)
def _doctor(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    doctor.LINK_NBYTES["cuda"] = 1 << 20
    doctor.LINK_REPEATS = 1  # type: ignore[misc]
    doctor.PROBE_NBYTES = 1 << 12  # type: ignore[misc]
    return lambda: doctor.examine(DEVICE), nothing


@operation("measure_link", releases=True)
def _link(bench: Bench) -> tuple[Act, Any]:
    driver = open_driver(DEVICE)
    return lambda: measure_link(driver, nbytes=1 << 16, repeat=1), nothing


# ------------------------------------------------------------------------------------------------- buffers
@operation("HostBuffer.allocate", deferred=True)
def _allocate(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    pages._nodes = lambda: [0, 1]  # as on a machine where it matters which node the device is near to
    return lambda: dlpo.HostBuffer.allocate(HUGE_NBYTES, device=DEVICE), close


@operation("HostBuffer.allocate, in the background")
def _background(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)

    def act() -> dlpo.HostBuffer:
        with ExitStack() as undo:
            buffer = dlpo.HostBuffer.allocate(5 << 20, device=DEVICE, background=True, chunk_nbytes=2 << 20)
            assert undo.enter_context(buffer).pinning is not None
            buffer.pinning.wait()
            undo.pop_all()
        return buffer

    return act, close


@operation("HostBuffer.register, memory")
def _register(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    memory = bytearray(NBYTES)
    return lambda: dlpo.HostBuffer.register(memory, device=DEVICE), close


@operation("HostBuffer.register, pages that are shared", deferred=True)
def _register_shared(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    memory = memoryview(mmap.mmap(-1, 4 * mmap.PAGESIZE))
    page = mmap.PAGESIZE
    bench.stack.enter_context(dlpo.HostBuffer.register(memory[page + 64 : page + 128], device=DEVICE))
    return lambda: dlpo.HostBuffer.register(memory[64 : 4 * page - 64], device=DEVICE), close


@operation("HostBuffer.register, a mapped file")
def _register_file(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    with bench.checkpoint.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    return lambda: dlpo.HostBuffer.register(mapping, device=DEVICE), close


@operation("HostBuffer.copy_of, device memory")
def _copy_of_device(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")
    return lambda: dlpo.HostBuffer.copy_of(view, device=DEVICE), close


@operation("HostBuffer.copy_into, device memory")
def _copy_into(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")
    buffer = bench.host_buffer()
    return lambda: buffer.copy_into(view), nothing


@operation("HostBuffer.close", releases=True)
def _close_host(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostBuffer.allocate(NBYTES, device=DEVICE).close, nothing


@operation("HostBuffer.close, registered memory", releases=True)
def _close_registered(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostBuffer.register(bytearray(NBYTES), device=DEVICE).close, nothing


@operation("HostBuffer.close, pageable memory", releases=True)
def _close_pageable(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostBuffer.allocate(NBYTES, device=DEVICE, pinned=False).close, nothing


@operation("HostBuffer dropped", releases=True)
def _drop_host(bench: Bench) -> tuple[Act, Any]:
    return dropping([dlpo.HostBuffer.allocate(NBYTES, device=DEVICE)])


@operation("HostBuffer.device_view, exported and imported")
def _views(bench: Bench) -> tuple[Act, Any]:
    buffer = bench.host_buffer()
    stream = bench.stream()

    def act() -> list[object]:
        view = dlpo.view_of(Foreign(buffer.device_view((NBYTES,), "uint8")))
        # Given out, or the reclaim thread may make calls of its own before those of this operation are counted.
        return [view, view.__dlpack__(stream=stream)]

    return act, freed


class Foreign:
    """Somebody else's tensor: it has no more than the two methods of the protocol."""

    def __init__(self, view: dlpo.View) -> None:
        self.__dlpack__ = view.__dlpack__
        self.__dlpack_device__ = view.__dlpack_device__


@operation("View.__dlpack__, copied to the device")
def _copied_view(bench: Bench) -> tuple[Act, Any]:
    view = bench.host_buffer().host_view((NBYTES,), "uint8")
    return lambda: view.__dlpack__(dl_device=(2, 0), copy=True), freed


@operation("View.__dlpack__, copied to the host")
def _copied_to_host(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")

    def act() -> list[object]:
        return [view.__dlpack__(dl_device=(label, 0), copy=True) for label in (1, 3)]  # kDLCPU, kDLCUDAHost

    return act, freed


@operation("DeviceBuffer.allocate", deferred=True)
def _allocate_device(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    return lambda: dlpo.DeviceBuffer.allocate(NBYTES, device=DEVICE), close


@operation("DeviceBuffer.register")
def _register_device(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")
    return lambda: dlpo.DeviceBuffer.register(view, device=DEVICE), close


@operation("DeviceBuffer.close", releases=True)
def _close_device(bench: Bench) -> tuple[Act, Any]:
    return dlpo.DeviceBuffer.allocate(NBYTES, device=DEVICE).close, nothing
