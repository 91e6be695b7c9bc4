"""Weights at home in the checkpoint's own pages: the same bits, no second copy, and no write ever reaches the file."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from models import CASES, Case, Tower, assert_same, run, same, tensors_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import HostStore, memory  # noqa: E402
from dlpoffload.checkpoint import align, narrow  # noqa: E402
from dlpoffload.driver import open_driver  # noqa: E402
from dlpoffload.errors import AliasError, CheckpointError, HostMemoryError, OffloadError, PlanError, SlotError  # noqa: E402
from dlpoffload.planning import all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

WEIGHT = "layers.2.a.weight"
PLACEMENTS = {"staged": {"policy": all_staged, "units": ["layers.*"]}, "mapped": {"policy": all_mapped}}
everywhere = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(autouse=True)
def mappable(device: str) -> None:
    """The device pins memory that is mapped read-only, or there is nothing to test on it."""
    if not open_driver(device).capabilities().read_only_host_register:
        pytest.skip(f"{device} pins no read-only memory")


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}


def saved(folder: Path, module: nn.Module, *, aligned: bool = True) -> Path:
    """A checkpoint; `aligned` as `dlpoffload align` writes it, else at 8 modulo 16."""
    plain = folder / "plain.safetensors"
    for pad in range(64):
        save_file(stored(module), plain, metadata={"pad": "x" * pad})
        start = 8 + int.from_bytes(plain.read_bytes()[:8], "little")
        if start % 16 == 8:
            break
    if not aligned:
        return plain
    align(plain, folder / "aligned.safetensors")
    return folder / "aligned.safetensors"


class Mapped:
    """A tower on meta that was mapped from a file, and the resident one that was saved there."""

    def __init__(
        self, placement: str, device: str, folder: Path, module: Callable[[], nn.Module] | None = None
    ) -> None:
        build = module or (lambda: Tower(4))
        torch.manual_seed(3)
        self.reference = build().to(device)
        self.path = saved(folder, self.reference)
        self.bytes = self.path.read_bytes()
        self.device = device
        with torch.device("meta"):
            self.tower = build()
        options = PLACEMENTS[placement]
        self.handle = offload_(self.tower, "64MiB", device=device, checkpoint=self.path, mode="map", **options)

    def input(self, seed: int = 0) -> Tensor:
        return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def check(self) -> None:
        """Outputs and weights are those of the reference, and the file is what it was."""
        with torch.no_grad():
            for seed in (0, 1):
                assert same(self.tower(self.input(seed)), self.reference(self.input(seed)))
        found = self.tower.state_dict()
        for name, tensor in self.reference.state_dict().items():
            assert same(found[name], tensor), name
        assert self.path.read_bytes() == self.bytes

    @property
    def moved(self) -> tuple[str, ...]:
        return self.handle.report(link=False).moved


# ------------------------------------------------------------------------------------------------ the same bits


def _row_major(case: Case) -> bool:
    return all(tensor.is_contiguous() for tensor in case.model().state_dict().values())


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "off16"])
@pytest.mark.parametrize("case", [case for case in CASES if _row_major(case)], ids=lambda case: case.name)
def test_the_zoo_mapped(case: Case, aligned: bool, device: str, tmp_path: Path) -> None:
    reference = case.model()
    weights = saved(tmp_path, reference, aligned=aligned)
    before = weights.read_bytes()
    total = sum(t.nbytes for t in {id(t): t for t in tensors_of(reference).values()}.values())
    model = case.model()
    probe = offload_at_least(model, int(total * 0.4), device)
    handle = offload_(model, probe, device=device, checkpoint=weights, mode="auto", strict=False)
    report = handle.report(link=False)
    assert report.mode in ("map", "copy")
    assert report.because or not report.pinned_nbytes
    if report.mode == "map":
        assert report.file_nbytes > 0
        assert not report.moved
    resident = case.model().to(device)
    with torch.no_grad():
        for seed in (0, 1):
            inputs = case.inputs(seed, device)
            assert_same(run(model, inputs), run(resident, case.inputs(seed, device)), case.name)
    handle.restore_()
    assert weights.read_bytes() == before


def offload_at_least(module: nn.Module, budget: int, device: str) -> int:
    """The budget, or the smallest that holds the ring, and a little for gaps between units in the file."""
    from models import offload_at

    twin = copy.deepcopy(module)
    handle = offload_at(twin, budget, device)
    found = handle.plan.device_budget
    handle.restore_()
    return int(found) + 4096


@everywhere
def test_the_report_says_how_and_why(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    report = mapped.handle.report(link=False)
    assert (report.mode, report.because, report.moved, report.copied) == ("map", "asked for", (), ())
    assert report.pinned_nbytes == report.file_nbytes, "not a byte beside the file's own pages"
    assert "mapped: asked for" in str(report)
    mapped.check()


def test_what_was_asked_to_be_copied_says_so(device: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        tower = Tower(4)
    path, options = saved(tmp_path, Tower(4)), {"device": device, **PLACEMENTS["staged"]}
    handle = offload_(tower, "1MiB", checkpoint=path, mode="copy", **options)
    report = handle.report(link=False)
    assert (report.mode, report.because) == ("copy", "asked for")
    assert "copied: asked for" in str(report)
    assert offload_(Tower(4), "1MiB", **options).report(link=False).because == "", "there is no checkpoint"


@pytest.mark.parametrize("mode", ["map", "copy", "auto"])
def test_a_file_that_has_to_be_cast(mode: Any, device: str, tmp_path: Path) -> None:
    reference = Tower(2).half()
    path = saved(tmp_path, reference)
    with torch.device("meta"):
        tower = Tower(2)
    with pytest.raises(CheckpointError, match=r'HostStore\.copy_of, cast .* mode="copy"'):
        offload_(tower, "1MiB", device=device, checkpoint=path, mode=mode)
    assert all(parameter.is_meta for parameter in tower.parameters())
    with HostStore.copy_of(path, device="cpu") as store:  # what it says to do
        cast = {name: torch.from_dlpack(store.host_view(name)).float() for name in store}
    offload_(tower, "1MiB", device=device, checkpoint=cast)
    for name, tensor in reference.state_dict().items():
        assert same(tower.state_dict()[name].cpu(), tensor.float()), name


GROWTH = """
import gc, os, sys, torch
from torch import nn
from safetensors.torch import save_file
from dlpoffload.planning import all_staged
from dlpoffload.torch import offload_

