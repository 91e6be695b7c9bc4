"""Streamed functions: same bits, a ring that is bounded, in every shape of program, derivatives included."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dlpoffload.errors import GradientError, PlanError, SpecError
from dlpoffload.planning import all_staged

jax = pytest.importorskip("jax")
jnp = jax.numpy
dj = pytest.importorskip("dlpoffload.jax")
execute = pytest.importorskip("dlpoffload.jax.execute")
models = pytest.importorskip("jax_models")

DEPTH = 6
SLOT = models.BLOCK_NBYTES


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, Any]:
    return models.blocks(rng, DEPTH)


@pytest.fixture
def x(rng: np.random.Generator, at: Any) -> Any:
    return jnp.asarray(rng.standard_normal((3, models.WIDTH)).astype(np.float32))


def offloaded(params: Any, device: str, slots: int = 2, **more: Any) -> tuple[Any, Any]:
    more.setdefault("units", ["layers.*"])
    return dj.offload(params, slots * SLOT, device=device, policy=all_staged, slots=slots, **more)


def program(handle: Any, name: str) -> Any:
    return next(p for p in handle.report().programs if p.name == name)


def ids(fun: Callable[..., Any]) -> str:
    return fun.__name__


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("fun", models.LOOPS, ids=ids)
def test_a_loop_is_bitwise_and_bounded(
    params: Any, x: Any, at: Any, device: str, fun: Callable[..., Any], slots: int
) -> None:
    tree, handle = offloaded(params, device, slots)
    run = jax.jit(handle.streamed(fun))
    result = run(tree, x)
    assert models.same(result, run(models.resident(params), x)), "resident weights through the same program"
    models.close(result, jax.jit(fun)(models.resident(params), x))
    seen = program(handle, fun.__name__)
    assert seen.copied_nbytes == DEPTH * SLOT
    assert seen.units == tuple(f"layers.{i}" for i in range(DEPTH))
    assert seen.ring_nbytes == slots * SLOT


@pytest.mark.parametrize("fun", models.LOOPS, ids=ids)
def test_gradients_stream_backwards(params: Any, x: Any, at: Any, device: str, fun: Callable[..., Any]) -> None:
    tree, handle = offloaded(params, device)

    def loss(p: Any, x: Any) -> Any:
        return (fun(p, x) ** 2).mean()

    wanted = jax.jit(jax.grad(loss, argnums=1))(models.resident(params), x)
    around = jax.jit(jax.grad(handle.streamed(loss), argnums=1))(tree, x)
    inside = jax.jit(handle.streamed(jax.grad(loss, argnums=1)))(tree, x)
    models.close(around, wanted)
    models.close(inside, wanted)
    backward = program(handle, "loss backward")
    if fun is models.whole_remat:  # forward again, then backward
        assert backward.units[:7] == (*(f"layers.{i}" for i in range(6)), "layers.3")
    else:
        assert backward.units == tuple(f"layers.{i}" for i in reversed(range(6)))
    assert 0 < backward.ring_nbytes <= 2 * SLOT
    assert max(p.ring_nbytes for p in handle.report().programs) <= 2 * SLOT


def test_second_derivatives_and_adapters(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)
    lora = {"a": jnp.full((models.WIDTH, 4), 0.01), "b": jnp.full((4, models.WIDTH), 0.02)}
    lora = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), lora)

    def loss(p: Any, lora: Any, x: Any) -> Any:
        for layer in p["layers"]:
            x = models.block(layer, x) + x @ lora["a"] @ lora["b"]
        return (x**2).mean()

    whole = models.resident(params)
    models.close(jax.jit(jax.grad(handle.streamed(loss), 1))(tree, lora, x), jax.jit(jax.grad(loss, 1))(whole, lora, x))

    def bend(fun: Callable[..., Any]) -> Callable[..., Any]:
        return lambda p, x: jax.grad(lambda x: jax.grad(fun, 2)(p, lora, x).sum())(x)

    models.close(jax.jit(bend(handle.streamed(loss)))(tree, x), jax.jit(bend(loss))(whole, x), 1e-4)
    models.close(jax.jit(handle.streamed(bend(loss)))(tree, x), jax.jit(bend(loss))(whole, x), 1e-4)


def test_what_is_closed_over_has_its_gradient(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)

    def with_adapter(p: Any, x: Any, a: Any) -> Any:
        return models.unrolled(p, x + x @ a)

    def through(tree: Any, a: Any) -> Any:
        return handle.streamed(lambda p, x: with_adapter(p, x, a))(tree, x).sum()

    adapter = jnp.full((models.WIDTH, models.WIDTH), 0.01)
    wanted = jax.grad(lambda a: with_adapter(models.resident(params), x, a).sum())(adapter)
    models.close(jax.jit(jax.grad(through, 1))(tree, adapter), wanted, 1e-4)


def test_vmap_and_checkpoint_around(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)
    run = handle.streamed(models.unrolled)
    many = jnp.stack([x, x + 1])
    wanted = jax.jit(jax.vmap(models.unrolled, (None, 0)))(models.resident(params), many)
    models.close(jax.jit(jax.vmap(run, (None, 0)))(tree, many), wanted)
    models.close(jax.jit(handle.streamed(jax.vmap(models.unrolled, (None, 0))))(tree, many), wanted)
    grad = jax.jit(jax.grad(lambda p, x: jax.checkpoint(run)(p, x).sum(), 1))
    models.close(grad(tree, x), jax.grad(lambda x: models.unrolled(models.resident(params), x).sum())(x))


def test_donated_inputs_and_no_jit(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)
    wanted = jax.jit(models.unrolled)(models.resident(params), x)
    models.close(handle.streamed(models.unrolled)(tree, x), wanted)
    models.close(jax.jit(handle.streamed(models.unrolled), donate_argnums=1)(tree, jnp.array(x)), wanted)
    again = jax.jit(handle.streamed(models.unrolled))
    models.close(again(tree, x), wanted)
    assert models.same(tree, params)


def test_without_jit_nothing_but_weights_is_transferred(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)
    with jax.transfer_guard("disallow"):
        result = handle.streamed(models.unrolled)(tree, x)
    models.close(result, models.unrolled(models.resident(params), x))


@pytest.mark.parametrize("derivative", [False, True])
def test_without_jit_copies_are_dropped(
    params: Any, x: Any, at: Any, device: str, derivative: bool, monkeypatch: Any
) -> None:
    tree, handle = offloaded(params, device)
    copies: list[Any] = []
    most = 0

    def counted(weights: Any) -> Any:
        nonlocal most
        made = [array.copy() for array in put(weights)]
        copies.extend(map(weakref.ref, made))
        most = max(most, sum(copy() is not None for copy in copies))
        return made

    put = execute.put
    monkeypatch.setattr(execute, "put", counted)
    run = handle.streamed(lambda p, x: models.unrolled(p, x).sum())
    (jax.grad(run, 1) if derivative else run)(tree, x)
    assert len(copies) >= 2 * DEPTH
    assert most == 2 * 2, "two leaves a block, two slots"


def test_shared_blocks_and_any_order(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)

    def fun(p: Any, x: Any) -> Any:
        for i in (0, 1, 0, 1, 3, 2, 5, 3):
            x = models.block(p["layers"][i], x)
        return x

    run = jax.jit(handle.streamed(fun))
    models.close(run(tree, x), jax.jit(fun)(models.resident(params), x))
    seen = program(handle, "fun")
    assert [int(unit.rpartition(".")[2]) for unit in seen.units] == [0, 1, 3, 2, 5], "what is in the ring is used again"
    assert seen.ring_nbytes == 2 * SLOT


def test_each_copy_is_tied_behind_the_slots_last_reader(params: Any, x: Any, at: Any, device: str) -> None:
    """The program that XLA is given: one barrier for each copy into a slot that was used before."""
    tree, handle = offloaded(params, device)
    traced = jax.make_jaxpr(handle.streamed(models.unrolled))(tree, x)
    text = jax.jit(handle.streamed(models.unrolled)).lower(tree, x).as_text()
    assert len(re.findall("stablehlo.optimization_barrier", text)) == DEPTH - 2
    assert str(traced).count("device_put") == 2 * DEPTH
    compiled = jax.jit(handle.streamed(models.unrolled)).lower(tree, x).compile()
    report = dj.inspect_compiled(compiled)
    assert report.host_computations == ()


@pytest.mark.parametrize("level", [0, 3])
def test_the_copies_survive_the_levels_of_xla(params: Any, x: Any, at: Any, device: str, level: int) -> None:
    tree, handle = offloaded(params, device)
    lowered = jax.jit(handle.streamed(models.unrolled)).lower(tree, x)
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": level})
    models.close(program(tree, x), models.unrolled(models.resident(params), x))
    assert dj.inspect_compiled(program).host_computations == ()


def test_kept_leaves_and_static_arguments_pass(params: Any, x: Any, at: Any, device: str) -> None:
    params = {**params, "key": jax.random.key(1), "act": jnp.tanh, "scale": 2.0}
    tree, handle = offloaded(params, device)

    def fun(p: Any, x: Any, mode: str, *, shift: float) -> Any:
        assert mode == "train"
        noise = jax.random.normal(p["key"], x.shape)
        return p["act"](models.unrolled(p, x) + noise) * p["scale"] + shift

    wanted = fun({**params, "layers": models.resident(params["layers"])}, x, "train", shift=1.0)

    @jax.jit
    def run(layers: Any, x: Any) -> Any:
        return handle.streamed(fun)({**tree, "layers": layers}, x, "train", shift=1.0)

    @jax.jit
    def argument(layers: Any, x: Any) -> Any:
        whole = {**tree, "layers": layers}
        return handle.streamed(lambda mode, p: fun(p, x, mode, shift=1.0), argnum=1)("train", whole)

    models.close(run(tree["layers"], x), wanted)
    models.close(argument(tree["layers"], x), wanted)


def test_a_tree_that_a_program_closes_over_is_refused(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)
    run = handle.streamed(models.unrolled)
    with pytest.raises(SpecError, match=r'"layers\.0\.b".* closed over .* pass the tree as an argument'):
        jax.jit(lambda x: run(tree, x))(x)
    if device != "cpu":  # whose arrays in host memory are arrays like any others
        with pytest.raises(SpecError, match="closed over"):
            jax.jit(lambda x: dj.stream_blocks(models.block, tree["layers"], x))(x)
    models.close(run(tree, x), models.unrolled(models.resident(params), x))


def test_weights_may_be_returned(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)

    def fun(p: Any, x: Any) -> Any:
        return models.unrolled(p, x), p["layers"][0]["w"], p["layers"][1]["w"].T

    _, host, turned = jax.jit(handle.streamed(fun))(tree, x)
    assert np.array_equal(np.asarray(host), params["layers"][0]["w"])
    assert np.array_equal(np.asarray(turned), params["layers"][1]["w"].T)


def test_a_conditional_runs_with_its_units_staged(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)

    def fun(p: Any, x: Any, which: Any) -> Any:
        first, second = p["layers"][:2]
        x = jax.lax.cond(which > 0, lambda x: models.block(first, x), lambda x: models.block(second, x), x)
        return models.block(p["layers"][2], x)

    run = jax.jit(handle.streamed(fun))
    for which in (0, 1):
        models.close(run(tree, x, which), jax.jit(fun)(models.resident(params), x, which))
    one = offloaded(params, device, slots=1)
    with pytest.raises(PlanError, match=r"2 units at once .* raise slots"):
        jax.jit(one[1].streamed(fun))(one[0], x, 1)


@pytest.mark.parametrize("fun", [models.unrolled, lambda p, x: models.scan(p, x)[0]], ids=["loop", "scan"])
def test_a_loop_is_around_what_is_streamed(params: Any, x: Any, at: Any, device: str, fun: Callable[..., Any]) -> None:
    stack = fun is not models.unrolled
    params = models.stacked(params) if stack else params
    tree, handle = offloaded(params, device, **({"units": None, "stacked": ["layers"]} if stack else {}))

    def steps(run: Callable[..., Any], p: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, x: run(p, x), x)

    with pytest.raises(PlanError, match=r"call handle\.streamed in"):
        jax.jit(handle.streamed(lambda p, x: steps(fun, p, x)))(tree, x)
    run = jax.jit(lambda p, x: steps(handle.streamed(fun), p, x))
    models.close(run(tree, x), jax.jit(lambda p, x: steps(fun, p, x))(models.resident(params), x), 1e-4)


def test_weights_that_are_kept_by_another_name_are_refused(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)

    def fun(p: Any, x: Any) -> Any:
        unpacked = [{**layer, "w": layer["w"] * 2} for layer in p["layers"]]
        return models.unrolled({"layers": unpacked}, x)

    with pytest.raises(PlanError, match="computed from staged weights alone"):
        jax.jit(handle.streamed(fun))(tree, x)


def wide(rng: np.random.Generator, device: str, stack: bool) -> tuple[Any, Any, Any, Any]:
    """Four units of 256 KiB, adapters for them, and an input."""
    weights = rng.standard_normal((4, 256, 256)).astype(np.float32) / 16
    host = {"w": weights} if stack else [{"w": w} for w in weights]
    options: dict[str, Any] = {"stacked": ["layers"]} if stack else {"units": ["layers.*"]}
    tree, handle = dj.offload({"layers": host}, "600KiB", device=device, policy=all_staged, slots=2, **options)
    adapter = jnp.full((256, 4), 0.01), jnp.full((4, 256), 0.01)
    return tree, handle, adapter, jnp.ones((1, 256))


@pytest.mark.parametrize("stack", [False, True], ids=["loop", "scan"])
def test_adapters_that_are_merged_are_refused_where_they_would_be_kept(
    rng: np.random.Generator, device: str, stack: bool
) -> None:
    tree, handle, adapter, x = wide(rng, device, stack)

    def model(block: Callable[..., Any]) -> Callable[..., Any]:
        def fun(p: Any, adapter: Any, x: Any) -> Any:
            if stack:
                return jax.lax.scan(lambda x, layer: (block(layer, adapter, x), None), x, p["layers"])[0].sum()
            for layer in p["layers"]:
                x = block(layer, adapter, x)
            return x.sum()

        return fun

    merging = lambda layer, ab, x: x + jnp.tanh(x @ (layer["w"] + ab[0] @ ab[1]))  # noqa: E731
    beside = lambda layer, ab, x: x + jnp.tanh(x @ layer["w"] + x @ ab[0] @ ab[1])  # noqa: E731
    forward = jax.jit(handle.streamed(model(merging)))(tree, adapter, x)
    assert models.same(forward, jax.jit(handle.streamed(model(merging)))(models.resident(tree), adapter, x))
    with pytest.raises(PlanError, match=r"an adapter merged into them.* jax\.checkpoint .* x @ a @ b"):
        jax.jit(jax.grad(handle.streamed(model(merging)), 2))(tree, adapter, x)
    wanted = jax.jit(jax.grad(model(merging), (1, 2)))(models.resident(tree), adapter, x)
    for block in (jax.checkpoint(merging), beside):
        models.close(jax.jit(jax.grad(handle.streamed(model(block)), (1, 2)))(tree, adapter, x), wanted, 1e-4)


MERGED: dict[str, Callable[..., Any]] = {
    "cast": lambda w, ab: (w.astype(jnp.bfloat16) + ab.astype(jnp.bfloat16)).astype(jnp.float32),
    "transposed": lambda w, ab: (w + ab).T,
    "bounded": lambda w, ab: jnp.tanh(w + ab),
    "flat": lambda w, ab: (w.reshape(-1) + ab.reshape(-1)).reshape(w.shape),
    "scaled": lambda w, ab: (w * 2 + ab) / jnp.linalg.norm(w + ab, axis=0, keepdims=True),
    "called": lambda w, ab: jax.nn.silu(jax.jit(jnp.add)(w, ab)),
    "parts": lambda w, ab: jnp.concatenate(jnp.split(w + ab, 2, axis=1)[::-1], axis=1),
}


@pytest.mark.parametrize("merge", MERGED.values(), ids=MERGED)
@pytest.mark.parametrize("stack", [False, True], ids=["loop", "scan"])
def test_what_is_made_of_a_merged_weight_is_refused_as_that_is(
    rng: np.random.Generator, device: str, stack: bool, merge: Callable[..., Any]
) -> None:
    tree, handle, adapter, x = wide(rng, device, stack)

    def fun(p: Any, adapter: Any, x: Any) -> Any:
        block = lambda x, w: (jnp.tanh(x @ merge(w, adapter[0] @ adapter[1])), None)  # noqa: E731
        if stack:
            return jax.lax.scan(block, x, p["layers"]["w"])[0].sum()
        for layer in p["layers"]:
            x, _ = block(x, layer["w"])
        return x.sum()

    with pytest.raises(PlanError, match="an adapter merged into them"):
        jax.make_jaxpr(jax.grad(handle.streamed(fun), 1))(tree, adapter, x)


def test_activations_behind_an_embedding_of_positions_are_no_merged_weights(x: Any, at: Any, device: str) -> None:
    params = {**models.blocks(np.random.default_rng(0), 6), "positions": np.ones((256, models.WIDTH), np.float32)}
    tree, handle = dj.offload(params, "160KiB", device=device, policy=all_staged, units=["layers.*", "positions"])
    tokens = jnp.ones((256, models.WIDTH))

    def loss(p: Any, tokens: Any) -> Any:
        hidden = tokens @ p["layers"][0]["w"] + p["positions"]
        for layer in p["layers"]:
            hidden = hidden + models.block(layer, jax.nn.standardize(hidden))
        return hidden.sum()

    wanted = jax.grad(loss, 1)(models.resident(params), tokens)
    models.close(jax.jit(jax.grad(handle.streamed(loss), 1))(tree, tokens), wanted, 1e-3)


def test_one_kept_copy_of_a_unit_is_more_than_the_budget(rng: np.random.Generator, device: str) -> None:
    tree, handle, _, x = wide(rng, device, stack=False)

    def fun(p: Any, x: Any) -> Any:
        for index, layer in enumerate(p["layers"]):
            x = x + jnp.tanh(x @ (layer["w"] if index else layer["w"] * 2))
        return x.sum()

    jax.jit(handle.streamed(fun))(tree, x)
    with pytest.raises(PlanError, match="computed from staged weights alone"):
        jax.jit(jax.grad(handle.streamed(fun), 1))(tree, x)


def test_another_tree_is_refused(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)
    run = handle.streamed(models.unrolled)
    with pytest.raises(SpecError, match="not the offloaded tree"):
        run({"layers": tree["layers"][:3]}, x)
    with pytest.raises(SpecError, match="was offloaded as"):
        run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models.resident(params)), x)
    with pytest.raises(SpecError, match=r"was offloaded as .* is float\[\] here"):
        run(jax.tree.map(lambda leaf: 1.0, tree), x)
    with pytest.raises(SpecError, match="argnum=2"):
        handle.streamed(models.unrolled, argnum=2)(tree, x)
    with pytest.raises(SpecError, match="by position, not by keyword"):
        run(params=tree, x=x)


def test_an_axis_of_a_vmap_is_named_inside_of_the_derivative(params: Any, x: Any, at: Any, device: str) -> None:
    tree, handle = offloaded(params, device)

    def loss(p: Any, x: Any) -> Any:
        return jax.lax.pmean((models.unrolled(p, x) ** 2).mean(), "batch")

    def each(fun: Callable[..., Any], p: Any) -> Callable[..., Any]:
        return jax.vmap(lambda x: fun(p, x), axis_name="batch")

    run = handle.streamed(loss)
    with pytest.raises(GradientError, match=r'the axis "batch" .* inside of handle\.streamed'):
        jax.jit(jax.grad(lambda p, x: each(run, p)(x).sum(), 1))(tree, x)
    wanted = jax.jit(jax.grad(lambda x: each(loss, models.resident(params))(x).sum()))(x)
    whole = handle.streamed(lambda p, x: each(loss, p)(x).sum())
    models.close(jax.jit(jax.grad(whole, 1))(tree, x), wanted, 1e-4)


@pytest.mark.parametrize("derivative", [False, True])
def test_inside_of_a_shard_map(params: Any, x: Any, at: Any, device: str, derivative: bool) -> None:
    tree, handle = offloaded(params, device)
    if device != "cpu":  # whose arrays have no mesh of their own in their type
        tree = models.resident(params)
    mesh = jax.sharding.Mesh(np.array([at]), ("data",))
    spec = jax.sharding.PartitionSpec

    def gradient(fun: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda p, x: fun(p, x).sum(), 1) if derivative else fun

    def run(check: bool) -> Any:
        fun = gradient(handle.streamed(models.unrolled))
        places = {"in_specs": (spec(), spec("data")), "out_specs": spec("data")}
        return jax.jit(jax.shard_map(fun, mesh=mesh, check_vma=check, **places))

    with pytest.raises(SpecError, match=r'varies over "data" of a jax\.shard_map .* check_vma=False'):
        run(True)(tree, x)
    models.close(run(False)(tree, x), jax.jit(gradient(models.unrolled))(models.resident(params), x), 1e-4)


@pytest.mark.parametrize(("depth", "slots"), [(1, 2), (4, 1), (8, 2), (11, 3)])
@pytest.mark.parametrize("fun", models.SCANS, ids=ids)
def test_a_scan_is_bitwise_and_bounded(
    rng: np.random.Generator, x: Any, at: Any, device: str, fun: Callable[..., Any], depth: int, slots: int
) -> None:
    params = models.stacked(models.blocks(rng, depth))
    tree, handle = offloaded(params, device, slots, units=None, stacked=["layers"])
    run = jax.jit(handle.streamed(fun))
    result = run(tree, x)
    assert models.same(result, run(models.resident(params), x))
    models.close(result, jax.jit(fun)(models.resident(params), x))
    seen = program(handle, fun.__name__)
    assert seen.copied_nbytes == depth * SLOT
    assert seen.ring_nbytes == min(slots, depth) * SLOT
    assert handle.plan.slots == min(slots, depth)


@pytest.mark.parametrize("fun", models.SCANS, ids=ids)
def test_a_scan_outside_of_cuda_graphs(rng: np.random.Generator, x: Any, device: str, fun: Callable[..., Any]) -> None:
    params = models.stacked(models.blocks(rng, 8))
    tree, handle = offloaded(params, device, units=None, stacked=["layers"])
    run = jax.jit(handle.streamed(fun), compiler_options=dict(dj.COMPILER_OPTIONS))
    assert models.same(run(tree, x), jax.jit(handle.streamed(fun))(tree, x))


def test_gradients_through_a_scan(rng: np.random.Generator, x: Any, at: Any, device: str) -> None:
    params = models.stacked(models.blocks(rng, 8))
    tree, handle = offloaded(params, device, units=None, stacked=["layers"])

    def loss(p: Any, x: Any) -> Any:
        return models.remat_scan(p, x)[0].sum()

    wanted = jax.jit(jax.grad(loss, 1))(models.resident(params), x)
    models.close(jax.jit(jax.grad(handle.streamed(loss), 1))(tree, x), wanted)
    models.close(jax.jit(handle.streamed(jax.grad(loss, 1)))(tree, x), wanted)
    backward = program(handle, "loss backward")
    assert (backward.copied_nbytes, backward.ring_nbytes) == (8 * SLOT, 2 * SLOT)
    with pytest.raises(PlanError, match=r"jax\.checkpoint"):
        jax.jit(jax.grad(handle.streamed(lambda p, x: models.scan(p, x)[0].sum()), 1))(tree, x)


def test_a_stack_is_one_array_and_is_scanned(rng: np.random.Generator, x: Any, at: Any, device: str) -> None:
    params = models.stacked(models.blocks(rng, 8))
    tree, handle = dj.offload(params, 5 * SLOT, device=device, stacked=["layers"])
    assert handle.plan.nbytes("device") == 0, "no room for all of it, so none of it is resident"
    with pytest.raises(PlanError, match="whole of a stack"):
        jax.jit(handle.streamed(lambda p, x: x @ p["layers"]["w"].sum(0)))(tree, x)
    whole, resident = dj.offload(params, 8 * SLOT, device=device, stacked=["layers"])
    assert resident.plan.nbytes("host_staged") == 0
    models.close(jax.jit(resident.streamed(models.scan))(whole, x), jax.jit(models.scan)(models.resident(params), x))


def test_a_scan_between_loops_has_the_ring_for_itself(rng: np.random.Generator, x: Any, at: Any, device: str) -> None:
    params = {**models.blocks(rng, 4), "stack": models.stacked(models.blocks(rng, 4))["layers"]}
    units = [*(f"layers.{i}" for i in range(4)), *(f"stack.{i}" for i in range(4))]
    tree, handle = offloaded(params, device, units=units, stacked=["stack"])

    def fun(p: Any, x: Any) -> Any:
        for layer in p["layers"][:2]:
            x = models.block(layer, x)
        x, _ = jax.lax.scan(lambda x, layer: (models.block(layer, x), None), x, p["stack"])
        for layer in p["layers"][2:]:
            x = models.block(layer, x)
        return x

    run = jax.jit(handle.streamed(fun))
    models.close(run(tree, x), jax.jit(fun)(models.resident(params), x))
    assert program(handle, "fun").ring_nbytes == 2 * SLOT
    assert program(handle, "fun").copied_nbytes == 8 * SLOT
