"""What only a GPU can show of the torch adapter: memory, streams, graphs, writes through mapped homes."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Decoder, Tower, distinct_nbytes, same, tensors_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.driver import Driver  # noqa: E402
from dlpoffload.errors import DeviceMemoryError, OffloadError, SlotError  # noqa: E402
from dlpoffload.planning import Placement, all_mapped, all_staged, pattern_policy  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

GRANULE = 2 << 20
"""torch's allocator rounds: 512 bytes for small blocks, 2 MiB for large ones."""


@pytest.fixture(autouse=True)
def clean(cuda_driver: Driver) -> Iterator[None]:
    """Every test begins and ends with a quiet device."""
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


def tower(depth: int = 6, width: int = 512, **options: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    """An offloaded tower, its resident copy, the handle. All of it is streamed unless `options` say otherwise."""
    torch.manual_seed(5)
    module = Tower(depth, width)
    reference = copy.deepcopy(module).to("cuda:0")
    options = {"device_budget": "1GiB", "policy": all_staged, **options}
    if options["policy"] is not all_mapped:
        options["units"] = ["layers.*"]
    return module, reference, offload_(module, device="cuda:0", **options)


def vector(seed: int, width: int = 512, rows: int = 8) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to("cuda:0")


def assert_streamed(handle: OffloadHandle) -> None:
    stats = handle.report(link=False).stats
    assert stats.copies > 0
    assert stats.mapped_runs == stats.host_waits == 0


# ---------------------------------------------------------------------------------------------------- memory


def test_homes_are_device_tensors_over_pinned_memory(cuda_driver: Driver) -> None:
    module, reference, handle = tower()
    with torch.no_grad():
        for _ in range(2):
            for name, parameter in module.named_parameters():
                assert parameter.device == torch.device("cuda:0"), name
                assert cuda_driver.pointer_info(parameter.data_ptr()).kind == "pinned", name
            assert same(module(vector(0)), reference(vector(0)))
    inside: list[str] = []
    layer = module.layers[2].a
    layer.register_forward_hook(lambda *_: inside.append(cuda_driver.pointer_info(layer.weight.data_ptr()).kind))
    with torch.no_grad():
        module(vector(0))
    assert inside == ["device"]
    assert_streamed(handle)


@pytest.mark.parametrize("percent", [10, 40, 75, 100])
@pytest.mark.parametrize("start", ["cpu", "cuda:0"])
def test_device_memory_stays_within_the_plan(start: str, percent: int) -> None:
    with torch.no_grad():
        Tower(1, 1024).to("cuda:0")(vector(0, 1024))  # cuBLAS takes its workspace at the first product, for good
    module = Tower(24, 1024).to(start)  # 24 units of 16 MiB
    total = distinct_nbytes(module)
    gc.collect()
    before = torch.cuda.memory_allocated() - (total if start != "cpu" else 0)
    handle = offload_(module, total * percent // 100 + 24 * 4096, device="cuda:0")
    gc.collect()
    plan = handle.plan
    count = len(plan.names(Placement.DEVICE)) + plan.slots
    taken = torch.cuda.memory_allocated() - before
    assert abs(taken - plan.device_nbytes) <= plan.device_nbytes // 100 + 512 * count
    torch.cuda.reset_peak_memory_stats()
    x = vector(0, 1024)
    with torch.no_grad():
        for _ in range(3):
            module(x)
    torch.cuda.synchronize()
    activations = 16 * x.numel() * 4 + GRANULE
    assert torch.cuda.max_memory_allocated() - before <= plan.device_nbytes * 1.01 + 512 * count + activations
    assert plan.device_nbytes <= plan.device_budget
    handle.restore_()
    gc.collect()
    after = torch.cuda.memory_allocated() - before
    assert abs(after - (total if start != "cpu" else 0)) <= total // 100 + GRANULE
    assert {str(parameter.device) for parameter in module.parameters()} == {start}


def test_no_room_on_the_device_leaves_the_module_alone() -> None:
    module = Tower(4, 1024)
    reference = copy.deepcopy(module)
    before = {name: (id(t), t.data_ptr()) for name, t in tensors_of(module).items()}
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (24 << 20)) / total)
    try:
        with pytest.raises(DeviceMemoryError, match="cuda:0"):
            offload_(module, "1GiB", device="cuda:0", policy=all_staged, units=["layers.*"], slots=4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {name: (id(t), t.data_ptr()) for name, t in tensors_of(module).items()} == before
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[name], tensor)
    assert live_buffers() == []


