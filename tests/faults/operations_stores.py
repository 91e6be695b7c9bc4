"""Operations of stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench import DEVICE, NBYTES, SPECS, UNITS, Act, Bench, nothing, operation

import dlpoffload as dlpo
from dlpoffload.driver import open_driver


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


def _from_file(make: Callable[..., dlpo.HostStore], bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)

    def act() -> dlpo.HostStore:
        return make(bench.checkpoint, units=UNITS, device=DEVICE)

    return act, lambda store: _checked(bench, store).close()


@operation("HostStore.copy_of, a file")
def _copy_of(bench: Bench) -> tuple[Act, Any]:
    return _from_file(dlpo.HostStore.copy_of, bench)


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
    return _from_file(dlpo.HostStore.map_file, bench)


@operation("HostStore.map_file, in the background")
def _map_in_background(bench: Bench) -> tuple[Act, Any]:
    return _in_background(dlpo.HostStore.map_file, bench)


@operation("share, from device memory")
def _share(bench: Bench) -> tuple[Act, Any]:
    source = bench.device_buffer().device_view((NBYTES,), "uint8")

    def act() -> None:
        with dlpo.share({"a": source}, f"faults-{os.getpid()}") as shared:
            assert shared.nbytes >= NBYTES

    return act, nothing


@operation("open_shared, and HostStore.map_file of it")
def _shared(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    shared = bench.stack.enter_context(dlpo.share(bench.checkpoint, f"faults-{os.getpid()}"))

    def act() -> dlpo.HostStore:
        with dlpo.open_shared(shared.path) as opened:
            return dlpo.HostStore.map_file(opened.path, units=UNITS, device=DEVICE)

    return act, lambda store: _checked(bench, store).close()


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

    return act, nothing


@operation("HostStore.update, from device memory")
def _update_from_device(bench: Bench) -> tuple[Act, Any]:
    store = bench.mapped()
    source = bench.device_buffer().device_view((4096,), "uint8")
    return lambda: store.update("u1.a", source), nothing


@operation("HostStore.copy_out")
def _copy_out(bench: Bench) -> tuple[Act, Any]:
    store = bench.mapped()

    def act() -> None:
        store.copy_out("u2.b")
        _checked(bench, store)

    return act, nothing


@operation("HostStore.device_view")
def _store_view(bench: Bench) -> tuple[Act, Any]:
    open_driver(DEVICE)
    store = bench.stack.enter_context(dlpo.HostStore.allocate(SPECS, units=UNITS, device=DEVICE))

    return lambda: store.slab("u1").device_view("u1.b"), nothing


@operation("HostStore.close", releases=True)
def _close_store(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostStore.copy_of(bench.checkpoint, units=UNITS, device=DEVICE).close, nothing


@operation("HostStore.close, a mapped file", releases=True)
def _close_mapped(bench: Bench) -> tuple[Act, Any]:
    return dlpo.HostStore.map_file(bench.checkpoint, units=UNITS, device=DEVICE).close, nothing
