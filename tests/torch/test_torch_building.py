"""Building larger than the device: from meta straight to where each tensor lives, or layer by layer through slabs."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from models import CASES, Case, Decoder, Step, Tower, assert_same, case_of, offload_at, run, same, tensors_of  # noqa: E402
from stored_models import looks, on_meta, pinned, saved, stored  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import memory  # noqa: E402
from dlpoffload.checkpoint import concat, open_checkpoint, part  # noqa: E402
from dlpoffload.errors import (  # noqa: E402
    CheckpointError,
    ClosedError,
    HostMemoryError,
    OffloadError,
    PlanError,
    SpecError,
)
from dlpoffload.planning import Placement, all_mapped, all_staged, pattern_policy  # noqa: E402
from dlpoffload.torch import Offloader, OffloadHandle, loading, offload_, placed  # noqa: E402
from dlpoffload.torch import handle as handle_module  # noqa: E402
from dlpoffload.torch import layers as layers_module  # noqa: E402

LAYERS = ["layers.*"]


# ----------------------------------------------------------------------------------------------- from meta


@pytest.mark.parametrize("form", ["file", "mapping"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_zoo_from_meta(case: Case, form: str, device: str, tmp_path: Path) -> None:
    reference = case.model()
    model = on_meta(case, reference)
    objects = {name: id(tensor) for name, tensor in tensors_of(model).items()}
    weights: Any = stored(reference) if form == "mapping" else saved(tmp_path, stored(reference))
    total = sum(t.nbytes for t in {id(t): t for t in tensors_of(reference).values()}.values())
    twin = case.model()
    loaded = offload_at(twin, int(total * 0.4), device)
    strict = stored(reference).keys() == reference.state_dict().keys()
    budget = loaded.plan.device_budget
    handle = offload_(model, budget, device=device, checkpoint=weights, strict=strict)
    assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == objects
    assert handle.plan.placements == loaded.plan.placements, "planned from meta as from the real module"
    resident = case.model().to(device)
    with torch.no_grad():
        for seed in (0, 1):
            inputs = case.inputs(seed, device)
            assert_same(run(model, inputs), run(resident, inputs), f"{case.name}, {seed}")
    report = handle.report(link=False)
    assert report.stats.host_waits == 0
    assert report.pinned_nbytes == loaded.report(link=False).pinned_nbytes
    if handle.plan.streamed_units:
        assert report.stats.copies > 0
    for name, tensor in resident.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
    handle.restore_()
    for name, tensor in tensors_of(resident).items():
        found = tensors_of(model)[name]
        assert found.device.type == "cpu", name
        assert same(found, tensor), name


def test_what_a_parameter_is_stays(device: str) -> None:
    class Special(nn.Parameter):
        __slots__ = ("slot",)

    tower = Tower(3)
    weights = stored(tower)
    with torch.device("meta"):
        model = Tower(3)
        special = torch.Tensor._make_subclass(Special, torch.empty(64, 32), False)
        special.slot, special.weight_loader = "s", test_what_a_parameter_is_stays
        model.layers[1].a.weight = special
    model.layers[0].b.bias.requires_grad_(False)
    handle = offload_(model, "1MiB", device=device, policy=all_staged, units=LAYERS, checkpoint=weights)
    assert model.layers[1].a.weight is special
    assert (special.slot, special.weight_loader) == ("s", test_what_a_parameter_is_stays)
    assert not special.requires_grad
    assert not model.layers[0].b.bias.requires_grad
    assert model.layers[0].a.bias.requires_grad
    handle.restore_()
    assert type(special) is Special
    assert same(special, weights["layers.1.a.weight"])


def test_gradients_flow_through_a_module_from_meta(device: str) -> None:
    reference = Tower(4).to(device).requires_grad_(False)
    with torch.device("meta"):
        model = Tower(4).requires_grad_(False)
    offload_(model, "1MiB", device=device, policy=all_staged, units=LAYERS, checkpoint=stored(reference))
    grads = []
    for module in (model, reference):
        x = torch.linspace(-1, 1, 96, device=device).reshape(3, 32).requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert same(*grads)


def test_partly_on_meta(device: str) -> None:
    """What is real and stored is read over, what is real and not stored is kept."""
    reference = Normed()
    weights = {name: tensor for name, tensor in stored(reference).items() if name != "extra"}
    with torch.device("meta"):
        model = Normed()
    model.norm = nn.BatchNorm1d(16).eval()
    model.extra = nn.Parameter(torch.full((4,), 7.0))
    model.table = torch.arange(16.0) + 1
    before = looks(model)
    with pytest.raises(CheckpointError, match=r'1 missing: "extra" \(float32\[4\]\)'):
        offload_(model, "1MiB", device=device, checkpoint=weights)
    assert looks(model) == before
    handle = offload_(model, "1MiB", device=device, checkpoint=weights, strict=False, policy=all_staged)
    found = {name: tensor.cpu().clone() for name, tensor in tensors_of(model).items()}
    assert same(found["norm.running_mean"], reference.norm.running_mean)
    assert same(found["norm.num_batches_tracked"], reference.norm.num_batches_tracked)
    assert same(found["extra"], torch.full((4,), 7.0))
    assert same(found["table"], torch.arange(16.0) + 1)
    assert same(found["linear.weight"], reference.linear.weight)
    handle.restore_()
    assert {name: tensor.device.type for name, tensor in tensors_of(model).items()} == dict.fromkeys(found, "cpu")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.extra = nn.Parameter(torch.zeros(4))
        self.register_buffer("table", torch.zeros(16), persistent=False)
        if not self.norm.running_mean.is_meta:
            self.norm.running_mean.normal_()
            self.norm.num_batches_tracked.fill_(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + self.table + self.extra.sum()


def test_an_open_checkpoint_stays_open_and_tied_names_may_be_stored_once(device: str, tmp_path: Path) -> None:
    reference = case_of("decoder_tied").model()
    for left_out in ("head.weight", "embed.weight"):
        weights = stored(reference)
        del weights[left_out]
        model = on_meta(case_of("decoder_tied"), reference)
        with open_checkpoint(saved(tmp_path, weights)) as checkpoint:
            handle = offload_(model, "2MiB", device=device, checkpoint=checkpoint)
            checkpoint.read_into(iter(()))
        assert model.head.weight is model.embed.weight
        assert same(model.state_dict()["embed.weight"], reference.embed.weight)
        handle.restore_()


def test_inside_of_a_device_context(device: str) -> None:
    """As a model's constructor runs that wraps its own layers."""
    reference = tower_of(list(built(4, "cpu")))
    options: dict[str, Any] = {"device": device, "policy": all_staged, "units": LAYERS}
    with torch.device("meta"):
        model = Tower(4)
        handle = offload_(model, "1MiB", checkpoint=stored(reference), **options)
        offloader = Offloader("1MiB", **options)
        other = tower_of(offloader.wrap(Step(32) for _ in range(4)))
        load(other, reference)
        offloader.offload_(other)
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
        assert same(other.state_dict()[name], tensor), name
    assert handle.device == device


