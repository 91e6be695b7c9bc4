"""An offloaded module is still a module: wrapped, moved, shared, copied, written behind torch's back, refreshed."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Decoder, Recurrent, Tower, assert_same, case_of, distinct_nbytes, run, same, tensors_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import lifetime, memory  # noqa: E402
from dlpoffload.errors import AliasError, HostMemoryError, OffloadError, SlotError  # noqa: E402
from dlpoffload.planning import Placement, all_mapped, all_staged  # noqa: E402
from dlpoffload.store import HostStore  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402
from dlpoffload.torch import placed as placed_module  # noqa: E402

LAYERS = ["layers.*"]


def vector(seed: int, device: str, width: int = 32) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).to(device)


def pair(device: str, tower: nn.Module | None = None, **options: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    """A tower that is staged, its resident copy, and the handle."""
    tower = Tower(5) if tower is None else tower
    reference = copy.deepcopy(tower).to(device)
    options = {"policy": all_staged, "units": LAYERS, **options}
    return tower, reference, offload_(tower, "1MiB", device=device, **options)


def check(tower: nn.Module, reference: nn.Module, device: str) -> None:
    with torch.no_grad():
        for seed in (0, 1):
            assert same(tower(vector(seed, device)), reference(vector(seed, device)))
    found = tower.state_dict()
    for name, tensor in reference.state_dict().items():
        assert same(found[name], tensor), name


def invalidations(handle: OffloadHandle) -> int:
    return handle.report(link=False).stats.invalidations


# -------------------------------------------------------------------------------------------------- .data


def _given(weight: Tensor) -> Tensor:
    return weight.data


def _row(weight: Tensor) -> Tensor:
    return weight.data[1]  # the alias itself is gone, a view of it stays


def _flat(weight: Tensor) -> Tensor:
    return weight.data.view(-1)[3:9].detach()


def _state(weight: Tensor) -> Tensor:
    return weight.detach()


@pytest.mark.parametrize("alias", [_given, _row, _flat, _state], ids=lambda alias: alias.__name__)
@pytest.mark.parametrize("slots", [2, 5])
def test_an_alias_is_seen_whenever_it_is_written(alias: Callable[[Tensor], Tensor], slots: int, device: str) -> None:
    """Taken once, written in later steps, and never announced."""
    tower, reference, handle = pair(device, slots=slots)
    aliases = [alias(module.layers[3].a.weight) for module in (tower, reference)]
    for step in range(3):
        check(tower, reference, device)
        check(tower, reference, device)
        for one in aliases:
            one.add_(1 + step)
    check(tower, reference, device)
    before = invalidations(handle)
    check(tower, reference, device)
    assert invalidations(handle) == before, "what is not written costs nothing"
    handle.restore_()
    check(tower.to(device), reference, device)


def test_an_alias_from_before_is_another_tensor_and_update_takes_it(device: str) -> None:
    """As `module.to(device)` moves a tensor away from aliases of what it was."""
    tower = Tower(5)
    alias = tower.layers[3].a.weight.data
    tower, reference, handle = pair(device, tower)
    alias.zero_()
    check(tower, reference, device)
    handle.update("layers.3.a.weight", alias)
    with torch.no_grad():
        reference.layers[3].a.weight.zero_()
    check(tower, reference, device)


def test_bytes_written_without_torch_need_a_word() -> None:
    np = pytest.importorskip("numpy")
    tower, reference, handle = pair("cpu", slots=5)
    views = [module.layers[3].a.weight.detach().numpy() for module in (tower, reference)]
    for step in range(3):
        check(tower, reference, "cpu")
        for view in views:
            np.add(view, step, out=view)
        handle.changed("layers.3.a.weight")
    check(tower, reference, "cpu")


def test_data_that_is_only_read_refuses_no_backward(device: str) -> None:
    tower, reference, _handle = pair(device)
    results = []
    for module in (tower.requires_grad_(False), reference.requires_grad_(False)):
        x = vector(0, device).requires_grad_()
        loss = module(x).square().sum()
        norms = [parameter.data.norm() for parameter in module.parameters()]  # as for a log
        loss.backward()
        results.append([x.grad, *norms])
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_data_written_through_an_old_alias_refuses_the_backward(device: str) -> None:
    tower, _, _handle = pair(device)
    tower.requires_grad_(False)
    alias = tower.layers[3].a.weight.data
    with torch.no_grad():
        tower(vector(0, device))
    loss = tower(vector(0, device).requires_grad_()).sum()
    alias.mul_(2)
    with pytest.raises(AliasError, match="between forward and backward"):
        loss.backward()


class Accumulating(nn.Module):
    """Writes its weight through `.data` in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data *= 0.5
        self.linear.bias.data[0] += 1
        return self.linear(x)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_data_written_inside_of_a_forward(slots: int, device: str) -> None:
    tower = Tower(0)
    tower.layers.extend(Accumulating() for _ in range(4))
    tower, reference, handle = pair(device, tower, slots=slots)
    for _ in range(3):
        check(tower, reference, device)
    handle.restore_()
    check(tower.to(device), reference, device)


