"""Views of weights in places where nobody expects them: right, or an error before anything is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Tower, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn import functional  # noqa: E402

import dlpoffload as dlpo  # noqa: E402
from dlpoffload.driver.cpu import CpuDriver  # noqa: E402
from dlpoffload.errors import AliasError, OffloadError, PlanError  # noqa: E402
from dlpoffload.planning import CostModel, all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

WIDTH = 32
POLICIES = {"staged": all_staged, "mapped": all_mapped}
policies = pytest.mark.parametrize("policy", POLICIES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(functional.linear(x, self.w))


class Blocks(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module] = Block, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def pair(device: str, policy: str = "staged", kind: Callable[[], nn.Module] = Block) -> Any:
    torch.manual_seed(2)
    module = Blocks(kind).requires_grad_(False)
    reference = copy.deepcopy(module).to(device)
    units = {"units": ["layers.*"]} if policy == "staged" else {}
    return module, reference, offload_(module, "1MiB", device=device, policy=POLICIES[policy], **units)


def vector(seed: int, device: str) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


def check(module: nn.Module, reference: nn.Module, device: str) -> None:
    with torch.no_grad():
        for seed in range(3):
            assert same(module(vector(seed, device)), reference(vector(seed, device)))


# --------------------------------------------------------------------------------- the same bytes, seen otherwise


@policies
@pytest.mark.parametrize("then", ["run", "restore", "copy", "refresh"])
def test_data_that_is_the_same_bytes_in_other_strides(device: str, policy: str, then: str) -> None:
    module, reference, handle = pair(device, policy)
    check(module, reference, device)
    for model in (module, reference):
        weight = model.layers[2].w
        weight.data = weight.data.t()
    if then == "restore":
        handle.restore_()
        module.to(device)
    elif then == "copy":
        module = copy.deepcopy(module)
    elif then == "refresh":
        handle.refresh_()
    if (policy, then) == ("staged", "run"):  # kernels choose other code for other strides: other bits
        with torch.no_grad(), pytest.raises(AliasError, match=r"strides .*refresh_\(\)"):
            module(vector(0, device))
        handle.refresh_()
    check(module, reference, device)
    if then == "run":
        handle.restore_()
        check(module.to(device), reference, device)


IN_PLACE = {
    "t_": lambda w: w.t_(),
    "as_strided_": lambda w: w.as_strided_((WIDTH, WIDTH), (1, WIDTH)),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
    "set_": lambda w: w.set_(torch.ones(WIDTH, WIDTH, device=w.device).t()),
    "resize_": lambda w: w.resize_(2, WIDTH),
}


class Acting(Block):
    """Does something to its own weight in its forward."""

    act: Callable[[Tensor], object] = staticmethod(lambda w: None)

    def forward(self, x: Tensor) -> Any:
        self.act(self.w)
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_tensor_that_is_another_one_in_place(device: str, name: str, where: str, mode: Any) -> None:
    # What is looked at in every call is the address: torch must count these as writes.
    module, reference, handle = pair(device, kind=Acting)
    check(module, reference, device)
    layer = module.layers[2]
    with mode():
        if where == "outside":
            IN_PLACE[name](layer.w)
        else:
            layer.act = IN_PLACE[name]
        with pytest.raises(AliasError, match=r'"layers.2.w" was offloaded (with strides|as float32)'):
            module(vector(0, device))
    handle.restore_()


class Normalising(Block):
    """Sets its weight's data anew in its own forward, as layers on a sphere do."""

    def forward(self, x: Tensor) -> Any:
        self.w.data = functional.normalize(self.w.data * 0.5, dim=1)
        return super().forward(x)


def test_data_computed_of_itself_inside_of_a_forward(device: str) -> None:
    module, reference, handle = pair(device, kind=Normalising)
    check(module, reference, device)
    assert all(same(module.state_dict()[name], t) for name, t in reference.state_dict().items())
    assert handle.report(link=False).adopted == tuple(f"layers.{i}.w" for i in range(5))


