"""One module over several devices, with a budget each: the bits of the resident model over the same devices."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from models import CASES, Case, Decoder, Tower, assert_same, flat_outputs, run, same, tensors_of  # noqa: E402
from split_models import (  # noqa: E402
    MAPS,
    SecondCpu,
    assert_streamed,
    offload_split,
    resident,
    torch_device_of,
)
from torch import Tensor, nn  # noqa: E402

from dlpoffload import driver as drivers  # noqa: E402
from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.errors import (  # noqa: E402
    ClosedError,
    CudaError,
    DeviceMemoryError,
    GradientError,
    HostMemoryError,
    OffloadError,
    PlanError,
    SlotError,
    SpecError,
)
from dlpoffload.planning import Placement, all_mapped, all_staged, pattern_policy  # noqa: E402
from dlpoffload.torch import (  # noqa: E402
    OffloadHandle,
    SplitHandle,
    borders,
    offload_,
)
from dlpoffload.torch import placed as placed_module  # noqa: E402
from dlpoffload.torch.borders import BorderForward, moved  # noqa: E402
from dlpoffload.torch.device_map import DeviceMap, Parts  # noqa: E402
from dlpoffload.torch.gate import Gate  # noqa: E402
from dlpoffload.transfer import SlotRing  # noqa: E402

Pair = tuple[str, str]


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    text: str


class Named(NamedTuple):
    x: Tensor
    nothing: None


SPLIT = [case for case in CASES if case.name in MAPS]


def mapped(pair: Pair, name: str) -> dict[str, str]:
    return {path: pair[index] for path, index in MAPS[name].items()}


HALF = {"": 0, "layers.4": 1, "layers.5": 1, "layers.6": 1, "layers.7": 1}
BUDGETS = ("52KiB", "36KiB")


def half(pair: Pair = ("cpu", "cpu:1")) -> dict[str, str]:
    return {path: pair[index] for path, index in HALF.items()}


def tower(pair: Pair = ("cpu", "cpu:1"), **options: Any) -> tuple[nn.Module, nn.Module, SplitHandle]:
    """Eight layers of 16.4 KiB, four on each device; on the first one fits beside the ring, on the second none."""
    torch.manual_seed(5)
    module = Tower(8, 32)
    reference = resident(module, half(pair))
    options = {"units": ["layers.*"], **options}
    budgets = dict(zip(pair, BUDGETS, strict=True))
    return module, reference, offload_(module, budgets, device_map=half(pair), **options)


def vector(seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(torch_device_of(device))


def check(module: nn.Module, reference: nn.Module, device: str = "cpu") -> None:
    with torch.no_grad():
        for seed in range(3):
            assert same(module(vector(seed, device)), reference(vector(seed, device)))


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that offloading puts on a module's tensors and modules, as far as one can see it from outside."""
    modules = {
        path: (
            sorted(inside.__dict__),
            inside.__dict__.get("forward"),
            len(inside._state_dict_hooks),
            len(inside._forward_pre_hooks),
        )
        for path, inside in module.named_modules()
    }
    tensors = {
        name: (id(tensor), type(tensor), tensor.device, tensor.requires_grad, len(tensor._backward_hooks or ()))
        for name, tensor in tensors_of(module).items()
    }
    return {"modules": modules, "tensors": tensors}


def pinned_nbytes() -> int:
    gc.collect()
    lifetime.drain()
    return sum(nbytes for kind, nbytes in live_buffers() if kind == "pinned")


# ------------------------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_same_bits_as_resident_over_the_same_devices(case: Case, pair: Pair) -> None:
    module = case.model()
    before, values = state_of(module), {name: tensor.clone() for name, tensor in tensors_of(module).items()}
    device_map = mapped(pair, case.name)
    reference = resident(module, device_map)
    handle = offload_split(module, device_map)
    assert handle.device == device_map[""]
    assert set(handle.devices) == set(pair)
    with torch.no_grad():
        for seed in range(3):
            inputs = case.inputs(seed, str(torch_device_of(handle.device)))
            assert_same(run(module, inputs), run(reference, inputs), f"seed {seed}")
    assert_streamed(handle)
    where = {name: str(torch_device_of(device)) for device in pair for name in handle.plan[device].specs}
    assert all(str(tensor.device) == where.get(name, str(tensor.device)) for name, tensor in tensors_of(module).items())
    written = {name for name, tensor in tensors_of(module).items() if not same(tensor, values[name])}
    assert written <= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    handle.restore_()
    assert state_of(module) == before
    assert all(same(tensor, values[n]) for n, tensor in tensors_of(module).items() if n not in written)


