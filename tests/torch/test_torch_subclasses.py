"""Tensors that wrap others: what is inside of them is offloaded, and they compute what they did."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import same  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.errors import GradientError, OffloadError, SpecError  # noqa: E402
from dlpoffload.planning import Placement, all_mapped, all_staged, pattern_policy  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

aten = torch.ops.aten
POLICIES = {"staged": all_staged, "mapped": all_mapped, "device": pattern_policy({"*": Placement.DEVICE})}


class Int8Tensor(torch.Tensor):
    """int8 elements and a float scale for each row, or each column once transposed; it poses as a float tensor."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, device: Any = None) -> Int8Tensor:
        made: Int8Tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            codes.shape,
            strides=codes.stride(),
            dtype=scale.dtype,
            device=codes.device if device is None else device,
        )
        made.codes, made.scale = codes, scale
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def of(cls, weight: Tensor) -> Int8Tensor:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Int8Tensor:
        return cls(inner["codes"], inner["scale"])

    def plain(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def mapped(self, call: Any) -> Int8Tensor:
        return type(self)(call(self.codes), call(self.scale))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.clone.default, aten.t.default):
            return args[0].mapped(lambda inner: func(inner, *args[1:], **kwargs))
        if func is aten.mul.Tensor:
            return cls(args[0].codes.clone(), args[0].scale * args[1])
        if func is aten._to_copy.default:
            # Not .to(): torch 2.11 does not part it into this operation below here.
            codes = func(args[0].codes, **{**kwargs, "dtype": None})
            return cls(codes, func(args[0].scale, **kwargs))
        if func is aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        if func in (aten.mm.default, aten.addmm.default):
            return func(*(arg.plain() if isinstance(arg, cls) else arg for arg in args), **kwargs)
        raise NotImplementedError(f"{func} on {cls.__name__}")


class Nested(Int8Tensor):
    """Its scale wraps others itself."""

    def plain(self) -> Tensor:
        scale = self.scale.plain()
        return self.codes.to(scale.dtype) * scale

    @classmethod
    def of(cls, weight: Tensor) -> Nested:
        inner = Int8Tensor.of(weight)
        return cls(inner.codes, Int8Tensor.of(inner.scale))


