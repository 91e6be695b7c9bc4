"""torch.compile on an offloaded module: the bits of the compiled resident one, few graphs, none made anew."""

from __future__ import annotations

import copy
import functools
import inspect
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


class Numbered(nn.Module):
    """A layer whose forward reads a plain value, which Dynamo guards."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(48, 48)

    def forward(self, x: Tensor, *, scale: float = 0.5) -> Tensor:
        return torch.tanh(self.linear(x)) * scale + self.index


def numbered(makes: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Numbered(index % makes) for index in range(12)))
    return nn.ModuleDict({"layers": layers}).requires_grad_(False)


@pytest.fixture
def strict() -> Iterator[None]:
    """What meets the limit of recompilations raises instead of running uncompiled."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("makes", "most"), [(1, 1), (2, 2), (6, 6 + 2), (12, 12 + 2)])
def test_each_make_has_code_of_its_own(device: str, makes: int, most: int) -> None:
    """Two makes share one. Of more, the second and the third are compiled once more, after the third parted them."""
    for _ in range(2):  # the second model finds the code parted already
        module = numbered(makes)
        reference = copy.deepcopy(module).to(device)
        handle = offload(module, device, "staged")
        fast, counter = compiled(module["layers"])
        counts = []
        with torch.no_grad():
            for seed in range(3):
                assert same(fast(vector(seed, device)), reference["layers"](vector(seed, device)))
                counts.append(counter.frame_count)
            assert counts[-1] == counts[1] <= most
            assert_used(handle, "staged")
            handle.restore_()


@pytest.mark.usefixtures("strict")
def test_code_of_its_own_is_seen_by_nobody(device: str) -> None:
    module = numbered(12)
    reference = copy.deepcopy(module).to(device)
    handle = offload(module, device, "staged")
    layers = list(module["layers"])
    fast, _ = compiled(module["layers"])
    with torch.no_grad():
        for seed in range(2):
            fast(vector(seed, device))
        codes = {inspect.unwrap(layer.forward.inner).__func__.__code__ for layer in layers}
        assert len(codes) == 12
        for layer in layers:
            assert inspect.signature(layer.forward) == inspect.signature(Numbered(0).forward)
            assert layer.forward.__code__ is Numbered.forward.__code__
        handle.refresh_()
        assert same(fast(vector(2, device)), reference["layers"](vector(2, device)))
        twin = copy.deepcopy(module)
        assert all(layer.forward.inner.__self__ is layer for layer in twin["layers"])
        assert same(twin["layers"](vector(3, device)), reference["layers"](vector(3, device)))
        handle.restore_()
        assert not any("forward" in layer.__dict__ for layer in layers)
        assert layers[7].forward.__func__ is Numbered.forward
        assert same(module["layers"].to(device)(vector(4, device)), reference["layers"](vector(4, device)))


def test_what_is_no_plain_method_keeps_its_code(device: str) -> None:
    """Somebody's wrapper is called, not a copy of what is inside of it."""
    module = numbered(12)
    called: list[int] = []

    def wrapped(layer: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def around(*args: Any, **kwargs: Any) -> Tensor:
            called.append(layer.index)
            return forward(*args, **kwargs)

        return around

    reference = copy.deepcopy(module).to(device)
    for layer in module["layers"]:
        layer.forward = wrapped(layer, layer.forward)
    handle = offload(module, device, "staged")
    layer = module["layers"][5]
    layer.forward = wrapped(layer, layer.forward)  # and one around ours
    with torch.no_grad():
        for seed in range(3):
            called.clear()
            assert same(module["layers"](vector(seed, device)), reference["layers"](vector(seed, device)))
            assert called == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
        fast, _ = compiled(module["layers"])
        for seed in range(3):
            assert same(fast(vector(seed, device)), reference["layers"](vector(seed, device)))
    assert_used(handle, "staged")


@pytest.mark.usefixtures("strict")
@torch._dynamo.config.patch(recompile_limit=6)  # the default is eight, and takes longer
def test_more_layers_than_the_limit_with_a_static_cache(device: str) -> None:
    """Each layer finds its cache by its index. Another length of prompts is one more kind of step."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",  # sdpa is called without a mask where nothing is traced
    )
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, "16MiB", device=device, policy=all_staged, units=["model.layers.*"])
    fast, counter = compiled(module, "eager")
    counts = []
    for prompt in (5, 8):
        caches = [transformers.StaticCache(config=config, max_cache_len=16) for _ in range(2)]
        tokens = torch.arange(prompt, device=device)[None]
        with torch.no_grad():
            for step in range(4):
                given = tokens if step == 0 else torch.tensor([[step]], device=device)
                found, wanted = (
                    model(given, past_key_values=cache).logits
                    for model, cache in zip((fast, reference), caches, strict=True)
                )
                assert same(found, wanted)
                counts.append(counter.frame_count)
    assert counts[1] == counts[3]
    assert counts[5] == counts[7]
    assert_used(handle, "staged")
