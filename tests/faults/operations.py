"""The public operations that make driver calls: how each is prepared, made, checked and undone.

An operation is a function that prepares on an `ExitStack` and returns what is to be failed, as `act`. What `act`
returns is given to `undo`. All of it runs on ``cuda:0`` over the fake library.
"""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fake import FakeCuda

import dlpoffload as dlpo
from dlpoffload import doctor, lifetime, pages
from dlpoffload.driver import default_device, open_driver
from dlpoffload.driver.cuda import device_count, driver_version
from dlpoffload.transfer import measure_link

__all__ = ["OPERATIONS", "Bench", "Operation", "write_checkpoint"]

DEVICE: Final = "cuda:0"
NBYTES: Final = 0x15000
HUGE_NBYTES: Final = (3 << 20) + 4096  # in huge pages
SPECS: Final = {f"u{u}.{n}": dlpo.TensorSpec((4096,), "uint8") for u in range(3) for n in "ab"}
UNITS: Final = {f"u{u}": (f"u{u}.a", f"u{u}.b") for u in range(3)}


def _nothing(result: object) -> None:
    """There is nothing to undo."""


def _close(result: Any) -> None:
    result.close()


def _freed(result: object) -> None:
    """Dropping it frees it."""


@dataclass
class Bench:
    """What an operation has to work with."""

    stack: ExitStack
    folder: Path
    fake: FakeCuda

    def bytes_of(self, name: str) -> bytes:
        """What tensor `name` of the checkpoint holds."""
        return bytes([1 + sorted(SPECS).index(name)]) * SPECS[name].nbytes

    @property
    def checkpoint(self) -> Path:
        return self.folder / "weights.safetensors"

    def store(self) -> dlpo.HostStore:
        return self.stack.enter_context(dlpo.HostStore.copy_of(self.checkpoint, units=UNITS, device=DEVICE))

    def mapped(self) -> dlpo.HostStore:
        return self.stack.enter_context(dlpo.HostStore.map_file(self.checkpoint, units=UNITS, device=DEVICE))

    def ring(self, store: dlpo.HostStore, slots: int = 2) -> dlpo.SlotRing:
        ring = dlpo.SlotRing({unit: store.slab(unit) for unit in UNITS}, slots=slots, device=DEVICE)
        return self.stack.enter_context(ring)

    def stream(self) -> int:
        driver = open_driver(DEVICE)
        stream = driver.stream_create()
        self.stack.callback(driver.stream_destroy, stream)
        return stream

    def device_buffer(self, nbytes: int = NBYTES) -> dlpo.DeviceBuffer:
        return self.stack.enter_context(dlpo.DeviceBuffer.allocate(nbytes, device=DEVICE))

    def host_buffer(self, nbytes: int = NBYTES) -> dlpo.HostBuffer:
        return self.stack.enter_context(dlpo.HostBuffer.allocate(nbytes, device=DEVICE))

    def check_slot(self, views: dict[str, dlpo.View], stream: int) -> None:
        """Compare a unit's tensors in a slot, as work on `stream` would read them, with the checkpoint's."""
        for name, view in views.items():
            if self.fake.read(view.pointer, view.nbytes, stream) != self.bytes_of(name):
                raise AssertionError(f'"{name}" has wrong bytes in its slot')


def _address(buffer: Any) -> int:
    from dlpoffload import _native

    return _native.buffer_pointer(buffer)


