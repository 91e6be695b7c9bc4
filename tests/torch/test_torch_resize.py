"""Giving device memory away and taking it back: another budget, sleep and wake; the bits stay those of resident."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import CASES, Case, Tower, assert_same, distinct_nbytes, run, same, tensors_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.errors import (  # noqa: E402
    ClosedError,
    HostMemoryError,
    OffloadError,
    PlanError,
    SlotError,
    SpecError,
)
from dlpoffload.planning import Placement, all_mapped  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402
from dlpoffload.torch import offloading as offloading_module  # noqa: E402
from dlpoffload.torch import placed as placed_module  # noqa: E402
from dlpoffload.torch.offloading import Offloading  # noqa: E402
from dlpoffload.torch.tree import collect  # noqa: E402

SOME = [case for case in CASES if case.name in ("decoder_tied", "encoder_decoder", "mixture", "odd_tensors", "unet")]
some = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)


def pinned_nbytes() -> int:
    gc.collect()
    lifetime.drain()
    return sum(nbytes for kind, nbytes in live_buffers() if kind == "pinned")


def tower(device: str, budget: int | str = "180KiB", **options: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    torch.manual_seed(5)
    module = Tower(8, 48)
    reference = copy.deepcopy(module).to(device)
    return module, reference, offload_(module, budget, device=device, units=["layers.*"], **options)


def vector(seed: int, device: str) -> Tensor:
    return torch.randn(3, 48, generator=torch.Generator().manual_seed(seed)).to(device)


def check(module: nn.Module, reference: nn.Module, device: str) -> None:
    with torch.no_grad():
        for seed in range(3):
            assert same(module(vector(seed, device)), reference(vector(seed, device)))


@some
def test_any_budget_after_any_other(case: Case, device: str) -> None:
    module, reference = case.model().eval(), case.model().eval().to(device)
    total = distinct_nbytes(module)
    handle = offload_(module, int(0.6 * total), device=device)
    for part in (0.4, 1.3, 0.9, 0.6, 2.0, 0.5):
        try:
            handle.resize_(int(part * total))
        except PlanError as error:
            handle.resize_(error.smallest_budget or 0)
        assert handle.plan.device_nbytes <= handle.plan.device_budget
        with torch.no_grad():
            for seed in (0, 1):
                inputs = case.inputs(seed, device)
                assert_same(run(module, inputs), run(reference, inputs), f"{part}, seed {seed}")
        report = handle.report(link=False)
        assert report.plan is handle.plan
        assert report.pinned_nbytes >= handle.plan.total_nbytes - handle.plan.nbytes(Placement.DEVICE)
        assert report.stats.host_waits == 0
    handle.restore_()
    wanted = tensors_of(case.model())
    assert all(same(tensor.cpu(), wanted[name]) for name, tensor in tensors_of(module).items())


@some
def test_sleep_and_wake(case: Case, device: str) -> None:
    module, reference = case.model().eval(), case.model().eval().to(device)
    handle = offload_(module, int(1.1 * distinct_nbytes(module)) // 2, device=device)
    before = handle.plan
    for seed in range(3):
        inputs = case.inputs(seed, device)
        with torch.no_grad():
            assert_same(run(module, inputs), run(reference, inputs))
        handle.sleep()
        handle.sleep()  # idempotent
        assert handle.asleep
        assert handle.plan.device_nbytes == handle.plan.nbytes(Placement.DEVICE) == 0
        assert "asleep" in str(handle.report(link=False))
        with pytest.raises(OffloadError, match="sleeps"):
            run(module, inputs)
        wanted = tensors_of(reference)
        assert all(same(tensor.cpu(), wanted[name].cpu()) for name, tensor in tensors_of(module).items())
        handle.wake()
        handle.wake()
        assert not handle.asleep
        assert handle.plan == before
    with torch.no_grad():
        assert_same(run(module, inputs), run(reference, inputs))
    assert handle.report(link=False).stats.copies > 0 or not before.streamed_units


def test_streamed_slabs_stay_what_they_are(device: str) -> None:
    """Neither sleeping nor resizing copies what is on the host before and after."""
    module, reference, handle = tower(device, "200KiB")
    streamed = [name for unit in handle.plan.streamed_units for name in unit.tensors]
    resident = handle.plan.names(Placement.DEVICE)
    assert streamed
    assert resident
    parameters = dict(module.named_parameters())
    homes = {name: parameters[name].data_ptr() for name in streamed}
    weights = handle.plan.total_nbytes
    used = pinned_nbytes()
    handle.sleep()
    assert {name: parameters[name].data_ptr() for name in streamed} == homes
    assert used < pinned_nbytes() <= weights + 256 * len(parameters)
    handle.wake()
    assert {name: parameters[name].data_ptr() for name in streamed} == homes
    assert pinned_nbytes() == used
    handle.resize_("160KiB")
    now = {name for unit in handle.plan.streamed_units for name in unit.tensors}
    assert len(now) > len(streamed)
    both = now & set(streamed)
    assert both
    assert {name: parameters[name].data_ptr() for name in both} == {name: homes[name] for name in both}
    assert pinned_nbytes() > used
    handle.resize_("200KiB")
    assert pinned_nbytes() == used
    check(module, reference, device)


def test_writes_while_asleep_are_there_afterwards(device: str) -> None:
    module, reference, handle = tower(device, "200KiB")
    handle.sleep()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(reference.named_parameters()):
            parameter.mul_(1.5)
            if index % 3 == 0:
                handle.update(name, parameter)
            elif index % 3 == 1:
                module.get_parameter(name).copy_(parameter)
    state = module.state_dict()
    left = {name: value for index, (name, value) in enumerate(reference.state_dict().items()) if index % 3 == 2}
    module.load_state_dict(left, strict=False)
    if device != "cpu":
        torch.cuda.synchronize()
    assert all(same(state[name].cpu(), value.cpu()) for name, value in reference.state_dict().items())
    handle.wake()
    check(module, reference, device)


def test_a_sleeping_module_is_resized_when_it_wakes(device: str) -> None:
    module, reference, handle = tower(device, "200KiB")
    handle.sleep()
    handle.resize_("160KiB")
    assert handle.plan.device_nbytes == 0
    with pytest.raises(PlanError):
        handle.resize_("1KiB")
    handle.wake()
    assert handle.plan.device_budget == 160 << 10
    check(module, reference, device)


def test_what_a_sleeping_module_refuses(device: str) -> None:
    module, reference, handle = tower(device, "200KiB")
    handle.sleep()
    for call in (handle.refresh_, lambda: copy.deepcopy(module)):
        with pytest.raises(OffloadError, match="wake"):
            call()
    with pytest.raises(OffloadError, match="sleeps"):
        module.layers[0](vector(0, device))
    handle.restore_()
    assert not handle.asleep
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    check(module, reference.cpu(), "cpu")
    for call in (handle.sleep, handle.wake, lambda: handle.resize_("1GiB")):
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize("budget", ["1KiB", "many", -1])
def test_a_budget_that_cannot_be_changes_nothing(device: str, budget: Any) -> None:
    module, reference, handle = tower(device)
    before = handle.plan
    with pytest.raises((PlanError, SpecError)):
        handle.resize_(budget)
    assert handle.plan is before
    check(module, reference, device)


def test_refused_inside_of_a_unit(device: str) -> None:
    module, reference, handle = tower(device)
    calls: list[Callable[[], None]] = [handle.sleep, lambda: handle.resize_("240KiB")]
    seen = []

    def inside(*_: Any) -> None:
        for call in calls:
            with pytest.raises(SlotError, match="running"):
                call()
            seen.append(call)

    hook = module.layers[3].a.register_forward_hook(inside)
    check(module, reference, device)
    hook.remove()
    assert len(seen) == 6
    handle.sleep()
    handle.wake()
    check(module, reference, device)


@pytest.mark.parametrize("act", ["resize", "sleep", "refresh"])
def test_no_unit_runs_while_the_module_is_looked_over(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the addresses of slots, tensors would seem to share bytes."""
    module, reference, handle = tower("cpu", "200KiB")
    found: list[Any] = []
    started: list[threading.Thread] = []

    def call() -> None:
        try:
            with torch.no_grad():
                found.append(module(vector(0, "cpu")))
        except (ClosedError, OffloadError) as error:
            found.append(error)

    def looking(*args: Any, **options: Any) -> Any:
        if not started:
            started.append(threading.Thread(target=call))
            started[0].start()
            started[0].join(0.3)
            assert started[0].is_alive()
        return collect(*args, **options)

    with monkeypatch.context() as patch, contextlib.suppress(SlotError):  # by then it may run
        patch.setattr(offloading_module, "collect", looking)
        {"resize": lambda: handle.resize_("240KiB"), "sleep": handle.sleep, "refresh": handle.refresh_}[act]()
    started[0].join()
    with torch.no_grad():
        assert isinstance(found[0], OffloadError | ClosedError) or same(found[0], reference(vector(0, "cpu")))
    handle.wake()
    check(module, reference, "cpu")


