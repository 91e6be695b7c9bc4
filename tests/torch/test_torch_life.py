"""The life of an offloaded module: moved, copied, changed in shape, trained around, adapted with LoRA."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Tower, assert_same, case_of, distinct_nbytes, run, same, tensors_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from dlpoffload import errors, lifetime, memory  # noqa: E402
from dlpoffload.errors import GradientError, HostMemoryError, OffloadError, PlanError  # noqa: E402
from dlpoffload.planning import all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402


def vector(device: str, seed: int = 0) -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def pair(device: str, depth: int = 5, **options: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    tower = Tower(depth)
    reference = copy.deepcopy(tower).to(device)
    return tower, reference, offload_(tower, "1MiB", device=device, policy=all_staged, units=["layers.*"], **options)


def check(tower: nn.Module, reference: nn.Module, device: str) -> None:
    with torch.no_grad():
        for seed in (0, 1):
            assert same(tower(vector(device, seed)), reference(vector(device, seed)))


# ------------------------------------------------------------------------------------------------ moving


def test_moves_that_change_nothing_work(device: str) -> None:
    tower, reference, handle = pair(device)
    homes = [parameter.data_ptr() for parameter in tower.parameters()]
    tower.to(device).float().to(torch.float32)
    tower.layers[1].to(device)
    assert [parameter.data_ptr() for parameter in tower.parameters()] == homes
    check(tower, reference, device)
    assert handle.report(link=False).stats.mapped_runs == 0


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, lambda module: module.to("meta")])
def test_moves_that_break_the_plan_are_refused_whole(change: Any, device: str) -> None:
    tower, reference, _handle = pair(device)
    for module in (tower, tower.layers[2]):
        with pytest.raises(OffloadError, match="restore_"):
            change(module)
    check(tower, reference, device)


def test_values_changed_by_apply_reach_the_host_bytes(device: str) -> None:
    tower, reference, _handle = pair(device)
    check(tower, reference, device)
    for module in (tower, reference):
        module._apply(lambda tensor: tensor * 2)
        module.layers[3].extra = nn.Parameter(torch.ones(2, dtype=torch.float64, device=device))
        module.layers[3]._apply(lambda tensor: tensor.neg())
    check(tower, reference, device)
    assert same(tower.layers[3].extra, reference.layers[3].extra)


def test_a_restored_module_holds_no_slot_and_no_slab(device: str) -> None:
    before = memory.live_buffers()
    tower, reference, handle = pair(device)
    check(tower, reference, device)
    handle.restore_()
    gc.collect()
    lifetime.drain()
    assert memory.live_buffers() == before, "though the handle is alive"
    assert handle.restored


# ----------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("name", ["decoder_tied", "tied_everywhere", "batch_norm"])
def test_deepcopy_is_independent_and_offloaded(name: str, device: str) -> None:
    case = case_of(name)
    module, reference = case.model().eval(), case.model().eval().to(device)
    handle = offload_(module, max(distinct_nbytes(module) * 4 // 10, 300_000), device=device)
    twin = copy.deepcopy(module)
    other = OffloadHandle.of(twin)
    assert other is not None
    assert other is not handle
    assert other.plan.placements == handle.plan.placements
    inputs = case.inputs(0, device)
    with torch.no_grad():
        assert_same(run(twin, inputs), run(reference, inputs))
        for tensor in twin.parameters():
            tensor.mul_(0.5)
        assert_same(run(module, inputs), run(reference, inputs), "the original is unharmed")
    assert len(list(twin.parameters())) == len(list(module.parameters())), "ties are kept"
    handle.restore_()
    with torch.no_grad():
        run(twin, inputs)
    other.restore_()
    assert all(type(parameter) is nn.Parameter for parameter in twin.parameters())


# ------------------------------------------------------------------------------------- writes through .data


def _alias_kept(weight: nn.Parameter) -> None:
    alias = weight.data
    alias.add_(1)


WRITES = {
    "iadd": lambda weight: setattr(weight, "data", weight.data.add_(1)),
    "new": lambda weight: setattr(weight, "data", weight.data + 1),
    "item": lambda weight: weight.data.__setitem__(0, 3.0),
    "mul_": lambda weight: weight.data.mul_(1.5),
    "alias": _alias_kept,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("slots", [2, 5])
def test_writes_through_data_are_seen(write: Any, slots: int, device: str) -> None:
    tower, reference, handle = pair(device, slots=slots)
    check(tower, reference, device)
    for layer in (0, 3, 4):
        for module in (tower, reference):
            write(module.layers[layer].a.weight)
        check(tower, reference, device)
    handle.restore_()
    check(tower.to(device), reference, device)


def test_an_alias_kept_from_an_earlier_step_needs_a_word(device: str) -> None:
    tower, reference, handle = pair(device)
    aliases = [module.layers[3].a.weight.data for module in (tower, reference)]
    check(tower, reference, device)
    check(tower, reference, device)  # by now the read of .data is forgotten
    for alias in aliases:
        alias.add_(1)
    handle.changed("layers.3.a.weight")
    check(tower, reference, device)


# --------------------------------------------------------------------------------------------- refreshing


def _repack(module: nn.Module, device: str) -> None:
    torch.manual_seed(7)
    module.layers[1].a = nn.Linear(32, 96).to(device)
    module.layers[1].b = nn.Linear(96, 32).to(device)
    module.layers[2].a.weight = nn.Parameter(torch.randn(64, 32).to(device))
    del module.layers[4]
    module.layers.insert(0, copy.deepcopy(Tower(1).layers[0]).to(device))


def test_refresh_takes_in_what_the_module_became(device: str) -> None:
    tower, reference, handle = pair(device)
    check(tower, reference, device)
    for module in (tower, reference):
        _repack(module, device)
    handle.refresh_()
    check(tower, reference, device)
    assert set(handle.plan.specs) == set(tensors_of(tower))
    report = handle.report(link=False)
    assert report.stats.copies > 0
    assert report.replaced == ()
    handle.restore_()
    check(tower.to(device), reference, device)


def test_refresh_that_cannot_be_planned_changes_nothing(device: str) -> None:
    tower, reference, handle = pair(device)
    plan = handle.plan
    tower.layers[0].huge = nn.Parameter(torch.zeros(1 << 20))  # its unit is larger than the budget
    with pytest.raises(PlanError):
        handle.refresh_()
    assert handle.plan is plan
    del tower.layers[0].huge
    check(tower, reference, device)


def test_refresh_without_memory_leaves_the_module_restored(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, reference, handle = pair(device)
    _repack(tower, device)
    _repack(reference, device)

    def refused(*args: Any, **options: Any) -> Any:
        raise HostMemoryError("no", nbytes=1)

    with monkeypatch.context() as patch:
        patch.setattr(memory.HostBuffer, "allocate", refused)
        with pytest.raises(HostMemoryError):
            handle.refresh_()
    assert handle.restored
    assert OffloadHandle.of(tower) is None
    check(tower.to(device), reference, device)


# ----------------------------------------------------------------------------------------------- gradients


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


def _grads(module: nn.Module, x: Tensor, how: str) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    y = x
    for layer in module.layers:
        if how == "outside":
            y = checkpoint(layer, y, use_reentrant=False)
        elif how == "reentrant":
            y = checkpoint(layer, y, use_reentrant=True)
        else:
            y = layer(y)
        y = y * module.adapter
    y.square().sum().backward()
    assert x.grad is not None
    adapter = module.adapter.grad.clone()
    module.adapter.grad = None
    return [x.grad, adapter]


@pytest.mark.parametrize("how", ["plain", "outside", "reentrant"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_gradients_to_inputs_and_adapters(how: str, slots: int, device: str) -> None:
    tower, reference, handle = pair(device, depth=7, slots=slots)
    _freeze(tower, reference)
    for module in (tower, reference):
        module.adapter = nn.Parameter(torch.linspace(0.5, 1.5, 32, device=device))
    for seed in (0, 1):
        found, wanted = (_grads(module, vector(device, seed), how) for module in (tower, reference))
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    report = handle.report(link=False)
    assert report.stats.copies >= 2 * 7, "backward stages units again"
    assert report.stats.host_waits == 0


def test_a_gradient_for_an_offloaded_parameter_is_refused_before_any(device: str) -> None:
    tower, _reference, _handle = pair(device)
    tower.late = nn.Parameter(torch.ones(32, device=device))
    with pytest.raises(GradientError, match=r'"layers\.\d.*requires_grad_\(False\)'):
        tower(vector(device) * tower.late).sum().backward()
    with pytest.raises(GradientError, match="requires_grad_"):
        tower.layers[2](vector(device)).sum().backward()
    with pytest.raises(GradientError, match=r"layers\.1\.a\.weight"):
        torch.autograd.grad(tower(vector(device)).sum(), tower.layers[1].a.weight)
    assert all(parameter.grad is None for parameter in tower.parameters())
    x = vector(device).requires_grad_(True)
    (gradient,) = torch.autograd.grad(tower(x).sum(), x)  # asks for none of the parameters'
    assert gradient.abs().sum() > 0
    assert issubclass(errors.GradientError, RuntimeError)


# ---------------------------------------------------------------------------------------------------- LoRA


def _adapted(module: nn.Module, seed: int, name: str = "default") -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"], init_lora_weights=False)
    if isinstance(module, peft.PeftModel):
        module.add_adapter(name, config)
        return module
    return peft.get_peft_model(module, config, adapter_name=name)


def test_lora_attach_merge_swap(device: str) -> None:
    """Attached, merged, unmerged and swapped, an adapter computes what it does on resident weights."""
    tower, reference, handle = pair(device)
    tower.config, reference.config = {}, {}
    both = [_adapted(module, 3).to(device) for module in (tower, reference)]
    check(both[0], both[1], device)
    for module in both:
        module.merge_adapter()
    check(both[0], both[1], device)
    for module in both:
        module.unmerge_adapter()
    check(both[0], both[1], device)
    for module in both:
        _adapted(module, 4, "second").to(device)
        module.set_adapter("second")
    check(both[0], both[1], device)
    with both[0].disable_adapter(), both[1].disable_adapter():
        check(both[0], both[1], device)
    for module in both:
        module.delete_adapter("default")
    check(both[0], both[1], device)
    gradients = []
    for module in both:
        x = vector(device).requires_grad_(True)
        module(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for n, p in module.named_parameters() if "lora_" in n and p.requires_grad)])
    assert len(gradients[0]) > 2
    assert all(same(a, b) for a, b in zip(*gradients, strict=True))
    assert handle.report(link=False).stats.copies > 0


def test_lora_attached_before(device: str) -> None:
    tower = Tower(5)
    tower.config = {}
    module = _adapted(tower, 3)
    reference = copy.deepcopy(module).to(device)
    offload_(module, "1MiB", device=device, policy=all_staged, units=["base_model.model.layers.*"])
    check(module, reference, device)
    for one in (module, reference):
        one.merge_adapter()
    check(module, reference, device)