# ------------------------------------------------------------------------------------------------- moving


def test_shared_memory_is_refused() -> None:
    tower, reference, _handle = pair("cpu")
    for call in (tower.share_memory, tower.layers[1].share_memory, tower.layers[1].a.weight.share_memory_):
        with pytest.raises(OffloadError, match=r"shared memory.*restore_"):
            call()
    check(tower, reference, "cpu")


def test_an_adapter_that_came_later_is_moved(device: str) -> None:
    tower, reference, _handle = pair(device)
    tower.layers[1].lora = nn.Linear(4, 4).double()
    parameter, buffer = nn.Parameter(torch.ones(3)), torch.ones(2, dtype=torch.int32)
    tower.layers[2].late = parameter
    tower.register_buffer("late_buffer", buffer)
    tower.layers[1].lora.weight.grad = torch.ones(4, 4, dtype=torch.float64)
    tower.to(device)
    assert tower.layers[2].late is parameter
    assert {str(t.device) for t in tensors_of(tower).values()} == {device}
    with pytest.raises(OffloadError, match="float16"):
        tower.half()
    assert tower.layers[1].lora.weight.dtype == torch.float64  # nothing has changed
    assert parameter.dtype == torch.float32
    tower.layers[1].lora.half()
    assert tower.layers[1].lora.weight.dtype == tower.layers[1].lora.weight.grad.dtype == torch.float16
    for name in ("lora", "late"):
        delattr(tower.layers[1 if name == "lora" else 2], name)
    del tower.late_buffer
    check(tower, reference, device)


def test_moved_as_a_part_of_something_larger(device: str) -> None:
    tower, reference, _handle = pair(device)
    whole = nn.Sequential(tower, nn.Linear(32, 2))
    whole.to(device).float()
    assert {str(p.device) for p in whole.parameters()} == {device}
    with pytest.raises(OffloadError, match="restore_"):
        whole.double()
    check(tower, reference, device)


def test_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that makes new tensors never has two of them alive."""
    tower, reference, _handle = pair("cpu")
    alive: list[Any] = []
    import weakref

    def doubled(tensor: Tensor) -> Tensor:
        assert [one for one in alive if one() is not None] == []
        result = tensor * 2
        if tensor.numel():
            alive.append(weakref.ref(result))
        return result

    tower._apply(doubled)
    reference._apply(lambda tensor: tensor * 2)
    assert len(alive) == 20
    check(tower, reference, "cpu")


@pytest.mark.parametrize("policy", [all_staged, all_mapped])
def test_recurrent_modules_keep_their_flat_weights(policy: Any, device: str) -> None:
    module = Recurrent(24)
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, "1MiB", device=device, policy=policy)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):
        with torch.no_grad():
            assert_same(module(x), reference(x))
        module.to(device).float()
        for each in (module, reference):
            each._apply(lambda tensor: tensor * 0.75)
    twin = copy.deepcopy(module)
    handle.restore_()
    module.to(device)
    with torch.no_grad():
        assert_same(module(x), reference(x))
        assert_same(twin(x), reference(x))
    for each in (module, twin):
        assert all(a is b for a, b in zip(each.gru._flat_weights, each.gru.parameters(), strict=True))


# --------------------------------------------------------------------------------------------- other wrappers


def test_a_forward_that_somebody_wrapped_since(device: str) -> None:
    """Copied and refreshed, ours stays inside of theirs, and does not call itself."""
    tower, reference, handle = pair(device)
    for module in (tower, reference):
        for target in (module.layers[2], module):

            def wrap(*args: Any, inner: Any = target.forward) -> Tensor:
                return inner(*args) * 2

            target.forward = wrap
    check(tower, reference, device)
    before = handle.report(link=False).stats.hits + handle.report(link=False).stats.copies
    copy.deepcopy(tower)
    check(tower, reference, device)
    stats = handle.report(link=False).stats
    assert stats.hits + stats.copies - before >= 10  # the second layer is staged as before
    handle.refresh_()
    check(tower, reference, device)
    assert handle.report(link=False).stats.hits + handle.report(link=False).stats.copies >= 10
    handle.restore_()
    check(tower.to(device), reference, device)


# ------------------------------------------------------------------------------------------------- copying


class Marked(nn.Parameter):
    """A parameter class of somebody's own."""