def _leaf(leaves: list[Tensor], _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    leaves.append(output.detach().requires_grad_())
    return leaves[-1]


@pytest.mark.parametrize("case", [case for case in SPLIT if case.name != "odd_tensors"], ids=lambda case: case.name)
def test_gradients_cross_the_borders(case: Case, pair: Pair) -> None:
    module = case.model().requires_grad_(False)
    device_map = mapped(pair, case.name)
    reference = resident(module, device_map)
    handle = offload_split(module, device_map)
    gradients = []
    for model in (module, reference):
        args, kwargs = case.inputs(3, str(torch_device_of(handle.device)))
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        leaves = [value.requires_grad_() for value in inputs if value.is_floating_point()]
        if not leaves:  # tokens: from what they are looked up as on
            first = next(inside for inside in model.modules() if isinstance(inside, nn.Embedding))
            first.register_forward_hook(functools.partial(_leaf, leaves))
        # cuDNN's recurrent kernels go backward in training mode only
        native = torch.backends.cudnn.flags(enabled=False, deterministic=True)
        with native if case.name == "recurrent" else contextlib.nullcontext():
            outputs = flat_outputs(model(*args, **kwargs))
            torch.manual_seed(0)
            device = outputs[0].device
            total = sum(
                (out.to(device) * torch.randn(out.shape).to(device)).sum() for out in outputs if out.requires_grad
            )
            total.backward()
        gradients.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert_same(*gradients)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert_streamed(handle)


# ------------------------------------------------------------------------------------------- what is done


def test_each_device_keeps_to_its_own_budget(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    check(module, reference, pair[0])
    assert_streamed(handle)
    first, second = (handle.plan[device] for device in pair)
    assert list(handle.plan) == list(pair)
    assert [plan.device_budget for plan in (first, second)] == [52 << 10, 36 << 10]
    assert {name.split(".")[1] for name in first.specs} == set("0123")
    assert {name.split(".")[1] for name in second.specs} == set("4567")
    assert [unit.name for unit in first.units] == [f"layers.{i}" for i in range(4)]
    assert first.slots == second.slots == 2
    assert (len(first.resident_units), len(second.resident_units)) == (1, 0)
    text = str(handle.plan)
    assert text.index(pair[0]) < text.index(pair[1])
    assert str(handle.report(link=False)).count("runs on") == 2
    assert pair[0] in repr(handle)
    assert pair[1] in repr(handle)


def test_an_output_comes_back_to_the_first_input(pair: Pair) -> None:
    module, _, handle = tower(pair)
    for device in pair:
        x = vector(0, device)
        out = module(x)
        assert out.device == x.device
    assert handle.device == pair[0]


def test_one_device_alone(device: str) -> None:
    """A map of one device is what offload_ makes of it: the same plan, the same bits."""
    torch.manual_seed(5)
    module = Tower(6, 32)
    reference, twin = copy.deepcopy(module).to(device), copy.deepcopy(module)
    before = state_of(module)
    handle = offload_(module, {device: "60KiB"}, device_map={"": device})
    assert handle.plan[device] == offload_(twin, "60KiB", device=device).plan
    check(module, reference, device)
    assert_streamed(handle)
    assert SplitHandle.of(module.layers[2].a) is handle
    assert OffloadHandle.of(module) is None
    handle.sleep()
    handle.wake()
    clone = copy.deepcopy(module)
    for model in (module, clone):
        check(model, reference, device)
    handle.restore_()
    assert state_of(module) == before


@pytest.mark.parametrize("policy", [all_staged, all_mapped], ids=lambda policy: policy.__name__)
def test_any_policy(policy: Any, pair: Pair) -> None:
    """All staged, so that what the whole itself has is staged, too: around parts on both devices."""
    torch.manual_seed(1)
    module = Decoder(tied=False)
    device_map = mapped(pair, "decoder")
    reference = resident(module, device_map)
    # three: the position is leased while norm's weight and bias are, each a unit of its own
    slots = {"slots": 3} if policy is all_staged else {}
    handle = offload_split(module, device_map, dict.fromkeys(pair, 0), policy=policy, **slots)
    assert any("position" in unit.tensors for unit in handle.plan[pair[0]].streamed_units) == (policy is all_staged)
    for seed in range(3):
        tokens = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(seed))
        tokens = tokens.to(torch_device_of(pair[0]))
        with torch.no_grad():
            assert same(module(tokens), reference(tokens))
            module.position.mul_(1.5)
            reference.position.mul_(1.5)
            assert same(module.state_dict()["position"], reference.position)
    if policy is all_staged:
        assert_streamed(handle)
    assert all(handle.plan[device].nbytes(Placement.DEVICE) == 0 for device in pair)


@pytest.mark.parametrize("seed", range(4))
def test_under_adversarial_schedules(
    seed: int, cpu_driver: Callable[..., Any], two_cpus: Callable[..., SecondCpu]
) -> None:
    cpu_driver(adversary=seed)
    two_cpus(adversary=seed + 100)
    module, reference, handle = tower()
    for order in (range(8), [5, 0, 7, 1], [2, 2, 6, 6, 4, 0], range(7, -1, -1)):
        assert same(module(vector(seed), order), reference(vector(seed), order))
    check(module, reference)
    assert all(report.stats.copies > 0 for report in handle.report(link=False).values())


def test_writes_and_reads_as_on_a_resident_model(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    check(module, reference, pair[0])
    with torch.no_grad():
        for index, (name, parameter) in enumerate(reference.named_parameters()):
            parameter.mul_(1.25)
            if index % 4 == 0:
                handle.update(name, parameter)
            elif index % 4 == 1:
                module.get_parameter(name).mul_(1.25)
            elif index % 4 == 2:
                module.get_parameter(name).data *= 1.25
    left = {name: value for index, (name, value) in enumerate(reference.state_dict().items()) if index % 4 == 3}
    module.load_state_dict(left, strict=False)
    check(module, reference, pair[0])
    inside: list[dict[str, Tensor]] = []
    hook = module.layers[4].a.register_forward_hook(
        lambda *_: inside.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    )
    check(module, reference, pair[0])
    hook.remove()
    for state in (*inside, module.state_dict()):
        assert all(same(state[name], value) for name, value in reference.state_dict().items())
    module.float()
    with pytest.raises(OffloadError, match=r"offloaded.*float16"):
        module.half()
    if pair[0] != "cpu":
        with pytest.raises(OffloadError, match="offloaded"):
            module.to(pair[0])
    with pytest.raises(SpecError, match=r'"layers.9.a.weight" among the 32'):
        handle.update("layers.9.a.weight", vector(0))
    with pytest.raises(SpecError, match="shape and dtype"):
        handle.update("layers.4.a.weight", vector(0))
    check(module, reference, pair[0])


def test_a_function_over_all_tensors_is_one(pair: Pair) -> None:
    """`Module._apply` of what is above the parts writes through to every device, each tensor once."""
    module, reference, _ = tower(pair)
    calls = []

    def scaled(tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return tensor * 2

    module._apply(scaled)
    reference._apply(lambda tensor: tensor * 2)
    assert sum(map(bool, calls)) == 32
    check(module, reference, pair[0])


def test_a_function_that_one_device_refuses_changes_nothing(pair: Pair) -> None:
    module = Tower(4, 32)
    module.layers[3].double()
    handle = offload_split(module, {"": pair[0], "layers.3": pair[1]}, units=["layers.*"])
    values = {name: tensor.clone() for name, tensor in tensors_of(module).items()}
    with pytest.raises(OffloadError, match=rf"layers.3.*float64 for {pair[1]}"):
        module._apply(lambda tensor: tensor.float() if tensor.dtype == torch.float64 else tensor * 2)
    assert all(same(tensor, values[name]) for name, tensor in tensors_of(module).items())
    handle.restore_()


def test_a_deep_copy_is_another_on_the_same_devices(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    module.layers[4].tag = [1]
    clone = copy.deepcopy(module)
    other = SplitHandle.of(clone.layers[4].b)
    assert other is not None
    assert other is not handle
    assert other.plan == handle.plan
    assert clone.layers[4].tag == [1]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    check(clone, reference, pair[0])
    assert_streamed(other)
    handle.restore_()
    check(clone, reference, pair[0])
    other.restore_()


def test_backward_goes_to_adapters_and_no_further(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    x, y = vector(1, pair[0]).requires_grad_(), vector(1, pair[0]).requires_grad_()
    with pytest.raises(GradientError, match="offloaded"):
        module(x).sum().backward()
    assert x.grad is None
    gain = torch.ones((), device=torch_device_of(pair[1]), requires_grad=True)
    hook = module.layers[7].register_forward_hook(lambda _, __, output: output * gain)
    with pytest.raises(GradientError):
        module(x).sum().backward()
    hook.remove()
    assert gain.grad is None  # refused before anything has accumulated
    module.requires_grad_(False)
    reference.requires_grad_(False)
    for _ in range(2):
        found, wanted = module(x), reference(y)
        found.square().sum().backward(retain_graph=True)
        wanted.square().sum().backward(retain_graph=True)
        found.sum().backward()
        wanted.sum().backward()
    assert x.grad is not None
    assert same(x.grad, y.grad)
    assert_streamed(handle)


def test_compiled(pair: Pair) -> None:
    torch._dynamo.reset()
    module, reference, handle = tower(pair)
    wanted = torch.compile(reference, backend="aot_eager")
    found = torch.compile(module, backend="aot_eager")
    check(found, wanted, pair[0])
    assert_streamed(handle)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_generates_the_same_tokens(pair: Pair) -> None:
    pytest.importorskip("transformers", minversion="4.56")
    from test_torch_huggingface import GENERATIONS, generated, made, prompts

    model = made("llama")
    # as accelerate writes it: every module named, and no default
    device_map = {"model.embed_tokens": pair[0], "model.rotary_emb": pair[0], "model.norm": pair[1], "lm_head": pair[1]}
    device_map |= {f"model.layers.{i}": pair[i >= 3] for i in range(8)}
    reference = resident(model, {**device_map, "": pair[0]})
    handle = offload_split(model, device_map)
    inputs = prompts(str(torch_device_of(pair[0])))
    for name in ("greedy", "sampled", "beams", "without a cache"):
        outputs = []
        for each in (model, reference):
            torch.manual_seed(3)
            outputs.append(generated(each, inputs, 12, **GENERATIONS[name]))
        assert_same(*outputs, name)
    with torch.no_grad():
        found, wanted = model(**inputs), reference(**inputs)
    assert same(found.logits, wanted.logits)
    assert found.logits.device == inputs["input_ids"].device
    assert type(found) is type(wanted)
    assert_streamed(handle)


def test_several_threads_at_once(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    with torch.no_grad():
        wanted = [reference(vector(seed, pair[0])) for seed in range(4)]
    wrong: list[object] = []

    def calls(seed: int) -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    if not same(module(vector(seed, pair[0])), wanted[seed]):
                        wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert all(report.stats.copies > 0 for report in handle.report(link=False).values())


def test_patterns_may_match_on_one_device_only(two_cpus: object) -> None:
    torch.manual_seed(1)
    module = Decoder(tied=False)
    device_map = {"": "cpu", "layers.4": "cpu:1", "layers.5": "cpu:1", "layers.6": "cpu:1"}
    handle = offload_(
        module,
        {"cpu": "2MiB", "cpu:1": "1MiB"},
        device_map=device_map,
        units=["layers.*.attention", "layers.5.up", "head"],
        policy=pattern_policy(
            {"embed.*": "host_staged", "layers.6.norm.*": "device", "layers.*.down.*": "host_mapped"}
        ),
    )
    units = {device: [unit.name for unit in plan.units] for device, plan in handle.plan.items()}
    assert units["cpu"] == [*(f"layers.{i}.attention" for i in range(4)), "head", "embed.weight"]
    assert units["cpu:1"] == ["layers.4.attention", "layers.5.attention", "layers.5.up", "layers.6.attention"]
    first, second = handle.plan["cpu"].placements, handle.plan["cpu:1"].placements
    assert first["layers.0.down.bias"] is second["layers.4.down.bias"] is Placement.HOST_MAPPED
    assert second["layers.6.norm.bias"] is Placement.DEVICE
    handle.restore_()
    whole = {"a": ["layers.0.up.weight", "layers.1.up.weight"], "b": ["layers.4.up.weight"]}
    handle = offload_(module, {"cpu": "2MiB", "cpu:1": "1MiB"}, device_map=device_map, units=whole, policy=all_staged)
    assert [unit.name for unit in handle.plan["cpu"].units][:1] == ["a"]
    assert [unit.name for unit in handle.plan["cpu:1"].units][:1] == ["b"]
    handle.restore_()


# ------------------------------------------------------------------------------------------ maps and borders


@pytest.mark.parametrize(
    ("path", "device"),
    [
        ("", "cpu"),
        ("head", "cpu"),
        ("layers", "cpu"),
        ("layers.0.a", "cpu"),
        ("layers.10.a", "cpu:1"),
        ("layers.11", "cpu"),
        ("layers.11.b", "cpu:1"),
        ("layers.11.a", "cpu"),
        ("layers.1.a", "cpu"),
        ("layers.2.a.inner", "cpu:1"),
    ],
)
def test_the_nearest_module_that_is_named_counts(path: str, device: str, two_cpus: object) -> None:
    said = {"": "cpu", "layers.10": "cpu:1", "layers.1*.b": "cpu:1", "layers.2.a": "cpu:1"}
    assert DeviceMap(said).device_of(path) == device


def test_a_path_goes_before_a_pattern_and_the_first_pattern_before_the_next(two_cpus: object) -> None:
    found = DeviceMap({"layers.*": "cpu:1", "*.3": "cpu", "layers.4": "cpu", "**.b": "cpu"})
    assert [found.device_of(f"layers.{i}.a") for i in (2, 3, 4)] == ["cpu:1", "cpu:1", "cpu"]
    assert found.device_of("layers.2.b") == "cpu"
    assert found.device_of("head") is None


def test_where_the_borders_are(two_cpus: object) -> None:
    """Each module beside or below which another device begins, and none inside of what is wholly on one."""
    module = Decoder(tied=False, depth=4)
    parts = Parts(module, DeviceMap({"": "cpu", "layers.2": "cpu:1", "layers.3.up": "cpu:1"}))
    paths = {id(inside): path for path, inside in module.named_modules()}
    assert {paths[id(inside)]: device for inside, device in parts.borders()} == {
        "embed": "cpu",
        "layers.0": "cpu",
        "layers.1": "cpu",
        "layers.2": "cpu:1",
        "layers.3": "cpu",
        "layers.3.norm": "cpu",
        "layers.3.attention": "cpu",
        "layers.3.up": "cpu:1",
        "layers.3.down": "cpu",
        "norm": "cpu",
        "head": "cpu",
    }
    second = parts.roots["cpu:1"]
    assert [name for name, _ in second.named_parameters()] == parts.names["cpu:1"]
    assert second.get_submodule("layers.2") is module.layers[2]
    assert second.get_submodule("layers") is not module.layers
    assert parts.roots["cpu"]._parameters is module._parameters


def test_a_border_brings_positional_and_keyword_inputs_over() -> None:
    module = nn.Bilinear(3, 3, 2, device="meta")
    forward = BorderForward(module, torch.device("meta"))
    forward.install(Gate())
    assert module(torch.ones(1, 3), input2=torch.ones(1, 3)).is_meta
    forward.remove()
    assert "forward" not in module.__dict__


def test_a_call_is_a_step_of_every_ring_and_moves_outputs_back(
    two_cpus: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, _ = tower()
    steps: list[tuple[str, str]] = []
    values: list[Any] = []

    def noted(name: str) -> None:
        original = getattr(SlotRing, name)

        def call(self: SlotRing, **options: Any) -> None:
            steps.append((name, self.driver.device))
            original(self, **options)

        monkeypatch.setattr(SlotRing, name, call)

    noted("begin_step")
    noted("end_step")
    monkeypatch.setattr(borders, "moved", lambda value, device: values.append(value) or moved(value, device))
    x = vector(0)
    out = module(x)
    assert sorted(steps[:2]) == [("begin_step", "cpu"), ("begin_step", "cpu:1")]
    assert sorted(steps[2:]) == [("end_step", "cpu"), ("end_step", "cpu:1")]
    assert values[0][0][0] is x
    assert values[-1] is out
    assert len(values) == 1 + len(module.layers) + 1
    steps.clear()
    with pytest.raises(IndexError):
        module(x, [8])
    assert len(steps) == 4


def test_what_is_moved_is_moved_once_and_the_caller_keeps_his_own() -> None:
    transformers = pytest.importorskip("transformers")
    meta = torch.device("meta")
    x, there = torch.ones(3), torch.ones(2, device="meta")
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x, there))
    named = torch.max(torch.ones(2, 2), 0)
    value = {
        "x": [x, (x, there, 5)],
        "frozen": Frozen(x, "text"),
        "output": output,
        "named": Named(x, None),
        "max": named,
    }
    found = moved(value, meta)
    moved_x = found["x"][0]
    assert moved_x.is_meta
    assert found["x"][1][0] is found["frozen"].x is found["output"].last_hidden_state is found["named"].x is moved_x
    assert found["output"]["hidden_states"][0] is moved_x
    assert found["x"][1][1] is there
    assert found["x"][1][2] == 5
    assert [type(part) for part in found.values()] == [type(part) for part in value.values()]
    assert found["max"].indices.is_meta
    assert value["x"][0] is value["frozen"].x is output.last_hidden_state is output["last_hidden_state"] is x
    for same_device in (value, found):
        device = torch.device("cpu") if same_device is value else meta
        assert moved(same_device, device) is same_device


# ------------------------------------------------------------------------- memory that is given and taken back


def test_resize_sleep_and_wake(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    plans = handle.plan
    handle.resize_({pair[1]: "80KiB"})
    assert handle.plan[pair[0]] == plans[pair[0]]
    assert len(handle.plan[pair[1]].resident_units) == 4
    check(module, reference, pair[0])
    handle.resize_({pair[0]: "40KiB", pair[1]: "36KiB"})
    assert handle.plan[pair[1]] == plans[pair[1]]
    assert handle.plan[pair[0]].device_budget == 40 << 10
    check(module, reference, pair[0])
    before = handle.plan
    handle.sleep()
    handle.sleep()
    assert handle.asleep
    assert all(plan.device_nbytes == 0 for plan in handle.plan.values())
    for inside in (module, module.layers[0], module.layers[5]):
        with pytest.raises(OffloadError, match="sleeps"):
            inside(vector(0, pair[0]))
    for call in (handle.refresh_, lambda: copy.deepcopy(module)):
        with pytest.raises(OffloadError, match="wake"):
            call()
    handle.wake()
    handle.wake()
    assert handle.plan == before
    check(module, reference, pair[0])
    assert_streamed(handle)
    clone = SplitHandle.of(copy.deepcopy(module))
    assert clone is not None
    assert [plan.device_budget for plan in clone.plan.values()] == [40 << 10, 36 << 10]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"cpu": "60KiB", "cpu:1": "1KiB"}, r'on "cpu:1": .*smallest'),
        ({"cpu:1": "60KiB", "cpu": 10}, 'on "cpu": '),
        ("60KiB", "cpu, cpu:1"),
        ({}, "names no device"),
        ({"cpu:1": "many"}, "many"),
    ],
)
def test_a_budget_that_cannot_be_changes_nothing(budget: Any, said: str, two_cpus: object) -> None:
    module, reference, handle = tower()
    before = handle.plan
    with pytest.raises((PlanError, SpecError), match=said):
        handle.resize_(budget)
    assert handle.plan == before
    check(module, reference)


@pytest.mark.parametrize("act", ["resize", "sleep", "wake"])
@pytest.mark.parametrize("refuses", ["cpu", "cpu:1"])
def test_memory_that_one_device_refuses_changes_none(
    act: str, refuses: str, two_cpus: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, reference, handle = tower()
    if act == "wake":
        handle.sleep()
    before, used = handle.plan, pinned_nbytes()
    acts = {"resize": lambda: handle.resize_({"cpu": "44KiB", "cpu:1": "80KiB"}), "sleep": handle.sleep}
    acts["wake"] = handle.wake
    change = OffloadHandle._change

    def refusing(self: OffloadHandle, *args: Any, **kwargs: Any) -> None:
        if self.device == refuses:
            raise DeviceMemoryError("refused", nbytes=1)
        change(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OffloadHandle, "_change", refusing)
        with pytest.raises(DeviceMemoryError, match="refused"):
            acts[act]()
    assert handle.plan == before
    assert handle.asleep == (act == "wake")
    assert pinned_nbytes() == used
    if act == "wake":
        with pytest.raises(OffloadError, match="sleeps"):
            module(vector(0))
        handle.wake()
    check(module, reference)
    acts[act]()


def test_a_host_that_refuses_the_second_device_wakes_the_first(two_cpus: Callable[..., SecondCpu]) -> None:
    two_cpus(host_limit_nbytes=70_000)  # three layers are pinned, in whole pages, and a fourth does not fit
    torch.manual_seed(5)
    module = Tower(8, 32)
    reference = resident(module, half())
    handle = offload_(module, dict.fromkeys(half().values(), "52KiB"), device_map=half(), units=["layers.*"])
    before = handle.plan
    assert before["cpu:1"].resident_units
    with pytest.raises(HostMemoryError):
        handle.sleep()
    assert not handle.asleep
    assert handle.plan == before
    check(module, reference)
    assert_streamed(handle)


# ----------------------------------------------------------------------------------------- nothing half done


def failing(driver: Any, call: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a driver's next calls of one name fail after they did what they do."""
    real, left = getattr(driver, call), [times]

    def called(*arguments: Any) -> Any:
        result = real(*arguments)
        left[0] -= 1
        if left[0] >= 0:
            raise CudaError(call, 999, "CUDA_ERROR_UNKNOWN")
        return result

    monkeypatch.setattr(driver, call, called)


def test_work_that_failed_on_one_device_keeps_all_offloaded(
    two_cpus: Callable[..., SecondCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, reference, handle = tower()
    failing(drivers.open_driver("cpu:1"), "synchronize", 1, monkeypatch)
    with pytest.raises(CudaError, match="synchronize"):
        handle.restore_()
    assert not handle.restored
    check(module, reference)
    assert len(handle.report(link=False)) == 2
    handle.restore_()
    assert handle.restored


@pytest.mark.parametrize("call", ["restore_", "refresh_"])
def test_a_ring_that_is_not_destroyed_whole_restores_every_part(
    two_cpus: Callable[..., SecondCpu], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    module, reference, handle = tower()
    check(module, reference)
    for device in ("cpu", "cpu:1"):
        failing(drivers.open_driver(device), "event_destroy", 1 << 30, monkeypatch)
    with pytest.raises(CudaError, match="event_destroy"):
        getattr(handle, call)()
    assert handle.restored
    assert all(part.restored for part in handle._handles.values())
    assert not [inside for inside in module.modules() if "forward" in inside.__dict__ or "_apply" in inside.__dict__]
    check(module, reference)


def test_what_fails_on_the_way_is_undone_on_every_device(two_cpus: object, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    module = Tower(8, 32)
    before, values = state_of(module), {n: tensor.clone() for n, tensor in tensors_of(module).items()}
    left = 0

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise MemoryError("refused")
            return original(*args, **kwargs)

        return call

    for name in ("empty_bytes", "from_dlpack", "watch", "copy_span"):
        monkeypatch.setattr(placed_module, name, refusing(getattr(placed_module, name)))
    budgets = dict(zip(("cpu", "cpu:1"), BUDGETS, strict=True))
    used, refusals, handle = pinned_nbytes(), 0, None
    while handle is None:
        left = 7 * refusals
        try:
            handle = offload_(module, budgets, device_map=half(), units=["layers.*"])
        except MemoryError:
            refusals += 1
        if handle is None:
            assert state_of(module) == before
            assert all(same(tensor, values[name]) for name, tensor in tensors_of(module).items())
            assert pinned_nbytes() == used
    assert refusals > 10
    assert left >= 0
    left = 1 << 30
    check(module, copy.deepcopy(module))


def test_host_memory_that_the_second_device_refuses(two_cpus: Callable[..., SecondCpu]) -> None:
    two_cpus(host_limit_nbytes=30_000)
    module = Tower(8, 32)
    before, used = state_of(module), pinned_nbytes()
    with pytest.raises(HostMemoryError):
        offload_(module, {"cpu": "52KiB", "cpu:1": "52KiB"}, device_map=half(), units=["layers.*"])
    assert state_of(module) == before
    assert pinned_nbytes() == used


def refuse(module: nn.Module, said: str, budgets: Any, device_map: Any, **options: Any) -> None:
    before = state_of(module)
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(module).items()}
    with pytest.raises(PlanError, match=said):
        offload_(module, budgets, device_map=device_map, **options)
    assert state_of(module) == before
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(module).items()} == places


BOTH = {"cpu": "1MiB", "cpu:1": "1MiB"}


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"": "cpu", "layers.9": "cpu:1"}, '"layers.9", which matches none of the 20 modules'),
        ({"": "cpu", "layers.*.c": "cpu:1"}, r'"layers.\*.c", which matches none'),
        ({"": "cpu", "layers.3.a.weight": "cpu:1"}, 'a tensor.*name the module: "layers.3.a"'),
        ({"layers.0": "cpu", "layers.1": "cpu:1"}, 'no device for "layers.2.a.weight"'),
        ({"": "cpu"}, 'bytes for "cpu:1", on which device_map puts nothing'),
        ({"": "cpu", "layers.*": "cpu:1"}, 'puts no tensor of this Tower on "cpu"'),
        ({"": "cpu", "layers.3": None}, "is None"),
        ({}, "puts nothing"),
        (["layers.0"], "is no mapping"),
    ],
)
def test_maps_that_cannot_be(device_map: Any, said: str, two_cpus: object) -> None:
    refuse(Tower(6, 32), said, BOTH, device_map)


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ("1MiB", "one number, but device_map names several"),
        ({"cpu": "1MiB"}, 'puts modules on "cpu:1", for which device_budget has no bytes'),
        ({"cpu": "1MiB", "cpu:1": "1KiB"}, 'on "cpu:1": .* "all_staged" takes 16896 bytes'),
        ({"cpu": 0, "cpu:1": "1MiB"}, 'on "cpu": '),
        ({}, "names no device"),
        ({torch.device("cpu"): 1, "cpu": 2}, '"cpu" twice'),
    ],
)
def test_budgets_that_cannot_be(budgets: Any, said: str, two_cpus: object) -> None:
    refuse(Tower(6, 32), said, budgets, {"": "cpu", "layers.3": "cpu:1"}, units=["layers.*"], policy=all_staged)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cpu"}, "device='cpu' has no effect"),
        ({"recipe": {}}, "without checkpoint= they have no effect"),
        ({"strict": False}, "without checkpoint= they have no effect"),
        ({"mode": "map"}, "without checkpoint= it has no effect"),
        ({"mode": "map", "checkpoint": {}}, "maps files"),
        ({"units": ["layers.*", "heads.*"]}, '"heads.*" matches none'),
        ({"units": ["layers"]}, "split over devices"),
        ({"units": {"two": ["layers.0.a.weight", "layers.3.a.weight"]}}, "on one device and .* on another"),
        ({"policy": pattern_policy({"*.c.*": "device"})}, r'"\*.c.\*" matches none'),
        ({"policy": all_mapped, "slots": 2}, "no effect"),
    ],
)
def test_arguments_that_cannot_be(options: Any, said: str, two_cpus: object) -> None:
    refuse(Tower(6, 32), said, BOTH, {"": "cpu", "layers.3": "cpu:1"}, **options)


