"""Modes: placements forced on everything, pageable memory, devices that cannot map; and options without an effect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import CASES, Case, Tower, assert_same, case_of, distinct_nbytes, run, same, tensors_of  # noqa: E402

import dlpoffload as dlpo  # noqa: E402
from dlpoffload import memory as memory_module  # noqa: E402
from dlpoffload.driver.cpu import CpuDriver  # noqa: E402
from dlpoffload.errors import HostMemoryError, PlanError  # noqa: E402
from dlpoffload.planning import CostModel, Placement, all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

SOME = [case for case in CASES if case.name in ("decoder_tied", "encoder_decoder", "mixture", "odd_tensors", "unet")]
some = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)


def check(case: Case, device: str, offload: Callable[[Any], OffloadHandle]) -> dict[str, Any]:
    """Offload, compare with resident bit for bit, restore; gives facts of the report before the restore."""
    module, reference = case.model().eval(), case.model().eval().to(device)
    handle = offload(module)
    with torch.no_grad():
        for seed in (0, 1, 2):
            inputs = case.inputs(seed, device)
            assert_same(run(module, inputs), run(reference, inputs), f"seed {seed}")
    report = handle.report(link=False)
    facts = {
        "pinned": report.pinned_nbytes,
        "pageable": report.pageable_nbytes,
        "copies": report.stats.copies,
        "waits": report.stats.host_waits,
        "placements": {placement: handle.plan.nbytes(placement) for placement in Placement},
        "text": str(report),
    }
    handle.restore_()
    wanted = tensors_of(case.model())
    assert all(same(tensor.cpu(), wanted[name]) for name, tensor in tensors_of(module).items())
    return facts


@some
def test_everything_mapped(case: Case, device: str) -> None:
    facts = check(case, device, lambda module: offload_(module, 0, device=device, policy=all_mapped))
    assert facts["placements"][Placement.HOST_MAPPED] == sum(facts["placements"].values()) > 0
    assert (facts["copies"], facts["pageable"]) == (0, 0)


@some
def test_everything_staged(case: Case, device: str) -> None:
    facts = check(case, device, lambda module: offload_(module, "64MiB", device=device, policy=all_staged, slots=4))
    assert facts["placements"][Placement.HOST_STAGED] == sum(facts["placements"].values())
    assert facts["copies"] > 0
    assert facts["waits"] == 0


@some
def test_pageable_by_choice(case: Case, device: str) -> None:
    budget = max(distinct_nbytes(case.model()) * 7 // 10, 400_000)
    before = dlpo.pinned_nbytes()

    def offload(module: Any) -> OffloadHandle:
        handle = offload_(module, budget, device=device, pageable="always", stage_unmapped=True)
        assert dlpo.pinned_nbytes() == before, "nothing is pinned"
        return handle

    facts = check(case, device, offload)
    assert facts["placements"][Placement.HOST_MAPPED] == 0
    assert facts["pinned"] == 0
    assert facts["pageable"] >= facts["placements"][Placement.HOST_STAGED] > 0
    assert "asked for" in facts["text"]


class Refusing:
    """Pinned memory is refused from the call number `at` on; pageable memory is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        allocate = memory_module.HostBuffer.allocate.__func__

        def limited(cls: Any, nbytes: int, *, pinned: bool = True, **options: Any) -> Any:
            if pinned:
                if not self.left:
                    raise HostMemoryError("the test has no more", nbytes=nbytes)
                self.left -= 1
            return allocate(cls, nbytes, pinned=pinned, **options)

        monkeypatch.setattr(memory_module.HostBuffer, "allocate", classmethod(limited))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_pageable_where_pinning_is_refused(at: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("decoder_tied")
    budget = distinct_nbytes(case.model()) * 7 // 10
    with monkeypatch.context() as patch:
        Refusing(patch, at)
        module, before = case.model(), tensors_of(case.model())
        with pytest.raises(HostMemoryError, match="the test has no more"):
            offload_(module, budget, device=device)
        assert OffloadHandle.of(module) is None
        assert all(same(tensor, before[name]) for name, tensor in tensors_of(module).items())
    with monkeypatch.context() as patch:
        Refusing(patch, at)
        facts = check(
            case,
            device,
            lambda module: offload_(module, budget, device=device, pageable="if_refused", stage_unmapped=True),
        )
    assert facts["pinned"] == 0
    assert facts["pageable"] > 0
    assert "the test has no more" in facts["text"]


def test_if_refused_pins_where_it_can(device: str) -> None:
    case = case_of("decoder_tied")
    budget = distinct_nbytes(case.model()) // 2
    facts = check(case, device, lambda module: offload_(module, budget, device=device, pageable="if_refused"))
    assert facts["pageable"] == 0
    assert facts["pinned"] > 0


@some
def test_stage_where_the_device_cannot_map(case: Case, cpu_driver: Callable[..., CpuDriver]) -> None:
    cpu_driver(map_host_memory=False)
    budget = max(distinct_nbytes(case.model()) * 7 // 10, 400_000)
    with pytest.raises(PlanError, match=r"cannot map host memory.*stage_unmapped=True"):
        offload_(case.model(), 0, device="cpu", policy=all_mapped)
    facts = check(case, "cpu", lambda module: offload_(module, budget, device="cpu", stage_unmapped=True))
    assert facts["placements"][Placement.HOST_MAPPED] == 0
    assert facts["copies"] > 0
    assert "the device cannot map these bytes" in facts["text"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": all_mapped, "slots": 3}, "no effect"),
        ({"policy": all_mapped, "units": ["layers.*"]}, "no effect"),
        ({"pageable": "sometimes"}, "pageable='sometimes'"),
        ({"units": ["blocks.*"]}, r'"blocks\.\*" matches none'),
        ({"slots": 0}, "slots=0"),
    ],
)
def test_options_without_an_effect(options: dict[str, Any], words: str, device: str) -> None:
    tower = Tower(3)
    with pytest.raises(PlanError, match=words):
        offload_(tower, "1MiB", device=device, **options)
    assert OffloadHandle.of(tower) is None


@some
@pytest.mark.parametrize("memory", ["coherent", "unified"])
def test_where_the_device_shares_the_hosts_memory(
    case: Case, memory: str, cpu_driver: Callable[..., CpuDriver]
) -> None:
    """GH200 and GB10: nothing is copied to be read once, and plan and report say why."""
    cpu_driver(**{"host_page_tables" if memory == "coherent" else "integrated": True})
    budget = distinct_nbytes(case.model()) // 2
    plans = []

    def offload(module: Any) -> OffloadHandle:
        handle = offload_(module, budget, device="cpu")
        plans.append(str(handle.plan))
        return handle

    facts = check(case, "cpu", offload)
    assert f"{memory} memory" in plans[0]
    assert facts["placements"][Placement.HOST_STAGED] == facts["copies"] == 0
    assert (facts["placements"][Placement.DEVICE] > 0) == (memory == "coherent")
    assert facts["placements"][Placement.DEVICE] <= budget
    with pytest.raises(PlanError, match="cannot hold"):  # staging is there for whoever asks for it
        offload_(case.model(), 0, device="cpu", policy=all_staged)


def test_rates_of_the_link_leave_what_memory_is_to_the_driver(cpu_driver: Callable[..., CpuDriver]) -> None:
    cpu_driver(host_page_tables=True)
    tower = Tower(6)
    nbytes = distinct_nbytes(tower)
    handle = offload_(tower, nbytes, device="cpu", cost=CostModel(link_gb_per_s=400.0))
    handle.resize_(nbytes // 2)
    assert handle.plan.nbytes(Placement.HOST_STAGED) == 0
    assert "coherent memory" in str(handle.plan)
    handle.restore_()
    handle = offload_(tower, nbytes // 2, device="cpu", cost=CostModel(memory="separate"), units=["layers.*"])
    assert handle.plan.nbytes(Placement.HOST_STAGED) > 0


class Vision(torch.nn.Module):
    """Blocks inside of a root with parameters of its own, and one below that with another and a shared table."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.randn(8, 32))
        self.token = torch.nn.Parameter(torch.randn(32))
        self.body = Tower(6, 32)
        self.body.scale = torch.nn.Parameter(torch.randn(32))
        self.body.shift = torch.nn.Parameter(torch.randn(32))

    def forward(self, x: Any) -> Any:
        return self.body(x + self.place + self.token)


class Scaled(Tower):
    def forward(self, x: Any) -> Any:
        return super().forward(x * self.scale + self.shift)


@pytest.mark.parametrize(
    "options", [{}, {"pageable": "always"}, {"pageable": "always", "stage_unmapped": True}], ids=str
)
def test_units_that_run_inside_of_each_other_have_a_slot_each(device: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module = Vision().requires_grad_(False)
    module.body.__class__ = Scaled
    x = torch.randn(8, 32).to(device)
    wanted = copy.deepcopy(module).to(device)(x)
    policy = {} if "stage_unmapped" in options else {"policy": all_staged}
    handle = offload_(module, "80KiB", device=device, units=["body.layers.*"], **policy, **options)
    for _ in range(3):
        assert same(module(x), wanted)
    report = handle.report(link=False)
    assert report.stats.mapped_runs == 0
    if policy:
        assert [unit.name for unit in handle.plan.streamed_units][-2:] == ["*", "body.*"]
        assert (handle.plan.at_once, handle.plan.slots) == (3, 4)


def test_too_few_slots_for_units_inside_of_each_other(device: str) -> None:
    module = Vision().requires_grad_(False)
    options: dict[str, Any] = {"device": device, "policy": all_staged, "units": ["body.layers.*"], "slots": 2}
    with pytest.raises(PlanError, match=r"3 units run inside of each other .* has 2: say slots=4"):
        offload_(module, "64KiB", pageable="always", **options)
    handle = offload_(module, "64KiB", **options)  # from mapped memory, which the report counts
    module(torch.randn(8, 32).to(device))
    assert handle.report(link=False).stats.mapped_runs > 0