def test_copies_keep_classes_attributes_and_hooks(device: str) -> None:
    tower = Tower(4)
    marked = Marked(tower.layers[1].a.weight.data, requires_grad=False)
    marked.loader = [1, 2]
    tower.layers[1].a.weight = marked
    calls: list[nn.Module] = []
    tower.layers[2].register_forward_hook(lambda module, *_: calls.append(module))
    tower.layers[3].note = {"layer": tower.layers[0]}
    tower, reference, handle = pair(device, tower)
    twin = copy.deepcopy(tower)
    found = twin.layers[1].a.weight
    assert isinstance(found, Marked)
    assert found.loader == [1, 2]
    assert found.loader is not marked.loader
    assert not found.requires_grad
    assert twin.layers[3].note["layer"] is twin.layers[0]
    check(twin, reference, device)
    assert twin.layers[2] in calls
    assert tower.layers[2] not in calls
    copied, original = (set(inside.__dict__) for inside in (twin.layers[2], tower.layers[2]))
    assert copied == original
    assert OffloadHandle.of(twin.layers[0]) is OffloadHandle.of(twin) is not handle
    OffloadHandle.of(twin).restore_()
    assert type(twin.layers[1].a.weight) is Marked
    assert type(twin.layers[2].a.weight) is nn.Parameter
    assert set(twin.layers[2].__dict__) == set(reference.layers[2].__dict__)
    again = copy.deepcopy(copy.deepcopy(tower))
    check(again, reference, device)
    check(tower, reference, device)