def test_budgets_without_a_map() -> None:
    refuse(Tower(6, 32), "device_map=", {"cpu": "1MiB"}, None)
    with pytest.raises(SpecError, match="no device name"):
        offload_(Tower(2, 32), {"tpu": 1}, device_map={"": "tpu"})


def test_tied_tensors_and_shared_modules_on_two_devices(two_cpus: object) -> None:
    refuse(Decoder(tied=True), '"embed.weight" and "head.weight" are one tensor', BOTH, {"": "cpu", "head": "cpu:1"})
    twice = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twice.append(twice[0])
    refuse(twice, '"0.weight" and "2.weight" are one tensor', BOTH, {"": "cpu", "2": "cpu:1"})
    overlapping = Tower(2, 32)
    overlapping.layers[1].a.weight = nn.Parameter(overlapping.layers[0].a.weight.data[8:])
    refuse(overlapping, "are one tensor", BOTH, {"": "cpu", "layers.1": "cpu:1"})


def test_modules_that_cannot_be_parted(two_cpus: object) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    refuse(nn.Sequential(layer), 'parts "0", a TransformerEncoderLayer', BOTH, {"": "cpu", "0.linear1": "cpu:1"})


def test_what_an_offloaded_module_refuses(two_cpus: object) -> None:
    module, reference, handle = tower()
    for inside in (module, module.layers, module.layers[4]):
        with pytest.raises(OffloadError, match="offloaded already, to cpu"):
            offload_(inside, "1MiB", device="cpu")
    for what in (module, module.layers, module.layers[0], module.layers[4].a, handle):
        with pytest.raises(OffloadError, match="pickled"):
            pickle.dumps(what)
    for what in (module.layers, module.layers[0], module.layers[4].a, handle):
        with pytest.raises(OffloadError, match="deepcopy"):
            copy.deepcopy(what)
    check(module, reference)


