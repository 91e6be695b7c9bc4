"""What `offload_` refuses, in words; and that a refusal, early or half-way, leaves the module as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import CASES, Case, Tower, assert_same, case_of, distinct_nbytes, run, same, tensors_of  # noqa: E402
from torch import nn  # noqa: E402

from dlpoffload import lifetime, live_buffers, pinned_nbytes  # noqa: E402
from dlpoffload import memory as memory_module  # noqa: E402
from dlpoffload.errors import (  # noqa: E402
    DeviceMemoryError,
    DriverNotFoundError,
    HostMemoryError,
    OffloadError,
    PlanError,
    SpecError,
)
from dlpoffload.planning import all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402
from dlpoffload.torch import placed as placed_module  # noqa: E402
from dlpoffload.torch import staging as staging_module  # noqa: E402
from dlpoffload.torch.tensors import empty_bytes  # noqa: E402


def facts(module: nn.Module) -> dict[str, Any]:
    """Everything that an offload might change, but the bytes of tensors."""
    return {
        "tensors": {
            name: (id(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t._version)
            for name, t in tensors_of(module).items()
        },
        "attributes": {path: list(inside.__dict__) for path, inside in module.named_modules()},
        "hooks": [len(inside._state_dict_hooks) for inside in module.modules()],
        "memory": (sorted(live_buffers()), pinned_nbytes()),
    }


def untouched(module: nn.Module, before: dict[str, Any], reference: nn.Module, inputs: Any) -> None:
    gc.collect()
    lifetime.drain()
    assert facts(module) == before
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(module)[name], tensor), name
    with torch.no_grad():
        assert_same(run(module, inputs), run(reference, inputs))


# -------------------------------------------------------------------------------------------- refused at once


def _sparse() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("table", torch.eye(4).to_sparse())
    return module


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


def _conjugated() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("spectrum", torch.ones(4, dtype=torch.complex64).conj())
    return module


def _negated() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("spectrum", torch.ones(4, dtype=torch.complex64).conj().imag)
    return module


def _quantised() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("table", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    return module


def _shell_dtype() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("table", torch.ones(4, dtype=torch.uint8).view(torch.uint4))
    return module


def _inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


class _Wrapper(torch.Tensor):
    """Does not say of which tensors it is made."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapper:
        made: _Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def _wrapped() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(_Wrapper(torch.ones(4, 4)), requires_grad=False)
    return module


def _traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))