def test_dropped_with_copies_under_way() -> None:
    module, _reference, handle = tower(8, 1024)
    slot_nbytes, slots = handle.plan.slot_nbytes, handle.plan.slots
    with torch.no_grad():
        for seed in range(3):
            module(vector(seed, 1024))  # the copies for the next call are enqueued, nothing is waited for
    del module, handle
    gc.collect()
    taken = [torch.full((slot_nbytes,), 7, dtype=torch.uint8, device="cuda:0") for _ in range(2 * slots)]
    torch.cuda.synchronize()
    assert all(bool((tensor == 7).all()) for tensor in taken)
    lifetime.drain()
    assert live_buffers() == []


def test_the_link_is_measured_and_said() -> None:
    module, _reference, handle = tower(8, 1024)
    with torch.no_grad():
        for seed in range(4):
            module(vector(seed, 1024))
    torch.cuda.synchronize()
    report = handle.report()
    assert report.link is not None
    assert report.link_share is not None
    assert report.link_share > 0  # of a link that others may use meanwhile
    assert "of the link" in str(report)


# ---------------------------------------------------------------------------------------------------- writes


@pytest.mark.parametrize("source", ["cpu", "pinned", "cuda:0"])
@pytest.mark.parametrize("policy", [all_staged, all_mapped])
def test_in_place_writes_to_a_home(policy: Any, source: str) -> None:
    module, reference, handle = tower(policy=policy)
    weight, wanted = module.layers[1].a.weight, reference.layers[1].a.weight
    with torch.no_grad():
        for seed in range(4):
            assert same(module(vector(seed)), reference(vector(seed)))
            values = torch.randn(weight.shape) / 30
            values = values.pin_memory() if source == "pinned" else values.to(source)
            weight.copy_(values)
            wanted.copy_(values)
            weight[3].mul_(2)
            wanted[3].mul_(2)
            assert same(module(vector(seed)), reference(vector(seed)))
    assert same(weight, wanted)
    assert same(module.state_dict()["layers.1.a.weight"], wanted)
    handle.restore_()
    assert same(module.layers[1].a.weight, wanted)


def test_a_write_is_ordered_by_its_stream() -> None:
    """A slow kernel, then a write to a home, then a forward: all on one stream, no wait of the host."""
    module, reference, handle = tower()
    big = torch.randn(4096, 4096, device="cuda:0")
    with torch.no_grad():
        for step in range(4):
            for _ in range(8):
                big = (big @ big).tanh_()
            scale = big[:1, :1].abs().reshape(()) * 0 + 1 + step
            for each in (module, reference):
                each.layers[2].b.weight.mul_(scale)
            assert same(module(vector(step)), reference(vector(step)))
    assert handle.report(link=False).stats.host_waits == 0