def test_no_graph_over_several_devices(two_cpus: Callable[..., SecondCpu], monkeypatch: pytest.MonkeyPatch) -> None:
    second = two_cpus()
    module, reference, _ = tower()
    with monkeypatch.context() as patch:
        patch.setattr(second, "capture_id", lambda stream: 7)
        with pytest.raises(OffloadError, match="several devices cannot be captured"):
            module(vector(0))
    check(module, reference)


@pytest.mark.parametrize("layer", [0, 6])
def test_refused_inside_of_a_unit(layer: int, two_cpus: object) -> None:
    """Wherever the running unit is, nothing has changed on the other device."""
    module, reference, handle = tower()
    calls = [handle.restore_, handle.sleep, handle.refresh_, lambda: handle.resize_({"cpu": "40KiB", "cpu:1": "80KiB"})]
    assert f"layers.{layer}" in {unit.name for plan in handle.plan.values() for unit in plan.streamed_units}
    before, seen = handle.plan, []

    def inside(*_: Any) -> None:
        for call in calls:
            with pytest.raises(SlotError, match="running"):
                call()
            seen.append(call)

    hook = module.layers[layer].a.register_forward_hook(inside)
    check(module, reference)
    hook.remove()
    assert len(seen) == 3 * len(calls)
    assert handle.plan == before
    assert not handle.restored
    assert_streamed(handle)
    handle.restore_()
    assert handle.restored
    check(module, reference)


