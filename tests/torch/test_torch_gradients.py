"""Gradients in every order of passes: raised and caught, nested, recomputed; and those that are refused."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Decoder, Step, Tower, case_of, distinct_nbytes, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.autograd.graph import save_on_cpu  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.errors import GradientError  # noqa: E402
from dlpoffload.planning import all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

LAYERS = ["layers.*"]


class Scaled(nn.Module):
    """Stands around a module as an adapter does; its own weight is trained and not offloaded."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return (out[0] * self.scale, *out[1:]) if isinstance(out, tuple) else out * self.scale


class Adapted(nn.Module):
    """A tower with a trained gain behind each layer, put there after the tower was offloaded."""

    def __init__(self, tower: nn.Module, device: str) -> None:
        super().__init__()
        self.tower = tower
        self.gains = nn.ParameterList(
            nn.Parameter(torch.linspace(0.5, 1.5, 32, device=device) + 0.1 * i) for i in range(len(tower.layers))
        )

    def forward(self, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Tensor:
        for layer, gain in zip(self.tower.layers, self.gains, strict=True):
            x = (layer(x) if call is None else call(layer, x)) * gain
        return x


def pair(device: str, depth: int = 6, *, frozen: bool = True, **options: Any) -> tuple[Adapted, Adapted, OffloadHandle]:
    """An offloaded model, all of it streamed, and its resident copy."""
    tower = Tower(depth).requires_grad_(not frozen)
    reference = copy.deepcopy(tower).to(device)
    options = {"units": LAYERS, "policy": all_staged, **options}
    handle = offload_(tower, "1MiB", device=device, **options)
    return Adapted(tower, device), Adapted(reference, device), handle


def vector(seed: int, device: str) -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(model: Adapted, x: Tensor, call: Any = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model(x, call).square().sum().backward()
    return taken(model, x)


def taken(model: nn.Module, *leaves: Tensor) -> list[Tensor]:
    """The gradients that have accumulated, and none is left."""
    found = []
    for leaf in [*leaves, *(p for p in model.parameters() if p.requires_grad)]:
        assert leaf.grad is not None
        found.append(leaf.grad)
        leaf.grad = None
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def assert_same_gradients(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    assert [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if not same(a, b)] == []
    assert all(bool(gradient.any()) for gradient in wanted)


def leased(handle: OffloadHandle) -> int:
    """Slots that somebody holds."""
    stager = handle._placed.stager
    return 0 if stager is None else sum(state.leases for state in stager.ring._states())


def unleased(handle: OffloadHandle) -> bool:
    """Whether no lease is left, soon: torch's device thread lets go of a backward that raised when it gets to it."""
    deadline = time.monotonic() + 5
    while leased(handle) and time.monotonic() < deadline:
        time.sleep(0.001)
    return leased(handle) == 0


# ------------------------------------------------------------------------------------------- whole models


def _adapters(module: nn.Module) -> None:
    """Put an adapter into every block, trained, after offloading."""
    blocks = [inside for inside in module.modules() if hasattr(inside, "attention")]
    assert len(blocks) > 2
    for block in blocks:
        width = block.attention.o.out_features
        wrapped = Scaled(block.attention.o, width)
        block.attention.o = wrapped.to(block.attention.q.weight.device)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("name", ["decoder", "decoder_tied", "encoder_decoder", "mixture"])
def test_adapters_inside_of_units(name: str, slots: int, device: str) -> None:
    """A LoRA is a module inside of a staged unit, and stays where it is."""
    case = case_of(name)
    module = case.model().requires_grad_(False)
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, distinct_nbytes(module) * 6 // 10, device=device, slots=slots)
    for each in (module, reference):
        _adapters(each)
    before = copies(handle)
    for seed in range(2):
        results = []
        for each in (module, reference):
            args, kwargs = case.inputs(seed, device)
            each(*args, **kwargs).square().mean().backward()
            results.append(taken_where_used(each))
        assert results[0].keys() == results[1].keys()
        assert len(results[0]) > 2
        for key, gradient in results[1].items():
            assert same(results[0][key], gradient), key
    stats = handle.report(link=False).stats
    assert stats.copies > before
    assert stats.host_waits == 0
    assert unleased(handle)


def taken_where_used(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; experts that were not chosen have none."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert all("scale" in name for name in found)
    for parameter in module.parameters():
        parameter.grad = None
    return found


def copies(handle: OffloadHandle) -> int:
    return handle.report(link=False).stats.copies


# ---------------------------------------------------------------------------------- through the ring, in reverse


def test_backward_streams_through_the_ring_in_reverse(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, handle = pair(device, depth=8)
    stager = handle._placed.stager
    entered: list[str] = []
    real = stager.backward._prefetcher.enter
    monkeypatch.setattr(
        stager.backward._prefetcher, "enter", lambda unit, **options: entered.append(unit) or real(unit, **options)
    )
    private: list[object] = []
    monkeypatch.setattr(stager.backward, "_copied", private.append)
    x = vector(0, device).requires_grad_()
    loss = model(x).square().sum()
    before = copies(handle)
    loss.backward()
    assert entered == [f"layers.{i}" for i in reversed(range(8))]
    assert private == []
    unit_nbytes = stager.units["layers.0"].slab.nbytes
    stats = handle.report(link=False).stats
    assert stats.copies - before >= 8 - 2  # two may still be in their slots
    assert stats.copied_nbytes == stats.copies * unit_nbytes
    assert stats.late_copies <= 1 + 1  # the first of each direction
    assert stats.mapped_runs == stats.host_waits == 0
    assert handle.report(link=False).device_nbytes == 2 * handle.plan.slot_nbytes
    found = taken(model, x)
    assert_same_gradients(found, gradients(reference, vector(0, device)))


@pytest.mark.parametrize("adversary", range(6))
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_adversarial_copies(slots: int, adversary: int, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    model, reference, handle = pair("cpu", depth=7, slots=slots)
    calls = [
        None,
        lambda m, x: checkpoint(m, x, use_reentrant=False),
        lambda m, x: checkpoint(m, x, use_reentrant=True),
    ]
    for seed, call in enumerate(calls * 2):
        x = vector(seed, "cpu")
        assert_same_gradients(gradients(model, x, call), gradients(reference, x, call))
        with torch.no_grad():
            assert same(model(x), reference(x))
    assert unleased(handle)


def test_a_fault_in_a_slot_is_seen() -> None:
    """The comparison would notice bytes of another unit."""
    model, reference, handle = pair("cpu")
    stager = handle._placed.stager
    x = vector(0, "cpu").requires_grad_()
    loss = model(x).square().sum()
    real = stager.backward._prefetcher.enter

    def spoiled(unit: str, **options: Any) -> Any:
        lease = real(unit, **options)
        stager.slots[lease.slot.index].view(torch.float32).add_(1)
        return lease

    stager.backward._prefetcher.enter = spoiled
    loss.backward()
    stager.backward._prefetcher.enter = real
    wanted = gradients(reference, vector(0, "cpu"))
    assert not all(same(a, b) for a, b in zip(taken(model, x), wanted, strict=True))


# -------------------------------------------------------------------------------------------- orders of passes


@pytest.mark.parametrize("slots", [1, 2])
def test_retained_graphs_and_several_forwards(slots: int, device: str) -> None:
    results = []
    for model in pair(device, slots=slots)[:2]:
        x, y = vector(0, device).requires_grad_(), vector(1, device).requires_grad_()
        first, second = model(x).square().sum(), model(y).sum()
        first.backward(retain_graph=True)
        (first * second).backward(retain_graph=True)
        with torch.no_grad():
            model(x)
        second.backward()
        first.backward()
        results.append(taken(model, x, y))
    assert_same_gradients(*results)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_higher_derivatives(slots: int, device: str) -> None:
    results = []
    model, reference, handle = pair(device, slots=slots)
    for each in (model, reference):
        x = vector(0, device).requires_grad_()
        y = each(x, lambda layer, z: torch.tanh(layer(z)))
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (second * first).sum().backward()
        results.append([first.detach(), second.detach(), *taken(each, x)])
    assert_same_gradients(*results)
    assert unleased(handle)


def test_what_autograd_saved_can_be_looked_at(device: str) -> None:
    model, reference, handle = pair(device)
    seen: list[list[Tensor]] = []
    for each in (model, reference):
        nodes, found = [each(vector(0, device).requires_grad_()).grad_fn], []
        while nodes:
            node = nodes.pop()
            if hasattr(node, "_saved_mat2"):
                found.append(node._saved_mat2.clone())
            nodes += [following for following, _ in node.next_functions if following is not None]
        seen.append(found)
    assert len(seen[0]) >= 2 * 6
    assert_same_gradients(*seen)
    assert unleased(handle)


class _Stumbling(torch.autograd.Function):
    stumbles = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if _Stumbling.stumbles:
            raise KeyError("stumbled")
        return gradient.clone()


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("at", [0, 3])
def test_a_backward_that_raised_holds_nothing(at: int, slots: int, depth: int, device: str) -> None:
    model, reference, handle = pair(device, depth=depth, slots=slots)
    layer = model.tower.layers[min(at, depth - 1)]

    def call(inner: nn.Module, x: Tensor) -> Tensor:
        return inner(_Stumbling.apply(x) if inner is layer else x)

    for seed in range(3):
        x = vector(seed, device)
        _Stumbling.stumbles = True
        with pytest.raises(KeyError, match="stumbled"):
            model(x.clone().requires_grad_(), call).square().sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        assert unleased(handle)
        _Stumbling.stumbles = False
        with torch.no_grad():
            assert same(model(x), reference(x))
        assert_same_gradients(gradients(model, x, call), gradients(reference, x))
    assert handle.report(link=False).stats.mapped_runs == 0
    handle.restore_()


def test_a_hook_that_raises(device: str) -> None:
    model, reference, handle = pair(device)

    def refuse(_: Tensor) -> None:
        raise ArithmeticError("not this one")

    hook = model.gains[2].register_hook(refuse)
    x = vector(0, device)
    with pytest.raises(ArithmeticError, match="not this one"):
        gradients(model, x)
    hook.remove()
    model.zero_grad()
    assert unleased(handle)
    assert_same_gradients(gradients(model, x), gradients(reference, x))


# ------------------------------------------------------------------------------------- passes inside of passes


class _Nested(torch.autograd.Function):
    """Runs a backward through another module inside its own, between two uses of the weight that it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, run: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.run = run
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            ctx.run(z).square().sum().backward()
        return gradient @ weight.t() + z.grad, None, None


class Nesting(nn.Module):
    def __init__(self, run: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return _Nested.apply(x, self.weight, self.run[0])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_node_that_runs_a_backward_keeps_its_weights(slots: int, device: str) -> None:
    """The pass inside streams other units, and the node reads its own weight afterwards."""
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        run: list[Any] = []
        tower = Tower(5)
        run.append(copy.deepcopy(tower).requires_grad_(False))
        for index in (1, 3):
            tower.layers[index] = Nesting(run)
        models.append((tower.requires_grad_(False), run))
    (tower, run), (reference, other) = models
    reference.to(device)
    other[0].to(device)
    units = ["outer.layers.*", "inner.layers.*"]
    both = nn.ModuleDict({"outer": tower, "inner": run[0]})
    handle = offload_(both, "1MiB", device=device, policy=all_staged, units=units, slots=slots)
    for seed in range(3):
        results = []
        for each in (tower, reference):
            x = vector(seed, device).requires_grad_()
            each(x).square().sum().backward()
            results.append([x.grad])
        assert_same_gradients(*results)
    assert unleased(handle)


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "outside": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "nested": lambda layer, x: checkpoint(
        lambda y: torch.tanh(checkpoint(layer, y, use_reentrant=False)), x, use_reentrant=False
    ),
    "nested reentrant": lambda layer, x: checkpoint(
        lambda y: torch.tanh(checkpoint(layer, y, use_reentrant=True)), x, use_reentrant=True
    ),
}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_checkpoints_around_units(call: Any, slots: int, mapped: bool, cpu_driver) -> None:
    """Where there is one slot, and nothing to fall back on, recomputing a unit finds that slot free."""
    cpu_driver(map_host_memory=mapped)
    model, reference, handle = pair("cpu", depth=7, slots=slots)
    for seed in range(2):
        x = vector(seed, "cpu")
        assert_same_gradients(gradients(model, x, call), gradients(reference, x, call))
    assert handle.report(link=False).stats.mapped_runs == 0
    assert unleased(handle)


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_checkpoint_around_several_units(reentrant: bool, device: str) -> None:
    model, reference, handle = pair(device, depth=9)

    def segments(each: Adapted, x: Tensor) -> Tensor:
        for start in (0, 3, 6):

            def segment(y: Tensor, start: int = start) -> Tensor:
                for index in range(start, start + 3):
                    y = each.tower.layers[index](y) * each.gains[index]
                return y

            x = checkpoint(segment, x, use_reentrant=reentrant)
        return x

    results = []
    for each in (model, reference):
        x = vector(0, device).requires_grad_()
        segments(each, x).square().sum().backward()
        results.append(taken(each, x))
    assert_same_gradients(*results)
    assert handle.report(link=False).stats.mapped_runs == 0


class SelfSaving(Step):
    """Checkpoints its own inside, and hands its weight in."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        def body(y: Tensor, weight: Tensor) -> Tensor:
            return self.b(torch.tanh(nn.functional.linear(y, weight) + self.a(y)))

        return x + checkpoint(body, x, self.a.weight, use_reentrant=self.reentrant)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_of_units_that_take_the_weight_itself(reentrant: bool, slots: int, device: str) -> None:
    tower = Tower(0)
    tower.layers.extend(SelfSaving(32) for _ in range(5))
    for layer in tower.layers:
        layer.reentrant = reentrant
    tower.requires_grad_(False)
    reference = copy.deepcopy(tower).to(device)
    handle = offload_(tower, "1MiB", device=device, units=LAYERS, policy=all_staged, slots=slots)
    model, other = Adapted(tower, device), Adapted(reference, device)
    outside = CALLS["outside"]
    for call in (None, outside):
        x = vector(0, device)
        assert_same_gradients(gradients(model, x, call), gradients(other, x, call))
    assert unleased(handle)


@pytest.mark.parametrize("call", [None, *CALLS.values()], ids=["plain", *CALLS])
def test_saved_on_the_cpu(call: Any, device: str) -> None:
    model, reference, handle = pair(device)
    results = []
    for each in (model, reference):
        with save_on_cpu():
            x = vector(0, device).requires_grad_()
            loss = each(x, call).square().sum()
        loss.backward()
        results.append(taken(each, x))
    assert_same_gradients(*results)
    assert copies(handle) > 6


# ------------------------------------------------------------------------------------------------ the refusals


@dataclass
class Two:
    first: Tensor
    second: list[Tensor]


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Step(32) for _ in range(4))
        self.lora = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Two:
        x = self.layers[0](x) * self.lora
        return Two(self.layers[1](x), [self.layers[2](x), self.layers[3](x) * self.lora])


def nothing_accumulated(*modules: nn.Module) -> bool:
    return all(parameter.grad is None for module in modules for parameter in module.parameters())


def refused(call: Callable[[], object], *modules: nn.Module, name: str = r"layers\.\d\.[ab]\.(weight|bias)") -> None:
    with pytest.raises(GradientError, match=rf'"{name}".*requires_grad_\(False\)'):
        call()
    assert nothing_accumulated(*modules)


@pytest.mark.parametrize("policy", [all_staged, all_mapped])
def test_refused_before_anything_accumulates(policy: Any, device: str) -> None:
    module = TwoOutputs().to(device)
    units = LAYERS if policy is all_staged else None
    module.lora.requires_grad_(False)
    handle = offload_(module, "1MiB", device=device, units=units, policy=policy)
    module.lora = nn.Parameter(torch.ones(32, device=device))  # not offloaded
    weight = module.layers[2].b.weight

    def x() -> Tensor:
        return vector(0, device).requires_grad_()

    def loss(out: Two) -> Tensor:
        return out.first.sum() + out.second[0].sum() + out.second[1].sum()

    refused(lambda: loss(module(x())).backward(), module)
    refused(lambda: module(x()).second[1].sum().backward(), module)
    refused(lambda: loss(module(vector(0, device))).backward(), module)
    refused(lambda: torch.autograd.grad(loss(module(x())), weight), module, name=r"layers\.2\.b\.weight")
    refused(lambda: torch.autograd.grad(loss(module(x())), [module.lora, weight]), module)
    refused(lambda: loss(module(x())).backward(inputs=[weight]), module, name=r"layers\.2\.b\.weight")
    refused(lambda: module.layers[1](x()).sum().backward(), module)
    refused(lambda: module.layers[1].a(x()).sum().backward(), module)  # not even a unit
    assert unleased(handle)

    # what reaches none of them works, though they require a gradient
    resident = TwoOutputs().to(device)
    resident.load_state_dict(module.state_dict())
    found = []
    for each in (module, resident):
        leaf = x()
        found.append([*torch.autograd.grad(loss(each(leaf)), [leaf, each.lora])])
        loss(each(leaf)).backward(inputs=[leaf, each.lora])
        found[-1] += [leaf.grad, each.lora.grad]
        each.lora.grad = None
    assert_same_gradients(*found)

    # frozen, everything works
    module.layers.requires_grad_(False)
    leaf = x()
    loss(module(leaf)).backward()
    assert same(leaf.grad, found[1][0])
    assert unleased(handle)


class Recomputed(nn.Module):
    """Two layers in a reentrant checkpoint, and a trained gain behind them and before."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Step(32) for _ in range(3))
        self.last = last

    def forward(self, x: Tensor, gains: list[Tensor]) -> Tensor:
        x = self.layers[0](x) * gains[0]
        x = checkpoint(lambda y: self.layers[2](self.layers[1](y)), x, use_reentrant=True)
        return x if self.last else x * gains[1]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("policy", [all_staged, all_mapped])
def test_refused_before_a_reentrant_checkpoint_accumulates(policy: Any, last: bool, device: str) -> None:
    module, resident = Recomputed(last=last).to(device), Recomputed(last=last).to(device)
    resident.load_state_dict(module.state_dict())
    offload_(module, "1MiB", device=device, units=LAYERS if policy is all_staged else None, policy=policy)

    def gains() -> list[Tensor]:
        return [torch.full((32,), 1.5, device=device, requires_grad=True) for _ in range(2)]

    module.layers[0].requires_grad_(False)
    given, x = gains(), vector(0, device).requires_grad_()
    refused(lambda: module(x, given).sum().backward(), module, name=r"layers\.[12]\.[ab]\.(weight|bias)")
    assert x.grad is None
    assert all(gain.grad is None for gain in given)

    found = []
    for each in (module, resident):
        each.requires_grad_(False)
        given, x = gains(), vector(0, device).requires_grad_()
        each(x, given).sum().backward()
        found.append([x.grad, given[0].grad, *([] if last else [given[1].grad])])
    assert_same_gradients(*found)


def test_a_mapped_embedding_called_directly(device: str) -> None:
    model = Decoder(tied=True, depth=3)
    offload_(model, 0, device=device, policy=all_mapped)
    tokens = torch.tensor([[1, 2]], device=device)
    with pytest.raises(GradientError, match=r'"embed\.weight".*requires_grad_'):
        model.embed(tokens).sum().backward()
    assert nothing_accumulated(model)


def test_a_parameter_that_requires_its_gradient_only_later(device: str) -> None:
    model, _, _handle = pair(device)
    tower = model.tower
    for switch in (lambda p: p.requires_grad_(True), lambda p: setattr(p, "requires_grad", True)):
        tower.requires_grad_(False)
        switch(tower.layers[3].a.weight)
        refused(lambda: tower(vector(0, device)).sum().backward(), tower, name=r"layers\.3\.a\.weight")
        refused(lambda: tower.layers[3].a(vector(0, device)).sum().backward(), tower, name=r"layers\.3\.a\.weight")


def test_the_hooks_go_with_the_offloading(device: str) -> None:
    """Restored, every parameter is trained as ever, requires what it required, and keeps no hook."""
    tower = Tower(3)
    tower.layers[1].a.bias.requires_grad_(False)
    handle = offload_(tower, "1MiB", device=device, units=LAYERS, policy=all_staged)
    assert [p.requires_grad for p in tower.parameters()].count(False) == 1
    assert not tower.layers[1].a.bias.requires_grad
    handle.restore_()
    tower(torch.ones(1, 32)).sum().backward()
    assert {name for name, p in tower.named_parameters() if p.grad is None} == {"layers.1.a.bias"}
    assert all(not p._backward_hooks for p in tower.parameters())


def test_inputs_that_pass_through_keep_no_hooks(device: str) -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Step(32), Step(32)])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.layers[1](self.layers[0](x))

    module = Passing()
    offload_(module, "1MiB", device=device, units=LAYERS, policy=all_staged)
    x = vector(0, device).requires_grad_()
    for _ in range(3):
        module(x)
    assert not x._backward_hooks
    x.sum().backward()  # none of the module's business
    assert x.grad is not None


def test_a_backward_that_raised_keeps_nothing_alive(device: str) -> None:
    gc.collect()
    lifetime.drain()
    alive = live_buffers()
    model, _, handle = pair(device, depth=3, slots=1)
    x = vector(0, device).requires_grad_()
    model.gains[0].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    assert len(handle._placed.stager.backward._passes) == 0
    # torch leaves the nodes that it did not come to in the thread's queue, and so the graph, until the next backward.
    torch.ones(1, requires_grad=True).sum().backward()
    del model, handle, x, _
    gc.collect()
    lifetime.drain()
    assert live_buffers() == alive
