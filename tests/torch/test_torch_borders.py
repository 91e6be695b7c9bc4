"""Where inputs go from one device to another, and what is said of code that mixes tensors of two.

Torch takes the two devices of the CPU driver for one, so that nothing can be missed there. Fake tensors tell devices
apart on any machine, and have no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pytest

torch = pytest.importorskip("torch")

from models import Case, Step, Tower, case_of, flat_outputs, same  # noqa: E402
from split_models import MAPS, SecondCpu, offload_split, resident, torch_device_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from dlpoffload import driver as drivers  # noqa: E402
from dlpoffload.errors import PlanError  # noqa: E402
from dlpoffload.torch import borders, mixing, offload_  # noqa: E402
from dlpoffload.torch.borders import BorderForward, SplitForward  # noqa: E402
from dlpoffload.torch.device_map import DeviceMap, Parts  # noqa: E402
from dlpoffload.torch.gate import Gate  # noqa: E402

OTHERS = {"mixture", "encoder_decoder", "rotated", "recurrent"}
"""Of the maps, those whose models need values, or ask a device for its kernels; they run where there is one."""
FAKED = [case_of(name) for name in MAPS if name not in OTHERS]


@contextlib.contextmanager
def faked(module: nn.Module, device_map: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a model on the CPU and on a card that need not be there, with nothing but what is at the borders."""
    monkeypatch.setattr(borders, "_current", lambda device: contextlib.nullcontext())
    names = ("cpu", "cpu:1")
    with drivers.installed(SecondCpu()):
        parts = Parts(module, DeviceMap({path: names[index] for path, index in device_map.items()}))
    devices = dict(zip(names, map(torch.device, ("cpu", "cuda:0")), strict=True))
    forwards: list[BorderForward] = [BorderForward(inside, devices[name]) for inside, name in parts.borders()]
    for forward in (*forwards, SplitForward(parts, devices[parts.home], [])):
        forward.install(Gate())
    made: dict[int, Tensor] = {}
    with torch.no_grad(), FakeTensorMode() as mode:
        for inside in module.modules():
            for table in (inside._parameters, inside._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        real = devices[parts.device_of_tensor[id(tensor)]]
                        fake = made.setdefault(id(tensor), mode.from_tensor(tensor).to(real))
                        table[name] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
        yield


def call(module: nn.Module, case: Case) -> list[Tensor]:
    args, kwargs = case.inputs(0)
    return flat_outputs(module(*args, **kwargs))


@pytest.mark.parametrize("case", FAKED, ids=lambda case: case.name)
def test_the_zoo_over_devices_that_differ(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    module = case.model()
    wanted = [(tensor.shape, tensor.dtype) for tensor in call(module, case)]
    with faked(module, MAPS[case.name], monkeypatch):
        found = call(module, case)
    assert [(tensor.shape, tensor.dtype) for tensor in found] == wanted
    assert {tensor.device for tensor in found} == {torch.device("cpu")}


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Scaled(nn.Module):
    """What has a tensor beside its parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.scale = torch.linspace(1, 2, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class Glued(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.tower = Tower(2)
        self.add = Sum()
        self.scaled = Scaled()

    def forward(self, x: Tensor, how: str) -> Tensor:
        x = self.first(x)
        if how == "add":
            return x + self.tower(x)
        if how == "add in a module":
            return self.add(x, self.tower(x))
        if how == "call what is inside":
            return self.tower.layers[1](x)
        return self.scaled(x) if how == "scale" else self.tower(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.glued = Glued()

    def forward(self, x: Tensor, how: str = "") -> Tensor:
        x = self.first(x)
        return x + self.glued.tower(x) if how == "add in the whole" else self.glued(x, how)


def test_what_is_a_border(two_cpus: object) -> None:
    """Parts of what is split, elements of lists and of Sequentials among them, and what the map names."""
    module = nn.ModuleDict(
        {
            "lists": nn.ModuleDict({"a": nn.ModuleList([Step(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])}),
            "outer": nn.ModuleDict({"sum": Sum(), "other": Sum(), "first": nn.Linear(8, 8)}),
            "deep": Tower(2, 8),
        }
    )
    device_map = {"": "cpu", "lists": "cpu:1", "deep": "cpu:1", "deep.layers": "cpu:1", "outer.sum": "cpu"}
    parts = Parts(module, DeviceMap(device_map))
    paths = {id(inside): path for path, inside in module.named_modules()}
    assert {paths[id(inside)]: device for inside, device in parts.borders()} == {
        "lists.a.0": "cpu:1",
        "lists.a.1": "cpu:1",
        "lists.a.1.0": "cpu:1",
        "outer.sum": "cpu",
        "outer.first": "cpu",
        "deep": "cpu:1",
        "deep.layers.0": "cpu:1",
        "deep.layers.1": "cpu:1",
    }


@pytest.mark.parametrize("device_map", [{"**": "cpu"}, {"": "cpu"}, {f"layers.{i}": "cpu" for i in range(3)}])
def test_one_device_has_no_borders(device_map: dict[str, str]) -> None:
    assert list(Parts(Tower(3), DeviceMap(device_map)).borders()) == []


def test_a_pattern_for_all_names_nothing(two_cpus: object) -> None:
    found = DeviceMap({"**": "cpu", "layers.*": "cpu:1", "layers.1.a": "cpu", "**.b": "cpu"})
    named = [path for path, _ in Tower(2).named_modules() if found.names(path)]
    assert named == ["layers.0", "layers.0.b", "layers.1", "layers.1.a", "layers.1.b"]


# -------------------------------------------------------------------------------------- code that mixes devices

PARTED = {"": 0, "glued.tower": 1, "glued.scaled": 1}
MIXED = [
    (
        "add",
        r'^the forward of "glued" \(Glued\) combines what its parts on {0} and {1} gave it: .*devices?.*; '
        r'.*outputs stay where they were computed; map the whole of it .*\(device_map={{..., "glued": "{0}"}}\)',
        {"glued": 0, "glued.tower": 0},
    ),
    ("add in the whole", "^the forward of this Around combines what its parts on {0} and {1} .* map whole blocks", {}),
    (
        "add in a module",
        r'^"glued.add" \(Sum\) is called with .* name this one as well: device_map={{..., "glued.add": "{0}"}}$',
        {"glued.add": 0},
    ),
    (
        "call what is inside",
        r'^"glued.tower.layers.1" \(Step\) is called with .*: device_map={{..., "glued.tower.layers.1": "{1}"}}$',
        {"glued.tower.layers.1": 1},
    ),
    ("scale", r'^"glued.scaled" \(Scaled\) uses a tensor .*attributes, .* are not moved', {"glued.scaled": 0}),
]
"""What `Glued` does, what is said of it over two devices, and what more in the map makes it run."""


@pytest.mark.parametrize(("how", "said", "more"), MIXED, ids=[how for how, *_ in MIXED])
def test_mixed_devices_are_named(how: str, said: str, more: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Around()
    with faked(module, PARTED, monkeypatch):
        if how == "scale":
            module.glued.scaled.scale = torch.empty(32)
        x = torch.empty(3, 32)
        assert module(x).device.type == "cpu"
        with pytest.raises(PlanError, match=said.format("cpu", "cpu:1")) as caught:
            module(x, how)
        assert isinstance(caught.value.__cause__, RuntimeError)
    if more:
        module = Around()
        with faked(module, {**PARTED, **more}, monkeypatch):
            if how == "scale":
                module.glued.scaled.scale = torch.empty(32)
            assert module(torch.empty(3, 32), how).device.type == "cpu"


@pytest.mark.parametrize(("how", "said", "more"), MIXED, ids=[how for how, *_ in MIXED])
def test_mixed_devices_on_the_devices(how: str, said: str, more: dict[str, int], pair: tuple[str, str]) -> None:
    """The same where values are computed. Two devices of the CPU driver mix, since torch has but one there."""
    module = Around()
    module.glued.scaled.scale = module.glued.scaled.scale.to(torch_device_of(pair[0]))
    device_map = {path: pair[index] for path, index in PARTED.items()}
    whole = {**device_map, **{path: pair[index] for path, index in more.items()}}
    parted, reference = resident(module, device_map), resident(module, whole)
    handle = offload_split(module, device_map)
    x = torch.linspace(-1, 1, 96).reshape(3, 32).to(torch_device_of(pair[0]))
    with torch.no_grad():
        chain = parted(x)
        assert same(module(x), chain)
        if torch_device_of(pair[0]) == torch_device_of(pair[1]):
            assert same(module(x, how), reference(x, how))
            return
        with pytest.raises(PlanError, match=said.format(*pair)):
            module(x, how)
        assert same(module(x), chain), "the rings are usable afterwards"
        handle.restore_()
        if more:
            offload_split(module, whole)
            assert same(module(x, how), reference(x, how))


TORCH_SAYS = {
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!": True,
    "Expected all tensors to be on the same device, but got mat1 is on cpu, different from other tensors": True,
    "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same": True,
    "Input type (torch.cuda.HalfTensor) and weight type (torch.cuda.FloatTensor) should be the same": False,
    "Input and parameter tensors are not at the same device, found input tensor at cpu": True,
    "indices should be either on cpu or on the same device as the indexed tensor (cpu)": True,
    "Dynamo failed to run FX node with fake tensors:\n  found two different devices cpu, cuda:0": True,
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)": False,
    "CUDA out of memory": False,
}


@pytest.mark.parametrize("said", TORCH_SAYS)
def test_which_errors_of_torch_are_meant(said: str, two_cpus: object) -> None:
    parts = Parts(Tower(4), DeviceMap({"": "cpu", "layers.2": "cpu:1"}))
    found = mixing.explained(RuntimeError(said), parts)
    assert isinstance(found, PlanError) is TORCH_SAYS[said]
    assert found is None or said.splitlines()[-1].strip().rstrip("!") in str(found)
    assert mixing.explained(RuntimeError(said), Parts(Tower(4), DeviceMap({"": "cpu"}))) is None


def test_other_errors_pass_as_they_are(two_cpus: object) -> None:
    module = Tower(4)
    offload_(module, dict.fromkeys(("cpu", "cpu:1"), "64KiB"), device_map={"": "cpu", "layers.2": "cpu:1"})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.ones(3, 7))