class Layer(nn.Module):
    def __init__(self, kind: type[Int8Tensor] = Int8Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        for linear in (self.a, self.b):
            linear.weight = nn.Parameter(kind.of(linear.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Stack(nn.Module):
    def __init__(self, depth: int = 5, kind: type[Int8Tensor] = Int8Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def to(module: nn.Module, device: str) -> nn.Module:
    """`module.to` of such parameters wants `torch.utils.swap_tensors`."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def pair(device: str, policy: str = "staged", kind: type[Int8Tensor] = Int8Tensor, **options: Any) -> Any:
    stack = Stack(kind=kind)
    reference = to(copy.deepcopy(stack), device)
    if policy != "mapped":
        options["units"] = ["layers.*"]
    return stack, reference, offload_(stack, "1MiB", device=device, policy=POLICIES[policy], **options)


def vector(seed: int, device: str) -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def check(stack: nn.Module, reference: nn.Module, device: str) -> None:
    with torch.no_grad():
        for seed in (0, 1):
            assert same(stack(vector(seed, device)), reference(vector(seed, device)))
    for layer, other in zip(stack.layers, reference.layers, strict=True):
        assert same(layer.a.weight.codes, other.a.weight.codes)
        found, wanted = layer.b.weight.scale, other.b.weight.scale
        assert same(found, wanted) if type(found) is type(wanted) is Tensor else found.shape == wanted.shape


# --------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("kind", [Int8Tensor, Nested])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_inside_is_offloaded(policy: str, kind: type[Int8Tensor], device: str) -> None:
    stack, reference, handle = pair(device, policy, kind)
    before = {name: id(inner) for name, inner in inside(stack).items()}
    check(stack, reference, device)
    assert {name: id(inner) for name, inner in inside(stack).items()} == before
    names = set(handle.plan.specs)
    assert "layers.3.a.weight.codes" in names
    assert ("layers.3.a.weight.scale.scale" if kind is Nested else "layers.3.a.weight.scale") in names
    assert "layers.3.a.weight" not in names
    assert str(stack.layers[3].a.weight.device) == device
    report = handle.report(link=False)
    assert report.replaced == report.adopted == ()
    assert (report.stats.copies > 0) == (policy == "staged")
    handle.restore_()
    check(to(stack, device), reference, device)
    assert all(type(inner) is Tensor for inner in inside(stack).values())


def inside(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, Int8Tensor):
            found[name + ".codes"] = parameter.codes
            inner = parameter.scale
            found[name + ".scale"] = inner.codes if isinstance(inner, Int8Tensor) else inner
    return found


def test_the_bytes_are_where_the_plan_says(device: str) -> None:
    stack, _, handle = pair(device)
    slot_pointers: list[int] = []
    weight = stack.layers[2].a.weight
    home = weight.codes.data_ptr()
    stack.layers[2].a.register_forward_hook(lambda *_: slot_pointers.append(weight.codes.data_ptr()))
    with torch.no_grad():
        stack(vector(0, device))
    assert weight.codes.data_ptr() == home
    slots = handle._placed.stager.slots
    assert any(slot.data_ptr() <= slot_pointers[0] < slot.data_ptr() + slot.nbytes for slot in slots)


@pytest.mark.parametrize("adversary", range(4))
@pytest.mark.parametrize("slots", [1, 2])
def test_adversarial_copies(slots: int, adversary: int, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    stack, reference, _handle = pair("cpu", slots=slots)
    for _ in range(3):
        check(stack, reference, "cpu")
        compare_gradients(stack, reference, "cpu")


# ------------------------------------------------------------------------------------------------- gradients


def compare_gradients(stack: nn.Module, reference: nn.Module, device: str, *, recompute: bool = False) -> None:
    results = []
    for module in (stack, reference):
        x = vector(2, device).requires_grad_()
        y = x
        for layer in module.layers:
            layer.a.bias.requires_grad_(False), layer.b.bias.requires_grad_(False)
            y = checkpoint(layer, y, use_reentrant=False) if recompute else layer(y)
        with torch.no_grad():
            module(vector(3, device))  # other units are in the slots now
        y.square().sum().backward()
        results.append(x.grad)
    assert same(*results)
    assert bool(results[0].any())


@pytest.mark.parametrize("kind", [Int8Tensor, Nested])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_gradients_through_them(slots: int, recompute: bool, kind: type[Int8Tensor], device: str) -> None:
    """Autograd saves the transposed weight, whose parts lie in a slot."""
    stack, reference, handle = pair(device, kind=kind, slots=slots)
    saved: list[str] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(type(t).__name__) or t, lambda t: t):
        reference(vector(0, device).requires_grad_())
    assert kind.__name__ in saved
    for _ in range(2):
        compare_gradients(stack, reference, device, recompute=recompute)
    assert handle.report(link=False).stats.copies > 5


class Viewable(Int8Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.view.default:
            return args[0].mapped(lambda inner: inner.view(inner.shape))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("kind", [Int8Tensor, Viewable])
@pytest.mark.parametrize("policy", ["staged", "mapped"])
def test_a_gradient_for_one_is_refused(policy: str, kind: type[Int8Tensor], device: str) -> None:
    """Before any other is accumulated, where the class has the view by which torch finds its node."""
    stack, _, _handle = pair(device, policy, kind)
    for parameter in stack.parameters():
        parameter.requires_grad_(False)
    stack.layers[3].a.weight.requires_grad_(True)
    lora = nn.Parameter(torch.ones(32, device=device))
    for call in (lambda: stack(vector(0, device) * lora), lambda: stack.layers[3](vector(0, device) * lora)):
        with pytest.raises(GradientError, match=r'"layers\.3\.a\.weight".*requires_grad_'):
            call().sum().backward()
    assert stack.layers[3].a.weight.grad is None
    assert lora.grad is None or kind is Int8Tensor


# ---------------------------------------------------------------------------------------------------- writes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", ["copy_", "codes", "data", "update", "parts", "load_state_dict"])
def test_written(way: str, policy: str, device: str) -> None:
    stack, reference, handle = pair(device, policy)
    check(stack, reference, device)
    for step in range(2):
        values = Int8Tensor.of(torch.randn(64, 32, generator=torch.Generator().manual_seed(step)))
        values = values.to(device)
        for module in (stack, reference):
            weight = module.layers[3].a.weight
            with torch.no_grad():
                if way == "codes":
                    weight.codes.copy_(values.codes)
                    weight.scale.copy_(values.scale)
                elif way == "data":
                    weight.codes.data[:] = values.codes
                    weight.scale.data.copy_(values.scale)
                elif way == "load_state_dict":
                    module.load_state_dict({"layers.3.a.weight": values}, strict=False)
                elif way == "copy_" or module is reference:
                    weight.copy_(values)
                elif way == "update":
                    handle.update("layers.3.a.weight", values)
                else:
                    handle.update("layers.3.a.weight.codes", values.codes)
                    handle.update("layers.3.a.weight.scale", values.scale)
        check(stack, reference, device)
    handle.changed("layers.3.a.weight")
    check(stack, reference, device)


def test_update_refuses_another_make(device: str) -> None:
    stack, reference, handle = pair(device)
    for wrong, words in (
        (torch.zeros(64, 32), "wraps the tensors codes, scale"),
        (Nested.of(torch.ones(64, 32)), "wraps the tensors codes, scale"),
        (Int8Tensor.of(torch.ones(64, 16)), "shape and dtype"),
    ):
        with pytest.raises(SpecError, match=words):
            handle.update("layers.3.a.weight", wrong)
    with pytest.raises(SpecError, match="no parameter"):
        handle.update("layers.3.a.weight.zero", torch.zeros(2))
    check(stack, reference, device)


def test_state_dict_inside_of_a_forward(device: str) -> None:
    stack, reference, _handle = pair(device)
    taken: list[dict[str, Any]] = []
    stack.layers[2].a.register_forward_hook(lambda *_: taken.append(stack.state_dict()) and None)
    with torch.no_grad():
        for seed in range(3):
            stack(vector(seed, device))
    for state in taken:
        for name, wanted in reference.state_dict().items():
            if isinstance(wanted, Int8Tensor):
                assert type(state[name]) is Int8Tensor
                assert same(state[name].codes, wanted.codes), name
                assert same(state[name].scale, wanted.scale), name


class Showing(Layer):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.a.weight.t(), self.b.weight


def test_outputs_of_their_make(device: str) -> None:
    module = nn.ModuleDict({"layers": nn.ModuleList(Showing() for _ in range(4))})
    reference = to(copy.deepcopy(module), device)
    handle = offload_(module, "1MiB", device=device, policy=all_staged, units=["layers.*"])
    with torch.no_grad():
        found = [layer(vector(0, device)) for layer in module["layers"]]
        wanted = [layer(vector(0, device)) for layer in reference["layers"]]
    for (_, transposed, own), (_, other, _unused), layer in zip(found, wanted, module["layers"], strict=True):
        assert same(transposed.codes, other.codes)
        assert transposed.codes.stride() == other.codes.stride()
        assert own is layer.b.weight
    assert handle.report(link=False).aliased_outputs == 4


# --------------------------------------------------------------------------------------------- the module's life


@pytest.mark.parametrize("policy", POLICIES)
def test_moved(policy: str, device: str) -> None:
    stack, reference, _handle = pair(device, policy)
    stack.to(device).float()
    check(stack, reference, device)
    for change in (nn.Module.half, lambda module: module.to("meta")):
        with pytest.raises(OffloadError, match="restore_"):
            change(stack)
    check(stack, reference, device)
    stack._apply(lambda tensor: tensor * 2)
    for layer in reference.layers:
        for linear in (layer.a, layer.b):
            linear.weight.scale.mul_(2)
            linear.bias.data.mul_(2)
    check(stack, reference, device)


@pytest.mark.parametrize("policy", POLICIES)
def test_copied(policy: str, device: str) -> None:
    stack, reference, handle = pair(device, policy)
    twin = copy.deepcopy(stack)
    other = OffloadHandle.of(twin)
    assert other.plan.placements == handle.plan.placements
    assert isinstance(twin.layers[3].a.weight, nn.Parameter)
    assert isinstance(twin.layers[3].a.weight, Int8Tensor)
    check(twin, reference, device)
    with torch.no_grad():
        twin.layers[3].a.weight.scale.zero_()
    check(stack, reference, device)
    handle.restore_()
    other.restore_()
    assert all(type(inner) is Tensor for inner in inside(twin).values())


def test_tied(device: str) -> None:
    stack = Stack()
    stack.layers[4].a.weight = stack.layers[1].a.weight
    shared = stack.layers[2].a.weight
    stack.layers[3].a.weight = nn.Parameter(Int8Tensor(shared.codes, shared.scale.clone()), requires_grad=False)
    reference = to(copy.deepcopy(stack), device)
    handle = offload_(stack, "1MiB", device=device, policy=all_staged, units=["layers.*"], slots=4)
    with torch.no_grad():
        for seed in range(2):
            assert same(stack(vector(seed, device)), reference(vector(seed, device)))
    twin = copy.deepcopy(stack)
    for module in (stack, twin):
        assert module.layers[4].a.weight is module.layers[1].a.weight
        codes, shared = module.layers[3].a.weight.codes, module.layers[2].a.weight.codes
        assert codes.data_ptr() == shared.data_ptr()
    assert "layers.3.a.weight.codes" not in handle.plan.specs
    assert {"layers.2.a.weight.scale", "layers.3.a.weight.scale"} <= set(handle.plan.specs)


def test_refreshed(device: str) -> None:
    alive = live_buffers()
    stack, reference, handle = pair(device)
    torch.manual_seed(1)
    weight = Int8Tensor.of(torch.randn(32, 64))
    for module in (stack, reference):
        module.layers[2].b.weight = nn.Parameter(copy.deepcopy(weight).to(device), requires_grad=False)
    check(stack, reference, device)
    assert handle.report(link=False).replaced == ("layers.2.b.weight.codes", "layers.2.b.weight.scale")
    handle.refresh_()
    check(stack, reference, device)
    assert handle.report(link=False).replaced == ()
    handle.restore_()
    assert stack.layers[0].a.weight.device.type == "cpu"
    check(to(stack, device), reference, device)
    lifetime.drain()
    assert live_buffers() == alive


def test_one_that_names_another_device_is_made_anew() -> None:
    """A wrapper's device is what it says, not where its parts are."""
    stack = Stack()
    reference = copy.deepcopy(stack)
    weight = stack.layers[2].a.weight
    labelled = Int8Tensor(weight.codes, weight.scale, device="meta")
    labelled._is_param = True
    stack.layers[2].a.weight = labelled
    assert str(stack.layers[2].a.weight.device) == "meta"
    handle = offload_(stack, "1MiB", device="cpu", policy=all_staged, units=["layers.*"])
    found = stack.layers[2].a.weight
    assert found is not labelled
    assert found.device.type == "cpu"
    assert isinstance(found, nn.Parameter)
    assert found.codes is labelled.codes
    check(stack, reference, "cpu")
    handle.refresh_()
    check(stack, reference, "cpu")
    handle.restore_()
    assert stack.layers[2].a.weight is labelled


# --------------------------------------------------------------------------------------------------- torchao


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config: str, policy: str, device: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao does not import")
    torch.manual_seed(0)
    plain = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(5))})

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain["layers"]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Chain().requires_grad_(False)
    quantization.quantize_(model, getattr(quantization, config)())
    assert type(model.layers[0][0].weight) not in (Tensor, nn.Parameter)
    reference = copy.deepcopy(model).to(device)
    options = {} if policy == "mapped" else {"units": ["layers.*"]}
    handle = offload_(model, "1MiB", device=device, policy=POLICIES[policy], **options)

    def compare() -> None:
        x = torch.randn(4, 64, device=device)
        with torch.no_grad():
            assert same(model(x), reference(x))

    for _ in range(3):
        compare()
    results = []
    x = torch.randn(4, 64, device=device)
    if config == "Int8WeightOnlyConfig":
        for module in (model, reference):
            leaf = x.clone().requires_grad_()
            module(leaf).square().sum().backward()
            results.append(leaf.grad)
        assert same(*results)
    with torch.no_grad():
        for module in (model, reference):
            module.layers[2][0].weight.copy_(module.layers[3][0].weight)
    compare()
    model.to(device)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert same(twin(x), reference(x))
    assert handle.plan.nbytes(Placement.DEVICE) == 0 or policy == "device"
    state = model.state_dict()
    for name, tensor in reference.state_dict().items():
        if hasattr(tensor, "qdata"):
            assert same(state[name].qdata, tensor.qdata), name
    handle.restore_()
    model.to(device)
    compare()
