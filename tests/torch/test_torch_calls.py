"""Units in any order, from anywhere: skipped, repeated, reordered, raising, on two threads, outside of the root."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Block, Decoder, Step, Tower, assert_same, case_of, distinct_nbytes, run, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.errors import SlotError  # noqa: E402
from dlpoffload.planning import all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

LAYERS = ["layers.*"]


def streamed(module: nn.Module, device: str, **options: Any) -> tuple[nn.Module, OffloadHandle]:
    """A copy of a tower that stays resident, and the handle of the tower with all of it streamed."""
    reference = copy.deepcopy(module).to(device)
    options = {"units": LAYERS, "policy": all_staged, **options}
    return reference, offload_(module, "64MiB", device=device, **options)


def vectors(seed: int, device: str, *shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 32)), generator=torch.Generator().manual_seed(seed)).to(device)


def still_live() -> list[tuple[str, int]]:
    gc.collect()
    lifetime.drain()
    return live_buffers()


# ------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", range(1, 14))
def test_any_number_of_units_and_slots(depth: int, slots: int, device: str) -> None:
    tower = Tower(depth, width=16)
    reference, handle = streamed(tower, device, slots=slots)
    with torch.no_grad():
        for seed in range(3):
            x = vectors(seed, device, 3, 16)
            assert same(tower(x), reference(x))
    stats = handle.report(link=False).stats
    assert stats.copies == (depth if depth <= slots else stats.copies) > 0
    assert stats.mapped_runs == stats.host_waits == 0


@pytest.mark.parametrize("adversary", [None, 0, 1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_random_orders(slots: int, adversary: int | None, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    tower = Tower(7)
    reference, handle = streamed(tower, "cpu", slots=slots)
    shuffle = random.Random(slots)
    with torch.no_grad():
        for seed in range(12):
            order = [shuffle.randrange(7) for _ in range(shuffle.randrange(1, 12))]
            x = vectors(seed, "cpu")
            assert same(tower(x, order), reference(x, order)), order
    assert handle.report(link=False).stats.mapped_runs == 0


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 4, 5], [0, 1, 1, 2, 3, 3, 3, 5], [5, 4, 3, 2, 1, 0], [2], [0, 5, 0, 5], []], ids=str
)
def test_skipped_repeated_reordered_short(order: list[int], device: str) -> None:
    tower = Tower(6)
    reference, handle = streamed(tower, device)
    x = vectors(0, device)
    with torch.no_grad():
        tower(x)  # the usual order is what the prefetcher expects
        for _ in range(3):
            assert same(tower(x, order), reference(x, order))
        assert same(tower(x), reference(x))
    stats = handle.report(link=False).stats
    assert stats.mapped_runs == stats.host_waits == 0
    assert stats.copies > stats.late_copies


def test_a_loop_like_generate(device: str) -> None:
    model = Decoder(tied=True)
    reference = copy.deepcopy(model).to(device)
    handle = offload_(model, distinct_nbytes(model) // 4, device=device)
    tokens = wanted = torch.tensor([[1, 2, 3]], device=device)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
            wanted = torch.cat([wanted, reference(wanted)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, wanted)
    stats = handle.report(link=False).stats
    assert stats.late_copies <= 2 < stats.copies


class Stumbling(nn.Module):
    """Raises in the middle of itself when told to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.first = nn.Linear(32, 32)
        self.stumbles = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.stumbles:
            raise KeyError("stumbled")
        return self.inner(x)