def anonymous():
    lines = [line.split() for line in open("/proc/self/status")]
    return sum(int(line[1]) << 10 for line in lines if line[0] in ("RssAnon:", "RssShmem:"))

def build():
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))

def opened(path, build, mode):
    with torch.device("meta"):
        model = build()
    before = anonymous()
    handle = offload_(model, "64MiB", device="cpu", checkpoint=path, mode=mode, policy=all_staged)
    report = handle.report(link=False)
    assert report.mode == mode
    return anonymous() - before, handle

small, large = sys.argv[1:3]
save_file(nn.Linear(64, 64, bias=False).state_dict(), small)
opened(small, lambda: nn.Linear(64, 64, bias=False), "copy")
if not os.path.exists(large):
    save_file(build().state_dict(), large)
gc.collect()
grown, handle = opened(large, build, sys.argv[3])
print(grown / (8 * 2048 * 2048 * 4))
"""


@pytest.mark.parametrize("device", ["cpu"])
def test_no_second_copy(device: str, tmp_path: Path) -> None:
    grown = {}
    for mode in ("map", "copy"):
        done = child(GROWTH, str(tmp_path / "small.safetensors"), str(tmp_path / "large.safetensors"), mode)
        assert done.returncode == 0, done.stderr
        grown[mode] = float(done.stdout)
    assert grown["map"] < 0.02, "memory that is no file; the ring is not touched yet"
    assert grown["copy"] > 0.9, "which the measure shows where there is a copy"


def child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    package = Path(memory.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here), str(package)))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ------------------------------------------------------------------------------------------ writes outside


def weight(tower: nn.Module) -> Tensor:
    return tower.get_parameter(WEIGHT)


def _item(tower: nn.Module) -> None:
    weight(tower)[0] = 1


def _augmented(tower: nn.Module) -> None:
    held = weight(tower)
    held += 1


def _parameter_data(tower: nn.Module) -> None:
    weight(tower).data.mul_(2)


def _foreach(tower: nn.Module) -> None:
    torch._foreach_add_([weight(tower)], 1.0)


def _optimiser(tower: nn.Module, **options: Any) -> None:
    for parameter in tower.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        torch.optim.SGD(tower.parameters(), lr=0.5, **options).step()
    finally:
        for parameter in tower.parameters():
            parameter.grad = None


def _held_view(tower: nn.Module) -> None:
    held = weight(tower).view(-1)
    tower(torch.zeros(1, 32, device=held.device))
    held[3:5].view(2, 1).squeeze()[0] = 5


def _statistics(tower: nn.Module) -> None:
    rows = weight(tower).detach()
    nn.functional.batch_norm(torch.ones(4, 32, device=rows.device), rows[0], rows[1], training=True)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "add_": lambda tower: weight(tower).add_(1),
    "copy_": lambda tower: weight(tower).copy_(torch.zeros(64, 32)),
    "item": _item,
    "augmented": _augmented,
    "data": _parameter_data,
    "data of data": lambda tower: weight(tower).data.data.zero_(),
    "detach": lambda tower: weight(tower).detach().zero_(),
    "view": lambda tower: weight(tower).view(-1)[7].fill_(5),
    "transpose": lambda tower: weight(tower).t().fill_(5),
    "chunk": lambda tower: weight(tower).chunk(2)[1].fill_(5),
    "held view": _held_view,
    "out": lambda tower: torch.add(torch.ones_like(weight(tower)), 1, out=weight(tower).detach()),
    "inplace": lambda tower: nn.functional.relu(weight(tower).detach(), inplace=True),
    "init": lambda tower: nn.init.ones_(weight(tower)),
    "kaiming": lambda tower: nn.init.kaiming_uniform_(weight(tower)),
    "foreach": _foreach,
    "foreach optimiser": lambda tower: _optimiser(tower, foreach=True),
    "loop optimiser": lambda tower: _optimiser(tower, foreach=False),
    "aten": lambda tower: torch.ops.aten.mul_.Scalar(weight(tower).detach(), 2),
    "packet": lambda tower: torch.ops.aten.zero_(weight(tower).detach()),
    "state_dict": lambda tower: tower.state_dict()[WEIGHT].add_(1),
    "kept": lambda tower: tower.state_dict(keep_vars=True)[WEIGHT].add_(1),
    "statistics": _statistics,
    "shared memory": lambda tower: weight(tower).detach().share_memory_(),
    "dlpack": lambda tower: torch.from_dlpack(weight(tower).detach()),
}


def attempt(placement: str, device: str, folder: str) -> None:
    """Every write, one after the other, in a process of its own: says how each was refused."""
    mapped = Mapped(placement, device, Path(folder))
    refused = {}
    for name, write in WRITES.items():
        for mode in (torch.no_grad, torch.inference_mode):
            try:
                with mode():
                    write(mapped.tower)
            except AliasError as error:
                refused[f"{name}, {mode.__name__}"] = str(error)
    with torch.no_grad():
        try:
            weight(mapped.tower).detach().cpu().numpy() if device != "cpu" else weight(
                mapped.tower
            ).detach().numpy().fill(0)
        except ValueError as error:
            refused["numpy"] = str(error)
    mapped.check()
    assert not mapped.moved
    print(json.dumps(refused))


@everywhere
def test_no_write_reaches_the_file_or_ends_the_process(placement: str, device: str, tmp_path: Path) -> None:
    done = child(f"import test_torch_mapped_files as t; t.attempt({placement!r}, {device!r}, {str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout.splitlines()[-1])
    if device == "cpu":
        assert "read-only" in refused.pop("numpy")
    assert {name.rpartition(", ")[0] for name in refused} == set(WRITES)
    assert len(refused) == 2 * len(WRITES)
    for name, words in refused.items():
        assert f'handle.copy_out("{WEIGHT}")' in words or "layers." in words, name
        assert "handle.update" in words, name


def write_raw(device: str, folder: str) -> None:
    """What nothing protects: the storage itself."""
    mapped = Mapped("staged", device, Path(folder))
    print("reads", flush=True)
    weight(mapped.tower).untyped_storage().fill_(0)
    print("wrote")


def test_it_is_the_guard_that_saves_the_process(tmp_path: Path) -> None:
    done = child(f"import test_torch_mapped_files as t; t.write_raw('cpu', {str(tmp_path)!r})")
    assert (done.returncode, done.stdout) == (-11, "reads\n"), done.stderr
    before = tmp_path / "again"
    before.mkdir()
    torch.manual_seed(3)
    assert saved(before, Tower(4)).read_bytes() == (tmp_path / "aligned.safetensors").read_bytes()


@everywhere
def test_reads_are_as_ever(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    ours, theirs = weight(mapped.tower), weight(mapped.reference)
    assert isinstance(ours, nn.Parameter)
    assert same(ours.detach() * 2, theirs.detach() * 2)
    assert same(ours.t()[3:5].sum(1).detach(), theirs.t()[3:5].sum(1).detach())
    assert ours.detach().tolist() == theirs.detach().tolist()
    (ours * 2).detach().add_(1), ours.detach().clone().add_(1), ours.detach().to(torch.float64).add_(1)
    into = torch.zeros_like(theirs)
    into.copy_(ours.detach())
    torch.mul(ours.detach(), 2, out=into)
    assert same(into, theirs.detach() * 2)
    assert "Parameter" in repr(ours)
    assert same(copy.deepcopy(ours).detach(), theirs.detach())
    ours.requires_grad_(False).requires_grad_(True)
    mapped.check()


@everywhere
def test_a_swapped_tensor_moves_out_before_it_is_written(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    mapped.check()
    for module in (mapped.tower, mapped.reference):
        weight = module.get_parameter(WEIGHT)
        torch.utils.swap_tensors(weight, nn.Parameter(torch.ones_like(weight)))
    mapped.check()
    assert mapped.moved == ((WEIGHT,) if placement == "staged" else ())
    for module in (mapped.tower, mapped.reference):
        module.get_parameter(WEIGHT).data.mul_(2)
    mapped.check()


@everywhere
def test_a_parameter_made_of_a_mapped_one_is_read_only_too(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    made = nn.Parameter(mapped.tower.get_parameter(WEIGHT), requires_grad=False)
    assert isinstance(made, nn.Parameter)
    assert made.data_ptr() == mapped.tower.get_parameter(WEIGHT).data_ptr()
    with pytest.raises(AliasError, match="read-only"):
        made.add_(1)
    mapped.check()


@everywhere
def test_a_state_dict_is_read_only_and_its_copies_are_not(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    weights = mapped.tower.state_dict()
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    loaded = torch.load(file)
    copied = copy.deepcopy(weights)
    save_file(dict(weights), tmp_path / "again.safetensors")
    fresh = Tower(4).to(device)
    fresh.load_state_dict(weights)
    for name, tensor in mapped.reference.state_dict().items():
        for made in (loaded[name], copied[name], fresh.state_dict()[name]):
            assert type(made) is Tensor
            assert same(made, tensor), name
            made.add_(1)
    mapped.check()


# ------------------------------------------------------------------------------------- documented writes


def _update(mapped: Mapped, values: Tensor) -> None:
    mapped.handle.update(WEIGHT, values)


def _load(mapped: Mapped, values: Tensor) -> None:
    mapped.tower.load_state_dict({WEIGHT: values}, strict=False)


def _assign_data(mapped: Mapped, values: Tensor) -> None:
    weight(mapped.tower).data = values.to(mapped.device)


def _copy_out(mapped: Mapped, values: Tensor) -> None:
    assert mapped.handle.copy_out(WEIGHT)
    assert not mapped.handle.copy_out(WEIGHT), "it is out"
    with torch.no_grad():
        weight(mapped.tower).copy_(values)


@pytest.mark.parametrize("write", [_update, _load, _assign_data, _copy_out], ids=lambda write: write.__name__[1:])
@everywhere
def test_what_is_written_moves_first(
    placement: str, write: Callable[[Mapped, Tensor], None], device: str, tmp_path: Path
) -> None:
    if placement == "mapped" and write is _assign_data:
        pytest.skip("a mapped tensor with other data is its owner's; see test_torch_writes")
    mapped = Mapped(placement, device, tmp_path)
    mapped.check()
    for index in range(2):
        values = torch.full((64, 32), 0.25 + index)
        if index and write is _copy_out:
            with torch.no_grad():
                weight(mapped.tower).copy_(values)
        else:
            write(mapped, values)
        with torch.no_grad():
            weight(mapped.reference).copy_(values)
        mapped.check()
        assert mapped.moved == (WEIGHT,)
    with torch.no_grad():  # and in place, from now on
        weight(mapped.tower).add_(1)
        weight(mapped.reference).add_(1)
    mapped.check()
    report = mapped.handle.report(link=False)
    assert report.mode == "map"
    assert report.copied == ()
    assert "1 tensors moved" in str(report)
    mapped.handle.restore_()
    with torch.no_grad():
        assert same(mapped.tower.cpu()(mapped.input().cpu()), mapped.reference.cpu()(mapped.input().cpu()))


def test_a_view_made_before_stays_on_the_file(device: str, tmp_path: Path) -> None:
    mapped = Mapped("staged", device, tmp_path)
    before = weight(mapped.tower).detach()
    mapped.handle.update(WEIGHT, torch.zeros(64, 32))
    assert same(before.clone(), weight(mapped.reference).detach().clone())
    with pytest.raises(AliasError, match="copy_out"):
        before.add_(1)


class Writing(nn.Module):
    """Writes a parameter and a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.25)
            self.linear.bias.add_(self.mean)
        return self.norm(self.linear(x)) + self.mean


