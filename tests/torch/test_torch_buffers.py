"""Buffers and weights of several dtypes in one slot: their storages are several, and all of them are the slot's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import same  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload.errors import AliasError  # noqa: E402
from dlpoffload.planning import all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

WIDTH = 32
BACKENDS = [None, "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Quantised(nn.Module):
    """Codes in a parameter, a scale and what is remembered in buffers: three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH) / 9, requires_grad=False)
        self.register_buffer("scale", torch.rand(WIDTH, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(4, WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Any:
        weight = self.codes.to(x.dtype) * self.scale.to(x.dtype)
        return torch.tanh(x @ weight + self.bias + self.seen.sum(0))


class Remembering(Quantised):
    def forward(self, x: Tensor) -> Tensor:
        self.seen[x.shape[0] % 4] = x[0]
        self.calls += 1
        return super().forward(x)


class Normal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Overlapping(nn.Module):
    """Buffers that share bytes; some are written and all are read, beside one of another dtype."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        flat = torch.randn(2 * WIDTH).to(device)
        self.register_buffer("front", flat[:WIDTH].data)
        self.register_buffer("middle", flat[WIDTH // 2 :][:WIDTH].data)
        self.register_buffer("whole", flat)
        self.register_buffer("codes", torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8).to(device))

    def forward(self, x: Tensor) -> Tensor:
        self.front.mul_(0.5)
        self.middle.add_(x[0])
        return torch.tanh(x @ self.codes.to(x.dtype) + self.front + self.middle + self.whole[:WIDTH])


class Stepping(nn.Module):
    """Writes a parameter, beside another of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.mean = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return torch.tanh(x @ self.codes.to(x.dtype) + self.bias + self.mean)


def pair(device: str, kind: Callable[[], nn.Module], depth: int = 5) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    torch.manual_seed(2)
    module = nn.Sequential(*(kind() for _ in range(depth))).requires_grad_(False)
    reference = copy.deepcopy(module).to(device)
    return module, reference, offload_(module, "1MiB", device=device, policy=all_staged, units=["*"])


def vector(seed: int, device: str, rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


def alike(found: Tensor, wanted: Tensor, backend: str | None) -> bool:
    """The same bits; but inductor fuses in one graph of all layers what it does not in one of each."""
    return same(found, wanted) if backend != "inductor" else torch.allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Remembering, Normal, Stepping])
def test_written_in_forward(device: str, kind: type[nn.Module], backend: str | None) -> None:
    """Compiled, too, where torch takes tensors of one storage for views of each other."""
    module, reference, handle = pair(device, kind)
    run, resident = (m if backend is None else torch.compile(m, backend=backend) for m in (module, reference))
    with torch.no_grad():
        for seed in range(5):
            found, wanted = (model(vector(seed, device)) for model in (run, resident))
            assert alike(found, wanted, backend)
    for (name, found), wanted in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        assert alike(found.to(device), wanted, backend), name
    assert handle.report(link=False).stats.mapped_runs == 0
    handle.restore_()
    with torch.no_grad():
        assert alike(module.to(device)(vector(7, device)), reference(vector(7, device)), backend)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_buffers_that_share_bytes_go_on_sharing_them(device: str, backend: str | None) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(*(Overlapping() for _ in range(5)))
    torch.manual_seed(2)
    reference = nn.Sequential(*(Overlapping(device) for _ in range(5)))  # a copy would share nothing
    offload_(module, "1MiB", device=device, policy=all_staged, units=["*"])
    run, resident = (m if backend is None else torch.compile(m, backend=backend) for m in (module, reference))
    with torch.no_grad():
        for seed in range(5):
            assert same(run(vector(seed, device)), resident(vector(seed, device)))
    for (name, found), wanted in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        assert same(found.to(device), wanted), name


class OverlappingViews(nn.Module):
    """Torch knows of two buffers that share bytes of what tensor they are views."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(2 * WIDTH)
        self.register_buffer("front", flat[:WIDTH])
        self.register_buffer("middle", flat[WIDTH // 2 :][:WIDTH])
        self.writes = True

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.front.mul_(0.5)
        return torch.tanh(x + self.front + self.middle)


def test_a_write_that_is_lost_is_an_error(device: str) -> None:
    """What torch compiles writes the tensor that they are views of, which is not in the slot."""
    torch.manual_seed(2)
    module = nn.Sequential(*(OverlappingViews() for _ in range(5)))
    torch.manual_seed(2)
    reference = nn.Sequential(*(OverlappingViews() for _ in range(5)))
    handle = offload_(module, "1MiB", device=device, policy=all_staged, units=["*"])
    fast = torch.compile(module, backend="aot_eager")

    def check(run: Callable[[Tensor], Tensor], seed: int) -> None:
        wanted = reference(vector(seed, "cpu"))
        assert torch.allclose(run(vector(seed, device)).cpu(), wanted, atol=1e-6)

    with torch.no_grad():
        for seed in range(3):
            check(module, seed)  # uncompiled nothing is lost
        for layer in (*module, *reference):
            layer.writes = False
        for seed in range(3):
            check(fast, seed)
        module[0].writes = True
        with pytest.raises(AliasError, match=r'"0\.front" shares its bytes .* is lost'):
            fast(vector(0, device))
        module[0].writes = False
        check(module, 3)
    assert handle.report(link=False).stats.mapped_runs == 0


class Slices(nn.Module):
    """Keys and values are views of one tensor, whose base torch goes on knowing."""

    def __init__(self) -> None:
        super().__init__()
        keys, values = torch.randn(2, 4, WIDTH)
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        self.keys.mul_(0.5)
        self.values[1] = x[0]
        return torch.tanh(x + self.keys.sum(0) - self.values.sum(0))


def test_views_of_one_tensor_are_told_apart(device: str) -> None:
    module, reference, _handle = pair(device, Slices)
    run, resident = torch.compile(module, backend="aot_eager"), torch.compile(reference, backend="aot_eager")
    with torch.no_grad():
        for seed in range(4):
            assert same(run(vector(seed, device)), resident(vector(seed, device)))
    for (name, found), wanted in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        assert same(found.to(device), wanted), name


KEPT: list[Any] = []
ATTRIBUTES = ["codes", "bias", "scale", "seen"]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_view_that_outlives_its_unit_is_an_error(device: str, attribute: str) -> None:
    class Keeping(Quantised):
        def forward(self, x: Tensor) -> Any:
            KEPT.append(getattr(self, attribute)[:1])
            return super().forward(x)

    module, _reference, handle = pair(device, Keeping)
    try:
        with torch.no_grad(), pytest.raises(AliasError, match='keeps a view of the weights of "0"'):
            module(vector(0, device))
    finally:
        KEPT.clear()
    handle.restore_()


def test_what_was_kept_once_is_no_excuse(device: str) -> None:
    """A view that goes while another comes leaves the sum as it was only where it is of the same unit and slot."""

    class Keeping(Quantised):
        def forward(self, x: Tensor) -> Any:
            KEPT[:] = [self.scale[:1], self.seen[0]]
            return super().forward(x)

    module, _reference, handle = pair(device, Keeping)
    try:
        with torch.no_grad():
            for layer in module:
                with pytest.raises(AliasError, match="keeps a view"):
                    layer(vector(0, device))
    finally:
        KEPT.clear()
    handle.restore_()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_outputs_that_alias_are_copied(device: str, attribute: str) -> None:
    class Returning(Quantised):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), getattr(self, attribute).t(), getattr(self, attribute)

    module, reference, handle = pair(device, Returning)
    found: list[Any] = []
    with torch.no_grad():
        for layer, twin in zip(module, reference, strict=True):
            out, turned, itself = layer(vector(0, device))
            assert itself is getattr(layer, attribute)
            found.append((turned, getattr(twin, attribute).t()))
            assert same(out, twin(vector(0, device))[0])
    assert all(same(turned, wanted) for turned, wanted in found)
    assert handle.report(link=False).aliased_outputs == len(module)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_what_autograd_saves_of_buffers_is_staged_again(device: str, backend: str | None) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(WIDTH, WIDTH) / 6)
            self.register_buffer("scale", torch.rand(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.tanh(x @ self.weight.t()) * self.scale).to(x.dtype)

    module, reference, handle = pair(device, Buffered, depth=6)
    run, resident = (m if backend is None else torch.compile(m, backend=backend) for m in (module, reference))
    for seed in range(3):
        x, y = vector(seed, device).requires_grad_(), vector(seed, device).requires_grad_()
        run(x).square().sum().backward()
        resident(y).square().sum().backward()
        assert x.grad is not None
        assert same(x.grad, y.grad)
    assert handle.report(link=False).stats.copies > 3 * len(module)


def test_state_dict_inside_of_a_forward(device: str) -> None:
    class Saving(Quantised):
        def forward(self, x: Tensor) -> Any:
            KEPT.append(self.state_dict())
            return super().forward(x)

    module, reference, _handle = pair(device, Saving)
    try:
        with torch.no_grad():
            module(vector(0, device))
        for saved, twin in zip(KEPT, reference, strict=True):
            assert all(same(saved[name].to(device), tensor) for name, tensor in twin.named_parameters())
            assert all(same(saved[name].to(device), tensor) for name, tensor in twin.named_buffers())
    finally:
        KEPT.clear()