@pytest.mark.parametrize("adversary", [None, 5])
def test_raising_and_caught(adversary: int | None, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    tower = Tower(0)
    tower.layers.extend(Stumbling(Step(32)) for _ in range(5))
    reference, handle = streamed(tower, "cpu")
    x = vectors(1, "cpu")
    with torch.no_grad():
        for at in [0, 3, 4, 3]:
            tower.layers[at].stumbles = True
            with pytest.raises(KeyError, match="stumbled"):
                tower(x)
            tower.layers[at].stumbles = False
            assert same(tower(x), reference(x))
    assert handle.report(link=False).stats.mapped_runs == 0
    handle.restore_()  # no lease is left open


# ------------------------------------------------------------------------------- outside of the root's forward


def test_a_unit_called_by_itself(device: str) -> None:
    tower = Tower(5)
    reference, _handle = streamed(tower, device)
    x = vectors(2, device)
    with torch.no_grad():
        for index in [4, 0, 2]:
            assert same(tower.layers[index](x), reference.layers[index](x))
            assert same(tower.layers[index].forward(x), reference.layers[index].forward(x))
            assert same(tower.layers[index].a(x), reference.layers[index].a(x))
        assert same(tower(x), reference(x))


def test_a_weight_used_outside_of_its_unit(device: str) -> None:
    tower = Tower(5)
    reference, handle = streamed(tower, device)
    x = vectors(3, device)
    with torch.no_grad():
        for index in [0, 3]:
            weight, wanted = tower.layers[index].a.weight, reference.layers[index].a.weight
            assert weight.device == wanted.device
            assert same(weight.sum(), wanted.sum())
            assert same(nn.functional.linear(x, weight), nn.functional.linear(x, wanted))
            assert same(tower(x), reference(x))
    assert handle.report(link=False).stats.write_backs == 0


def test_hooks_around_a_unit_see_the_weights(device: str) -> None:
    tower = Tower(4)
    reference, _handle = streamed(tower, device)
    seen: list[Tensor] = []
    tower.layers[2].register_forward_pre_hook(lambda m, args: seen.append(m.a.weight.sum()))
    tower.layers[2].register_forward_hook(lambda m, args, out: out * m.b.bias.sum())
    reference.layers[2].register_forward_hook(lambda m, args, out: out * m.b.bias.sum())
    x = vectors(4, device)
    with torch.no_grad():
        for _ in range(2):
            assert same(tower(x), reference(x))
    assert all(same(total, reference.layers[2].a.weight.sum()) for total in seen)
    assert len(seen) == 2


def test_two_models_interleaved(device: str) -> None:
    first, second = Tower(5), Tower(7)
    reference, one = streamed(first, device)
    other, two = streamed(second, device)
    x, y = vectors(5, device), vectors(6, device)
    with torch.no_grad():
        for _ in range(3):
            for a, b in itertools.zip_longest(range(5), range(7)):
                if a is not None:
                    assert same(first.layers[a](x), reference.layers[a](x))
                assert same(second.layers[b](y), other.layers[b](y))
        one.restore_()
        assert same(second(y), other(y))
        assert same(first(x.cpu()), reference.cpu()(x.cpu()))
        assert two.report(link=False).stats.mapped_runs == 0


# -------------------------------------------------------------------------------------- wrapped more than once


class Lonely(nn.Linear):
    """A root that is its own only unit."""


def test_the_root_as_its_own_unit(device: str) -> None:
    module = Lonely(32, 16)
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, "1MiB", device=device, policy=all_staged, units=[""])
    x = vectors(7, device)
    with torch.no_grad():
        assert same(module(x), reference(x))
        assert same(module(x), reference(x))
    stats = handle.report(link=False).stats
    assert (stats.copies, stats.hits) == (1, 1)
    assert [unit.name for unit in handle.plan.streamed_units] == [""]


def test_two_units_in_one_module(device: str) -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    reference = copy.deepcopy(module).to(device)
    units = {"weights": ["0.weight", "1.weight"], "biases": ["0.bias", "1.bias"]}
    handle = offload_(module, "1MiB", device=device, policy=all_staged, units=units)
    x = vectors(8, device)
    with torch.no_grad():
        assert same(module(x), reference(x))
    stats = handle.report(link=False).stats
    assert (stats.copies, stats.hits, stats.mapped_runs) == (2, 3, 0)


def test_a_forward_wrapped_before_and_after(device: str) -> None:
    tower = Tower(3)
    reference, _ = copy.deepcopy(tower).to(device), None
    inner = tower.layers[1].forward
    tower.layers[1].forward = lambda x: inner(x) + 1  # as accelerate's hooks do
    handle = offload_(tower, "1MiB", device=device, policy=all_staged, units=LAYERS)
    ours = tower.layers[0].forward
    tower.layers[0].forward = lambda x: ours(x) * 2
    x = vectors(9, device)
    with torch.no_grad():
        y = reference.layers[0](x) * 2
        wanted = reference.layers[2](reference.layers[1](y) + 1)
        assert same(tower(x), wanted)
        handle.restore_()
        assert same(tower(x.cpu()), wanted) if device == "cpu" else True


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        x = self.inner(x)
        return self(x, depth - 1) if depth else x


def test_a_unit_that_calls_itself(device: str) -> None:
    tower = Tower(0)
    tower.layers.extend(Recursive() for _ in range(4))
    reference, handle = streamed(tower, device)
    x = vectors(10, device)
    with torch.no_grad():
        assert same(tower(x), reference(x))
        assert same(tower(x), reference(x))
    report = handle.report(link=False)
    assert report.adopted == ()  # the slot stays the unit's until its last caller has left
    assert report.stats.mapped_runs == report.stats.host_waits == 0
    handle.restore_()