def test_under_inference_mode(device: str) -> None:
    reference = Tower(4)
    with torch.device("meta"):
        model = Tower(4)
    x = torch.ones(3, 32, device=device)
    with torch.inference_mode():
        offload_(model, "1MiB", device=device, checkpoint=stored(reference), policy=all_staged, units=LAYERS)
        y = model(x)
    with torch.no_grad():
        assert same(y, reference.to(device)(x))


def test_a_model_of_transformers(device: str, tmp_path: Path) -> None:
    """What accelerate leaves off meta is kept: the rotary table, which no checkpoint stores."""
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    resident = transformers.LlamaForCausalLM(config).eval()
    resident.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(CheckpointError, match=r'"model\.rotary_emb\.inv_freq" .*not persistent.*include_buffers=False'):
        offload_(model, "1MiB", device=device, checkpoint=tmp_path)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.LlamaForCausalLM(config).eval()
    model.tie_weights()
    handle = offload_(model, "300KiB", device=device, checkpoint=tmp_path)
    assert handle.plan.streamed_units
    tokens = torch.arange(20, device=device).reshape(2, 10)
    with torch.no_grad():
        assert same(model(tokens).logits, resident.to(device)(tokens).logits)


@pytest.mark.parametrize("policy", [all_staged, all_mapped, pattern_policy({"*": "device"})])
def test_each_placement_from_meta(policy: Any, device: str, tmp_path: Path) -> None:
    reference = Tower(4)
    with torch.device("meta"):
        model = Tower(4)
    options = {} if policy is all_mapped else {"units": LAYERS}
    handle = offload_(
        model, "1MiB", device=device, policy=policy, checkpoint=saved(tmp_path, stored(reference)), **options
    )
    assert handle.plan.device_nbytes <= 1 << 20
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
    x = torch.ones(3, 32, device=device)
    with torch.no_grad():
        assert same(model(x), reference.to(device)(x))