def test_an_error_inside_of_a_layer_leaves_every_ring_usable(pair: Pair) -> None:
    module, reference, handle = tower(pair)
    for layer in (0, 6):

        def fails(*_: Any) -> None:
            raise ZeroDivisionError("in a layer")

        hook = module.layers[layer].b.register_forward_hook(fails)
        with pytest.raises(ZeroDivisionError):
            module(vector(0, pair[0]))
        hook.remove()
        check(module, reference, pair[0])
    handle.restore_()


def test_after_restore(pair: Pair) -> None:
    module, _, handle = tower(pair)
    assert handle.restore_() is module
    assert handle.restore_() is module
    assert handle.restored
    assert SplitHandle.of(module) is None
    calls = [handle.sleep, handle.wake, handle.refresh_, handle.report, lambda: handle.resize_({pair[0]: "1MiB"})]
    calls += [lambda: handle.update("layers.0.a.weight", vector(0)), lambda: handle.changed("layers.0.a.weight")]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    assert pinned_nbytes() == 0


def test_the_memory_goes_with_the_module(pair: Pair) -> None:
    module, _, handle = tower(pair)
    module(vector(0, pair[0]))
    assert pinned_nbytes() > 0
    del module, handle
    assert pinned_nbytes() == 0


# ------------------------------------------------------------------------------------------------- changes