ACTS: dict[str, Callable[[OffloadHandle], Any]] = {
    "resized": lambda handle: handle.resize_("240KiB"),
    "put to sleep": lambda handle: handle.sleep(),
    "woken": lambda handle: handle.wake(),
    "refreshed": lambda handle: handle.refresh_(),
    "restored": lambda handle: handle.restore_(),
}


@pytest.mark.parametrize("what", ACTS)
@pytest.mark.parametrize("policy", [None, all_mapped])
def test_nothing_is_moved_under_the_call_of_another_thread(policy: Any, what: str) -> None:
    # Between two units, or where nothing is staged, none of them is running.
    torch.manual_seed(5)
    module = Tower(8, 48)
    reference = copy.deepcopy(module)
    handle = offload_(module, "200KiB", device="cpu", **({"policy": policy} if policy else {"units": ["layers.*"]}))
    inside, go_on = threading.Event(), threading.Event()
    found: list[Any] = []

    def wait(layer: nn.Module, inputs: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    def call() -> None:
        with torch.no_grad():
            found.append(module(vector(0, "cpu")))

    hook = module.layers[3].register_forward_pre_hook(wait)
    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(SlotError, match=f"^1 other threads are inside of a call .* cannot be {what};"):
        ACTS[what](handle)
    go_on.set()
    thread.join()
    hook.remove()
    with torch.no_grad():
        assert same(found[0], reference(vector(0, "cpu")))
    ACTS[what](handle)
    if not handle.restored:
        handle.wake()
    check(module, reference, "cpu")


@pytest.mark.parametrize("at", range(5))
def test_a_restoring_that_memory_is_refused_for_leaves_nothing_behind(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, reference, handle = tower("cpu", "200KiB")
    left = at
    made = placed_module.empty_bytes

    def refused(nbytes: int, device: Any) -> Tensor:
        nonlocal left
        if left == 0:
            raise torch.OutOfMemoryError("refused")
        left -= 1
        return made(nbytes, device)

    with monkeypatch.context() as patch:
        patch.setattr(placed_module, "empty_bytes", refused)
        with pytest.raises(torch.OutOfMemoryError):
            handle.restore_()
    assert not [name for name, inside in module.named_modules() if "forward" in inside.__dict__]
    check(module, reference, "cpu")
    handle.restore_()
    check(module, reference, "cpu")
    offload_(module, "200KiB", device="cpu", units=["layers.*"])
    check(module, reference, "cpu")


@pytest.mark.parametrize("pageable", ["never", "always"])
def test_calls_that_begin_while_tensors_are_moved_wait(pageable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, reference, handle = tower("cpu", "200KiB", pageable=pageable)
    found: list[Any] = []
    started: list[threading.Thread] = []
    move = Offloading.move

    def call(called: Callable[[Tensor], Tensor], seed: int) -> None:
        with torch.no_grad():
            found.append((seed, called(vector(seed, "cpu"))))

    def moving(self: Offloading, *args: Any, **options: Any) -> Any:
        for seed, called in enumerate(on_the_way):
            started.append(threading.Thread(target=call, args=(called, seed)))
            started[-1].start()
        placed = move(self, *args, **options)
        time.sleep(0.2)
        assert not found
        return placed

    # What a caller has looked up before it is taken off.
    on_the_way = [module, module.forward, module.layers[2].forward]
    monkeypatch.setattr(Offloading, "move", moving)
    handle.resize_("260KiB")
    for thread in started:
        thread.join()
    with torch.no_grad():
        for seed, output in found:
            assert same(output, [reference, reference, reference.layers[2]][seed](vector(seed, "cpu")))
    assert sorted(seed for seed, _ in found) == [0, 1, 2]
    check(module, reference, "cpu")


@pytest.mark.parametrize("act", ["resize", "sleep", "wake"])
@pytest.mark.parametrize("at", range(6))
def test_memory_that_is_refused_changes_nothing(
    device: str, act: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, reference, handle = tower(device, "200KiB")
    if act == "wake":
        handle.sleep()
    before = handle.plan
    left = at

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise MemoryError("refused")
            return original(*args, **kwargs)

        return call

    used = pinned_nbytes()
    with monkeypatch.context() as patch:
        patch.setattr(placed_module, "empty_bytes", refusing(placed_module.empty_bytes))
        patch.setattr(placed_module, "from_dlpack", refusing(placed_module.from_dlpack))
        acts = {"resize": lambda: handle.resize_("240KiB"), "sleep": handle.sleep, "wake": handle.wake}
        try:
            acts[act]()
            assert left >= 0
            refused = False
        except MemoryError:
            refused = True
    if refused:
        assert handle.plan == before
        assert handle.asleep == (act == "wake")
        assert pinned_nbytes() == used
        if act == "wake":
            with pytest.raises(OffloadError, match="sleeps"):
                module(vector(0, device))
        acts[act]()
    if act == "sleep":
        handle.wake()
    check(module, reference, device)


def _append(module: nn.Module) -> None:
    torch.manual_seed(9)
    device = next(iter(module.parameters())).device
    module.layers.append(copy.deepcopy(Tower(1, 48).layers[0]).to(device))


def _remove(module: nn.Module) -> None:
    del module.layers[2]


def _double(module: nn.Module) -> None:
    module.load_state_dict({name: value.double() for name, value in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("when", ["before", "asleep"])
@pytest.mark.parametrize("become", [_append, _remove, _double])
def test_a_module_that_became_another_sleeps_and_wakes(
    become: Callable[[nn.Module], None], when: str, device: str
) -> None:
    module, reference, handle = tower(device, "200KiB")
    become(reference)
    if when == "before":
        become(module)
    handle.sleep()
    if when == "asleep":
        become(module)
    handle.wake()
    assert set(handle.plan.specs) == {name for name, _ in reference.named_parameters()}
    x = vector(0, device).to(next(reference.parameters()).dtype)
    with torch.no_grad():
        assert same(module(x), reference(x))
    assert handle.report(link=False).stats.copies > 0


@pytest.mark.parametrize("at", range(6))
def test_a_module_that_became_another_is_callable_after_refused_memory(
    at: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, reference, handle = tower(device, "200KiB")
    for each in (module, reference):
        _append(each)
    real, left = placed_module.from_dlpack, at

    def refusing(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise MemoryError("refused")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(placed_module, "from_dlpack", refusing)
        with pytest.raises(MemoryError):
            handle.sleep()
    assert not handle.asleep
    check(module, reference, device)
    handle.sleep()
    handle.wake()
    check(module, reference, device)


def test_backward_after_a_sleep_is_refused_or_right(device: str) -> None:
    module, reference, handle = tower(device)
    module.requires_grad_(False)
    reference.requires_grad_(False)
    x, y = vector(0, device).requires_grad_(), vector(0, device).requires_grad_()
    found, wanted = module(x), reference(y)
    handle.sleep()
    handle.wake()
    try:
        found.sum().backward()
    except OffloadError:
        return
    wanted.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert same(x.grad, y.grad)


def test_subclasses_of_tensors_sleep_too(device: str) -> None:
    from test_torch_subclasses import Stack, to, vector

    torch.manual_seed(0)
    module = Stack()
    reference = to(copy.deepcopy(module), device)
    handle = offload_(module, "40KiB", device=device, units=["layers.*"])
    for _ in range(2):
        with torch.no_grad():
            assert same(module(vector(0, device)), reference(vector(0, device)))
        handle.sleep()
        handle.wake()
        handle.resize_("60KiB")
    with torch.no_grad():
        assert same(module(vector(0, device)), reference(vector(0, device)))


@pytest.mark.parametrize("act", ["sleep", "resize", "wake"])
def test_a_host_without_a_page_to_spare(
    act: str, cpu_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back needs no more pinned memory than there was: what was tried is let go of before."""
    layer = 40960  # pinned, in whole pages, of 37568 bytes
    cpu_driver(host_limit_nbytes=8 * layer if act == "wake" else 5 * layer)
    module, reference, handle = tower("cpu", 4 * 37632 + 2 * 37632)
    assert len(handle.plan.streamed_units) == 4
    move, pinned = Offloading.move, []

    def moving(self: Offloading, *args: Any, back: bool = False) -> Any:
        if back:
            pinned.append(pinned_nbytes())
        return move(self, *args, back=back)

    monkeypatch.setattr(Offloading, "move", moving)
    before, used = handle.plan, pinned_nbytes()
    if act == "wake":
        handle.sleep()
        asleep = handle.plan
        left = 2 + 4 * 2  # the ring and two layers find room on the device

        def refusing(nbytes: int, where: Any) -> Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError("refused")
            return empty_bytes(nbytes, where)

        empty_bytes = placed_module.empty_bytes
        with monkeypatch.context() as patch:
            patch.setattr(placed_module, "empty_bytes", refusing)
            with pytest.raises(MemoryError):
                handle.wake()
        assert handle.asleep
        assert handle.plan == asleep
        handle.wake()
    else:
        with pytest.raises(HostMemoryError):
            handle.sleep() if act == "sleep" else handle.resize_(2 * 37632)
        assert not handle.asleep
    assert handle.plan == before
    assert pinned_nbytes() == used
    assert len(pinned) == 1
    assert pinned[0] <= (8 * 37568 if act == "wake" else used)
    check(module, reference, "cpu")