def _swap(module: nn.Module, first: int, second: int) -> None:
    one, other = module.layers[first].w, module.layers[second].w
    one.data, other.data = other.data, one.data


def _tie(module: nn.Module, first: int, second: int) -> None:
    module.layers[first].w.data = module.layers[second].w.data


@policies
@pytest.mark.parametrize("give", [_swap, _tie])
@pytest.mark.parametrize("at", [(1, 3), (3, 1)])
def test_data_of_another_offloaded_tensor(
    at: tuple[int, int], give: Callable[[nn.Module, int, int], None], policy: str, device: str
) -> None:
    module, reference, handle = pair(device, policy)
    check(module, reference, device)
    for each in (module, reference):
        give(each, *at)
    if policy == "staged":
        with torch.no_grad(), pytest.raises(AliasError, match=r"refresh_\(\)"):
            module(vector(0, device))
        handle.refresh_()
    check(module, reference, device)
    with torch.no_grad():
        for each in (module, reference):
            each.layers[at[0]].w.mul_(0.5)
    check(module, reference, device)
    handle.refresh_()
    check(module, reference, device)
    handle.restore_()
    check(module.cpu(), reference.cpu(), "cpu")


class Turning(nn.Module):
    """Exchanges the data of two weights of its own in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        self.a.data, self.b.data = self.b.data, self.a.data
        return torch.tanh(functional.linear(functional.linear(x, self.a), self.b))


def test_data_exchanged_inside_of_a_forward(device: str) -> None:
    module, _reference, _handle = pair(device, kind=Turning)
    with torch.no_grad(), pytest.raises(AliasError, match="was given the bytes"):
        module(vector(0, device))


def test_data_of_another_shape_or_dtype_is_refused(device: str) -> None:
    for change in (lambda t: t[:8], lambda t: t.view(torch.int32)):
        module, _reference, _handle = pair(device)
        module.layers[2].w.data = change(module.layers[2].w.data)
        with torch.no_grad(), pytest.raises(AliasError, match=r'"layers\.2\.w" was offloaded as'):
            module(vector(0, device))


def test_turned_inside_of_a_forward(device: str) -> None:
    class Turning(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.w.data = self.w.data.t()
            return y

    module, _reference, _handle = pair(device, kind=Turning)
    with torch.no_grad(), pytest.raises(AliasError, match="strides"):
        module(vector(0, device))


@policies
def test_an_update_from_the_tensor_itself(device: str, policy: str) -> None:
    module, reference, handle = pair(device, policy)
    with torch.no_grad():
        reference.layers[2].w.copy_(reference.layers[2].w.t().clone())
    handle.update("layers.2.w", module.layers[2].w.t())
    check(module, reference, device)


def test_statistics_of_a_module_of_ones_own(device: str) -> None:
    """What F.batch_norm writes is counted by no version."""

    class Norm(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.register_buffer("variance", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return functional.batch_norm(super().forward(x), self.mean, self.variance, training=self.training)

    module, reference, handle = pair(device, kind=Norm)
    for mode in (True, True, False, True, False):
        module.train(mode)
        reference.train(mode)
        check(module, reference, device)
        for (name, found), wanted in zip(module.named_buffers(), reference.buffers(), strict=True):
            assert same(found, wanted), name
    backs = handle.report(link=False).stats.write_backs
    assert backs == 3 * 3 * 5 * 2
    check(module, reference, device)
    assert handle.report(link=False).stats.write_backs == backs  # not in evaluation


# ------------------------------------------------------------------------------------------- views that escape


class Caching(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "turned"):
            self.turned = self.w.t()
        return torch.tanh(x @ self.turned)


KEPT: list[Any] = []


class Listing(Block):
    def forward(self, x: Tensor) -> Tensor:
        KEPT.append(self.w[0])
        return super().forward(x)


class Boxing(Block):
    def forward(self, x: Tensor) -> Tensor:
        KEPT.append(type("Box", (), {"rows": self.w[:2]})())
        return super().forward(x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turned: Tensor) -> Tensor:
        ctx.turned = turned
        return x @ turned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.turned.t(), None


class OnContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(Product.apply(x, self.w.t()))


@pytest.mark.parametrize("kind", [Caching, Listing, Boxing, OnContext], ids=lambda kind: kind.__name__)
def test_a_view_that_outlives_its_unit_is_an_error(device: str, kind: type[nn.Module]) -> None:
    module, reference, handle = pair(device, kind=kind)
    x = vector(0, device).requires_grad_()
    try:
        with pytest.raises(AliasError, match=r'keeps a view of the weights of "layers\.0"'):
            module(x)
    finally:
        KEPT.clear()
    handle.restore_()
    module.layers[0].__dict__.pop("turned", None)
    check(module.to(device), reference, device)
    KEPT.clear()


def test_what_is_cloned_may_be_kept(device: str) -> None:
    class Cloning(Block):
        def forward(self, x: Tensor) -> Tensor:
            KEPT.append(self.w[0].clone())
            KEPT.append(self.w.sum())
            return super().forward(x)

    module, reference, handle = pair(device, kind=Cloning)
    check(module, reference, device)
    KEPT.clear()
    assert handle.report(link=False).stats.mapped_runs == 0


def test_garbage_in_cycles_is_no_escape(device: str) -> None:
    class Cyclic(Block):
        def forward(self, x: Tensor) -> Tensor:
            cycle: list[Any] = [self.w.t()]
            cycle.append(cycle)
            return super().forward(x)

    module, reference, _handle = pair(device, kind=Cyclic)
    check(module, reference, device)


# ------------------------------------------------------------------------------------- classes and transforms


class Doubling(nn.Parameter):
    """A Parameter with a say in what is done with it, as those of quantised formats are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if func is functional.linear else result


