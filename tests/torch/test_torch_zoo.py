"""Every shape of model, at small and large budgets: bitwise what the resident model gives, and really offloaded."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

torch = pytest.importorskip("torch")

from models import CASES, Case, assert_same, case_of, distinct_nbytes, offload_at, run, same, tensors_of  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.planning import Placement, all_mapped, all_staged  # noqa: E402
from dlpoffload.spec import ALIGNMENT  # noqa: E402
from dlpoffload.torch import offload_  # noqa: E402
from dlpoffload.torch.staging import StagedForward  # noqa: E402

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FITS_ONLY_WHOLE = {"huge_linear", "recurrent"}
"""Their largest leaf is most of the model, and a leaf is staged whole."""


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    context: AbstractContextManager[object] = MODES[name]()
    with context:
        yield


def layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_leaf


@pytest.mark.parametrize("percent", [10, 25, 60, 110])
@cases
def test_zoo(case: Case, percent: int, device: str) -> None:
    module = case.model()
    reference = copy.deepcopy(module).to(device)
    total = distinct_nbytes(module)
    budget = total * percent // 100 + (4096 if percent > 100 else 0)
    before = {name: (tensor, layout(tensor)) for name, tensor in tensors_of(module).items()}
    attributes = {path: set(inside.__dict__) for path, inside in module.named_modules()}
    alive = live_buffers()
    handle = offload_at(module, budget, device)
    for name in MODES if percent in (10, 60) else ("no_grad",):
        with mode(name):
            for seed in range(3):
                inputs = case.inputs(seed, device)
                assert_same(run(module, inputs), run(reference, inputs), f"{name}, call {seed}")

    # the report says what was done, and it was done
    plan, report = handle.plan, handle.report(link=False)
    parts = {placement: plan.nbytes(placement) for placement in Placement}
    assert sum(parts.values()) == plan.total_nbytes == total
    assert plan.device_nbytes == report.device_nbytes <= plan.device_budget
    on_host = parts[Placement.HOST_MAPPED] + parts[Placement.HOST_STAGED]
    assert on_host <= report.pinned_nbytes <= on_host + ALIGNMENT * len(plan.specs)
    assert (on_host == 0) == (percent > 100 or (case.name in FITS_ONLY_WHOLE and parts[Placement.HOST_MAPPED] == 0))
    assert (report.stats.copies > 0) == bool(plan.streamed_units)
    assert bool(plan.streamed_units) == (percent < 100 and case.name not in FITS_ONLY_WHOLE)
    assert report.stats.mapped_runs == 0
    assert report.stats.host_waits == 0
    assert report.adopted == report.replaced == ()
    assert report.aliased_outputs == 0

    # weights stay weights
    for name, tensor in reference.state_dict().items():
        assert same(module.state_dict()[name], tensor), name
    handle.restore_()
    after = tensors_of(module)
    for name, tensor in tensors_of(reference).items():
        assert after[name] is before[name][0], name
        assert layout(after[name]) == before[name][1], name
        assert same(after[name], tensor), name
    assert {path: set(inside.__dict__) for path, inside in module.named_modules()} == attributes
    if module.training:
        module.eval(), reference.eval()
    inputs = case.inputs(9)
    assert_same(run(module, inputs), run(reference.to("cpu"), inputs), "restored")
    del handle, plan, report
    gc.collect()
    lifetime.drain()
    assert live_buffers() == alive


@cases
def test_zoo_all_mapped_takes_no_device_memory(case: Case, device: str) -> None:
    module = case.model()
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, 0, device=device, policy=all_mapped)
    with torch.no_grad():
        for seed in range(2):
            inputs = case.inputs(seed, device)
            assert_same(run(module, inputs), run(reference, inputs), f"call {seed}")
    report = handle.report(link=False)
    assert report.device_nbytes == 0
    assert handle.plan.nbytes(Placement.HOST_MAPPED) == distinct_nbytes(module)
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[name], tensor), name


@cases
def test_zoo_all_staged(case: Case, device: str) -> None:
    module = case.model()
    reference = copy.deepcopy(module).to(device)
    # a slot for each tensor that the root holds itself: it is leased as long as the root runs
    slots = 2 + sum(tensor.numel() > 0 for tensor in [*module._parameters.values(), *module._buffers.values()])
    handle = offload_(module, "1GiB", device=device, policy=all_staged, slots=slots)
    with torch.no_grad():
        for seed in range(3):
            inputs = case.inputs(seed, device)
            assert_same(run(module, inputs), run(reference, inputs), f"call {seed}")
    report = handle.report(link=False)
    assert handle.plan.nbytes(Placement.HOST_STAGED) == distinct_nbytes(module)
    assert report.stats.copies > 0
    assert report.stats.mapped_runs == 0
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[name], tensor), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["decoder_tied", "unet", "mixture", "recurring", "batch_norm", "odd_tensors"])
def test_zoo_on_an_adversarial_device(name: str, seed: int, cpu_driver) -> None:
    cpu_driver(adversary=seed)
    case = case_of(name)
    module = case.model()
    reference = copy.deepcopy(module)
    handle = offload_at(module, distinct_nbytes(module) // 4, "cpu")
    with torch.no_grad():
        for call in range(3):
            inputs = case.inputs(call)
            assert_same(run(module, inputs), run(reference, inputs), f"call {call}")
    assert handle.report(link=False).stats.mapped_runs == 0
    for key, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[key], tensor), key
    handle.restore_()
    for key, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[key], tensor), key


# ------------------------------------------------------------------------------------------ planted faults


@pytest.mark.parametrize("name", ["decoder", "unet", "mixture", "batch_norm"])
def test_a_fault_in_a_slot_changes_the_output(name: str, device: str) -> None:
    case = case_of(name)
    module = case.model().eval()
    handle = offload_at(module, distinct_nbytes(module) // 4, device)
    inputs = case.inputs(0, device)
    with torch.no_grad():
        good = run(module, inputs)
        stager = handle._placed.stager
        entered = next(forward for forward in handle._installed.forwards if isinstance(forward, StagedForward))
        inner = entered.inner

        def spoiled(*args: object, **kwargs: object) -> object:
            (lease,) = entered.unit.active
            stager.slots[lease.slot.index].fill_(0x3C)
            return inner(*args, **kwargs)

        entered.inner = spoiled
        assert not same(good, run(module, inputs))


@pytest.mark.parametrize("name", ["decoder", "unet", "vision_language", "rotated"])
def test_a_fault_in_the_host_bytes_changes_the_output(name: str, device: str) -> None:
    case = case_of(name)
    module = case.model()
    handle = offload_at(module, distinct_nbytes(module) // 4, device)
    inputs = case.inputs(0, device)
    with torch.no_grad():
        good = run(module, inputs)
        unit = handle.plan.streamed_units[0]
        key = max(unit.tensors, key=lambda tensor: handle.plan.specs[tensor].nbytes)
        handle._placed.store.host_view(key).memoryview()[:] = b"\x3c" * handle.plan.specs[key].nbytes
        handle.changed(key)
        assert not same(good, run(module, inputs))