def writing() -> nn.Module:
    tower = Tower(0)
    tower.layers.extend(Writing() for _ in range(3))
    return tower


def test_writes_inside_of_a_units_forward(device: str, tmp_path: Path) -> None:
    mapped = Mapped("staged", device, tmp_path, writing)
    report = mapped.handle.report(link=False)
    assert {name.rpartition(".")[2] for name in report.copied} == {"running_mean", "running_var", "num_batches_tracked"}
    for seed in range(3):
        with torch.no_grad():
            x = mapped.input(seed)
            assert same(mapped.tower(x), mapped.reference(x))
    for name, tensor in mapped.reference.state_dict().items():
        assert same(mapped.tower.state_dict()[name], tensor), name
    assert set(mapped.moved) == {f"layers.{i}.{n}" for i in range(3) for n in ("linear.bias", "mean")}
    assert mapped.path.read_bytes() == mapped.bytes


def test_writes_inside_of_a_mapped_modules_forward_are_errors(device: str, tmp_path: Path) -> None:
    mapped = Mapped("mapped", device, tmp_path, writing)
    with torch.no_grad(), pytest.raises(AliasError, match="copy_out"):
        mapped.tower(mapped.input())
    assert mapped.path.read_bytes() == mapped.bytes


def test_a_running_unit_is_not_moved(device: str, tmp_path: Path) -> None:
    mapped = Mapped("staged", device, tmp_path)
    found = []

    def meanwhile(*_: Any) -> None:
        with pytest.raises(SlotError, match="running"):
            mapped.handle.copy_out(WEIGHT)
        found.append(mapped.tower.state_dict()[WEIGHT])

    hook = mapped.tower.layers[2].a.register_forward_hook(meanwhile)
    with torch.no_grad():
        mapped.tower(mapped.input())
    hook.remove()
    assert same(found[0].clone(), weight(mapped.reference).detach())
    with torch.no_grad(), pytest.raises(AliasError, match="copy_out"):
        found[0].add_(1)
    mapped.check()