Act = Callable[[], Any]


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes
    ----------
    releases : bool
        It takes memory back: what is failed then may stay, where it is counted.
    swallows : tuple of str
        Calls whose failure is no failure of the operation.
    deferred : bool
        Calls that need no context fail for good, too: they may give the errors of earlier work (CUDA driver API).
    """

    name: str
    prepare: Callable[[Bench], tuple[Act, Callable[[Any], None]]]
    releases: bool = False
    swallows: tuple[str, ...] = ()
    deferred: bool = False


OPERATIONS: dict[str, Operation] = {}
_DRAINS: Final = (
    "cuEventSynchronize",
    "cuStreamSynchronize",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuThreadExchangeStreamCaptureMode",
)
"""What a ring that was dropped waits with for its work: nobody is there to hear that it failed."""


def operation(
    name: str, *, releases: bool = False, swallows: tuple[str, ...] = (), deferred: bool = False
) -> Callable[[Any], Any]:
    def add(prepare: Any) -> Any:
        OPERATIONS[name] = Operation(name, prepare, releases, swallows, deferred)
        return prepare

    return add


def write_checkpoint(path: Path) -> None:
    """A safetensors file of `SPECS`, each tensor full of one byte, its data on a page's border."""
    import json

    header: dict[str, Any] = {}
    at = 0
    for name, spec in SPECS.items():
        header[name] = {"dtype": "U8", "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (4096 - 8 - len(text))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, name in enumerate(sorted(SPECS)):
            file.write(bytes([1 + index]) * SPECS[name].nbytes)


# ------------------------------------------------------------------------------------------------- devices
@operation("open_driver")
def _open(bench: Bench) -> tuple[Act, Any]:
    def act() -> None:
        driver = open_driver(DEVICE)
        driver.capabilities()
        driver.device_memory_info()
        if driver.pointer_info(_address(bytearray(8))).kind != "pageable":
            raise AssertionError("what the driver does not know is pageable")

    return act, _nothing


@operation("default_device")
def _default(bench: Bench) -> tuple[Act, Any]:
    def act() -> None:
        if (default_device(), device_count(), driver_version()) != (DEVICE, 1, (13, 0)):
            raise AssertionError("the fake's device was not found")

    return act, _nothing


@operation("doctor", releases=True)
def _doctor(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    doctor.LINK_NBYTES["cuda"] = 1 << 20
    doctor.LINK_REPEATS = 1  # type: ignore[misc]
    doctor.PROBE_NBYTES = 1 << 12  # type: ignore[misc]
    return lambda: doctor.examine(DEVICE), _nothing


@operation("measure_link", releases=True)
def _link(bench: Bench) -> tuple[Act, Any]:
    driver = open_driver(DEVICE)
    return lambda: measure_link(driver, nbytes=1 << 16, repeat=1), _nothing


# ------------------------------------------------------------------------------------------------- buffers
@operation("HostBuffer.allocate", deferred=True)
def _allocate(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    pages._nodes = lambda: [0, 1]  # as on a machine where it matters which node the device is near to
    return lambda: dlpo.HostBuffer.allocate(HUGE_NBYTES, device=DEVICE), _close


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

    return act, _close


@operation("HostBuffer.register, memory")
def _register(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    memory = bytearray(NBYTES)
    return lambda: dlpo.HostBuffer.register(memory, device=DEVICE), _close


@operation("HostBuffer.register, pages that are shared", deferred=True)
def _register_shared(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    memory = memoryview(mmap.mmap(-1, 4 * mmap.PAGESIZE))
    page = mmap.PAGESIZE
    bench.stack.enter_context(dlpo.HostBuffer.register(memory[page + 64 : page + 128], device=DEVICE))
    return lambda: dlpo.HostBuffer.register(memory[64 : 4 * page - 64], device=DEVICE), _close


@operation("HostBuffer.register, a mapped file")
def _register_file(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    with bench.checkpoint.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    return lambda: dlpo.HostBuffer.register(mapping, device=DEVICE), _close


@operation("HostBuffer.copy_of, device memory")
def _copy_of_device(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")
    return lambda: dlpo.HostBuffer.copy_of(view, device=DEVICE), _close


@operation("HostBuffer.copy_into, device memory")
def _copy_into(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")
    buffer = bench.host_buffer()
    return lambda: buffer.copy_into(view), _nothing


@operation("HostBuffer.close", releases=True)
def _close_host(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostBuffer.allocate(NBYTES, device=DEVICE).close, _nothing


@operation("HostBuffer.close, registered memory", releases=True)
def _close_registered(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostBuffer.register(bytearray(NBYTES), device=DEVICE).close, _nothing


@operation("HostBuffer.close, pageable memory", releases=True)
def _close_pageable(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostBuffer.allocate(NBYTES, device=DEVICE, pinned=False).close, _nothing


@operation("HostBuffer dropped", releases=True)
def _drop_host(bench: Bench) -> tuple[Act, Any]:
    return _dropping([dlpo.HostBuffer.allocate(NBYTES, device=DEVICE)])


def _dropping(held: list[Any]) -> tuple[Act, Any]:
    """Drop what is held and let our own calls free it; who fails then has no caller, but a hook."""

    def act() -> None:
        held.clear()
        gc.collect()
        lifetime.drain()

    return act, _nothing


@operation("HostBuffer.device_view, exported and imported")
def _views(bench: Bench) -> tuple[Act, Any]:
    buffer = bench.host_buffer()
    stream = bench.stream()

    def act() -> list[object]:
        view = dlpo.view_of(Foreign(buffer.device_view((NBYTES,), "uint8")))
        # Given out, or the reclaim thread may make calls of its own before those of this operation are counted.
        return [view, view.__dlpack__(stream=stream)]

    return act, _freed


class Foreign:
    """Somebody else's tensor: it has no more than the two methods of the protocol."""

    def __init__(self, view: dlpo.View) -> None:
        self.__dlpack__ = view.__dlpack__
        self.__dlpack_device__ = view.__dlpack_device__


@operation("View.__dlpack__, copied to the device")
def _copied_view(bench: Bench) -> tuple[Act, Any]:
    view = bench.host_buffer().host_view((NBYTES,), "uint8")
    return lambda: view.__dlpack__(dl_device=(2, 0), copy=True), _freed


@operation("View.__dlpack__, copied to the host")
def _copied_to_host(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")

    def act() -> list[object]:
        return [view.__dlpack__(dl_device=(label, 0), copy=True) for label in (1, 3)]  # kDLCPU, kDLCUDAHost

    return act, _freed


@operation("DeviceBuffer.allocate", deferred=True)
def _allocate_device(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    return lambda: dlpo.DeviceBuffer.allocate(NBYTES, device=DEVICE), _close


@operation("DeviceBuffer.register")
def _register_device(bench: Bench) -> tuple[Act, Any]:
    view = bench.device_buffer().device_view((NBYTES,), "uint8")
    return lambda: dlpo.DeviceBuffer.register(view, device=DEVICE), _close


@operation("DeviceBuffer.close", releases=True)
def _close_device(bench: Bench) -> tuple[Act, Any]:
    return dlpo.DeviceBuffer.allocate(NBYTES, device=DEVICE).close, _nothing


# -------------------------------------------------------------------------------------------------- stores
def _checked(bench: Bench, store: dlpo.HostStore) -> dlpo.HostStore:
    for name in SPECS:
        if bytes(store.host_view(name).memoryview()) != bench.bytes_of(name):
            raise AssertionError(f'"{name}" has wrong bytes in its store')
    return store


@operation("HostStore.allocate and fill")
def _fill(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)

    def act() -> dlpo.HostStore:
        with ExitStack() as undo:
            store = undo.enter_context(dlpo.HostStore.allocate(SPECS, units=UNITS, device=DEVICE))
            for name in SPECS:
                store.copy_into(name, bench.bytes_of(name))
            undo.pop_all()
            return store

    return act, lambda store: _checked(bench, store).close()


@operation("HostStore.copy_of, a mapping")
def _copy_of_mapping(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    source = {name: bench.bytes_of(name) for name in SPECS}
    return lambda: dlpo.HostStore.copy_of(source, device=DEVICE), lambda store: _checked(bench, store).close()


@operation("HostStore.copy_of, a file")
def _copy_of(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)

    def act() -> dlpo.HostStore:
        return dlpo.HostStore.copy_of(bench.checkpoint, units=UNITS, device=DEVICE)

    return act, lambda store: _checked(bench, store).close()


def _in_background(make: Callable[..., dlpo.HostStore], bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)

    def act() -> dlpo.HostStore:
        with ExitStack() as undo:
            store = undo.enter_context(make(bench.checkpoint, units=UNITS, device=DEVICE, background=True))
            assert store.pinning is not None
            store.pinning.wait()
            undo.pop_all()
        return store

    return act, lambda store: _checked(bench, store).close()


@operation("HostStore.copy_of, in the background")
def _copy_in_background(bench: Bench) -> tuple[Act, Any]:
    return _in_background(dlpo.HostStore.copy_of, bench)


@operation("HostStore.map_file")
def _map(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)

    def act() -> dlpo.HostStore:
        return dlpo.HostStore.map_file(bench.checkpoint, units=UNITS, device=DEVICE)

    return act, lambda store: _checked(bench, store).close()


@operation("HostStore.map_file, in the background")
def _map_in_background(bench: Bench) -> tuple[Act, Any]:
    return _in_background(dlpo.HostStore.map_file, bench)


@operation("HostStore.update, out of a mapped file")
def _update(bench: Bench) -> tuple[Act, Any]:
    store = bench.mapped()
    slab = store.slab("u1")
    new = bytes(SPECS["u1.a"].nbytes)

    def act() -> None:
        moved = dict(store.moved)
        try:
            store.update("u1.a", new)
        except BaseException:
            assert dict(store.moved) == moved, "it says that the tensor was moved"
            _checked(bench, store)
            raise
        assert bytes(slab.host_view("u1.a").memoryview()) == new

    return act, _nothing


@operation("HostStore.update, from device memory")
def _update_from_device(bench: Bench) -> tuple[Act, Any]:
    store = bench.mapped()
    source = bench.device_buffer().device_view((4096,), "uint8")
    return lambda: store.update("u1.a", source), _nothing


@operation("HostStore.copy_out")
def _copy_out(bench: Bench) -> tuple[Act, Any]:
    store = bench.mapped()

    def act() -> None:
        store.copy_out("u2.b")
        _checked(bench, store)

    return act, _nothing


@operation("HostStore.device_view")
def _store_view(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    store = bench.stack.enter_context(dlpo.HostStore.allocate(SPECS, units=UNITS, device=DEVICE))

    return lambda: store.slab("u1").device_view("u1.b"), _nothing


@operation("HostStore.close", releases=True)
def _close_store(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostStore.copy_of(bench.checkpoint, units=UNITS, device=DEVICE).close, _nothing


@operation("HostStore.close, a mapped file", releases=True)
def _close_mapped(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostStore.map_file(bench.checkpoint, units=UNITS, device=DEVICE).close, _nothing


# --------------------------------------------------------------------------------------------------- rings
@operation("SlotRing")
def _make_ring(bench: Bench) -> tuple[Act, Any]:
    store = bench.store()
    slabs = {unit: store.slab(unit) for unit in UNITS}
    return lambda: dlpo.SlotRing(slabs, slots=3, device=DEVICE), _close


@operation("SlotRing.prefetch, used and left")
def _prefetch(bench: Bench) -> tuple[Act, Any]:
    ring = bench.ring(bench.store())
    stream = bench.stream()

    def act() -> None:
        for unit in UNITS:
            with ring.prefetch(unit, stream=stream) as views:
                bench.check_slot(views, stream)

    return act, _nothing


@operation("Prefetcher, one step")
def _step(bench: Bench) -> tuple[Act, Any]:
    prefetcher = dlpo.Prefetcher(bench.ring(bench.store()))
    stream = bench.stream()
    return lambda: _one_step(bench, prefetcher, stream), _nothing


@operation("Prefetcher, one step from a mapped file")
def _mapped_step(bench: Bench) -> tuple[Act, Any]:
    prefetcher = dlpo.Prefetcher(bench.ring(bench.mapped()))
    stream = bench.stream()
    return lambda: _one_step(bench, prefetcher, stream), _nothing


def _one_step(bench: Bench, prefetcher: dlpo.Prefetcher, stream: int, check: bool = True) -> None:
    prefetcher.begin_step(stream=stream)
    try:
        for unit in UNITS:
            lease = prefetcher.enter(unit, stream=stream)
            try:
                if check:
                    bench.check_slot(lease.views, stream)
            except BaseException:
                lease.release()
                raise
            prefetcher.leave(lease)
    finally:
        prefetcher.end_step(stream=stream)


@operation("SlotRing, more leases than slots")
def _mapped_lease(bench: Bench) -> tuple[Act, Any]:
    ring = bench.ring(bench.store(), slots=1)
    stream = bench.stream()

    def act() -> None:
        with ring.prefetch("u0", stream=stream) as first, ring.prefetch("u1", stream=stream) as second:
            bench.check_slot(first | second, stream)
        with ring.host_lease("u2", stream=stream) as views:
            bench.check_slot(views, stream)

    return act, _nothing


@operation("SlotRing, host bytes written")
def _written(bench: Bench) -> tuple[Act, Any]:
    store = bench.store()
    ring = bench.ring(store)
    stream = bench.stream()

    def act() -> None:
        with ring.prefetch("u0", stream=stream) as views:
            bench.check_slot(views, stream)
        ring.before_host_write("u0")
        store.copy_into("u0.a", bench.bytes_of("u0.a"))
        ring.changed("u0")
        with (lease := ring.prefetch("u1", stream=stream)):
            ring.changed_on_stream("u1", stream=stream, valid=lease.slot)
        with ring.prefetch("u1", stream=stream) as views:
            bench.check_slot(views, stream)

    return act, _nothing


@operation("SlotRing.read_stats")
def _stats(bench: Bench) -> tuple[Act, Any]:
    ring = bench.ring(bench.store())
    stream = bench.stream()

    def act() -> None:
        with ring.prefetch("u0", stream=stream) as views:
            bench.check_slot(views, stream)
        ring.read_stats()

    return act, _nothing


@operation("SlotRing, captured in a graph and replayed")
def _captured(bench: Bench) -> tuple[Act, Any]:
    prefetcher = dlpo.Prefetcher(bench.ring(bench.store()))
    stream = bench.stream()

    def act() -> None:
        bench.fake.capture_begin(stream)
        try:
            _one_step(bench, prefetcher, stream, check=False)
        finally:
            graph, result = bench.fake.capture_end(stream)
            if sys.exc_info()[0] is not None:
                bench.fake.graph_destroy(graph)
        try:
            assert result == 0, f"the capture ended with {result}"
            bench.fake.graph_launch(graph, stream)
            _one_step(bench, prefetcher, stream)
        finally:
            bench.fake.graph_destroy(graph)

    return act, _nothing


def _used_ring(bench: Bench) -> dlpo.SlotRing:
    store = bench.store()
    slabs = {unit: store.slab(unit) for unit in UNITS}
    stream = bench.stream()
    ring = dlpo.SlotRing(slabs, slots=2, device=DEVICE)
    with ring.prefetch("u0", stream=stream) as views:
        bench.check_slot(views, stream)
    return ring


@operation("SlotRing.close", releases=True)
def _close_ring(bench: Bench) -> tuple[Act, Any]:
    return _used_ring(bench).close, _nothing


@operation("SlotRing dropped", releases=True, swallows=_DRAINS)
def _drop_ring(bench: Bench) -> tuple[Act, Any]:
    return _dropping([_used_ring(bench)])
