"""Operations of rings."""

from __future__ import annotations

import sys
from typing import Any, Final

from bench import DEVICE, UNITS, Act, Bench, close, dropping, nothing, operation

import dlpoffload as dlpo

_DRAINS: Final = (
    "cuEventSynchronize",
    "cuStreamSynchronize",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuThreadExchangeStreamCaptureMode",
)
"""What a ring that was dropped waits with for its work: nobody is there to hear that it failed."""


@operation("SlotRing")
def _make_ring(bench: Bench) -> tuple[Act, Any]:
    store = bench.store()
    slabs = {unit: store.slab(unit) for unit in UNITS}
    return lambda: dlpo.SlotRing(slabs, slots=3, device=DEVICE), close


@operation("SlotRing.prefetch, used and left")
def _prefetch(bench: Bench) -> tuple[Act, Any]:
    ring = bench.ring(bench.store())
    stream = bench.stream()

    def act() -> None:
        for unit in UNITS:
            with ring.prefetch(unit, stream=stream) as views:
                bench.check_slot(views, stream)

    return act, nothing


@operation("Prefetcher, one step")
def _step(bench: Bench) -> tuple[Act, Any]:
    prefetcher = dlpo.Prefetcher(bench.ring(bench.store()))
    stream = bench.stream()
    return lambda: _one_step(bench, prefetcher, stream), nothing


@operation("Prefetcher, one step from a mapped file")
def _mapped_step(bench: Bench) -> tuple[Act, Any]:
    prefetcher = dlpo.Prefetcher(bench.ring(bench.mapped()))
    stream = bench.stream()
    return lambda: _one_step(bench, prefetcher, stream), nothing


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

    return act, nothing


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

    return act, nothing


@operation("SlotRing.read_stats")
def _stats(bench: Bench) -> tuple[Act, Any]:
    ring = bench.ring(bench.store())
    stream = bench.stream()

    def act() -> None:
        with ring.prefetch("u0", stream=stream) as views:
            bench.check_slot(views, stream)
        ring.read_stats()

    return act, nothing


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

    return act, nothing


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
    return _used_ring(bench).close, nothing


@operation("SlotRing dropped", releases=True, swallows=_DRAINS)
def _drop_ring(bench: Bench) -> tuple[Act, Any]:
    return dropping([_used_ring(bench)])
