"""`Prefetcher`: what it foresees, and what a wrong guess costs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from transfer_scenarios import Workbench, workbench

from dlpoffload import transfer


@pytest.fixture
def bench(seed: int) -> Iterator[Workbench]:
    with workbench(transfer, seed, units=8) as made:
        yield made


def late(bench: Workbench, units: Sequence[str]) -> int:
    """Late copies of a step."""
    before = bench.ring.stats.late_copies
    bench.step(bench.streams[0], units)
    return bench.ring.stats.late_copies - before


def test_an_order_is_learnt_in_one_step(bench: Workbench) -> None:
    forwards, backwards = bench.names, bench.names[::-1]
    assert [late(bench, forwards) for _ in range(2)] == [1, 0]
    costs = [late(bench, backwards) for _ in range(4)]
    assert 0 < costs[0] <= len(backwards)
    assert costs[1:] == [1, 0, 0], "where it begins anew is learnt when it does"


def test_an_order_is_given(seed: int) -> None:
    with workbench(transfer, seed, units=6) as bench:
        order = bench.random.sample(bench.names, 6)
        bench.prefetcher = transfer.Prefetcher(bench.ring, order)
        assert late(bench, order) == 1


def test_a_unit_used_in_several_places_has_several_followers(bench: Workbench) -> None:
    m = bench.names
    shared = [m[0], m[1], m[7], m[2], m[3], m[7], m[4], m[5], m[7], m[6]]
    late(bench, shared)
    assert [late(bench, shared) for _ in range(3)] == [1, 0, 0]


def test_forward_and_recomputation_in_turn(bench: Workbench) -> None:
    there_and_back = [*bench.names, *bench.names[::-1]]
    late(bench, there_and_back)
    late(bench, there_and_back)
    assert late(bench, there_and_back) == 0


def test_skipping_and_repeating_cost_few_copies_once(bench: Workbench) -> None:
    late(bench, bench.names)
    assert late(bench, [unit for unit in bench.names if unit != "u3"]) == 0, "what comes behind it is on its way"
    repeating = [*bench.names[:4], "u3", *bench.names[4:]]
    assert 0 < late(bench, repeating) <= 3  # u3 is not foreseen, twice, and displaces what was
    assert late(bench, repeating) == 0


def test_orders_without_order_take_no_memory(bench: Workbench) -> None:
    for _ in range(60):
        late(bench, bench.random.choices(bench.names, k=40))
    assert len(bench.prefetcher._next_of_pair) <= 16 * len(bench.names)


def test_threads_learn_apart(bench: Workbench) -> None:
    """Units of two threads interleave; the order within each is what counts."""
    one, two = bench.names[:4], bench.names[4:]
    late(bench, one)
    worker = threading.Thread(target=lambda: (late(bench, two), late(bench, two)))
    worker.start()
    worker.join()
    late(bench, one)
    assert bench.prefetcher._next["u0"] == "u1"
    assert bench.prefetcher._next["u3"] == "u0"
    assert bench.prefetcher._next["u7"] == "u4"


def test_a_look_ahead_that_fails_releases_the_unit(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.use("u0", bench.streams[0])

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bench.ring, "_look_ahead", fail)
        with pytest.raises(MemoryError):
            bench.prefetcher.enter("u1", stream=bench.streams[0])
    assert sum(state.leases for state in bench.ring._timelines.eager.states) == 0


def test_what_is_needed_next_is_taken_last(seed: int) -> None:
    with workbench(transfer, seed, units=6, slots=3) as bench:
        stream = bench.streams[0]
        late(bench, bench.names)
        bench.use("u0", stream)  # u1 and u2 are on their way
        bench.use("u4", stream)  # out of order
        held = {state.holds for state in bench.ring._timelines.eager.states}
        assert "u5" in held
