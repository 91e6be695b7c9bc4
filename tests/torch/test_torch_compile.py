"""torch.compile on an offloaded module: the bits of the compiled resident one, few graphs, none made anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Decoder, Tower, assert_same, distinct_nbytes, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from dlpoffload.errors import GradientError  # noqa: E402
from dlpoffload.planning import all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

POLICIES = {"staged": all_staged, "mapped": all_mapped}
policies = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def offload(module: nn.Module, device: str, policy: str) -> OffloadHandle:
    units = {"units": ["layers.*"]} if policy == "staged" else {}
    return offload_(module, "16MiB", device=device, policy=POLICIES[policy], **units)


def tower(
    device: str, policy: str, *, frozen: bool = True, depth: int = 5
) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    torch.manual_seed(3)
    module = Tower(5, 48).requires_grad_(False)
    reference = copy.deepcopy(module).to(device)
    return module, reference, offload(module, device, policy)


def vector(seed: int, device: str, rows: int = 4) -> Tensor:
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(seed)).to(device)


def compiled(module: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> tuple[Any, Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, **options), counter


def assert_used(handle: OffloadHandle, policy: str) -> None:
    stats = handle.report(link=False).stats
    assert (stats.copies > 0) == (policy == "staged")
    assert stats.mapped_runs == stats.host_waits == 0


@policies
def test_compiled_once_and_equal(device: str, policy: str) -> None:
    module, reference, handle = tower(device, policy)
    fast, counter = compiled(module, fullgraph=policy == "mapped")
    counts = []
    with torch.no_grad():
        for seed in range(6):
            assert same(fast(vector(seed, device)), reference(vector(seed, device)))
            counts.append(counter.frame_count)
    assert counts[-1] == counts[1] > 0
    assert counts[-1] <= 2  # all layers share one; what lies behind them may be another
    assert_used(handle, policy)


@policies
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_inductor_gives_the_bits_of_the_resident_compiled(device: str, policy: str, slots: int) -> None:
    torch.manual_seed(0)
    module = Tower(5, 48)
    reference = copy.deepcopy(module).to(device)
    options: dict[str, Any] = {"units": ["layers.*"], "slots": slots} if policy == "staged" else {}
    if policy == "mapped" and slots > 1:
        pytest.skip("mapped placement has no slots")
    handle = offload_(module, "16MiB", device=device, policy=POLICIES[policy], **options)
    fast, resident = torch.compile(module), torch.compile(reference)
    with torch.no_grad():
        for seed in range(4):
            assert same(fast(vector(seed, device)), resident(vector(seed, device)))
    assert_used(handle, policy)


@policies
def test_new_shapes_and_modes_are_compiled_anew_and_right(device: str, policy: str) -> None:
    module, reference, handle = tower(device, policy)
    fast, counter = compiled(module)
    counts = []
    for rows, grad in ((4, False), (7, False), (7, True), (2, True), (9, False), (4, True)):
        with torch.set_grad_enabled(grad):
            assert same(fast(vector(rows, device, rows)), reference(vector(rows, device, rows)))
        counts.append(counter.frame_count)
    assert counts[0] < counts[1]
    with torch.no_grad():
        for rows in (4, 7, 9):
            assert same(fast(vector(rows, device, rows)), reference(vector(rows, device, rows)))
    assert counter.frame_count == counts[-1]
    assert_used(handle, policy)


@policies
def test_gradients_flow_through(device: str, policy: str) -> None:
    module, reference, handle = tower(device, policy)
    fast, counter = compiled(module)
    for seed in range(3):
        x, y = vector(seed, device).requires_grad_(), vector(seed, device).requires_grad_()
        fast(x).square().sum().backward()
        reference(y).square().sum().backward()
        assert x.grad is not None
        assert same(x.grad, y.grad)
    assert counter.frame_count <= 2
    assert_used(handle, policy)


@policies
def test_a_gradient_for_an_offloaded_parameter_is_refused(device: str, policy: str) -> None:
    module, _reference, _handle = tower(device, policy)
    # One: of several, torch keeps those for ever whose turn had not come when a hook raised.
    next(module.parameters()).requires_grad_(True)
    fast, _ = compiled(module)
    with pytest.raises(GradientError, match="layers"):
        fast(vector(0, device)).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_one_graph_of_staged_units_is_refused_and_said_why(device: str) -> None:
    module, reference, _handle = tower(device, "staged")
    fast, _ = compiled(module, fullgraph=True)
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph out"):
            fast(vector(0, device))
        assert same(module(vector(0, device)), reference(vector(0, device)))


@policies
def test_writes_between_two_steps_are_seen(device: str, policy: str) -> None:
    module, reference, handle = tower(device, policy)
    fast, counter = compiled(module)
    with torch.no_grad():
        for seed in range(4):
            for name, parameter in reference.named_parameters():
                parameter.mul_(1.01)
                if seed % 2:
                    handle.update(name, parameter)
                else:
                    module.get_parameter(name).mul_(1.01)
            assert same(fast(vector(seed, device)), reference(vector(seed, device)))
    assert counter.frame_count <= 2


@policies
def test_compiled_before_it_was_offloaded(device: str, policy: str) -> None:
    torch.manual_seed(3)
    module = Tower(4, 48).to(device)
    reference = copy.deepcopy(module)
    fast, _ = compiled(module)
    with torch.no_grad():
        wanted = [reference(vector(seed, device)) for seed in range(3)]
        assert same(fast(vector(0, device)), wanted[0])
        handle = offload(module, device, policy)
        for seed in range(3):
            assert same(fast(vector(seed, device)), wanted[seed])
        assert_used(handle, policy)
        handle.restore_()
        assert same(fast(vector(2, device)), wanted[2])


class Affine(nn.Module):
    """Weights that are buffers, as quantised layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(48, 48) / 8)
        self.register_buffer("shift", torch.randn(48), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + self.shift)