def test_layers_put_in_and_taken_out(pair: Pair) -> None:
    torch.manual_seed(5)
    module = Tower(8, 32)
    changed = copy.deepcopy(module)
    budgets = dict(zip(pair, BUDGETS, strict=True))
    handle = offload_(module, budgets, device_map=half(pair), units=["layers.*"])
    new = Tower(2, 32).layers
    for model, layers in ((module, new), (changed, copy.deepcopy(new))):
        del model.layers[7]
        model.layers[4] = layers[0]
        model.layers.append(layers[1])
    reference = resident(changed, half(pair))
    handle.refresh_()
    names = {name.rpartition(".")[0] for name in handle.plan[pair[1]].specs}
    assert names == {f"layers.{i}.{part}" for i in (4, 5, 6, 7) for part in "ab"}
    assert SplitHandle.of(new[0]) is handle
    check(module, reference, pair[0])
    assert_streamed(handle)
    handle.restore_()
    assert all("forward" not in inside.__dict__ for inside in module.modules())


def test_a_layer_that_went_to_another_device_is_refused(two_cpus: object) -> None:
    module, reference, handle = tower()
    before = handle.plan
    for model in (module, reference):
        model.layers[0], model.layers[4] = model.layers[4], model.layers[0]
    with pytest.raises(PlanError, match=r'was offloaded to "cpu(:1)?", and stands where device_map says'):
        handle.refresh_()
    assert handle.plan == before
    check(module, reference)
    handle.restore_()
    check(module, reference)


def test_memory_refused_while_refreshing_restores_all(two_cpus: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module, reference, handle = tower()
    refresh = OffloadHandle.refresh_

    def refusing(self: OffloadHandle) -> None:
        if self.device == "cpu:1":
            raise HostMemoryError("refused", nbytes=1)
        refresh(self)

    with monkeypatch.context() as patch:
        patch.setattr(OffloadHandle, "refresh_", refusing)
        with pytest.raises(HostMemoryError, match="refused"):
            handle.refresh_()
    assert handle.restored
    assert all("forward" not in inside.__dict__ for inside in module.modules())
    assert pinned_nbytes() == 0
    check(module, reference)