class Remembering(nn.Module):
    """Writes a buffer and a weight in its forward, behind slow work."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 512)
        self.norm = nn.BatchNorm1d(512)
        self.register_buffer("mean", torch.zeros(512))

    def forward(self, x: Tensor) -> Tensor:
        slow = torch.ones(2048, 2048, device=x.device)
        for _ in range(6):
            slow = (slow @ slow).clamp_(max=1)
        with torch.no_grad():
            self.mean.add_(x.mean(0) * slow[0, 0])
            self.linear.bias.copy_(self.mean)
        return self.norm(self.linear(x)) + self.mean


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_written_in_forward_and_staged_again(slots: int) -> None:
    torch.manual_seed(5)
    module = Tower(0)
    module.layers.extend(Remembering() for _ in range(4))
    reference = copy.deepcopy(module).to("cuda:0")
    handle = offload_(module, "1GiB", device="cuda:0", units=["layers.*"], policy=all_staged, slots=slots)
    with torch.no_grad():
        for seed in range(4):
            assert same(module(vector(seed)), reference(vector(seed)))
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[name], tensor), name
    assert handle.report(link=False).stats.write_backs > 0
    handle.restore_()
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[name], tensor), name


def test_update_while_the_device_is_busy() -> None:
    module, reference, handle = tower()
    with torch.no_grad():
        for seed in range(6):
            values = torch.randn(512, 1024) / 30
            found = module(vector(seed))  # enqueued, and reads the old weights
            handle.update("layers.4.b.weight", values)
            wanted = reference(vector(seed))
            reference.layers[4].b.weight.copy_(values)
            assert same(found, wanted)
            assert same(module(vector(seed)), reference(vector(seed)))


# --------------------------------------------------------------------------------------------------- streams


def test_forward_on_a_side_stream() -> None:
    module, reference, handle = tower()
    side = torch.cuda.Stream()
    x = vector(0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        wanted = reference(x)
        with torch.cuda.stream(side):
            found = [module(x) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(side)
        found.append(module(x))
    assert all(same(y, wanted) for y in found)
    assert_streamed(handle)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_two_streams_at_once(slots: int) -> None:
    module, reference, handle = tower(slots=slots)
    streams = [torch.cuda.Stream() for _ in range(2)]
    xs = [vector(seed) for seed in range(8)]
    with torch.no_grad():
        wanted = [reference(x) for x in xs]
        torch.cuda.synchronize()
        found = []
        for index, x in enumerate(xs):
            with torch.cuda.stream(streams[index % 2]):
                found.append(module(x))
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
        # unit by unit, so that both streams read one slot at a time
        ys = list(xs[:2])
        for layer in module.layers:
            for index in (0, 1):
                with torch.cuda.stream(streams[index]):
                    ys[index] = layer(ys[index])
        torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(ys, wanted, strict=False))
    assert_streamed(handle)


def test_two_threads_on_two_streams() -> None:
    module, reference, handle = tower(slots=3)
    xs = [vector(seed) for seed in range(10)]
    with torch.no_grad():
        wanted = [reference(x) for x in xs]
    torch.cuda.synchronize()
    found: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def work(numbers: range) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for number in numbers:
                    found[number] = module(xs[number])
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(start, 10, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(same(found[number], wanted[number]) for number in range(10))
    handle.restore_()


def test_gradients_on_a_side_stream() -> None:
    module, reference, _handle = tower()
    module.requires_grad_(False), reference.requires_grad_(False)
    gradients = []
    for each in (module, reference):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x = vector(1).requires_grad_()
            side.synchronize()
            loss = each(x).square().sum()
            with torch.no_grad():
                each(vector(2))
            loss.backward()
        torch.cuda.current_stream().wait_stream(side)
        gradients.append(x.grad)
    torch.cuda.synchronize()
    assert same(*gradients)


# ---------------------------------------------------------------------------------------------------- graphs


def captured(module: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Warm up on a side stream and capture, as torch's documentation says."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(2):
            module(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
    return graph, y


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("budget", ["1GiB", None])
def test_graph_replays_with_new_inputs(budget: str | None, slots: int) -> None:
    options: dict[str, Any] = {"slots": slots}
    if budget is None:  # a part resident, by the usual policy
        options |= {"device_budget": 10 * (4 << 20), "policy": pattern_policy({"layers.1.*": Placement.DEVICE})}
    module, reference, handle = tower(12, **options)
    x = vector(0)
    graph, y = captured(module, x)
    with torch.no_grad():
        for seed in range(1, 6):
            x.copy_(vector(seed))
            graph.replay()
            assert same(y, reference(x))
    assert handle.report(link=False).stats.mapped_runs == 0


def test_replay_eager_replay() -> None:
    module, reference, handle = tower(7)
    x = vector(0)
    graph, y = captured(module, x)
    with torch.no_grad():
        for seed in range(6):
            x.copy_(vector(seed))
            wanted = reference(x)
            graph.replay()
            eager = module(x)
            graph.replay()
            again = y.clone()
            short = module.layers[3](x)
            assert same(eager, wanted)
            assert same(again, wanted)
            assert same(short, reference.layers[3](x))
    assert handle.report(link=False).stats.mapped_runs == 0


def test_replays_see_new_weights() -> None:
    module, reference, handle = tower()
    x = vector(0)
    graph, y = captured(module, x)
    with torch.no_grad():
        for step in range(3):
            values = torch.randn(1024, 512) / 30
            handle.update("layers.3.a.weight", values)
            reference.layers[3].a.weight.copy_(values)
            for each in (module, reference):
                each.layers[5].b.bias.add_(step + 1)
            graph.replay()
            assert same(y, reference(x))


def test_a_graph_of_a_whole_decoder() -> None:
    module = Decoder(tied=True)
    reference = copy.deepcopy(module).to("cuda:0")
    handle = offload_(module, distinct_nbytes(module) // 4, device="cuda:0")
    x = torch.randint(0, 500, (2, 9), device="cuda:0")
    graph, y = captured(module, x)
    with torch.no_grad():
        for _ in range(3):
            x.copy_(torch.randint(0, 500, (2, 9)))
            graph.replay()
            assert same(y, reference(x))
    assert handle.plan.streamed_units


def test_two_graphs_of_one_model() -> None:
    module, reference, _handle = tower()
    first, second = vector(0), vector(1, rows=3)
    one, y = captured(module, first)
    two, z = captured(module, second)
    with torch.no_grad():
        for seed in range(4):
            first.copy_(vector(seed))
            second.copy_(vector(seed + 10, rows=3))
            one.replay()
            two.replay()
            assert same(y, reference(first))
            assert same(z, reference(second))


def test_another_model_is_freed_during_a_capture() -> None:
    if "jax" in sys.modules:
        pytest.skip("JAX ran in this process, and its threads make calls that break a capture, whoever's it is")
    module, reference, _handle = tower()
    holder: list[Any] = [tower(5, 256)]
    with torch.no_grad():
        holder[0][0](vector(0, 256))
    x = vector(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        module(x)
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # what torch itself leaves behind of other tests is not ours to free in a capture
    before = len(live_buffers())
    errors: list[BaseException] = []

    def free() -> None:
        try:
            holder.clear()
            gc.collect()
            lifetime.drain()
        except BaseException as error:
            errors.append(error)

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
        thread = threading.Thread(target=free)
        thread.start()
        thread.join()
        y = module(y)
    assert errors == []
    gc.collect()
    lifetime.drain()
    assert len(live_buffers()) < before
    with torch.no_grad():
        for seed in range(2):
            x.copy_(vector(seed))
            graph.replay()
            assert same(y, reference(reference(x)))


def test_a_module_is_not_restored_under_a_graph() -> None:
    module, reference, handle = tower()
    x = vector(0)
    graph, y = captured(module, x)
    with pytest.raises(SlotError, match=r'capture \d+ of "layers.0" to "layers.5"; drop them first \(del graph\)'):
        handle.restore_()
    graph.replay()
    with torch.no_grad():
        assert same(y, reference(x))
        del graph
        handle.restore_()
        assert same(module.to("cuda:0")(x), reference(x))


def test_a_graph_outlives_its_model() -> None:
    module, reference, handle = tower()
    x = vector(0)
    graph, y = captured(module, x)
    x.copy_(vector(1))
    with torch.no_grad():
        wanted = reference(x)
    before = len(live_buffers())
    del module, handle
    gc.collect()
    lifetime.drain()
    torch.cuda.empty_cache()
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0").fill_(255)
    graph.replay()
    assert same(y, wanted)
    del graph
    torch.cuda.synchronize()
    for _ in range(1000):
        lifetime.drain()
        if len(live_buffers()) < before:
            break
        time.sleep(0.001)
    assert len(live_buffers()) < before


def test_an_update_inside_a_capture_is_refused() -> None:
    """Host writes wait for the device, which a capture forbids: an error of ours, and the graph is given up."""
    module, reference, handle = tower()
    x = vector(0)
    captured(module, x)

    def capture() -> None:
        with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(x)
            handle.update("layers.0.a.weight", torch.zeros(1024, 512))

    with pytest.raises((OffloadError, RuntimeError)):
        capture()
    torch.cuda.synchronize()
    with torch.no_grad():
        reference.layers[0].a.weight.copy_(module.layers[0].a.weight)
        assert same(module(x), reference(x))
