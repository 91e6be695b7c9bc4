"""Gradients through an offloaded module are those of the resident one, bit by bit."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import (  # noqa: E402
    CASES,
    Case,
    Normalised,
    Tower,
    distinct_nbytes,
    flat_outputs,
    offload_at,
    same,
    tensors_of,
)
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from dlpoffload import lifetime, live_buffers  # noqa: E402
from dlpoffload.errors import AliasError  # noqa: E402
from dlpoffload.planning import all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

WITH_GRADIENTS = [case for case in CASES if case.name not in ("odd_tensors", "huge_linear", "recurrent")]


class Adapted(nn.Module):
    """A frozen base that is offloaded, and a small adapter beside it that is not."""

    def __init__(self, base: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(width, 4, bias=False)
        self.up = nn.Linear(4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.up(self.down(x)))


def adapted(device: str, depth: int = 6, **options: Any) -> tuple[Adapted, Adapted, OffloadHandle]:
    torch.manual_seed(3)
    model = Adapted(Tower(depth)).to(device)
    reference = copy.deepcopy(model)
    options = {"units": ["layers.*"], "policy": all_staged, **options}
    return model, reference, offload_(model.base, "1MiB", device=device, **options)


def vector(seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same_gradients(model: Adapted, reference: Adapted) -> None:
    for name in ("down", "up"):
        found, wanted = getattr(model, name).weight.grad, getattr(reference, name).weight.grad
        assert same(found, wanted), name
    assert all(parameter.grad is None for parameter in model.base.parameters())


# -------------------------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda case: case.name)
def test_gradients_of_inputs(case: Case, device: str) -> None:
    module = case.model().requires_grad_(False)
    reference = copy.deepcopy(module).to(device)
    handle = offload_at(module, distinct_nbytes(module) // 4, device)
    for seed in range(2):
        gradients = []
        for model in (module, reference):
            args, kwargs = case.inputs(seed, device)
            leaves: list[Tensor] = []

            def wanting(value: Any, leaves: list[Tensor] = leaves) -> Any:
                if isinstance(value, Tensor) and value.is_floating_point():
                    leaves.append(value.requires_grad_())
                return value

            tokens = not any(isinstance(v, Tensor) and v.is_floating_point() for v in [*args, *kwargs.values()])
            if tokens:  # a hook makes the embedding's output a leaf that wants a gradient
                embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
                hook = embedding.register_forward_hook(lambda m, i, out, wanting=wanting: wanting(out.detach()))
            else:
                args, kwargs = tuple(map(wanting, args)), {k: wanting(v) for k, v in kwargs.items()}
            outputs = [t for t in flat_outputs(model(*args, **kwargs)) if t.requires_grad]
            sum(t.square().sum() for t in outputs).backward()
            if tokens:
                hook.remove()
            gradients.append([leaf.grad for leaf in leaves])
        assert len(gradients[0]) == len(gradients[1]) > 0
        assert all(same(a, b) for a, b in zip(*gradients, strict=True))
    assert handle.report(link=False).stats.mapped_runs == 0


# --------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("adversary", [None, 0, 1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_backward_after_the_slots_were_refilled(slots: int, adversary: int | None, cpu_driver) -> None:
    cpu_driver(adversary=adversary)
    model, reference, handle = adapted("cpu", slots=slots)
    for seed in range(3):
        for each in (model, reference):
            x = vector(seed).requires_grad_()
            loss = each(x).square().mean()
            with torch.no_grad():
                each.base(vector(99))  # other units were in every slot since
            loss.backward()
    assert_same_gradients(model, reference)
    assert handle.report(link=False).stats.copies > 0


def test_two_forwards_before_one_backward(device: str) -> None:
    model, reference, _handle = adapted(device)
    for each in (model, reference):
        first, second = each(vector(0, device)), each(vector(1, device))
        (first * second).sum().backward()
    assert_same_gradients(model, reference)


def test_retained_graph_and_backward_twice(device: str) -> None:
    model, reference, _handle = adapted(device)
    for each in (model, reference):
        loss = each(vector(0, device)).square().sum()
        loss.backward(retain_graph=True)
        each(vector(1, device)).sum().backward()
        loss.backward()
    assert_same_gradients(model, reference)


def test_second_derivatives(device: str) -> None:
    gradients = []
    for each in adapted(device)[:2]:
        x = vector(0, device).requires_grad_()
        (first,) = torch.autograd.grad(each(x).pow(3).sum(), x, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert same(*gradients)


def test_a_training_loop(device: str) -> None:
    model, reference, handle = adapted(device)
    optimisers = [torch.optim.AdamW([each.down.weight, each.up.weight], lr=0.01) for each in (model, reference)]
    for step in range(5):
        losses = []
        for each, optimiser in zip((model, reference), optimisers, strict=True):
            optimiser.zero_grad()
            loss = each(vector(step, device)).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss)
        assert same(*losses)
    assert same(model.up.weight, reference.up.weight)
    stats = handle.report(link=False).stats
    assert stats.mapped_runs == stats.host_waits == 0


class Spectral(nn.Module):
    """Saves a lazy conjugate of its weight, and a negative view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, dtype=torch.complex64) / 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.complex64) @ self.weight.conj()
        return (y * self.weight.conj()[:1] + y * y.conj()).real + x * self.weight.conj().imag[0]


