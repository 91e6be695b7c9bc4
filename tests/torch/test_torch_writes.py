"""Weights stay weights: read at any time, written in every way that a resident module allows."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Normalised, Tower, assert_same, case_of, distinct_nbytes, run, same, tensors_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from dlpoffload.errors import AliasError, ClosedError, GradientError, OffloadError, SlotError, SpecError  # noqa: E402
from dlpoffload.planning import Placement, all_mapped, all_staged, pattern_policy  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

PLACEMENTS = {
    "staged": all_staged,
    "mapped": all_mapped,
    "device": pattern_policy({"*": Placement.DEVICE}),
}
everywhere = pytest.mark.parametrize("placement", PLACEMENTS)


def placed(
    placement: str, device: str, module: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    """A tower whose tensors all have one placement, its resident copy, and the handle; both were called once."""
    tower = Tower(4) if module is None else module
    reference = copy.deepcopy(tower).to(device)
    if placement != "mapped":
        options["units"] = ["layers.*"]
    if placement == "staged":
        options.setdefault("slots", 4)  # one for each unit, so that what is not invalidated is used again
    handle = offload_(tower, "64MiB", device=device, policy=PLACEMENTS[placement], **options)
    with torch.no_grad():
        assert same(tower(vector(0, device)), reference(vector(0, device)))
    return tower, reference, handle


def vector(seed: int, device: str) -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def check(tower: nn.Module, reference: nn.Module, device: str) -> None:
    """Outputs, state_dict and all tensors are equal."""
    with torch.no_grad():
        for seed in (0, 1):
            assert same(tower(vector(seed, device)), reference(vector(seed, device)))
    wanted = reference.state_dict()
    found = tower.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert same(found[name], tensor), name


def linear(module: nn.Module) -> nn.Linear:
    return module.layers[2].a


# ------------------------------------------------------------------------------------------ in place, by torch


def _copy(module: nn.Module) -> None:
    linear(module).weight.copy_(torch.full((64, 32), 0.25))


def _scale(module: nn.Module) -> None:
    linear(module).weight.mul_(3)


def _slice(module: nn.Module) -> None:
    linear(module).weight[3:5].zero_()


def _view(module: nn.Module) -> None:
    linear(module).weight.view(-1)[7] = 5


def _detached(module: nn.Module) -> None:
    linear(module).bias.detach().add_(1)


def _initialised(module: nn.Module) -> None:
    for inside in module.modules():
        if isinstance(inside, nn.Linear):
            nn.init.constant_(inside.weight, 0.01)
            nn.init.ones_(inside.bias)


def _through_state_dict(module: nn.Module) -> None:
    module.state_dict()["layers.2.a.weight"].add_(0.5)


def _optimiser(module: nn.Module) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    for index, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * index)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({name: t.cpu() * 2 for name, t in module.state_dict().items()})


def _loaded_partly(module: nn.Module) -> None:
    module.load_state_dict({"layers.1.b.bias": torch.ones(32)}, strict=False)


WRITES = [
    *[_copy, _scale, _slice, _view, _detached, _initialised],
    *[_through_state_dict, _optimiser, _loaded, _loaded_partly],
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@everywhere
def test_writes_that_torch_sees(placement: str, mode: Any, write: Callable[[nn.Module], None], device: str) -> None:
    tower, reference, handle = placed(placement, device)
    with mode():
        write(tower)
        write(reference)
    check(tower, reference, device)
    handle.restore_()
    check(tower, reference.cpu(), "cpu")


@everywhere
def test_writes_that_torch_does_not_see(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    for module in (tower, reference):
        linear(module).weight.data.fill_(0.125)
    handle.changed("layers.2.a.weight")
    check(tower, reference, device)


@pytest.mark.parametrize("adversary", range(4))
def test_writes_while_copies_are_under_way(adversary: int, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    tower, reference, handle = placed("staged", "cpu")
    with torch.no_grad():
        for step in range(6):
            for module in (tower, reference):
                module.layers[step % 4].a.weight.mul_(-1.5)
            if step % 2:
                update = torch.full((32,), float(step))
                handle.update(f"layers.{step % 3}.b.bias", update)
                reference.layers[step % 3].b.bias.copy_(update)
            x = vector(step, "cpu")
            assert same(tower(x), reference(x))
    check(tower, reference, "cpu")


# -------------------------------------------------------------------------------- inside of a unit's own forward


class Counting(nn.Module):
    """Writes its buffers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.mean.lerp_(x.mean(0), 0.25)
            if self.calls > 2:
                self.linear.bias.add_(self.mean)
        return self.linear(x) + self.mean * self.calls