@pytest.mark.parametrize("policy", [all_staged, all_mapped], ids=lambda policy: policy.__name__)
def test_copies_of_expanded_tensors(policy: Any, device: str) -> None:
    class Expanded(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.register_buffer("row", torch.randn(32).expand(3, 32))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.row

    tower = Tower(5)
    for layer in tower.layers:
        layer.b = nn.Sequential(layer.b, Expanded())
    options = {"policy": policy, "units": LAYERS if policy is all_staged else None}
    tower, reference, _handle = pair(device, tower, **options)
    check(tower, reference, device)
    copied = copy.deepcopy(tower)
    check(copied, reference, device)
    assert copied.layers[1].b[1].row.stride() == (0, 1)
    for each in (copied, reference):
        each.layers[1].b[1].row.data = torch.ones(32, device=device).expand(3, 32)
    check(copied, reference, device)


def test_a_copy_takes_what_was_written_and_not_used_yet(device: str) -> None:
    tower, reference, _handle = pair(device)
    for module in (tower, reference):
        module.layers[1].a.weight.data += 1
        module.layers[2].a.weight.data = torch.ones(64, 32, device=device)
        with torch.no_grad():
            module.layers[3].b.bias.mul_(3)
    check(copy.deepcopy(tower), reference, device)
    check(tower, reference, device)


def test_copies_of_single_tensors(device: str) -> None:
    tower, reference, _handle = pair(device)
    weight, wanted = tower.layers[1].a.weight, reference.layers[1].a.weight
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for twin in (copy.deepcopy(weight), torch.load(file, weights_only=False)):
        assert type(twin) is nn.Parameter
        assert same(twin, wanted)
        assert twin.requires_grad
        with torch.no_grad():
            twin.zero_()
    check(tower, reference, device)


def test_a_copy_while_other_threads_run() -> None:
    tower, reference, _handle = pair("cpu", Tower(6))
    wanted = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    x = vector(number, "cpu")
                    assert same(tower(x), reference(x))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            twin = copy.deepcopy(tower)
            for name, tensor in twin.state_dict().items():
                assert same(tensor, wanted[name]), name
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    check(tower, reference, "cpu")
    check(twin, reference, "cpu")


def test_a_copy_inside_of_a_forward(device: str) -> None:
    """The unit's weights are in a slot then, that of the copy must not be."""
    tower, reference, _handle = pair(device)
    twins: list[nn.Module] = []
    hook = tower.layers[2].a.register_forward_hook(lambda *_: twins.append(copy.deepcopy(tower)) and None)
    with torch.no_grad():
        assert same(tower(vector(0, device)), reference(vector(0, device)))
    hook.remove()
    check(tower, reference, device)
    twins[0].layers[2].a._forward_hooks.clear()
    check(twins[0], reference, device)


# ------------------------------------------------------------------------------------------------- refreshing


def test_ties_made_and_broken(device: str) -> None:
    case = case_of("decoder")
    module = Decoder(tied=True, depth=4)
    reference = copy.deepcopy(module).to(device)
    total = distinct_nbytes(module)
    handle = offload_(module, total * 6 // 10, device=device)
    inputs = case.inputs(0, device)
    states: list[set[str]] = []
    for change in ("untie", "tie"):
        for each in (module, reference):
            if change == "untie":
                each.head.weight = nn.Parameter(each.embed.weight.detach().clone() * 2)
            else:
                each.layers[3].up.weight = each.layers[1].up.weight
        handle.refresh_()
        states.append(set(handle.plan.specs))
        with torch.no_grad():
            assert_same(run(module, inputs), run(reference, inputs), change)
    assert "head.weight" in states[0]
    assert "layers.3.up.weight" in states[0]
    assert "layers.3.up.weight" not in states[1]
    assert module.layers[3].up.weight is module.layers[1].up.weight
    handle.update("layers.3.up.weight", torch.ones_like(module.layers[3].up.weight))
    assert bool((module.layers[1].up.weight == 1).all())


def _wrapped(weight: Tensor) -> Tensor:
    return nn.Parameter(weight, requires_grad=False)


def _of_its_class(weight: Tensor) -> Tensor:
    return type(weight)(weight.detach() * 2, requires_grad=False)


@pytest.mark.parametrize("make", [_wrapped, _of_its_class], ids=lambda make: make.__name__)
@pytest.mark.parametrize("policy", [all_staged, all_mapped], ids=lambda policy: policy.__name__)
def test_parameters_made_of_an_offloaded_one(make: Callable[[Tensor], Tensor], policy: Any, device: str) -> None:
    options = {"policy": policy, "units": LAYERS if policy is all_staged else None}
    tower, reference, handle = pair(device, **options)
    for each in (tower, reference):
        each.layers[3].a.weight = make(each.layers[1].a.weight)
        assert isinstance(each.layers[3].a.weight, nn.Parameter)
        assert not each.layers[3].a.weight.requires_grad
        assert type(each.layers[1].a.weight.detach()) is Tensor
    aliases = tower.layers[3].a.weight.data_ptr() == tower.layers[1].a.weight.data_ptr()
    assert aliases == (make is _wrapped)
    check(tower, reference, device)
    for step in ("before", "after"):
        with torch.no_grad():
            for each in (tower, reference):
                each.layers[3].a.weight.mul_(1.5)
                each.layers[1].a.weight.sub_(0.125)
        check(tower, reference, device)
        if step == "before":
            handle.refresh_()
            assert ("layers.3.a.weight" in handle.plan.specs) == (make is not _wrapped)
    check(copy.deepcopy(tower), reference, device)
    handle.restore_()
    assert {type(parameter) for parameter in tower.parameters()} == {nn.Parameter}


def test_repacked_weights_of_another_dtype(device: str) -> None:
    """A step after loading that makes int8 of float and adds scales, as serving stacks do."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.weight.dtype == torch.int8:
                return (x @ self.weight.to(x.dtype)) * self.scale
            return x @ self.weight

        def process_weights_after_loading(self) -> None:
            scale = self.weight.abs().amax() / 127
            self.weight = nn.Parameter((self.weight / scale).round().to(torch.int8), requires_grad=False)
            self.register_buffer("scale", scale)

    tower = Tower(0)
    tower.layers.extend(Quantised() for _ in range(5))
    tower, reference, handle = pair(device, tower)
    check(tower, reference, device)
    for module in (tower, reference):
        for layer in module.layers:
            layer.process_weights_after_loading()
    check(tower, reference, device)  # right before the refresh, too, only not offloaded
    assert len(handle.report(link=False).replaced) == 5
    handle.refresh_()
    check(tower, reference, device)
    assert handle.plan.nbytes(Placement.HOST_STAGED) == 5 * (32 * 32 + 4)
    assert handle.report(link=False).replaced == ()


def test_data_of_another_shape_is_taken_by_refresh(device: str) -> None:
    tower, reference, handle = pair(device)
    for module in (tower, reference):
        for linear, shape in ((module.layers[1].a, (48, 32)), (module.layers[1].b, (32, 48))):
            linear.weight.data = torch.full(shape, 0.01, device=device)
        module.layers[1].a.bias.data = torch.zeros(48, device=device)
    with torch.no_grad(), pytest.raises(AliasError, match="now holds"):
        tower(vector(0, device))
    handle.refresh_()
    check(tower, reference, device)
    assert handle.plan.specs["layers.1.a.weight"].shape == (48, 32)


def test_refresh_again_and_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one unit is in pinned memory twice, and the collector is not needed for that."""
    gc.collect()
    lifetime.drain()
    others, others_pinned = memory.live_buffers(), memory.pinned_nbytes()
    tower, reference, handle = pair(device)
    peaks: list[int] = []
    allocate = memory.HostBuffer.allocate.__func__

    def watched(cls: Any, nbytes: int, **options: Any) -> Any:
        lifetime.drain()
        made = allocate(cls, nbytes, **options)
        peaks.append(memory.pinned_nbytes() - others_pinned)
        return made

    alive, pinned = sorted(memory.live_buffers()), memory.pinned_nbytes() - others_pinned
    gc.disable()
    try:
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(memory.HostBuffer, "allocate", classmethod(watched))
                patch.setattr(HostStore, "take_over", lambda *_: None)  # as if no slab could stay what it is
                handle.refresh_()
            check(tower, reference, device)
            lifetime.drain()
            assert sorted(memory.live_buffers()) == alive
        handle.restore_()
        lifetime.drain()
        assert memory.live_buffers() == others
    finally:
        gc.enable()
    assert len(peaks) == 15
    assert max(peaks) <= pinned * 6 // 5
    assert {str(p.device) for p in tower.parameters()} == {"cpu"}  # as it was before all of them
    check(tower.to(device), reference, device)


def test_refresh_inside_of_a_unit_is_refused(device: str) -> None:
    tower, reference, handle = pair(device)
    plan, errors = handle.plan, []

    def late(*_: Any) -> None:
        try:
            handle.refresh_()
        except SlotError as error:
            errors.append(error)

    hook = tower.layers[2].a.register_forward_hook(late)
    with torch.no_grad():
        tower(vector(0, device))
    hook.remove()
    assert len(errors) == 1
    assert handle.plan is plan
    check(tower, reference, device)


@pytest.mark.parametrize("at", range(0, 14, 2))
@pytest.mark.parametrize("what", ["host", "device"])
def test_refresh_without_memory_half_way(what: str, at: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was placed anew by then, all is restored: to ordinary memory, on the device where it was at first."""
    lifetime.drain()
    others = memory.pinned_nbytes()
    module = Decoder(tied=True, depth=4)
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, distinct_nbytes(module) * 6 // 10, device=device)
    for each in (module, reference):
        each.layers[2].up.weight = nn.Parameter(torch.ones_like(each.layers[2].up.weight))
    owner, name = (memory.HostBuffer, "allocate") if what == "host" else (placed_module, "empty_bytes")
    real, left = getattr(owner, name), [at]

    def refused(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise HostMemoryError("no more", nbytes=1)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refused)
        with contextlib.suppress(HostMemoryError):
            handle.refresh_()
    inputs = case_of("decoder").inputs(0, device)
    if left[0] >= 0:
        assert not handle.restored  # so many were not asked for
    else:
        assert handle.restored
        assert OffloadHandle.of(module) is None
        assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
        homes = {str(p.device) for name, p in module.named_parameters() if name != "layers.2.up.weight"}
        assert homes == {"cpu"}
        lifetime.drain()
        assert memory.pinned_nbytes() == others
        module.to(device)
    with torch.no_grad():
        assert_same(run(module, inputs), run(reference, inputs))
    if handle.restored:
        offload_(module, distinct_nbytes(module) * 6 // 10, device=device)
        with torch.no_grad():
            assert_same(run(module, inputs), run(reference, inputs))


def test_refresh_into_pageable_memory_keeps_the_first_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"pageable": "if_refused", "stage_unmapped": True, "slots": 2}
    tower, reference, handle = pair(device, **options)
    assert handle.report(link=False).pinned_nbytes > 0
    allocate = memory.HostBuffer.allocate.__func__

    def unpinned(cls: Any, nbytes: int, *, pinned: bool = True, **rest: Any) -> Any:
        if pinned:
            raise HostMemoryError("nothing to pin", nbytes=nbytes)
        return allocate(cls, nbytes, pinned=pinned, **rest)

    layer = tower.layers[1].a
    layer.weight = nn.Parameter(layer.weight.detach().cpu().clone())
    with monkeypatch.context() as patch:
        patch.setattr(memory.HostBuffer, "allocate", classmethod(unpinned))
        handle.refresh_()
    report = handle.report(link=False)
    assert report.pinned_nbytes == 0
    assert "nothing to pin" in report.pageable_because
    check(tower, reference, device)
    handle.restore_()
    assert {str(p.device) for p in tower.parameters()} == {"cpu"}
    check(tower.to(device), reference, device)