@policies
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_that_are_buffers(device: str, policy: str, backend: str) -> None:
    """Torch looks at the class of what a graph is given, in its first call."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"layers": nn.Sequential(*(Affine() for _ in range(4)))})
    reference = copy.deepcopy(module).to(device)
    handle = offload(module, device, policy)
    fast, counter = compiled(module["layers"], backend)
    resident, _ = compiled(reference["layers"], backend)
    for seed in range(4):
        assert same(fast(vector(seed, device)), resident(vector(seed, device)))
    assert counter.frame_count <= 2
    assert_used(handle, policy)


@policies
@pytest.mark.parametrize("first", ["compile", "offload"])
def test_layers_compiled_in_place(device: str, policy: str, first: str) -> None:
    """The regional way of compiling: each block by itself."""
    torch.manual_seed(3)
    module = Tower(4, 48)
    reference = copy.deepcopy(module).to(device)
    counter = CompileCounterWithBackend("aot_eager")

    def compile_layers() -> None:
        for layer in module.layers:
            layer.compile(backend=counter)

    if first == "compile":
        compile_layers()
    handle = offload(module, device, policy)
    if first == "offload":
        compile_layers()
    with torch.no_grad():
        for seed in range(4):
            assert same(module(vector(seed, device)), reference(vector(seed, device)))
    assert counter.frame_count == 1
    assert_used(handle, policy)


def test_a_decoder(device: str) -> None:
    torch.manual_seed(0)
    module = Decoder(tied=True).eval()
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, distinct_nbytes(module) // 2, device=device)
    fast, counter = compiled(module)
    resident, _ = compiled(reference)
    tokens = torch.arange(9, device=device)[None]
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(tokens), resident(tokens))
        counts = counter.frame_count
        for _ in range(3):
            assert_same(fast(tokens), resident(tokens))
    assert counter.frame_count == counts > 0
    assert_used(handle, "staged")


def test_a_broken_unit_is_left(device: str) -> None:
    """What raises inside of a compiled unit leaves it, and the next call is right."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 3:
                raise ValueError("three")
            return torch.tanh(self.linear(x))

    torch.manual_seed(0)
    module = nn.ModuleDict({"layers": nn.ModuleList(Odd() for _ in range(4))})

    def step(model: nn.ModuleDict, x: Tensor) -> Tensor:
        for layer in model["layers"]:
            x = layer(x)
        return x

    reference = copy.deepcopy(module).to(device)
    handle = offload(module, device, "staged")
    fast, _ = compiled(step)
    with torch.no_grad():
        for rows in (4, 3, 4, 3, 5):
            if rows == 3:
                with pytest.raises(ValueError, match="three"):
                    fast(module, vector(rows, device, rows))
            else:
                assert same(fast(module, vector(rows, device, rows)), step(reference, vector(rows, device, rows)))
    assert_used(handle, "staged")
    handle.restore_()  # nothing is left entered