def test_saved_conjugates_and_negatives(device: str) -> None:
    tower = Tower(0)
    tower.layers.extend(Spectral() for _ in range(4))
    model = Adapted(tower).to(device)
    reference = copy.deepcopy(model)
    offload_(model.base, "1MiB", device=device, units=["layers.*"], policy=all_staged)
    for each in (model, reference):
        each(vector(0, device) / 8).sum().backward()
    assert_same_gradients(model, reference)


def test_batch_norm_in_training_writes_between_forward_and_backward(device: str) -> None:
    model = Normalised(16).train().requires_grad_(False).to(device)
    reference = copy.deepcopy(model)
    offload_(model, "1MiB", device=device, policy=all_staged)
    gradients = []
    for each in (model, reference):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        (each(x).sum() + each(x * 2).square().sum()).backward()
        gradients.append(x.grad)
    assert same(*gradients)
    for name, tensor in tensors_of(reference).items():
        assert same(tensors_of(model)[name], tensor), name


# --------------------------------------------------------------------------------- checkpoints and other hooks


class Checkpointed(nn.Module):
    """Checkpoints each layer from outside, or the inside of each."""

    def __init__(self, tower: Tower, *, inside: bool, reentrant: bool) -> None:
        super().__init__()
        self.layers = tower.layers
        self.reentrant = reentrant
        if inside:
            for layer in self.layers:
                layer.forward = self._inside(layer)
        self.outside = not inside

    def _inside(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            def body(y: Tensor) -> Tensor:
                return layer.b(torch.tanh(layer.a(y)))

            return x + checkpoint(body, x, use_reentrant=self.reentrant)

        return forward

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.outside else layer(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_activation_checkpoints(inside: bool, reentrant: bool, device: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(Adapted(Checkpointed(Tower(5), inside=inside, reentrant=reentrant)).to(device))
    model, reference = models
    handle = offload_(model.base, "1MiB", device=device, units=["layers.*"], policy=all_staged)
    for seed in range(2):
        for each in models:
            each(vector(seed, device)).square().sum().backward()
    assert_same_gradients(model, reference)
    assert handle.report(link=False).stats.copies > 0


def test_a_checkpoint_around_a_unit_still_saves_memory() -> None:
    """torch calls only the innermost hooks that pack, so ours must hand on to those of the checkpoint."""
    model, _reference, _handle = adapted("cpu")
    runs = [0]
    model.base.layers[2].a.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    x = vector(0).requires_grad_()
    y = checkpoint(model.base.layers[2], x, use_reentrant=False)
    assert runs == [1]
    y.sum().backward()
    assert runs == [2]  # what it saved was thrown away and computed again


def test_hooks_around_a_unit_see_what_it_saves() -> None:
    model, reference, _handle = adapted("cpu")
    packed: dict[str, int] = {"offloaded": 0, "resident": 0}
    for key, each in (("offloaded", model), ("resident", reference)):

        def pack(tensor: Tensor, key: str = key) -> Tensor:
            packed[key] += 1
            return tensor.detach() + 0

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = each(vector(0)).square().sum()
        loss.backward()
    assert_same_gradients(model, reference)
    assert 0 < packed["offloaded"] <= packed["resident"]


# ----------------------------------------------------------------------------------------- changed in between


def _by_torch(handle: OffloadHandle, model: Adapted) -> None:
    with torch.no_grad():
        model.base.layers[2].a.weight.mul_(2)


def _by_update(handle: OffloadHandle, model: Adapted) -> None:
    handle.update("layers.2.a.weight", torch.zeros(64, 32))


def _by_changed(handle: OffloadHandle, model: Adapted) -> None:
    model.base.layers[2].a.weight.data.zero_()
    handle.changed("layers.2.a.weight")


def _by_data(handle: OffloadHandle, model: Adapted) -> None:
    model.base.layers[2].a.weight.data = torch.zeros_like(model.base.layers[2].a.weight)


@pytest.mark.parametrize("change", [_by_torch, _by_update, _by_changed, _by_data])
@pytest.mark.parametrize("called_again", [False, True])
def test_weights_changed_before_backward(change: Any, called_again: bool, device: str) -> None:
    model, reference, handle = adapted(device)
    loss = model(vector(0, device)).square().sum()
    change(handle, model)
    if called_again:
        with torch.no_grad():
            model(vector(1, device))
    with pytest.raises(AliasError, match=r'"layers\.2" were changed between forward and backward'):
        loss.backward()
    assert model.down.weight.grad is None
    with torch.no_grad():
        reference.base.layers[2].a.weight.copy_(model.base.layers[2].a.weight)
    for each in (model, reference):
        each(vector(0, device)).square().sum().backward()
    assert_same_gradients(model, reference)


def test_another_tensor_of_the_unit_may_change(device: str) -> None:
    """A bias is not saved, so its change is no error: neither is it for a resident module."""
    model, reference, handle = adapted(device)
    losses = [each(vector(0, device)).square().sum() for each in (model, reference)]
    handle.update("layers.2.a.bias", torch.ones(64))
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, reference)


class Careless(nn.Module):
    """Writes over what autograd has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.linear(x))
        z = y * 2
        y.add_(1)
        return z


def test_activations_written_in_place_are_still_an_error(device: str) -> None:
    tower = Tower(0)
    tower.layers.extend(Careless() for _ in range(3))
    model = Adapted(tower).to(device)
    reference = copy.deepcopy(model)
    offload_(model.base, "1MiB", device=device, units=["layers.*"], policy=all_staged)
    for each in (model, reference):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            each(vector(0, device)).sum().backward()


# --------------------------------------------------------------------------------------------------- memory


def test_a_graph_that_is_dropped_keeps_nothing(device: str) -> None:
    model, _reference, handle = adapted(device)
    for seed in range(3):
        model(vector(seed, device).requires_grad_())  # never taken backward
    handle.restore_()
    del handle
    gc.collect()
    lifetime.drain()
    assert live_buffers() == []


def test_backward_after_restore(device: str) -> None:
    model, reference, handle = adapted(device)
    losses = [each(vector(0, device)).square().sum() for each in (model, reference)]
    handle.restore_()
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, reference)


def test_backward_on_another_thread_than_forward(device: str) -> None:
    model, reference, _handle = adapted(device)
    losses = [each(vector(0, device)).square().sum() for each in (model, reference)]
    thread = threading.Thread(target=lambda: [loss.backward() for loss in losses])
    thread.start()
    thread.join()
    assert_same_gradients(model, reference)


def test_weights_changed_after_restore_and_before_backward(device: str) -> None:
    model, _reference, handle = adapted(device)
    loss = model(vector(0, device)).square().sum()
    handle.restore_()
    with torch.no_grad():
        model.base.layers[2].a.weight.mul_(2)
    with pytest.raises(AliasError, match="between forward and backward"):
        loss.backward()