def _scripted_part() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = [
    (nn.Identity, {}, PlanError, "Identity without parameters and buffers has nothing to offload"),
    (lambda: nn.Linear(0, 4, bias=False), {}, PlanError, "nothing to offload"),
    (_on_meta, {}, SpecError, '"weight" is on the meta device'),
    (lambda: nn.LazyLinear(4), {}, SpecError, '"weight" is not initialised'),
    (_sparse, {}, SpecError, '"table" is torch.sparse_coo'),
    (_quantised, {}, SpecError, '"table" is quantised'),
    (_conjugated, {}, SpecError, '"spectrum" is a lazy conjugate'),
    (_negated, {}, SpecError, '"spectrum" is a lazy conjugate or negative'),
    (_shell_dtype, {}, SpecError, '"table" has dtype torch.uint4'),
    (_inference, {}, SpecError, "inference_mode"),
    (_traced, {}, SpecError, '"TopLevelTracedModule" is a .*torch.compile'),
    (_scripted_part, {}, SpecError, '"1" is a RecursiveScriptModule'),
    (_wrapped, {}, SpecError, '"weight" is a .*_Wrapper'),
    (Tower, {"device_budget": "lots"}, SpecError, 'device_budget="lots" is not a count of bytes'),
    (Tower, {"device_budget": -1}, SpecError, "-1 is negative"),
    (Tower, {"device_budget": True}, SpecError, "device_budget=True"),
    (Tower, {"device": "cuda:77"}, DriverNotFoundError, "device|driver"),
    (Tower, {"device": "tpu"}, SpecError, "device='tpu' is no device name"),
    (Tower, {"units": ["layerz.*"]}, PlanError, '"layerz.*" matches none'),
    (Tower, {"units": ["layers"]}, PlanError, "never called"),
    (Tower, {"units": ["layers.*", "layers.1.a"]}, PlanError, "cannot be nested"),
    (Tower, {"units": "layers.*"}, PlanError, "one string"),
    (Tower, {"units": {"one": ["layers.0.a.weight", "nothing"]}}, PlanError, 'names the tensor "nothing"'),
    (Tower, {"slots": 0}, PlanError, "slots=0"),
    (Tower, {"policy": lambda request: {}}, PlanError, "leaves tensors unplaced"),
    (Tower, {"device_budget": 1}, PlanError, "smallest budget"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "options", "kind", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", None)
)
def test_refused(make: Callable[[], nn.Module], options: dict[str, Any], kind: type[Exception], words: str) -> None:
    module = make()
    attributes = {path: list(inside.__dict__) for path, inside in module.named_modules()}
    data = [id(tensor) for tensor in tensors_of(module).values()]
    alive = live_buffers()
    with pytest.raises(kind, match=words.replace("*", r"\*").replace(r".\*", ".*")) as caught:
        offload_(module, **{"device_budget": "1MiB", "device": "cpu", **options})
    assert isinstance(caught.value, OffloadError)
    assert {path: list(inside.__dict__) for path, inside in module.named_modules()} == attributes
    assert [id(tensor) for tensor in tensors_of(module).values()] == data
    assert live_buffers() == alive


def test_the_names_of_a_dtype_shell_would_have_lost_half_of_it() -> None:
    assert torch.uint4.itemsize == 1


def test_offloaded_twice(device: str) -> None:
    tower = Tower(3)
    handle = offload_(tower, "10KiB", device=device, units=["layers.*.a", "layers.*.b"], slots=1)
    outer = nn.Sequential(nn.Linear(2, 2), tower)
    for module, name in ((tower, "Tower"), (tower.layers[1], "Step"), (outer, "1"), (tower.layers[0].a, "Linear")):
        with pytest.raises(OffloadError, match=f'"{name}" is offloaded already'):
            offload_(module, "1MiB", device=device)
    handle.restore_()
    offload_(outer, "1MiB", device=device).restore_()


def test_copies_and_pickles_are_refused_before_a_tensor_is_touched(device: str, monkeypatch: Any) -> None:
    tower = Tower(3)
    reference = copy.deepcopy(tower)
    handle = offload_(tower, "1MiB", device=device, policy=all_staged, units=["layers.*"])
    touched: list[str] = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: touched.append("copied"))
    calls: list[tuple[str, Callable[[], object]]] = [
        ("deepcopy", lambda: copy.deepcopy(tower.layers[1])),
        ("deepcopy", lambda: copy.deepcopy(handle)),
        ("pickled", lambda: pickle.dumps(tower)),
        ("pickled", lambda: pickle.dumps(tower.layers[0].a)),
        ("pickled", lambda: torch.save(tower, io.BytesIO())),
    ]
    for words, call in calls:
        with pytest.raises(OffloadError, match=words):
            call()
    assert touched == []
    monkeypatch.undo()
    file = io.BytesIO()
    torch.save(tower.state_dict(), file)
    file.seek(0)
    for name, tensor in torch.load(file, map_location="cpu").items():
        assert same(tensor, reference.state_dict()[name])
    handle.restore_()
    assert same(copy.deepcopy(tower).layers[0].a.weight, reference.layers[0].a.weight)


# ------------------------------------------------------------------------------------------ refused half-way


HALFWAY = [case for case in CASES if case.name in ("decoder_tied", "odd_tensors", "tied_everywhere")]


def _fails_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: BaseException) -> list[int]:
    """Let the call number `at` of a function raise; gives the calls made so far."""
    calls = [0]
    real = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at + 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


POINTS: list[tuple[str, Any, str, BaseException]] = [
    ("host memory", memory_module.HostBuffer, "allocate", HostMemoryError("no", nbytes=1)),
    ("slots", memory_module.DeviceBuffer, "register", DeviceMemoryError("no", nbytes=1)),
    ("device memory", placed_module, "empty_bytes", DeviceMemoryError("no", nbytes=1)),
    ("ring", placed_module, "SlotRing", DeviceMemoryError("no", nbytes=1)),
    ("stager", placed_module, "Stager", ValueError("no")),
    ("units", placed_module, "StagedUnit", KeyboardInterrupt()),
    ("wrapping", staging_module.WrappedForward, "install", ValueError("no")),
    ("views", placed_module, "home_tensor", MemoryError("no")),
]