@pytest.mark.parametrize("form", ["file", "mapping"])
def test_residents_pass_through_one_tensor_of_the_host(
    form: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that files cannot be read into, which the CPU is here made to be."""
    monkeypatch.setattr(loading, "_READABLE", ())
    asked: list[int] = []
    real = memory.allocate_pinned
    monkeypatch.setattr(
        memory, "allocate_pinned", lambda n, *more, **options: asked.append(n) or real(n, *more, **options)
    )
    reference = case_of("unet_channels_last").model()
    model = on_meta(case_of("unet_channels_last"), reference)
    weights: Any = stored(reference) if form == "mapping" else saved(tmp_path, stored(reference))
    before = pinned()
    everything = pattern_policy({"*": "device"})
    handle = offload_(model, "1GiB", device=device, policy=everything, checkpoint=weights)
    assert handle.plan.names(Placement.DEVICE) == tuple(handle.plan.specs)
    rows = [s.nbytes for s in handle.plan.specs.values() if s.is_row_major]
    assert asked == [max(rows)]
    assert pinned() == before
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].device == torch.device(device), name


# ------------------------------------------------------------------------------------------------- recipes


class Fused(nn.Module):
    """A rank's part of a block: q, k and v as one, gate and up as one, and the half of down that goes with them."""

    def __init__(self, width: int, ranks: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width // ranks, bias=False)
        self.gate_up = nn.Linear(width, 4 * width // ranks, bias=False)
        self.down = nn.Linear(2 * width // ranks, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(gate.sigmoid() * up) + (q * k * v).sum(-1, keepdim=True)


class FusedModel(nn.Module):
    def __init__(self, width: int = 64, depth: int = 5, ranks: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Fused(width, ranks) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("form", ["file", "mapping"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_fused_layers(rank: int, form: str, device: str, tmp_path: Path) -> None:
    width = 64
    parts = {"q": width, "k": width, "v": width, "gate": 2 * width, "up": 2 * width}
    whole = {
        f"model.blocks.{i}.{name}.weight": torch.randn(rows, width) for i in range(5) for name, rows in parts.items()
    }
    whole |= {f"model.blocks.{i}.down.weight": torch.randn(width, 2 * width) for i in range(5)}

    def ours(name: str, dim: int) -> Any:
        return part(f"model.blocks.*.{name}.weight", dim=dim, index=rank, count=2)

    recipe = {
        "layers.*.qkv.weight": concat(*(ours(name, 0) for name in "qkv"), dim=0),
        "layers.*.gate_up.weight": concat(ours("gate", 0), ours("up", 0), dim=0),
        "layers.*.down.weight": ours("down", 1),
    }
    reference = FusedModel(ranks=2)
    reference.load_state_dict(
        {
            f"layers.{i}.{name}.weight": torch.cat(
                [whole[f"model.blocks.{i}.{source}.weight"].chunk(2, dim)[rank] for source in sources], dim
            )
            for i in range(5)
            for name, sources, dim in (("qkv", "qkv", 0), ("gate_up", ("gate", "up"), 0), ("down", ("down",), 1))
        }
    )
    with torch.device("meta"):
        model = FusedModel(ranks=2)
    weights: Any = saved(tmp_path, whole) if form == "file" else whole
    handle = offload_(model, "150KiB", device=device, units=LAYERS, checkpoint=weights, recipe=recipe)
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
    x = torch.randn(3, width).to(device)
    with torch.no_grad():
        assert same(model(x), reference.to(device)(x))
    assert handle.plan.placements[next(iter(handle.plan.placements))] in set(Placement)


def test_a_prefix_for_all(device: str) -> None:
    """Also where it fits names that are not stored, since they are tied to others."""
    reference = case_of("decoder_tied").model()
    weights = {f"model.{name}": tensor for name, tensor in stored(reference).items() if name != "head.weight"}
    model = on_meta(case_of("decoder_tied"), reference)
    offload_(model, "2MiB", device=device, checkpoint=weights, recipe={"*": "model.*"})
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name


# -------------------------------------------------------------------------------------------------- errors


def _missing(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    del weights["layers.1.a.bias"]
    return weights


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (_missing, r'1 missing: "layers\.1\.a\.bias" \(float32\[64\]\).*recipe'),
    "unexpected": (lambda w: w | {"x": torch.ones(2)}, r'1 unexpected: "x" \(float32\[2\]\).*strict=False'),
    "shape": (lambda w: w | {"layers.0.a.bias": torch.ones(31)}, r'"layers\.0\.a\.bias" is float32\[31\] .*\[64\]'),
    "dtype": (
        lambda w: w | {"layers.0.a.bias": torch.ones(64).half()},
        r"float16\[64\] .* wanted as float32\[64\].*dtype of the checkpoint",
    ),
    "all": (
        lambda w: _missing(w) | {"x": torch.ones(2), "layers.0.a.bias": torch.ones(31)},
        r"1 missing: .*; 1 unexpected: .*; 1 of another shape",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_does_not_fit(change: str, device: str, tmp_path: Path) -> None:
    alter, words = CHANGES[change]
    weights = alter(stored(Tower(3)))
    with torch.device("meta"):
        model = Tower(3)
    before, buffers = looks(model), pinned()
    for source in (weights, saved(tmp_path, weights)):
        with pytest.raises(CheckpointError, match=words):
            offload_(model, "1MiB", device=device, checkpoint=source)
        assert looks(model) == before
        assert pinned() == buffers
        assert OffloadHandle.of(model) is None


def test_strict_false_ignores_what_is_not_asked_for(device: str) -> None:
    reference = Tower(3)
    with torch.device("meta"):
        model = Tower(3)
    offload_(model, "1MiB", device=device, checkpoint=stored(reference) | {"x": torch.ones(1)}, strict=False)
    assert same(model.state_dict()["layers.2.b.weight"], reference.layers[2].b.weight)
    with torch.device("meta"):
        other = Tower(3)
    with pytest.raises(CheckpointError, match="12 missing") as caught:
        offload_(other, "1MiB", device=device, checkpoint={"x": torch.ones(1)}, strict=False)
    assert "and 7 more" in str(caught.value)


def test_buffers_that_are_computed_are_named(device: str) -> None:
    reference = Normed()
    with torch.device("meta"):
        model = Normed()
    with pytest.raises(CheckpointError, match=r'"table" \(float32\[16\], a buffer that is not persistent\).*off meta'):
        offload_(model, "1MiB", device=device, checkpoint=stored(reference))
    weights = stored(reference) | {"table": torch.arange(16.0)}
    offload_(model, "1MiB", device=device, checkpoint=weights)
    assert same(model.table.cpu(), torch.arange(16.0))


def test_options_without_effect(device: str) -> None:
    for options in ({"recipe": {"a": "b"}}, {"strict": False}):
        with pytest.raises(PlanError, match="without checkpoint= they have no effect"):
            offload_(Tower(2), "1MiB", device=device, **options)
    with pytest.raises(CheckpointError, match=r"none of the checkpoint's 1 tensors .* so it has no effect"):
        offload_(Tower(2), "1MiB", device=device, checkpoint={"x": torch.ones(1)}, strict=False)
    with pytest.raises(SpecError, match="not a int"):
        offload_(Tower(2), "1MiB", device=device, checkpoint=3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r'"layers\.0\.a\.weight" is on the meta device.*checkpoint='):
        offload_(Tower(2).to("meta"), "1MiB", device=device)
    with pytest.raises(SpecError, match=r'"m\.\*" makes nothing'):
        offload_(Tower(2).to("meta"), "1MiB", device=device, checkpoint=stored(Tower(2)), recipe={"m.*": "*"})


def test_tensors_that_wrap_others_are_built_off_meta(device: str) -> None:
    from test_torch_subclasses import Int8Tensor

    reference = Tower(2)
    with torch.device("meta"):
        model = Tower(2)
    codes = torch.empty(64, 32, dtype=torch.int8, device="meta")
    inside = Int8Tensor(codes, torch.empty(64, 1, device="meta"))
    model.layers[0].a.weight = nn.Parameter(inside, requires_grad=False)
    with pytest.raises(
        SpecError, match=r'"layers\.0\.a\.weight\.codes" lies on meta inside of a Int8Tensor; build that'
    ):
        offload_(model, "1MiB", device=device, checkpoint=stored(reference))
    model.layers[0].a.weight = nn.Parameter(Int8Tensor.of(reference.layers[0].a.weight), requires_grad=False)
    weights = {name: tensor for name, tensor in stored(reference).items() if name != "layers.0.a.weight"}
    offload_(model, "1MiB", device=device, policy=all_staged, units=LAYERS, checkpoint=weights)
    reference.layers[0].a.weight = nn.Parameter(Int8Tensor.of(reference.layers[0].a.weight), requires_grad=False)
    x = torch.ones(3, 32, device=device)
    with torch.no_grad():
        assert same(model(x), reference.to(device)(x))


def test_what_would_not_come_along_is_refused(device: str) -> None:
    with torch.device("meta"):
        model = Tower(2)
    model.layers[1].a.weight.register_hook(lambda grad: grad)
    model.layers[0].a.bias.grad = torch.zeros(64, device="meta")
    made = [model.layers[0].b.weight * 2]
    before = looks(model)
    for words, undo in (
        (r'"layers\.0\.a\.bias" is on meta and has a gradient', lambda: setattr(model.layers[0].a.bias, "grad", None)),
        (r'"layers\.0\.b\.weight" is on meta and has autograd holding on to it', made.clear),
        (r'"layers\.1\.a\.weight" is on meta and has hooks', gc.collect),
    ):
        with pytest.raises(SpecError, match=words):
            offload_(model, "1MiB", device=device, checkpoint=stored(Tower(2)))
        undo()
    assert looks(model) == before


def test_more_than_the_machine_has(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before the first byte is allocated or read."""
    monkeypatch.setattr(memory, "allocate_pinned", lambda *_, **__: pytest.fail("allocated"))
    model = nn.Sequential(*(nn.Linear(1 << 20, 1 << 20, bias=False, device="meta") for _ in range(256)))  # 1 PiB
    weights = {name: torch.zeros(()).expand(t.shape) for name, t in model.state_dict().items()}
    before = looks(model)
    with pytest.raises(HostMemoryError) as caught:
        offload_(model, 0, device=device, policy=all_mapped, checkpoint=weights)
    assert caught.value.nbytes == 1 << 50
    assert looks(model) == before


@pytest.mark.parametrize("pageable", ["never", "always"])
def test_memory_that_is_promised_to_others_is_not_free(
    pageable: Any, device: str, all_promised: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("allocate_pinned", "allocate_pageable"):
        monkeypatch.setattr(memory, name, lambda *_, **__: pytest.fail("allocated"))
    with torch.device("meta"):
        model = Tower(2)
    before = looks(model)
    with pytest.raises(HostMemoryError, match="promised to what is being pinned now"):
        offload_(model, "1MiB", device=device, policy=all_staged, pageable=pageable, checkpoint=stored(Tower(2)))
    assert looks(model) == before


@pytest.mark.parametrize("policy", [all_staged, all_mapped, None])
def test_memory_refused_at_each_buffer(policy: Any, device: str, refuse: Callable[[int], None], tmp_path: Path) -> None:
    reference = Tower(5)
    source = saved(tmp_path, stored(reference))
    options = {} if policy is None else {"policy": policy}
    if policy is not all_mapped:
        options["units"] = LAYERS
    with torch.device("meta"):
        model = Tower(5)
    model.layers[2].a.weight = nn.Parameter(torch.ones(64, 32))
    kept = model.layers[2].a.weight.data_ptr()
    before, buffers = looks(model), pinned()
    refused = 0
    while True:
        refuse(refused + 1)
        try:
            handle = offload_(model, "40KiB", device=device, checkpoint=source, **options)
        except HostMemoryError:
            refused += 1
        else:
            break
        assert looks(model) == before
        assert model.layers[2].a.weight.data_ptr() == kept
        assert same(model.layers[2].a.weight, torch.ones(64, 32)), "read over in its new home only"
        assert OffloadHandle.of(model) is None
        assert pinned() == buffers
    refuse(0)
    assert refused >= (1 if policy is all_mapped else 4)
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
    handle.restore_()


def failing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Let offloading fail once, after tensors were placed: half way, before the last step, or in it."""
    count = [0]

    def fail(*_: Any, **__: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise RuntimeError("planted")

    if where == "half way":
        real_point = placed.Placed._point
        monkeypatch.setattr(placed.Placed, "_point", lambda *args: (fail(), real_point(*args)))
    elif where == "watching":
        real_watch = placed.watch
        monkeypatch.setattr(placed, "watch", lambda tensor: (fail(), real_watch(tensor)))
    else:
        real = handle_module.Installed
        count[0] = 4
        monkeypatch.setattr(handle_module, "Installed", lambda *args, **kwargs: fail() or real(*args, **kwargs))


FAILURES = ["half way", "watching", "installing"]


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_after_tensors_were_placed(where: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Tower(5)
    with torch.device("meta"):
        model = Tower(5)
    model.layers[0].a.weight = nn.Parameter(torch.ones(64, 32))
    kept = model.layers[0].a.weight.data_ptr()
    before, buffers = looks(model), pinned()
    options: dict[str, Any] = {"device": device, "checkpoint": stored(reference), "units": LAYERS}
    failing(monkeypatch, where)
    with pytest.raises(RuntimeError, match="planted"):
        offload_(model, "60KiB", **options)
    assert looks(model) == before
    assert model.layers[0].a.weight.data_ptr() == kept
    assert OffloadHandle.of(model) is None
    assert pinned() == buffers
    offload_(model, "60KiB", **options)
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_after_slabs_were_taken_over(where: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tower_of(list(built(5, "cpu")))
    offloader = Offloader("40KiB", device=device, policy=all_staged, units=LAYERS)
    tower = tower_of(offloader.wrap(built(5, "cpu")))
    homes = [p.data_ptr() for p in tower.parameters()]
    failing(monkeypatch, where)
    with pytest.raises(RuntimeError, match="planted"):
        offloader.offload_(tower)
    assert [p.data_ptr() for p in tower.parameters()] == homes
    assert {type(p) for p in tower.parameters()} == {nn.Parameter}
    handle = offloader.offload_(tower)
    assert [p.data_ptr() for p in tower.parameters()] == homes
    handle.restore_()
    for name, tensor in reference.state_dict().items():
        assert same(tower.state_dict()[name], tensor), name


def test_pageable_when_pinning_is_refused(device: str, refuse: Callable[[int], None]) -> None:
    reference = Tower(4)
    with torch.device("meta"):
        model = Tower(4)
    refuse(3)
    options = {"policy": all_staged, "units": LAYERS, "pageable": "if_refused"}
    handle = offload_(model, "1MiB", device=device, checkpoint=stored(reference), **options)
    report = handle.report(link=False)
    assert report.pinned_nbytes == 0
    assert "refused by the test" in report.pageable_because
    x = torch.ones(3, 32, device=device)
    with torch.no_grad():
        assert same(model(x), reference.to(device)(x))


def test_a_file_that_ends_early_leaves_the_module_on_meta(device: str, tmp_path: Path) -> None:
    source = saved(tmp_path, stored(Tower(4)))
    with torch.device("meta"):
        model = Tower(4)
    before = looks(model)
    with open_checkpoint(source) as checkpoint:
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.truncate(9000)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            offload_(model, "1MiB", device=device, policy=all_staged, units=LAYERS, checkpoint=checkpoint)
    assert looks(model) == before


def test_a_deep_copy_and_refresh_do_not_read_again(device: str, tmp_path: Path) -> None:
    reference = Tower(4)
    source = saved(tmp_path, stored(reference))
    with torch.device("meta"):
        model = Tower(4)
    handle = offload_(model, "1MiB", device=device, policy=all_staged, units=LAYERS, checkpoint=source)
    handle.update("layers.0.a.bias", torch.full((64,), 5.0))
    twin = copy.deepcopy(model)
    handle.refresh_()
    for module in (model, twin):
        assert same(module.state_dict()["layers.0.a.bias"], torch.full((64,), 5.0))
        assert same(module.state_dict()["layers.3.b.weight"], reference.layers[3].b.weight)
    handle.restore_()
    assert same(model.layers[0].a.bias, torch.full((64,), 5.0))
    assert model.layers[0].a.bias.device.type == "cpu"


def test_of_tied_weights_that_are_stored_apart_the_last_counts(device: str) -> None:
    """As with `load_state_dict`."""
    case = case_of("decoder_tied")
    reference = case.model()
    weights = stored(reference)
    weights["head.weight"] = weights["embed.weight"] + 1
    model = on_meta(case, reference)
    reference.load_state_dict(weights)
    offload_(model, "2MiB", device=device, checkpoint=weights)
    assert same(model.state_dict()["embed.weight"], reference.embed.weight)


@pytest.mark.parametrize("how", ["meta", "wrap"])
def test_resized_and_put_to_sleep_afterwards(how: str, device: str) -> None:
    reference = tower_of(list(built(8, "cpu")))
    nbytes = sum(p.nbytes for p in reference.parameters())
    if how == "meta":
        with torch.device("meta"):
            model = Tower(8)
        handle = offload_(model, nbytes // 2, device=device, units=LAYERS, checkpoint=stored(reference))
    else:
        offloader = Offloader(nbytes // 2, device=device, units=LAYERS)
        model = tower_of(offloader.wrap(built(8, "cpu")))
        handle = offloader.offload_(model)
    resident = reference.to(device)
    x = torch.linspace(-1, 1, 96, device=device).reshape(3, 32)

    def check() -> None:
        with torch.no_grad():
            assert same(model(x), resident(x))

    check()
    for budget in (2 * nbytes, nbytes // 3, nbytes // 2):
        handle.resize_(device_budget=budget)
        check()
    handle.sleep()
    handle.wake()
    check()
    handle.restore_()
    for name, tensor in resident.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].device.type == "cpu"


# ------------------------------------------------------------------------------------------- layer by layer


def built(depth: int, where: str) -> Iterator[nn.Module]:
    """Layers of a tower with the same weights wherever they are built; weights on meta are loaded later."""
    for seed in range(depth):
        torch.manual_seed(seed)
        layer = Step(32)
        yield layer.to(where)


def tower_of(layers: list[nn.Module]) -> Tower:
    tower = Tower(0)
    tower.layers = nn.ModuleList(layers)
    return tower


def load(module: nn.Module, reference: nn.Module) -> None:
    """As weight loaders do it."""
    given = dict(reference.named_parameters())
    for name, parameter in module.named_parameters():
        rows = parameter.data.narrow(0, 0, len(parameter) // 2)
        rows.copy_(given[name].data[: len(rows)])
        parameter.data[len(rows) :].copy_(given[name].data[len(rows) :])


@pytest.mark.parametrize("where", ["cpu", "device", "meta"])
def test_wrapped_layers_keep_their_slabs(where: str, device: str) -> None:
    reference = tower_of(list(built(6, "cpu")))
    offloader = Offloader("1MiB", device=device, policy=all_staged, units=LAYERS)
    before = pinned()
    layers = offloader.wrap(built(6, device if where == "device" else where))
    assert offloader.host_nbytes == pinned() - before
    homes = [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]
    tower = tower_of(layers)
    load(tower, reference)
    total = offloader.host_nbytes
    handle = offloader.offload_(tower)
    assert [parameter.data_ptr() for layer in layers for parameter in layer.parameters()] == homes, "no byte moved"
    report = handle.report(link=False)
    assert report.pinned_nbytes == total
    assert pinned() - before == total
    resident = reference.to(device)
    x = torch.linspace(-1, 1, 96, device=device).reshape(3, 32)
    with torch.no_grad():
        for _ in range(2):
            assert same(tower(x), resident(x))
    assert handle.report(link=False).stats.copies >= 6
    handle.restore_()
    kind = "cpu" if where in ("cpu", "meta") else torch.device(device).type
    assert {parameter.device.type for parameter in tower.parameters()} == {kind}
    for name, tensor in resident.state_dict().items():
        assert same(tower.state_dict()[name], tensor), name


def test_residents_are_moved_and_their_slabs_freed(device: str) -> None:
    reference = tower_of(list(built(8, "cpu")))
    nbytes = sum(p.nbytes for p in reference.parameters())
    offloader = Offloader(nbytes // 2 + 20_000, device=device, units=LAYERS)
    tower = tower_of(offloader.wrap(built(8, "cpu")))
    total, homes = offloader.host_nbytes, {name: p.data_ptr() for name, p in tower.named_parameters()}
    before = pinned()
    handle = offloader.offload_(tower)
    gc.collect()
    resident = handle.plan.names(Placement.DEVICE)
    assert 0 < len(resident) < len(homes)
    report = handle.report(link=False)
    after = pinned()
    assert before - after == total - report.pinned_nbytes > 0
    for name, parameter in tower.named_parameters():
        assert (parameter.data_ptr() != homes[name]) is (name in resident), name
    x = torch.ones(3, 32, device=device)
    with torch.no_grad():
        assert same(tower(x), reference.to(device)(x))


def test_mapped_layers_keep_their_slabs(device: str) -> None:
    reference = tower_of(list(built(4, "cpu")))
    offloader = Offloader(0, device=device, policy=all_mapped)
    tower = tower_of(offloader.wrap(built(4, "cpu")))
    total, homes = offloader.host_nbytes, [p.data_ptr() for p in tower.parameters()]
    handle = offloader.offload_(tower)
    assert [p.data_ptr() for p in tower.parameters()] == homes
    assert handle.report(link=False).pinned_nbytes == total
    x = torch.ones(3, 32, device=device)
    with torch.no_grad():
        assert same(tower(x), reference.to(device)(x))


def test_a_whole_model_around_wrapped_layers(device: str) -> None:
    """Embedding and head come as they are, one weight is tied between layers, one layer is there twice."""

    def make(wrap: Callable[[Iterator[nn.Module]], list[nn.Module]]) -> Decoder:
        torch.manual_seed(3)
        model = Decoder(tied=True, depth=1)
        plain = [Decoder(tied=False, depth=1).layers[0] for _ in range(6)]
        plain[4].up.weight = plain[1].up.weight
        layers = wrap(iter(plain))
        model.layers = nn.ModuleList([*layers, layers[2]])
        return model.eval()

    reference = make(list).to(device)
    offloader = Offloader("1300KiB", device=device)
    model = make(offloader.wrap)
    handle = offloader.offload_(model)
    assert model.layers[4].up.weight is model.layers[1].up.weight
    assert handle.plan.streamed_units
    tokens = torch.arange(18).reshape(2, 9).to(device)
    with torch.no_grad():
        assert same(model(tokens), reference(tokens))
    assert handle.report(link=False).stats.host_waits == 0
    handle.restore_()
    with torch.no_grad():
        assert same(model.to(device)(tokens), reference(tokens))


def test_at_most_one_layer_is_on_the_device(device: str) -> None:
    """When the generator is asked for the next layer, nothing is left of the bytes that the last one was built in."""
    numpy = pytest.importorskip("numpy")
    alive: list[Any] = []

    def layers() -> Iterator[nn.Module]:
        for layer in built(5, device):
            if device == "cpu":
                for parameter in layer.parameters():
                    array = parameter.detach().numpy().copy()
                    parameter.data = torch.from_numpy(array)
                    alive.append(weakref.ref(array))
                    del array
                assert sum(array() is not None for array in alive) == 4
            else:
                alive.append(torch.cuda.memory_allocated())
                assert alive[-1] == alive[0]
            yield layer

    assert numpy
    with Offloader("1MiB", device=device) as offloader:
        assert len(offloader.wrap(layers())) == 5
    assert len(alive) >= 5


@pytest.mark.parametrize("how", ["context", "abandon", "drop"])
def test_an_offloader_that_is_not_used(how: str, device: str) -> None:
    reference = tower_of(list(built(4, "cpu")))
    offloader = Offloader("1MiB", device=device)
    before = pinned()
    tower = tower_of(offloader.wrap(built(4, "cpu")))
    assert pinned() > before
    if how == "context":
        with pytest.raises(KeyError), offloader:
            raise KeyError
    elif how == "abandon":
        offloader.abandon()
        offloader.abandon()
    if how == "drop":
        del offloader
        assert same(tower.layers[2].a.weight.cpu(), reference.layers[2].a.weight)
        del tower
        gc.collect()
        return  # the fixture sees whether anything is left
    gc.collect()
    assert pinned() == before
    for name, tensor in reference.state_dict().items():
        assert same(tower.state_dict()[name], tensor), name
        assert tower.state_dict()[name].device.type == "cpu"
    with pytest.raises(ClosedError, match="it was abandoned; make a new one"):
        offloader.wrap(iter(()))


def test_wrapping_that_is_refused(device: str, refuse: Callable[[int], None]) -> None:
    reference = tower_of(list(built(4, "cpu")))
    offloader = Offloader("1MiB", device=device)
    refuse(3)
    made: list[nn.Module] = []

    def layers() -> Iterator[nn.Module]:
        for layer in built(4, "cpu"):
            made.append(layer)
            yield layer

    with pytest.raises(HostMemoryError, match="refused by the test"):
        offloader.wrap(layers())
    assert len(made) == 3
    assert {p.device.type for p in made[2].parameters()} == {"cpu"}
    assert same(made[2].a.weight, reference.layers[2].a.weight)
    offloader.abandon()
    for made_layer, layer in zip(made, reference.layers, strict=False):
        assert same(made_layer.a.weight, layer.a.weight)


@pytest.mark.parametrize("where", ["cpu", "device", "meta"])
def test_a_layer_whose_wrapping_fails_half_way_is_as_it_was(
    where: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer,) = built(1, device if where == "device" else where)
    before, buffers = looks(layer), pinned()
    values = stored(layer)
    real, count = layers_module.home_tensor, [0]

    def failing_home(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("planted")
        return real(*args)

    monkeypatch.setattr(layers_module, "home_tensor", failing_home)
    with Offloader("1MiB", device=device) as offloader:
        with pytest.raises(RuntimeError, match="planted"):
            offloader.wrap([layer])
        assert looks(layer) == before
        assert pinned() == buffers
        if where != "meta":
            assert all(same(tensor, values[name]) for name, tensor in layer.state_dict().items())
        assert offloader.wrap([layer]) == [layer]
        assert offloader.host_nbytes > 0


def test_offloading_that_is_refused_can_be_tried_again(device: str, refuse: Callable[[int], None]) -> None:
    reference = case_of("decoder").model()
    offloader = Offloader("1200KiB", device=device, policy=all_staged)
    model = case_of("decoder").model()
    offloader.wrap(model.layers)
    homes = [p.data_ptr() for p in model.layers.parameters()]
    refuse(1)
    with pytest.raises(HostMemoryError):
        offloader.offload_(model)
    refuse(0)
    assert [p.data_ptr() for p in model.layers.parameters()] == homes
    handle = offloader.offload_(model)
    assert [p.data_ptr() for p in model.layers.parameters()] == homes
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
    with pytest.raises(ClosedError, match="its model was offloaded"):
        offloader.offload_(model)
    handle.restore_()


def test_models_that_are_not_the_wrapped_ones(device: str) -> None:
    with Offloader("1MiB", device=device) as offloader:
        with pytest.raises(OffloadError, match=r"no layer was wrapped.*call wrap"):
            offloader.offload_(Tower(2))
        layers = offloader.wrap(built(3, "cpu"))
        with pytest.raises(OffloadError, match=r"1 of 3 wrapped layers are not in this Tower \(number 1, a Step\)"):
            offloader.offload_(tower_of([layers[0], layers[2]]))
        with pytest.raises(SpecError, match="takes modules, not a int"):
            offloader.wrap([3])  # type: ignore[list-item]
        offload_(other := Tower(2), "1MiB", device=device)
        with pytest.raises(OffloadError, match="offloaded already"):
            offloader.wrap(iter(other.layers))
        tower = tower_of(layers)
        tower.tail = nn.Linear(2, 2, device="meta")
        with pytest.raises(SpecError, match=r'"tail\.weight" is on the meta device'):
            offloader.offload_(tower)
    with Offloader(1, device=device, units=LAYERS) as offloader:
        tower = tower_of(offloader.wrap(built(3, "cpu")))
        with pytest.raises(PlanError, match="smallest budget"):
            offloader.offload_(tower)


def test_data_given_away_from_the_slab_is_taken_as_it_is(device: str) -> None:
    """A loader that replaces `.data`, or the Parameter, instead of writing it."""
    reference = tower_of(list(built(4, "cpu")))
    with Offloader("1MiB", device=device, policy=all_staged, units=LAYERS) as offloader:
        tower = tower_of(offloader.wrap(built(4, "meta")))
        load(tower, reference)
        tower.layers[1].a.weight.data = reference.layers[1].a.weight.data.to(tower.layers[1].a.weight.device).clone()
        tower.layers[2].b.bias = nn.Parameter(reference.layers[2].b.bias.data.clone())
        handle = offloader.offload_(tower)
        for name, tensor in reference.state_dict().items():
            assert same(tower.state_dict()[name], tensor), name
        x = torch.ones(3, 32, device=device)
        with torch.no_grad():
            assert same(tower(x), reference.to(device)(x))
        assert handle.report(link=False).pinned_nbytes < handle.plan.total_nbytes + 16 * 256


def test_the_options_are_those_of_offload() -> None:
    import inspect

    ours, theirs = (inspect.signature(call).parameters for call in (Offloader, offload_))
    left_out = {"module", "checkpoint", "mode", "recipe", "strict", "device_map"}
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items() if n not in left_out}


def test_pageable_layers(device: str) -> None:
    reference = tower_of(list(built(4, "cpu")))
    options = {"policy": all_staged, "units": LAYERS}
    offloader = Offloader("1MiB", device=device, pageable="always", **options)
    tower = tower_of(offloader.wrap(built(4, "cpu")))
    handle = offloader.offload_(tower)
    report = handle.report(link=False)
    assert (report.pinned_nbytes, report.pageable_nbytes > 0) == (0, True)
    x = torch.ones(3, 32, device=device)
    with torch.no_grad():
        assert same(tower(x), reference.to(device)(x))
