"""One module over several devices, from meta straight to the host homes of each, by one checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from models import Case, Tower, assert_same, case_of, run, same, tensors_of  # noqa: E402
from split_models import MAPS, SecondCpu, assert_streamed, offload_split, resident, torch_device_of  # noqa: E402
from stored_models import looks, on_meta, pinned, saved, stored  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import memory  # noqa: E402
from dlpoffload.checkpoint import align, concat, part  # noqa: E402
from dlpoffload.driver import open_driver  # noqa: E402
from dlpoffload.errors import (  # noqa: E402
    AliasError,
    CheckpointError,
    HostMemoryError,
    OffloadError,
    PlanError,
    RegistrationError,
    SpecError,
)
from dlpoffload.planning import all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import Offloader, SplitHandle, offload_  # noqa: E402
from dlpoffload.torch import placed as placed_module  # noqa: E402
from dlpoffload.torch import split as split_module  # noqa: E402

Pair = tuple[str, str]
LAYERS = ["layers.*"]
SECOND = "layers.3.a.weight"
"""A tensor on the second device."""


def half(pair: Pair = ("cpu", "cpu:1")) -> dict[str, str]:
    return {"": pair[0], "layers.3": pair[1], "layers.4": pair[1], "layers.5": pair[1]}


def towers() -> tuple[Tower, Tower]:
    """One with weights, and one on meta."""
    torch.manual_seed(5)
    reference = Tower(6)
    with torch.device("meta"):
        return reference, Tower(6)


def both(pair: Pair, budget: str = "40KiB") -> dict[str, str]:
    """Budgets; of three layers of 16.4 KiB none stays on its device beside the ring."""
    return dict.fromkeys(pair, budget)


def vector(pair: Pair, seed: int = 0) -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(torch_device_of(pair[0]))


def check(module: nn.Module, reference: nn.Module, pair: Pair) -> None:
    """The outputs of the resident module over the same devices, and its weights."""
    twin = resident(reference, half(pair))
    with torch.no_grad():
        for seed in range(2):
            assert same(module(vector(pair, seed)), twin(vector(pair, seed)))
    found = module.state_dict()
    assert all(same(found[name], tensor) for name, tensor in reference.state_dict().items())


# ---------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("form", ["file", "mapping"])
@pytest.mark.parametrize("name", MAPS)
def test_the_zoo_from_meta(name: str, form: str, pair: Pair, tmp_path: Path) -> None:
    case: Case = case_of(name)
    reference = case.model()
    model, twin = on_meta(case, reference), case.model()
    objects = {name: id(tensor) for name, tensor in tensors_of(model).items()}
    weights: Any = stored(reference) if form == "mapping" else saved(tmp_path, stored(reference))
    strict = stored(reference).keys() == reference.state_dict().keys()
    device_map = {path: pair[index] for path, index in MAPS[name].items()}
    loaded = offload_split(twin, device_map)
    budgets = {device: plan.device_budget for device, plan in loaded.plan.items()}
    handle = offload_(model, budgets, device_map=device_map, checkpoint=weights, strict=strict)
    assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == objects
    for device, plan in handle.plan.items():
        assert plan.placements == loaded.plan[device].placements, "planned from meta as from the real module"
    over = resident(reference, device_map)
    with torch.no_grad():
        for seed in range(2):
            inputs = case.inputs(seed, str(torch_device_of(handle.device)))
            assert_same(run(model, inputs), run(over, inputs), f"{name}, {seed}")
    assert_streamed(handle)
    found, asked = (each.report(link=False) for each in (handle, loaded))
    assert [r.pinned_nbytes for r in found.values()] == [r.pinned_nbytes for r in asked.values()]
    assert all(same(model.state_dict()[name], tensor) for name, tensor in over.state_dict().items())
    handle.restore_()
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}
    assert all(same(tensors_of(model)[name], tensor) for name, tensor in tensors_of(over).items())


@pytest.mark.parametrize("policy", [all_staged, all_mapped], ids=lambda policy: policy.__name__)
def test_recipes_are_for_the_whole(policy: Any, pair: Pair, tmp_path: Path) -> None:
    """One recipe for layers of all devices, with slices and concatenations of what is stored."""
    reference, model = towers()
    weights = {}
    for name, tensor in stored(reference).items():
        if name.endswith("a.weight"):
            halves = tensor.chunk(2, 1)
            weights |= {f"old.{name}.{side}": h.contiguous() for side, h in zip("lr", halves, strict=True)}
        else:
            weights[f"old.{name}"] = tensor
    recipe = {
        "*.a.weight": concat("old.*.a.weight.l", "old.*.a.weight.r", dim=1),
        "*.b.weight": concat(*(part("old.*.b.weight", dim=0, index=i, count=2) for i in range(2)), dim=0),
        "*": "old.*",
    }
    path = saved(tmp_path, weights)
    options = {"units": LAYERS} if policy is all_staged else {}
    handle = offload_(
        model, both(pair), device_map=half(pair), checkpoint=path, recipe=recipe, policy=policy, **options
    )
    check(model, reference, pair)
    assert set(handle.devices) == set(pair)


def test_partly_on_meta(pair: Pair) -> None:
    """What is real and stored is read over, what is real and not stored is kept, on either device."""
    reference, model = towers()
    weights = {name: t for name, t in stored(reference).items() if name not in ("layers.0.a.bias", "layers.5.a.bias")}
    for layer in (0, 5):
        model.layers[layer].a.bias = nn.Parameter(torch.full((64,), 7.0 + layer))
        with torch.no_grad():
            reference.layers[layer].a.bias.fill_(7.0 + layer)
    model.layers[4].a.weight = nn.Parameter(torch.zeros(64, 32))
    before = looks(model)
    with pytest.raises(CheckpointError, match=r'2 missing: "layers.0.a.bias" .*"layers.5.a.bias"'):
        offload_(model, both(pair), device_map=half(pair), checkpoint=weights, units=LAYERS)
    assert looks(model) == before
    handle = offload_(model, both(pair), device_map=half(pair), checkpoint=weights, units=LAYERS, strict=False)
    check(model, reference, pair)
    handle.restore_()
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    check(model.to("cpu"), reference, ("cpu", "cpu"))


def test_a_device_that_the_checkpoint_has_nothing_for(pair: Pair) -> None:
    reference, model = towers()
    for layer in (3, 4, 5):
        model.layers[layer] = copy.deepcopy(reference.layers[layer])
    weights = {name: tensor for name, tensor in stored(reference).items() if name[7] in "012"}
    offload_(model, both(pair), device_map=half(pair), checkpoint=weights, units=LAYERS, strict=False)
    check(model, reference, pair)


def test_everything_else_goes_on_from_there(pair: Pair, tmp_path: Path) -> None:
    reference, model = towers()
    path = saved(tmp_path, stored(reference))
    handle = offload_(model, both(pair), device_map=half(pair), checkpoint=path, units=LAYERS)
    for name in ("layers.0.a.bias", "layers.5.a.bias"):
        handle.update(name, torch.full((64,), 5.0))
        with torch.no_grad():
            reference.get_parameter(name).fill_(5.0)
    twin = copy.deepcopy(model)
    handle.resize_(both(pair, "80KiB"))
    check(model, reference, pair)
    handle.sleep()
    handle.wake()
    handle.refresh_()
    for module in (model, twin):
        check(module, reference, pair)
    handle.restore_()
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}


# --------------------------------------------------------------------------------------------------- mapped


def mappable(folder: Path, module: nn.Module) -> Path:
    """A checkpoint of which each tensor lies on a boundary, so that kernels may read it where it lies."""
    align(saved(folder, stored(module)) / "model.safetensors", folder / "aligned.safetensors")
    return folder / "aligned.safetensors"


@pytest.mark.parametrize("policy", [all_staged, all_mapped], ids=lambda policy: policy.__name__)
def test_mapped(policy: Any, pair: Pair, tmp_path: Path) -> None:
    for device in pair:
        if not open_driver(device).capabilities().read_only_host_register:
            pytest.skip(f"{device} pins no read-only memory")
    reference, model = towers()
    path = mappable(tmp_path, reference)
    before = path.read_bytes()
    options: dict[str, Any] = {"policy": policy, "checkpoint": path, "mode": "map"}
    options |= {"units": LAYERS} if policy is all_staged else {}
    handle = offload_(model, both(pair, "1MiB"), device_map=half(pair), **options)
    reports = handle.report(link=False)
    assert [report.mode for report in reports.values()] == ["map", "map"]
    assert sum(report.file_nbytes for report in reports.values()) >= sum(p.nbytes for p in reference.parameters())
    check(model, reference, pair)
    for name in ("layers.1.a.weight", SECOND):
        with torch.no_grad(), pytest.raises(AliasError, match="copy_out"):
            model.get_parameter(name).add_(1)
    assert handle.copy_out(SECOND)
    assert not handle.copy_out(SECOND)
    with torch.no_grad():
        for module in (model, reference):
            module.get_parameter(SECOND).add_(1)
    handle.update("layers.1.a.weight", torch.ones(64, 32))
    with torch.no_grad():
        reference.layers[1].a.weight.fill_(1)
    check(model, reference, pair)
    assert [report.moved for report in handle.report(link=False).values()] == [("layers.1.a.weight",), (SECOND,)]
    handle.restore_()
    check(model, reference, ("cpu", "cpu"))
    assert path.read_bytes() == before


def test_auto_maps_where_it_can(two_cpus: Callable[..., SecondCpu], tmp_path: Path) -> None:
    two_cpus(read_only_host_register=False)
    reference, model = towers()
    options: dict[str, Any] = {"device_map": half(), "units": LAYERS, "policy": all_staged}
    options["checkpoint"] = mappable(tmp_path, reference)
    before, used = looks(model), pinned()
    with pytest.raises(RegistrationError):
        offload_(model, both(("cpu", "cpu:1"), "1MiB"), mode="map", **options)
    assert looks(model) == before
    assert pinned() == used
    handle = offload_(model, both(("cpu", "cpu:1"), "1MiB"), mode="auto", **options)
    first, second = handle.report(link=False).values()
    assert (first.mode, second.mode) == ("map", "copy")
    assert second.because
    check(model, reference, ("cpu", "cpu:1"))


# ------------------------------------------------------------------------------------------- nothing half done


def changed(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    found = dict(weights)
    if how == "missing":
        del found[SECOND]
    elif how == "shape":
        found[SECOND] = found[SECOND][:3].clone()
    elif how == "dtype":
        found[SECOND] = found[SECOND].half()
    elif how == "unexpected":
        found["layers.6.a.weight"] = torch.ones(3)
    return found


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", f'23 tensors do not fit the Tower: 1 missing: "{SECOND}"'),
        ("shape", f'1 of another shape or dtype: "{SECOND}"'),
        ("dtype", f'1 of another shape or dtype: "{SECOND}"'),
        ("unexpected", '1 unexpected: "layers.6.a.weight"'),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    how: str, said: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out before anything is allocated, on either device."""
    reference, model = towers()
    path = saved(tmp_path, changed(stored(reference), how))
    before = looks(model)
    monkeypatch.setattr(memory, "allocate_pinned", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match=said):
        offload_(model, both(pair), device_map=half(pair), checkpoint=path, units=LAYERS)
    assert looks(model) == before
    assert SplitHandle.of(model) is None