# ------------------------------------------------------------------------------------------- aliasing outputs


class Leaky(nn.Module):
    """Returns pieces of its own weights, in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {
            "rows": self.weight[:3],
            "list": [self.weight.t(), x + 1],
            "tuple": (self.table[::2], {"deep": self.table[0].expand(5, 6)}),
            "parameter": self.weight,
            "buffer": self.table,
            "bytes": self.table.detach().view(torch.uint8),
        }


def test_outputs_that_alias_a_slot_stay_right(device: str) -> None:
    module = nn.ModuleDict({"layers": nn.ModuleList(Leaky() for _ in range(5))})
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, "1MiB", device=device, policy=all_staged, units=LAYERS)
    x = vectors(11, device)
    with torch.no_grad():
        outputs = [layer(x) for _ in range(2) for layer in module["layers"]]
        wanted = [layer(x) for _ in range(2) for layer in reference["layers"]]
    for found, right in zip(outputs, wanted, strict=True):
        assert_same(found, right)
        for key in ("rows", "list", "tuple"):
            pairs = zip(*(torch.utils._pytree.tree_leaves(o[key]) for o in (found, right)), strict=True)
            assert all(a.stride() == b.stride() for a, b in pairs)
    assert outputs[0]["parameter"] is module["layers"][0].weight
    assert outputs[0]["buffer"] is module["layers"][0].table
    assert handle.report(link=False).aliased_outputs == 10 * 5


# --------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("adversary", [None, 1])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_on_one_model(threads: int, slots: int, adversary: int | None, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    tower = Tower(6, width=24)
    reference, handle = streamed(tower, "cpu", slots=slots)
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def work(number: int) -> None:
        try:
            shuffle = random.Random(number)
            start.wait()
            for seed in range(25):
                order = [shuffle.randrange(6) for _ in range(6)] if number % 2 else None
                x = vectors(100 * number + seed, "cpu", 4, 24)
                with torch.no_grad():
                    assert same(tower(x, order), reference(x, order)), (number, seed)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert errors == []
    assert handle.report(link=False).adopted == ()
    handle.restore_()


def test_threads_without_mapped_memory_get_a_slot_or_an_error(cpu_driver) -> None:
    cpu_driver(map_host_memory=False)
    tower = Tower(4)
    reference, handle = streamed(tower, "cpu", slots=1)
    x = vectors(12, "cpu")
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        go_on.wait(10)

    hook = tower.layers[0].a.register_forward_hook(pause)
    with torch.no_grad():
        assert not handle.report(link=False).mapped_home
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(tower(x)))
        thread.start()
        assert inside.wait(10)
        with pytest.raises(SlotError, match=r"layers\.2"):
            tower.layers[2](x)
        go_on.set()
        thread.join()
        hook.remove()
        with torch.no_grad():
            assert same(results[0], reference(x))
            assert same(tower(x), reference(x))


# -------------------------------------------------------------------------------------------------- lifetime


def test_a_dropped_model_frees_everything() -> None:
    tower = Tower(5)
    _, handle = streamed(tower, "cpu")
    with torch.no_grad():
        tower(vectors(0, "cpu"))  # copies for the next call are under way
    assert live_buffers()
    del tower, handle, _
    assert still_live() == []


def test_a_dropped_handle_leaves_the_model_offloaded() -> None:
    tower = Tower(5)
    reference, handle = streamed(tower, "cpu")
    del handle
    gc.collect()
    x = vectors(0, "cpu")
    with torch.no_grad():
        assert same(tower(x), reference(x))
    handle = OffloadHandle.of(tower.layers[1])
    assert handle is OffloadHandle.of(tower)
    assert handle.report(link=False).stats.copies > 0


def test_outputs_outlive_the_model() -> None:
    case = case_of("decoder")
    module = case.model()
    reference = copy.deepcopy(module)
    offload_(module, distinct_nbytes(module) // 4, device="cpu")
    kept = run(module, case.inputs(0))  # with its graph
    embedding = module.embed.weight
    del module
    gc.collect()
    assert same(kept, run(reference, case.inputs(0)))
    assert same(embedding, reference.embed.weight)
    del kept, embedding
    assert still_live() == []


def test_the_signature_of_forward_is_kept() -> None:
    import inspect

    tower = Tower(3)
    before = inspect.signature(tower.forward)
    streamed(tower, "cpu")
    assert inspect.signature(tower.forward) == before
    assert isinstance(tower.layers[0], Step)
    assert Block.forward is not tower.forward