# --------------------------------------------------------------------------------------------------- life


@everywhere
def test_sleep_wake_resize_refresh_copy_restore(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    handle = mapped.handle
    handle.update(WEIGHT, torch.zeros(64, 32))
    with torch.no_grad():
        weight(mapped.reference).zero_()
    in_file = handle.report(link=False).file_nbytes

    def unchanged() -> None:
        mapped.check()
        report = handle.report(link=False)
        assert (report.mode, report.moved, report.copied) == ("map", (WEIGHT,), ())
        assert report.file_nbytes == in_file, "mapped still, not copied"
        with torch.no_grad(), pytest.raises(AliasError, match="copy_out"):
            mapped.tower.layers[0].a.weight.add_(1)

    unchanged()
    handle.sleep()
    assert same(mapped.tower.state_dict()[WEIGHT], weight(mapped.reference).detach())
    with torch.no_grad(), pytest.raises(AliasError, match="copy_out"):
        mapped.tower.layers[0].a.weight.add_(1)
    handle.wake()
    unchanged()
    handle.resize_("32MiB")
    unchanged()
    handle.refresh_()
    unchanged()
    clone = copy.deepcopy(mapped.tower)
    copied = OffloadHandle.of(clone)
    assert copied is not None
    assert copied.report(link=False).file_nbytes == 0, "a copy is anonymous"
    with torch.no_grad():
        clone.layers[0].a.weight.add_(1)
    unchanged()
    handle.restore_()
    assert all(type(parameter) is nn.Parameter for parameter in mapped.tower.parameters())
    with torch.no_grad():
        mapped.tower.layers[0].a.weight.add_(1)
    assert mapped.path.read_bytes() == mapped.bytes


def test_residents_are_read_and_come_and_go(device: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    reference = Tower(8, 256).to(device)
    path = saved(tmp_path, reference)
    with torch.device("meta"):
        tower = Tower(8, 256)
    total = sum(p.nbytes for p in reference.parameters())
    handle = offload_(tower, int(total * 0.6), device=device, checkpoint=path, mode="map", units=["layers.*"])
    first = handle.report(link=False)
    assert first.plan.device_nbytes > 0
    assert first.file_nbytes < total, "pages of residents are not pinned"
    x = torch.randn(3, 256).to(device)
    with torch.no_grad():
        for budget in (0.6, 0.4, 1.5, 0.5):
            handle.resize_(int(total * budget))
            assert same(tower(x), reference(x))
        handle.sleep()
        handle.wake()
        assert same(tower(x), reference(x))
    for name, tensor in reference.state_dict().items():
        assert same(tower.state_dict()[name].clone(), tensor), name


def test_refused_memory_leaves_it_as_it_was(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    reference = Tower(8, 256).to(device)
    path = saved(tmp_path, reference)
    before = path.read_bytes()
    with torch.device("meta"):
        tower = Tower(8, 256)
    budget = int(sum(p.nbytes for p in reference.parameters()) * 0.6)
    handle = offload_(tower, budget, device=device, checkpoint=path, mode="map", units=["layers.*"])
    in_file = handle.report(link=False).file_nbytes

    def refuse(nbytes: int, *_: Any) -> None:
        raise HostMemoryError(f"{nbytes} bytes refused by the test", nbytes=nbytes)

    with monkeypatch.context() as patched:
        patched.setattr(memory, "allocate_pinned", refuse)
        with pytest.raises(HostMemoryError, match="by the test"):
            handle.sleep()
    assert not handle.asleep
    assert handle.report(link=False).file_nbytes == in_file, "mapped still"
    x = torch.randn(3, 256).to(device)
    with torch.no_grad():
        assert same(tower(x), reference(x))
    assert path.read_bytes() == before


def test_gradients_of_adapters_flow_through(device: str, tmp_path: Path) -> None:
    mapped = Mapped("staged", device, tmp_path)
    for module in (mapped.tower, mapped.reference):
        module.requires_grad_(False)
    inputs = [mapped.input().requires_grad_() for _ in range(2)]
    for module, x in zip((mapped.tower, mapped.reference), inputs, strict=True):
        module(x).square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert same(inputs[0].grad, inputs[1].grad)
    mapped.check()


@everywhere
def test_compiled(placement: str, device: str, tmp_path: Path) -> None:
    mapped = Mapped(placement, device, tmp_path)
    compiled = torch.compile(mapped.tower, backend="eager", fullgraph=placement == "mapped")
    with torch.no_grad():
        for seed in range(3):
            assert same(compiled(mapped.input(seed)), mapped.reference(mapped.input(seed)))
    mapped.check()


# ---------------------------------------------------------------------------------------------- what is asked


def test_modes_without_effect_are_errors(device: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Tower(4))
    asked: list[tuple[dict[str, Any], type[OffloadError], str]] = [
        ({"mode": "map"}, PlanError, "without checkpoint="),
        ({"mode": "auto"}, PlanError, "without checkpoint="),
        ({"mode": "mmap", "checkpoint": path}, PlanError, '"map", "copy" or "auto"'),
        ({"mode": "map", "checkpoint": stored(Tower(4))}, PlanError, 'mode="copy"'),
        ({"mode": "auto", "checkpoint": stored(Tower(4))}, PlanError, 'mode="copy"'),
        ({"mode": "map", "checkpoint": path, "pageable": "if_refused"}, PlanError, "pageable="),
    ]
    for options, kind, words in asked:
        with torch.device("meta"):
            tower = Tower(4)
        with pytest.raises(kind, match=words):
            offload_(tower, "1MiB", device=device, **options)
        assert all(parameter.is_meta for parameter in tower.parameters())


def test_a_recipe_that_slices_cannot_be_mapped(device: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Tower(4))
    recipe = {WEIGHT: narrow(WEIGHT, dim=0, start=0, length=32), "*.bias": "*.bias", "*": "*"}

    def build() -> nn.Module:
        with torch.device("meta"):
            tower = Tower(4)
            tower.layers[2].a.weight = nn.Parameter(torch.empty(32, 32))
        return tower

    options = {"device": device, "checkpoint": path, "recipe": recipe, "strict": False, **PLACEMENTS["staged"]}
    with pytest.raises(AliasError, match='mode="copy"'):
        offload_(build(), "1MiB", mode="map", **options)
    report = offload_(build(), "1MiB", mode="auto", **options).report(link=False)
    assert report.mode == "copy"
    assert "slices" in report.because
    assert "copied: " in str(report)


def test_a_recipe_that_renames_is_mapped(device: str, tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Tower(4)

    path = saved(tmp_path, Outer())
    with torch.device("meta"):
        tower = Tower(4)
    handle = offload_(
        tower, "1MiB", device=device, checkpoint=path, mode="map", recipe={"*": "model.*"}, **PLACEMENTS["staged"]
    )
    report = handle.report(link=False)
    assert (report.mode, report.copied) == ("map", ())


def test_off_16_bytes_only_slots_read_it(device: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Tower(4), aligned=False)
    with torch.device("meta"):
        staged, mapped = Tower(4), Tower(4)
    options = {"device": device, "checkpoint": path}
    assert offload_(staged, "1MiB", mode="map", **options, **PLACEMENTS["staged"]).report(link=False).copied == ()
    with pytest.raises(AliasError, match="align"):
        offload_(mapped, "1MiB", mode="map", **options, **PLACEMENTS["mapped"])
    assert all(parameter.is_meta for parameter in mapped.parameters())
    report = offload_(mapped, "1MiB", mode="auto", **options, **PLACEMENTS["mapped"]).report(link=False)
    assert report.mode == "copy"
    assert "align" in report.because


def test_a_file_that_was_written_to_is_an_error(device: str, tmp_path: Path) -> None:
    mapped = Mapped("staged", device, tmp_path)
    mapped.check()
    with mapped.path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(mapped.path, ns=(1, 1))
    with torch.no_grad(), pytest.raises(CheckpointError):
        mapped.tower(mapped.input())
