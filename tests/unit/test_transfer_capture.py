"""The border of a graph capture: what must not cross it, and what is left when a capture breaks."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from transfer_graphs import GraphDriver
from transfer_scenarios import GRAPHS, Scenario, Workbench, workbench

from dlpoffload import lifetime, transfer
from dlpoffload.driver import installed
from dlpoffload.errors import CudaError, SlotError
from dlpoffload.memory import DeviceBuffer, live_buffers
from dlpoffload.transfer.capture import Horizon


@pytest.fixture
def bench(seed: int) -> Iterator[Workbench]:
    with workbench(transfer, seed) as made:
        yield made


@pytest.mark.parametrize("seed_", range(20, 60))
def test_anything_in_any_order(seed_: int) -> None:
    scenario: Scenario = GRAPHS["anything_in_any_order"]
    scenario(transfer, seed_)


def test_a_capture_copies_for_itself_and_runs_nothing(bench: Workbench) -> None:
    stream = bench.streams[0]
    bench.step(stream)
    bench.settle()
    reads, copies = bench.reads, bench.ring.stats.copies
    graph = bench.capture(stream, lambda: bench.step(stream))
    assert bench.ring.stats.copies == copies + len(bench.names)
    bench.settle()
    assert bench.reads == reads
    bench.replay(graph, stream)
    bench.settle()
    assert bench.reads == reads + len(bench.names)


def test_horizons(bench: Workbench) -> None:
    ring, stream = bench.ring, bench.streams[0]
    bench.use("u0", stream)
    assert ring.horizon(stream=stream) is Horizon.OPEN

    def record() -> None:
        assert ring.horizon(stream=stream) is Horizon.NONE
        ring.begin_step(stream=stream)
        assert ring.horizon(stream=stream) is Horizon.STEP
        ring.end_step(stream=stream)

    bench.capture(stream, record)
    assert ring.horizon(stream=stream) is Horizon.NONE
    ring.begin_step(stream=stream)
    assert ring.horizon(stream=stream) is Horizon.STEP
    ring.end_step(stream=stream)
    bench.capture(stream, lambda: bench.use("u1", stream))
    ring.begin_step(stream=stream)
    assert ring.horizon(stream=stream) is Horizon.NONE, "replays of parts may lie anywhere"
    ring.end_step(stream=stream)


def test_eager_steps_beside_a_graph_copy_ahead(bench: Workbench) -> None:
    stream = bench.streams[0]
    bench.step(stream)
    bench.capture(stream, lambda: bench.step(stream))
    late, copies = bench.ring.stats.late_copies, bench.ring.stats.copies
    bench.step(stream)
    assert bench.ring.stats.late_copies == late + 1, "only the first unit of the step"
    assert bench.ring.stats.copies == copies + len(bench.names)


def test_an_eager_lease_is_not_used_in_a_capture(bench: Workbench) -> None:
    stream = bench.streams[0]
    lease = bench.ring.prefetch("u0", stream=stream)

    def record() -> None:
        for use in (lease.wait, lease.release, lambda: lease.share(stream)):
            with pytest.raises(SlotError, match='"u0" was taken outside a graph capture'):
                use()
        bench.step(stream)

    graph = bench.capture(stream, record)
    lease.release()
    bench.replay(graph, stream)
    bench.step(stream)


def test_a_captured_lease_is_not_used_behind_the_capture(bench: Workbench) -> None:
    stream, kept = bench.streams[0], []

    def record() -> None:
        bench.prefetcher.begin_step(stream=stream)
        kept.append(bench.prefetcher.enter("u0", stream=stream))
        bench.read(kept[0])
        bench.prefetcher.end_step(stream=stream)

    graph = bench.capture(stream, record)
    with pytest.raises(SlotError, match='"u0" was taken inside a graph capture'):
        kept[0].wait()
    with pytest.raises(SlotError, match="leases are open"):
        bench.ring.close()
    kept[0].release()
    bench.replay(graph, stream)
    bench.step(stream)


def test_a_step_that_ends_behind_its_capture(bench: Workbench) -> None:
    stream = bench.streams[0]
    bench.driver.begin_capture(stream)
    bench.prefetcher.begin_step(stream=stream)
    graph = bench.driver.end_capture(stream)
    bench.prefetcher.end_step(stream=stream)
    assert not graph.nodes
    bench.step(stream)


def test_a_step_that_ends_on_another_stream(bench: Workbench) -> None:
    first, second, _ = bench.streams
    graph = bench.capture(first, lambda: bench.step(first))
    bench.prefetcher.begin_step(stream=first)
    bench.use("u0", first)
    bench.prefetcher.end_step(stream=second)
    bench.driver.synchronize()
    bench.replay(graph, first)
    bench.step(first)  # begins anew, behind the replay
    assert bench.ring.horizon(stream=first) is Horizon.NONE


def test_a_broken_capture_leaves_everything_as_it_was(bench: Workbench) -> None:
    stream = bench.streams[0]
    bench.step(stream)
    bench.driver.begin_capture(stream)
    bench.prefetcher.begin_step(stream=stream)
    bench.use("u0", stream)
    with pytest.raises(CudaError):
        bench.driver.synchronize()
    with pytest.raises(CudaError, match="INVALIDATED"):
        bench.prefetcher.end_step(stream=stream)
    with pytest.raises(CudaError, match="INVALIDATED"):
        bench.driver.end_capture(stream)
    DeviceBuffer.allocate(78, device="cpu")
    lifetime.drain()
    assert ("device", 78) not in live_buffers(), "reclaims rest no longer"
    bench.step(stream)
    graph = bench.capture(stream, lambda: bench.step(stream))
    bench.replay(graph, stream)


def test_a_fork_that_fails_is_forked_again(seed: int) -> None:
    class Faulty(GraphDriver):
        fail = False
        destroyed = 0

        def stream_destroy(self, stream: int) -> None:
            super().stream_destroy(stream)
            self.destroyed += 1

        def stream_wait_event(self, stream: int, event: int) -> None:
            if self.fail:
                self.fail = False
                raise CudaError("cuStreamWaitEvent", 999, "CUDA_ERROR_UNKNOWN")
            super().stream_wait_event(stream, event)

    driver = Faulty(adversary=seed)
    with installed(driver):
        bench = Workbench(transfer, driver, seed)
        stream = bench.streams[0]

        def record() -> None:
            driver.fail = True
            with pytest.raises(CudaError, match="UNKNOWN"):
                bench.ring.begin_step(stream=stream)
            bench.step(stream)

        graph = bench.capture(stream, record)
        assert driver.destroyed == 1, "the copy stream of the attempt"
        bench.replay(graph, stream)
        bench.check()
        driver.destroy_graphs()
        bench.ring.close()
        bench.store.close()
        assert driver.destroyed == 3


def test_host_bytes_are_not_written_in_a_capture(bench: Workbench) -> None:
    stream = bench.streams[0]
    bench.use("u0", stream)
    bench.capture(stream, lambda: bench.step(stream))
    bench.driver.begin_capture(stream)
    with pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
        bench.ring.before_host_write("u0")
    with pytest.raises(CudaError):
        bench.driver.end_capture(stream)


# ----------------------------------------------------------------------------------- as long as it can be replayed


def test_a_ring_is_not_closed_under_a_graph(bench: Workbench) -> None:
    stream = bench.streams[0]
    graph = bench.capture(stream, lambda: bench.step(stream, ["u1", "u3"]))
    for _ in range(2):
        with pytest.raises(SlotError, match=r'capture 1 of "u1" to "u.*"; drop them first \(del graph\)'):
            bench.ring.close()
        bench.replay(graph, stream)
        bench.step(stream)


def test_once_no_graph_is_left_eager_steps_copy_past_their_end(bench: Workbench) -> None:
    stream = bench.streams[0]
    graphs = [bench.capture(stream, lambda: bench.step(stream)) for _ in range(2)]
    graphs.append(bench.capture(stream, lambda: bench.use("u2", stream)))
    for graph in graphs:
        assert bench.ring.horizon(stream=stream) is Horizon.NONE
        bench.replay(graph, stream)
        bench.step(stream)
        bench.driver.destroy(graph)
    bench.driver.synchronize()
    bench.step(stream)
    bench.step(stream)
    assert bench.ring.horizon(stream=stream) is Horizon.OPEN
    copies, hits = bench.ring.stats.copies, bench.ring.stats.hits
    bench.step(stream)
    assert bench.ring.stats.hits > hits
    assert bench.ring.stats.copies == copies + len(bench.names)


def test_a_graph_keeps_what_it_uses(seed: int) -> None:
    """Ring and store are dropped; the graph can be replayed all the same, and then everything is freed."""
    with workbench(transfer, seed) as bench:
        driver = bench.driver
        other = Workbench(transfer, driver, seed, units=3)
        stream = other.streams[0]
        graph = other.capture(stream, lambda: other.step(stream))
        reads = other.reads
        gc.collect()
        lifetime.drain()
        truth, wrong = dict(other.truth), other.wrong
        held = sum(nbytes for kind, nbytes in live_buffers() if kind == "device")
        del other.prefetcher, other.ring, other.store, other.slabs
        gc.collect()
        lifetime.drain()
        assert sum(nbytes for kind, nbytes in live_buffers() if kind == "device") == held
        driver.replay(graph, stream, truth)
        driver.synchronize()
        assert other.reads == reads + 3
        assert not wrong
        driver.destroy(graph)
        driver.synchronize()
        lifetime.drain()
        assert sum(nbytes for kind, nbytes in live_buffers() if kind == "device") < held
        bench.step(bench.streams[0])


def test_a_hold_that_is_refused_is_none(seed: int) -> None:
    class Faulty(GraphDriver):
        fail = True

        def capture_hold(self, stream: int, argument: int, function: int) -> None:
            if self.fail:
                self.fail = False
                raise CudaError("cuUserObjectCreate", 999, "CUDA_ERROR_UNKNOWN")
            super().capture_hold(stream, argument, function)

    driver = Faulty(adversary=seed)
    with installed(driver):
        bench = Workbench(transfer, driver, seed)
        stream = bench.streams[0]

        def record() -> None:
            with pytest.raises(CudaError, match="UNKNOWN"):
                bench.ring.begin_step(stream=stream)
            lifetime.drain()
            assert "graph" not in [kind for kind, _ in live_buffers()]
            bench.step(stream)

        graph = bench.capture(stream, record)
        bench.replay(graph, stream)
        bench.check()
        driver.destroy_graphs()
        bench.ring.close()
        bench.store.close()
    driver.close()