@pytest.mark.parametrize(("what", "owner", "name", "error"), POINTS, ids=[point[0] for point in POINTS])
@pytest.mark.parametrize("case", HALFWAY, ids=lambda case: case.name)
def test_refused_half_way(
    case: Case, what: str, owner: Any, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = case.model()
    reference, before, inputs = case.model(), facts(module), case.inputs(0)
    budget = max(distinct_nbytes(module) * 4 // 10, 300_000)
    failed = 0
    for at in [*range(12), *range(12, 400, 17)]:
        with monkeypatch.context() as patch:
            calls = _fails_at(patch, owner, name, at, error)
            caught, handle = None, None
            try:
                handle = offload_(module, budget, device="cpu")
            except type(error) as refused:
                caught = refused.with_traceback(None)
        if handle is not None:
            assert calls[0] <= at
            handle.restore_()
            del handle
            break
        assert caught is error
        failed += 1
        untouched(module, before, reference, inputs)
    assert failed, f"{what}: nothing was called"
    untouched(module, before, reference, inputs)


@pytest.mark.parametrize("at", [0, 1, 7, 30])
def test_restore_without_memory_can_be_repeated(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, reference = case_of("decoder").model(), case_of("decoder").model()
    inputs = case_of("decoder").inputs(0)
    handle = offload_(module, distinct_nbytes(module) // 4, device="cpu")
    with torch.no_grad():
        run(module, inputs)
        with monkeypatch.context() as patch:
            _fails_at(patch, placed_module, "empty_bytes", at, HostMemoryError("not enough", nbytes=1))
            with pytest.raises(HostMemoryError, match="not enough"):
                handle.restore_()
        assert not handle.restored
        assert_same(run(module, inputs), run(reference, inputs))
        assert_same(handle.restore_()(*inputs[0]), run(reference, inputs))
    assert handle.restored


def test_torch_without_memory() -> None:
    with pytest.raises(HostMemoryError, match="torch would not allocate") as caught:
        empty_bytes(1 << 62, torch.device("cpu"))
    assert caught.value.nbytes == 1 << 62


def test_too_little_host_memory(cpu_driver) -> None:
    module = case_of("decoder").model()
    cpu_driver(host_limit_nbytes=1_000_000)
    reference, before = case_of("decoder").model(), facts(module)
    with pytest.raises(HostMemoryError, match="memory"):
        offload_(module, distinct_nbytes(module) // 4, device="cpu")
    untouched(module, before, reference, case_of("decoder").inputs(0))


def test_mapping_where_the_device_cannot_map(cpu_driver) -> None:
    cpu_driver(map_host_memory=False)
    module = case_of("decoder").model()
    reference, before, inputs = case_of("decoder").model(), facts(module), case_of("decoder").inputs(0)
    with pytest.raises(PlanError, match=r"cannot map host memory.*stage_unmapped=True"):
        offload_(module, distinct_nbytes(module) // 4, device="cpu")
    untouched(module, before, reference, inputs)
    handle = offload_(module, "8MiB", device="cpu", policy=all_staged, slots=6)
    with torch.no_grad():
        for _ in range(2):
            assert_same(run(module, inputs), run(reference, inputs))
    report = handle.report(link=False)
    assert not report.mapped_home
    assert "the device cannot map these bytes" in str(report)
    handle.restore_()
    assert OffloadHandle.of(module) is None


def test_what_is_printed() -> None:
    module = case_of("decoder").model()
    handle = offload_(module, distinct_nbytes(module) // 4, device="cpu")
    with torch.no_grad():
        run(module, case_of("decoder").inputs(0))
    text = str(handle.report(link=False))
    for words in ("cpu", "host_staged", "ring", "copies", "stalls", "host waits", "pinned memory"):
        assert words in text
    assert "streamed" in str(handle.plan)
    assert repr(handle) == "<OffloadHandle of Decoder, on cpu>"
    assert handle.device == "cpu"
    assert not handle.restored
    handle.restore_()
    assert "restored" in repr(handle)
    assert handle.restored
    assert handle.plan.streamed_units  # what was