def test_what_cannot_be(pair: Pair) -> None:
    reference, model = towers()
    weights, before = stored(reference), looks(model)
    with pytest.raises(SpecError, match=r'"m\.\*" makes nothing'):
        offload_(model, both(pair), device_map=half(pair), checkpoint=weights, recipe={"m.*": "*"}, units=LAYERS)
    with pytest.raises(SpecError, match="is on the meta device"):
        offload_(model, both(pair), device_map=half(pair), units=LAYERS)
    with pytest.raises(PlanError, match=f'on "{pair[1]}": '):
        offload_(model, {pair[0]: "40KiB", pair[1]: "1KiB"}, device_map=half(pair), checkpoint=weights, units=LAYERS)
    with pytest.raises(PlanError, match="an Offloader is of one device"):
        Offloader(both(pair))  # type: ignore[arg-type]
    assert looks(model) == before


def test_more_than_the_machine_has(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all devices together ask of the host is looked at before the first byte is allocated or read."""
    monkeypatch.setattr(memory, "allocate_pinned", lambda *_, **__: pytest.fail("allocated"))
    small, large = 1 << 10, 1 << 20
    model = nn.Sequential(
        nn.Linear(small, small, bias=False, device="meta"),
        *(nn.Linear(large, large, bias=False, device="meta") for _ in range(256)),  # 1 PiB
    )
    weights = {name: torch.zeros(()).expand(t.shape) for name, t in model.state_dict().items()}
    before = looks(model)
    device_map = {"": pair[1], "0": pair[0]}
    with pytest.raises(HostMemoryError) as caught:
        offload_(model, dict.fromkeys(pair, 0), device_map=device_map, policy=all_mapped, checkpoint=weights)
    assert caught.value.nbytes == (1 << 50) + (1 << 22)
    assert looks(model) == before


def test_memory_that_is_promised_to_others_is_not_free(
    pair: Pair, all_promised: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlpoffload.torch.placed.Placed.__init__", lambda *_, **__: pytest.fail("a part was placed"))
    model = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta"))
    weights = {name: torch.zeros(t.shape) for name, t in model.state_dict().items()}
    options: dict[str, Any] = {"device_map": {"": pair[1], "0": pair[0]}, "policy": all_mapped}
    with pytest.raises(HostMemoryError, match="promised to what is being pinned now"):
        offload_(model, dict.fromkeys(pair, 0), checkpoint=weights, **options)


@pytest.mark.parametrize("policy", [all_staged, all_mapped, None])
def test_memory_refused_at_each_buffer(policy: Any, pair: Pair, refuse: Callable[[int], None], tmp_path: Path) -> None:
    """Whichever buffer of whichever device: all of the module is on meta again, and what was real has its bytes."""
    reference, model = towers()
    path = saved(tmp_path, stored(reference))
    options: dict[str, Any] = {} if policy is None else {"policy": policy}
    options |= {} if policy is all_mapped else {"units": LAYERS}
    kept = {}
    for layer in (1, 4):
        model.layers[layer].a.weight = nn.Parameter(torch.full((64, 32), float(layer)))
        kept[layer] = model.layers[layer].a.weight.data_ptr()
    before, buffers, refused, handle = looks(model), pinned(), 0, None
    while handle is None:
        refuse(refused + 1)
        try:
            handle = offload_(model, both(pair), device_map=half(pair), checkpoint=path, **options)
        except HostMemoryError:
            refused += 1
        if handle is None:
            assert looks(model) == before
            for layer, pointer in kept.items():
                assert model.layers[layer].a.weight.data_ptr() == pointer
                assert same(model.layers[layer].a.weight, torch.full((64, 32), float(layer)))
            assert SplitHandle.of(model) is None
            assert pinned() == buffers
    refuse(0)
    assert refused >= (2 if policy is all_mapped else 6)
    check(model, reference, pair)


@pytest.mark.parametrize("where", ["half way through the second", "around both"])
def test_a_failure_after_tensors_were_placed(
    where: str, pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reference, model = towers()
    path = saved(tmp_path, stored(reference))
    options: dict[str, Any] = {"device_map": half(pair), "checkpoint": path, "units": LAYERS}
    before, buffers = looks(model), pinned()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        if where == "around both":
            patch.setattr(split_module, "InstalledOverParts", fail)
        else:
            watch, left = placed_module.watch, [18]  # of twelve tensors each

            def failing(tensor: Tensor) -> None:
                left[0] -= 1
                if left[0] == 0:
                    fail()
                watch(tensor)

            patch.setattr(placed_module, "watch", failing)
        with pytest.raises(RuntimeError, match="planted"):
            offload_(model, both(pair), **options)
    assert looks(model) == before
    assert all("forward" not in inside.__dict__ for inside in model.modules())
    assert SplitHandle.of(model) is None
    assert pinned() == buffers
    offload_(model, both(pair), **options)
    check(model, reference, pair)


def test_host_memory_that_the_second_device_refuses(two_cpus: Callable[..., SecondCpu], tmp_path: Path) -> None:
    two_cpus(host_limit_nbytes=30_000)
    reference, model = towers()
    before, buffers = looks(model), pinned()
    options: dict[str, Any] = {"checkpoint": saved(tmp_path, stored(reference)), "units": LAYERS}
    with pytest.raises(HostMemoryError):
        offload_(model, both(("cpu", "cpu:1")), device_map=half(), **options)
    assert looks(model) == before
    assert pinned() == buffers
    options["pageable"] = "if_refused"
    handle = offload_(model, both(("cpu", "cpu:1")), device_map=half(), **options)
    first, second = handle.report(link=False).values()
    assert first.pinned_nbytes > 0 == second.pinned_nbytes
    assert second.pageable_because
    check(model, reference, ("cpu", "cpu:1"))
    with pytest.raises(OffloadError, match="offloaded already"):
        offload_(model, both(("cpu", "cpu:1")), device_map=half(), **options)