@pytest.mark.parametrize("adversary", [None, 0, 1])
@pytest.mark.parametrize("slots", [1, 2])
def test_written_in_forward(slots: int, adversary: int | None, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    tower = Tower(0)
    tower.layers.extend(Counting() for _ in range(4))
    tower, reference, handle = placed("staged", "cpu", tower, slots=slots)
    with torch.no_grad():
        for seed in range(4):
            assert same(tower(vector(seed, "cpu")), reference(vector(seed, "cpu")))
            for name, tensor in tensors_of(reference).items():
                assert same(tensors_of(tower)[name], tensor), name
    assert handle.report(link=False).stats.write_backs >= 2 * 4 * 5


@pytest.mark.parametrize("adversary", [None, 0, 1])
def test_running_statistics_of_batch_norm(adversary: int | None, cpu_driver) -> None:
    """torch does not count the writes of a batch norm's kernel."""
    cpu_driver(adversary=adversary)
    model = Normalised(16).train()
    reference = copy.deepcopy(model)
    handle = offload_(model, "1MiB", device="cpu", policy=all_staged)
    for step in range(4):
        x = torch.randn(4, 3, 8, 8)
        assert same(model(x), reference(x))
        model.train(step % 2 == 0), reference.train(step % 2 == 0)
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name
    handle.restore_()
    for name, tensor in reference.state_dict().items():
        assert same(model.state_dict()[name], tensor), name


class Replacing(nn.Module):
    """Gives a buffer other bytes in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("cache", torch.zeros(3, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) + self.cache
        self.cache.data = x.detach() * 2
        return x


def test_data_given_in_forward_is_taken_over(device: str) -> None:
    tower = Tower(0)
    tower.layers.extend(Replacing() for _ in range(3))
    tower, reference, handle = placed("staged", device, tower)
    with torch.no_grad():
        for seed in range(3):
            assert same(tower(vector(seed, device)), reference(vector(seed, device)))
    assert same(tower.layers[0].cache, reference.layers[0].cache)
    assert handle.report(link=False).adopted == tuple(f"layers.{i}.cache" for i in range(3))


# ------------------------------------------------------------------------------------------ reading, at any time


def test_state_dict_at_any_time(device: str) -> None:
    tower, reference, _handle = placed("staged", device)
    wanted = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    taken: list[dict[str, Tensor]] = [tower.state_dict()]
    for module in (tower.layers[1].a, tower.layers[3], tower.layers[2].b):
        module.register_forward_hook(lambda *_: taken.append(tower.state_dict()) and None)
        module.register_forward_pre_hook(lambda *_: taken.append(tower.state_dict()) and None)
    kept_vars: list[dict[str, Tensor]] = []
    tower.layers[0].a.register_forward_hook(lambda *_: kept_vars.append(tower.state_dict(keep_vars=True)) and None)
    with torch.no_grad():
        for seed in range(3):
            tower(vector(seed, device))
    taken.append(tower.state_dict())
    assert len(taken) == 20
    for state in taken + kept_vars:  # long after their slots have held other units
        for name, tensor in wanted.items():
            assert same(state[name], tensor), name
    assert all(state["layers.0.a.weight"] is tower.layers[0].a.weight for state in kept_vars)


@pytest.mark.parametrize("name", ["decoder_tied", "odd_tensors", "encoder_decoder"])
def test_saved_and_loaded_by_files(name: str, device: str, tmp_path: Path) -> None:
    """Files are those of a resident model: no slab, and no tensor twice."""
    safetensors = pytest.importorskip("safetensors.torch")
    case = case_of(name)
    module, reference = case.model(), case.model().to(device)
    handle = offload_(module, max(distinct_nbytes(module) * 3 // 10, 300_000), device=device)
    inputs = case.inputs(0, device)
    files = [tmp_path / "offloaded", tmp_path / "reference"]
    for each, file in zip((module, reference), files, strict=True):
        torch.save({key: tensor.cpu() for key, tensor in each.state_dict().items()}, file)
    assert files[0].stat().st_size <= files[1].stat().st_size
    saved = torch.load(files[0])
    assert all(same(saved[key], tensor.cpu()) for key, tensor in reference.state_dict().items())
    if name != "odd_tensors":  # safetensors has no complex numbers
        with torch.no_grad():
            for each in (module, reference):
                for parameter in each.parameters():
                    parameter.add_(1)
        safetensors.save_model(module, str(files[0]))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        safetensors.load_model(module, str(files[0]), device=device)
    with torch.no_grad():
        assert_same(run(module, inputs), run(reference, inputs))
    saved = {key: tensor for key, tensor in saved.items() if "expanded" not in key}  # torch loads into no such tensor
    for each in (module, reference):
        each.load_state_dict(saved, strict=False)
    with torch.no_grad():
        assert_same(run(module, inputs), run(reference, inputs))
    assert handle.report(link=False).adopted == ()


def test_state_dict_in_the_middle_of_a_write() -> None:
    tower = Tower(0)
    tower.layers.extend(Counting() for _ in range(3))
    tower, reference, _handle = placed("staged", "cpu", tower)
    taken: dict[str, list[dict[str, Tensor]]] = {"offloaded": [], "resident": []}
    for key, module in (("offloaded", tower), ("resident", reference)):

        def take(*_: Any, key: str = key, module: nn.Module = module) -> None:
            taken[key].append({name: tensor.clone() for name, tensor in module.state_dict().items()})

        module.layers[1].linear.register_forward_pre_hook(take)
    with torch.no_grad():
        for seed in range(2):
            tower(vector(seed, "cpu")), reference(vector(seed, "cpu"))
    for found, wanted in zip(taken["offloaded"], taken["resident"], strict=True):
        for name, tensor in wanted.items():
            assert same(found[name], tensor), name


def test_state_dict_on_another_thread_while_a_unit_is_left() -> None:
    """What it has of the slot for a moment is no view that outlives the unit's forward."""
    inside, left = threading.Event(), threading.Event()

    class Pausing(nn.Linear):
        def _save_to_state_dict(self, *args: Any) -> None:
            super()._save_to_state_dict(*args)
            if threading.current_thread() is saving and self is tower.layers[2].a:
                inside.set()
                left.wait(0.3)

    tower = Tower(4)
    tower.layers[2].a.__class__ = Pausing
    tower, reference, _handle = placed("staged", "cpu", tower)
    states: list[dict[str, Tensor]] = []
    saving = threading.Thread(target=lambda: states.append(tower.state_dict()))

    def start(*_: Any) -> None:
        saving.start()
        assert inside.wait(30)

    hook = tower.layers[2].b.register_forward_hook(start)
    with torch.no_grad():
        found = tower(vector(1, "cpu"))
    left.set()
    saving.join()
    hook.remove()
    with torch.no_grad():
        assert same(found, reference(vector(1, "cpu")))
    assert all(same(states[0][name], tensor) for name, tensor in reference.state_dict().items())
    check(tower, reference, "cpu")


def test_names_are_what_they_were(device: str) -> None:
    tower, reference, _handle = placed("staged", device)
    assert [name for name, _ in tower.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert [name for name, _ in tower.named_modules()] == [name for name, _ in reference.named_modules()]
    assert all(p.requires_grad and p.is_leaf for p in tower.parameters())
    assert {str(p.device) for p in tower.parameters()} == {device}


# ------------------------------------------------------------------------------------------------- update


@everywhere
def test_update(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    for _ in range(3):
        values = torch.randn(64, 32)
        handle.update("layers.2.a.weight", values)
        with torch.no_grad():
            reference.layers[2].a.weight.copy_(values)
        values.zero_()
        check(tower, reference, device)


@pytest.mark.parametrize("grad", [False, True])
@everywhere
def test_update_under_autocast_leaves_no_cast_of_old_values(placement: str, grad: bool, device: str) -> None:
    tower, _reference, handle = placed(placement, device)
    cast = torch.autocast(torch.device(device).type, torch.bfloat16)
    x = vector(0, device)
    with torch.set_grad_enabled(grad):
        with cast:
            before = tower(x)
            handle.update("layers.2.a.weight", torch.ones(64, 32))
            after = tower(x)
        with cast:
            assert same(after, tower(x))
    assert not same(after, before)


def test_autocast_keeps_no_casts_of_streamed_weights(device: str) -> None:
    """It would keep one of every weight that requires a gradient, on the device, until its context ends."""
    tower, reference, _handle = placed("staged", device)
    kinds: list[Counter[str]] = []
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
        for module in (tower, reference):
            module(vector(0, device))
            with _Casts() as casts:
                module(vector(0, device))
            kinds.append(casts.counted)
        assert same(tower(vector(0, device)), reference(vector(0, device)))
        assert torch.is_autocast_cache_enabled()
    weights = 2 * len(tower.layers)
    assert kinds[1]["_to_copy"] > 0
    assert kinds[0]["_to_copy"] >= kinds[1]["_to_copy"] + weights  # none was kept from the step before


class _Casts(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [20, 110])
@pytest.mark.parametrize("name", ["decoder_tied", "encoder_decoder", "recurring"])
def test_update_by_every_name(name: str, budget: int, device: str) -> None:
    case = case_of(name)
    module = case.model()
    reference = copy.deepcopy(module).to(device)
    handle = offload_(module, max(distinct_nbytes(module) * budget // 100, 300_000), device=device)
    inputs = case.inputs(0, device)
    before = {key: tensor.device for key, tensor in tensors_of(module).items()}
    keys = list(reference.state_dict())
    counts = Counter(id(tensor) for tensor in tensors_of(reference).values())
    aliases = [key for key in keys if counts[id(tensors_of(reference)[key])] > 1]
    assert len(aliases) > 1
    with torch.no_grad():
        for step, key in enumerate([*keys[:2], aliases[0], aliases[-1], *keys[-2:]]):
            target = tensors_of(reference)[key]
            values = torch.randn(target.shape, generator=torch.Generator().manual_seed(step)) / 10
            handle.update(key, values)
            target.copy_(values)
            assert_same(run(module, inputs), run(reference, inputs), key)
    for key, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[key], tensor), key
        assert tensors_of(module)[key].device == before[key]


@pytest.mark.parametrize(
    "options", [{"policy": all_staged, "slots": 3}, {"policy": all_mapped}], ids=["staged", "mapped"]
)
def test_update_of_tensors_that_share_bytes(options: dict[str, Any]) -> None:
    module, reference = case_of("tied_everywhere").model(), case_of("tied_everywhere").model()
    handle = offload_(module, "1MiB", device="cpu", **options)
    inputs = case_of("tied_everywhere").inputs(0)
    with torch.no_grad():
        for key in ["layers.0.again", "layers.0.mix.weight", "tail.weight", "layers.4.again", "layers.3.down.weight"]:
            target = tensors_of(reference)[key]
            values = torch.randn_like(target) / 10
            handle.update(key, values)
            target.copy_(values)
            assert_same(run(module, inputs), run(reference, inputs), key)
            for name, tensor in tensors_of(reference).items():
                assert same(tensors_of(module)[name], tensor), name


def test_update_refuses(device: str) -> None:
    tower, reference, handle = placed("staged", device)
    with pytest.raises(SpecError, match=r'no parameter or buffer "layers\.9\.a\.weight"'):
        handle.update("layers.9.a.weight", torch.zeros(64, 32))
    with pytest.raises(SpecError, match="shape and dtype"):
        handle.update("layers.2.a.weight", torch.zeros(32, 64))
    with pytest.raises(SpecError, match="shape and dtype"):
        handle.update("layers.2.a.weight", torch.zeros(64, 32, dtype=torch.float64))
    for values, words in [
        (torch.zeros(64, 32).tolist(), "is a list; give a torch.Tensor"),
        (torch.zeros(64, 32, device="meta"), "on meta"),
        (torch.zeros(64, 32).to_sparse(), "sparse_coo; give a dense"),
    ]:
        with pytest.raises(SpecError, match=words):
            handle.update("layers.2.a.weight", values)
    check(tower, reference, device)
    errors: list[BaseException] = []

    def late(*_: Any) -> None:
        for call in (
            lambda: handle.update("layers.2.a.weight", torch.zeros(64, 32)),
            handle.restore_,
        ):
            try:
                call()
            except SlotError as error:
                errors.append(error)

    hook = tower.layers[2].a.register_forward_hook(late)
    with torch.no_grad():
        tower(vector(0, device))
    hook.remove()
    assert len(errors) == 2
    assert all('"layers.2" is running' in str(error) for error in errors)
    check(tower, reference, device)
    handle.restore_()
    handle.restore_()
    for call in (handle.report, lambda: handle.changed("layers.2.a.weight")):
        with pytest.raises(ClosedError, match="offload_ again"):
            call()


def test_update_of_elements_that_share_bytes_is_refused() -> None:
    module = case_of("odd_tensors").model()
    handle = offload_(module, "1MiB", device="cpu", policy=all_staged)
    with pytest.raises(SpecError, match="share bytes"):
        handle.update("layers.0.expanded", torch.zeros(5, 64))
    handle.update("layers.0.empty", torch.zeros(0, 64))
    handle.update("layers.0.gain", torch.tensor(2.0))
    handle.update("layers.0.fp8", torch.ones(64, 64).to(torch.float8_e4m3fn))
    assert module.layers[0].gain.item() == 2
    assert bool((module.layers[0].fp8.float() == 1).all())


# ------------------------------------------------------------------------------------------ replaced tensors


@everywhere
def test_data_replaced(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    values = torch.randn(64, 32)
    for module in (tower, reference):
        linear(module).weight.data = values.clone().to(device)
    check(tower, reference, device)
    assert handle.report(link=False).adopted == (("layers.2.a.weight",) if placement == "staged" else ())
    more = torch.randn(64, 32)
    handle.update("layers.2.a.weight", more)
    with torch.no_grad():
        linear(reference).weight.copy_(more)
    check(tower, reference, device)
    handle.restore_()
    check(tower.cpu(), reference.cpu(), "cpu")


@everywhere
def test_data_replaced_and_updated_or_restored_at_once(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    for module in (tower, reference):
        linear(module).weight.data = torch.zeros(64, 32, device=device)
    values = torch.randn(64, 32)
    handle.update("layers.2.a.weight", values)
    with torch.no_grad():
        linear(reference).weight.copy_(values)
    check(tower, reference, device)
    for module in (tower, reference):
        linear(module).bias.data = torch.full((64,), 3.0, device=device)
    handle.restore_()
    check(tower.cpu(), reference.cpu(), "cpu")


@contextlib.contextmanager
def swapping() -> Iterator[None]:
    """torch's own switch: load_state_dict swaps tensors instead of copying into them."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _swap_in_new(module: nn.Module) -> None:
    weight = linear(module).weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.ones_like(weight), requires_grad=weight.requires_grad))


def _swap_in_alias(module: nn.Module) -> None:
    weight = linear(module).weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach(), requires_grad=weight.requires_grad))


def _load_by_swapping(module: nn.Module) -> None:
    with swapping():
        module.load_state_dict({name: tensor * 0.5 for name, tensor in module.state_dict().items()})


def _assign_by_swapping(module: nn.Module) -> None:
    with swapping():
        module.load_state_dict({name: tensor * 0.5 for name, tensor in module.state_dict().items()}, assign=True)


SWAPS = [_swap_in_new, _swap_in_alias, _load_by_swapping, _assign_by_swapping]


@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.__name__.strip("_"))
@pytest.mark.parametrize("used_between", [True, False])
@everywhere
def test_swapped_tensors_are_watched_as_before(
    placement: str, used_between: bool, swap: Callable[[nn.Module], None], device: str
) -> None:
    tower, reference, handle = placed(placement, device)
    for module in (tower, reference):
        swap(module)
    for write in (1.5, -0.5):
        if used_between:
            check(tower, reference, device)
        for module in (tower, reference):
            linear(module).weight.data.mul_(write)
    check(tower, reference, device)
    held = [linear(module).weight.data for module in (tower, reference)]
    check(tower, reference, device)
    for alias in held:
        alias.add_(1)
    check(tower, reference, device)
    if placement == "staged":
        with pytest.raises(GradientError, match=r"layers\.2\.a\.weight"):
            nn.functional.linear(vector(0, device), linear(tower).weight).sum().backward()
    handle.restore_()
    assert {type(parameter) for parameter in tower.parameters()} == {nn.Parameter}
    check(tower.cpu(), reference.cpu(), "cpu")


def test_swapped_inside_of_a_forward(device: str) -> None:
    tower, reference, _handle = placed("staged", device)
    for module in (tower, reference):

        def swap(inside: nn.Module, inputs: Any) -> None:
            new = nn.Parameter(torch.full_like(inside.weight, 0.25), requires_grad=inside.weight.requires_grad)
            torch.utils.swap_tensors(inside.weight, new)

        hook = linear(module).register_forward_pre_hook(swap)
        with torch.no_grad():
            module(vector(0, device))
        hook.remove()
    check(tower, reference, device)
    for module in (tower, reference):
        linear(module).weight.data.mul_(3)
    check(tower, reference, device)


# Inside of a forward, what `detach` gives is the slot, which is not to be moved.
@pytest.mark.parametrize(("what", "when"), [("state_dict", "between"), ("state_dict", "inside"), ("detach", "between")])
@everywhere
def test_memory_that_is_shared_with_processes(placement: str, what: str, when: str) -> None:
    """torch moves the storage, and with it all tensors over it; what torch.multiprocessing sends is moved so."""
    tower, reference, handle = placed(placement, "cpu")

    def share(*_: Any) -> None:
        aliases = tower.state_dict().values() if what == "state_dict" else [p.detach() for p in tower.parameters()]
        for tensor in aliases:
            tensor.share_memory_()

    def write(inside: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            inside.weight.mul_(0.5)

    if when == "between":
        share()
    else:
        hook = linear(tower).register_forward_pre_hook(share)
        writes = [linear(module).register_forward_pre_hook(write) for module in (tower, reference)]
        with torch.no_grad():
            assert same(tower(vector(3, "cpu")), reference(vector(3, "cpu")))
        for each in (hook, *writes):
            each.remove()
    check(tower, reference, "cpu")
    with torch.no_grad():
        for module in (tower, reference):
            for parameter in module.parameters():
                parameter.mul_(0.5)
        check(tower, reference, "cpu")
        for name, parameter in reference.named_parameters():
            parameter.add_(1)
            handle.update(name, parameter)
    check(tower, reference, "cpu")
    check(copy.deepcopy(tower), reference, "cpu")
    handle.refresh_()
    check(tower, reference, "cpu")
    handle.restore_()
    check(tower, reference, "cpu")


@everywhere
def test_parameter_replaced(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    old = linear(tower).weight
    values = torch.randn(64, 32, device=device)
    for module in (tower, reference):
        linear(module).weight = nn.Parameter(values.clone())
    new = linear(tower).weight
    check(tower, reference, device)
    assert handle.report(link=False).replaced == ("layers.2.a.weight",)
    handle.update("layers.2.a.weight", torch.ones(64, 32))
    with torch.no_grad():
        linear(reference).weight.fill_(1)
    check(tower, reference, device)
    handle.restore_()
    assert linear(tower).weight is new
    assert old.device.type == "cpu"
    check(tower.cpu(), reference.cpu(), "cpu")


@everywhere
def test_load_state_dict_with_assign(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    state = {name: torch.randn(t.shape, device=device) / 9 for name, t in tower.state_dict().items()}
    tower.load_state_dict(copy.deepcopy(state), assign=True)
    reference.load_state_dict(copy.deepcopy(state), assign=True)
    check(tower, reference, device)
    assert set(handle.report(link=False).replaced) == set(state)
    handle.restore_()
    check(tower.cpu(), reference.cpu(), "cpu")


@everywhere
def test_functional_call_is_for_one_call(placement: str, device: str) -> None:
    tower, reference, handle = placed(placement, device)
    other = {name: nn.Parameter(torch.randn_like(t)) for name, t in reference.named_parameters()}
    x = vector(5, device)
    with torch.no_grad():
        for parameters in (other, {"layers.2.a.weight": other["layers.2.a.weight"].detach()}):
            for _ in range(2):
                assert same(functional_call(tower, parameters, (x,)), functional_call(reference, parameters, (x,)))
            check(tower, reference, device)  # the weights are what they were
    report = handle.report(link=False)
    assert report.replaced == report.adopted == ()


def test_another_shape_or_dtype_is_refused_before_anything_runs(device: str) -> None:
    tower, reference, handle = placed("staged", device)
    weight = linear(tower).weight
    for replaced in (torch.zeros(64, 32, dtype=torch.float64), torch.zeros(2, 3)):
        right = weight.data
        weight.data = replaced.to(device)
        with (
            torch.no_grad(),
            pytest.raises(AliasError, match=r"offloaded as float32\[64, 32\]"),
        ):
            tower(vector(0, device))
        weight.data = right
        check(tower, reference, device)
    weight.data = torch.zeros(2, 3, device=device)
    handle.restore_()  # leaves it what it is
    assert weight.shape == (2, 3)


def test_half_is_refused_and_can_be_restored(device: str) -> None:
    tower, reference, handle = placed("staged", device)
    with pytest.raises(OffloadError, match=r"would make it torch\.float16.*restore_"):
        tower.half()
    check(tower, reference, device)
    handle.restore_()
    tower.half()
    assert all(same(a, b.half()) for a, b in zip(tower.parameters(), reference.parameters(), strict=True))


def test_untying_bytes_is_refused(device: str) -> None:
    tower = Tower(4)
    tower.layers[1].a.weight = nn.Parameter(tower.layers[1].a.weight.data)
    tower.layers[1].extra = nn.Parameter(tower.layers[1].a.weight.data)
    tower, _reference, _handle = placed("staged", device, tower)
    tower.layers[1].extra.data = torch.zeros(64, 32, device=device)
    with torch.no_grad(), pytest.raises(AliasError, match="untying"):
        tower(vector(0, device))
    tower.layers[1].a.weight.data = tower.layers[1].extra.data  # both again
    with torch.no_grad():
        tower(vector(0, device))
    assert not tower.layers[1].a.weight.any()
    assert tower.layers[1].a.weight.data_ptr() == tower.layers[1].extra.data_ptr()


def test_a_tied_place_may_be_given_its_own(device: str) -> None:
    """Untying by assignment is what it is for a resident module."""
    case = case_of("tied_everywhere")
    module = case.model()
    reference = copy.deepcopy(module).to(device)
    offload_(module, 300_000, device=device)
    for inside in (module, reference):
        inside.layers[3].up.weight = nn.Parameter(torch.ones(192, 96, device=device))
    inputs = case.inputs(1, device)
    with torch.no_grad():
        assert_same(run(module, inputs), run(reference, inputs))


@everywhere
def test_restore_leaves_what_was_untied(placement: str, device: str) -> None:
    """Two parameters over the same bytes, of which one was given others."""
    tower, reference = Tower(4), Tower(4)
    reference.load_state_dict(tower.state_dict())
    for module in (tower, reference):
        module.layers[1].extra = nn.Parameter(module.layers[1].a.weight.data)
    units = None if placement == "mapped" else ["layers.*"]
    handle = offload_(tower, "64MiB", device=device, policy=PLACEMENTS[placement], units=units)
    for module in (tower, reference):
        module.layers[1].extra.data = torch.zeros(2, 3)
    handle.restore_()
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(tower)[name], tensor), name
    assert tower.layers[1].extra.shape == (2, 3)


@everywhere
def test_update_of_a_weight_that_autograd_holds_is_seen(placement: str, device: str) -> None:
    tower, _reference, handle = placed(placement, device)
    weight = linear(tower).weight
    loss = nn.functional.linear(vector(0, device).requires_grad_(), weight).sum()  # outside of its unit
    handle.update("layers.2.a.weight", torch.zeros(64, 32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