@policies
def test_a_class_with_a_say_of_its_own(device: str, policy: str) -> None:
    torch.manual_seed(0)
    module = Blocks()
    for layer in module.layers:
        layer.w = Doubling(layer.w.detach().clone(), requires_grad=False)
    reference = [layer.w.detach().clone().to(device) for layer in module.layers]
    units = {"units": ["layers.*"]} if policy == "staged" else {}
    offload_(module, "1MiB", device=device, policy=POLICIES[policy], **units)
    x = y = vector(0, device)
    for weight in reference:
        y = torch.tanh(functional.linear(y, weight) * 2)
    with torch.no_grad():
        assert same(module(x), y)


def test_transforms_of_torch_func_are_refused_before_anything_moved(device: str) -> None:
    module, reference, handle = pair(device)
    x = vector(0, device)
    for call in (
        lambda: torch.func.grad(lambda v: module(v).sum())(x),
        lambda: torch.func.vmap(module)(x),
        lambda: torch.func.jvp(module, (x,), (x,)),
    ):
        with pytest.raises(OffloadError, match=r"torch\.func"):
            call()
        check(module, reference, device)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    handle.restore_()


def _on_fake_tensors(module: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return module(torch.empty(3, WIDTH, device=x.device))


TRACERS: list[Callable[[nn.Module, Tensor], Any]] = [
    lambda module, x: torch.jit.trace(module, (x,)),
    lambda module, x: torch.jit.script(module),
    lambda module, x: make_fx(module)(x),
    _on_fake_tensors,
]


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is on its way out
@pytest.mark.parametrize("tracer", TRACERS, ids=["trace", "script", "make_fx", "fake"])
def test_what_would_record_a_slot_is_refused_before_anything_moved(tracer: Any, device: str) -> None:
    module, reference, handle = pair(device)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(OffloadError, match="restore_"):
            tracer(module, vector(0, device))
        check(module, reference, device)
    report = handle.report(link=False)
    assert report.stats.mapped_runs == 0
    assert report.adopted == report.replaced == ()
    handle.restore_()
    check(module, reference.cpu(), "cpu")


def test_a_mapped_module_is_exported(device: str) -> None:
    module, reference, _handle = pair(device, "mapped")
    exported = torch.export.export(module, (vector(0, device),)).module()
    check(exported, reference, device)
    check(module, reference, device)


class Learning(Block):
    """Takes a gradient by torch.func in its own forward, as layers that learn at test time do."""

    def forward(self, x: Tensor) -> Any:
        return x - torch.func.grad(lambda v: functional.linear(v, self.w).square().sum())(x)


@policies
def test_torch_func_inside_of_a_unit(policy: str, device: str) -> None:
    module, reference, _handle = pair(device, policy, Learning)
    check(module, reference, device)
    if policy == "staged":
        with pytest.raises(OffloadError, match=r"saved tensor hooks.*no_grad"):
            module(vector(0, device))
    else:
        assert same(module(vector(0, device)), reference(vector(0, device)))
    check(module, reference, device)


def test_where_hooks_on_saved_tensors_are_disabled(device: str) -> None:
    module, reference, _handle = pair(device)
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        with pytest.raises(OffloadError, match=r"not now.*no_grad"):
            module(vector(0, device))
        check(module, reference, device)
    assert same(module(vector(0, device)), reference(vector(0, device)))


# ------------------------------------------------------------------------------------------ refused, and said


def test_a_parameter_of_two_offloaded_modules(device: str) -> None:
    module, reference, _handle = pair(device)
    other = Blocks(depth=2)
    other.layers[0].w = module.layers[1].w
    with pytest.raises(OffloadError, match=r'"layers\.0\.w" is a tensor of another module'):
        offload_(other, "1MiB", device=device, policy=all_mapped)
    assert OffloadHandle.of(other) is None
    check(module, reference, device)


def test_another_memory_format_is_refused(device: str) -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    offload_(module, 0, device=device, policy=all_mapped)
    with pytest.raises(OffloadError, match="memory format"):
        module.to(memory_format=torch.channels_last)
    turned = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    offload_(turned, 0, device=device, policy=all_mapped)
    turned.to(memory_format=torch.channels_last)  # what it has already


@policies
def test_costs_without_an_effect(device: str, policy: str) -> None:
    with pytest.raises(PlanError, match="cost has no effect"):
        offload_(Tower(3), "1MiB", device=device, policy=POLICIES[policy], cost=CostModel())


def test_a_report_where_the_link_cannot_be_measured(cpu_driver: Callable[..., CpuDriver]) -> None:
    cpu_driver(host_limit_nbytes=1024)
    module = Blocks()
    handle = offload_(module, "1MiB", device="cpu", pageable="if_refused", policy=all_staged, units=["layers.*"])
    with torch.no_grad():
        module(vector(0, "cpu"))
    from dlpoffload.torch import report as links_module

    links_module._links.clear()
    report = handle.report()
    assert report.link is None
    assert "not measured" in str(report)
    assert report.pageable_nbytes > 0


def test_units_over_pageable_memory_are_never_mapped(device: str) -> None:
    specs = {name: dlpo.TensorSpec((64,), "float32") for name in "ab"}
    with (
        dlpo.HostStore.allocate(specs, units={n: (n,) for n in "ab"}, device=device, pinned=False) as store,
        dlpo.SlotRing({n: store.slab(n) for n in "ab"}, slots=1, device=device) as ring,
    ):
        assert ring.when_full == "error"


def test_a_negated_tensor_is_no_view() -> None:
    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert imaginary.is_neg()
    with pytest.raises(AliasError, match="resolve_neg"):
        dlpo.view_of(imaginary)


def test_tensors_that_share_bytes_off_each_others_alignment(device: str) -> None:
    module = nn.Module()
    flat = torch.arange(64, dtype=torch.uint8)
    module.register_buffer("bytes", flat[1:33])
    module.register_buffer("floats", flat[4:20].view(torch.float32))
    wanted = {name: tensor.clone() for name, tensor in module.named_buffers()}
    handle = offload_(module, 0, device=device, policy=all_mapped)
    assert all(same(tensor.cpu(), wanted[name]) for name, tensor in module.named_buffers())
    handle.restore_()
    assert all(same(tensor, wanted[name]) for name, tensor in module.named_buffers())
