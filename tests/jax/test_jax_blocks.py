"""`stream_blocks`, `scan_blocks` and `inspect_compiled`: without a handle, on arrays that lie in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlpoffload.errors import GradientError, PlanError, SpecError

jax = pytest.importorskip("jax")
jnp = jax.numpy
dj = pytest.importorskip("dlpoffload.jax")
models = pytest.importorskip("jax_models")
compiled = pytest.importorskip("dlpoffload.jax.compiled")

DEPTH = 5


@pytest.fixture
def params(rng: np.random.Generator) -> Any:
    return models.blocks(rng, DEPTH)


@pytest.fixture
def x(at: Any) -> Any:
    return jnp.ones((2, models.WIDTH))


def on_host(tree: Any, at: Any) -> Any:
    """JAX's own pinned arrays: whatever lies in host memory is staged, ours or not."""
    return jax.device_put(tree, jax.sharding.SingleDeviceSharding(at, memory_kind="pinned_host"))


def step(layer: Any, x: Any) -> Any:
    return models.block(layer, x)


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_a_list_of_blocks(params: Any, x: Any, at: Any, slots: int) -> None:
    layers = on_host(params["layers"], at)
    wanted = jax.jit(models.unrolled)(models.resident(params), x)
    models.close(jax.jit(lambda b, x: dj.stream_blocks(step, b, x, slots=slots))(layers, x), wanted)
    models.close(dj.stream_blocks(jax.jit(step), layers, x, slots=slots), wanted)
    mixed = [*layers[:2], *models.resident(params["layers"][2:])]
    models.close(dj.stream_blocks(jax.jit(step), mixed, x, slots=slots), wanted)
    models.close(jax.jit(lambda b, x: dj.stream_blocks(step, b, x, slots=slots))(mixed, x), wanted)


def test_an_eager_loop_holds_no_more_than_its_slots(params: Any, x: Any, at: Any, monkeypatch: Any) -> None:
    layers = on_host(params["layers"], at)
    blocks = dj.blocks
    alive: list[Any] = []
    most = 0
    put = blocks._put

    def counted(leaf: Any) -> Any:
        import weakref

        nonlocal most
        made = put(leaf)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(blocks, "_put", counted)
    dj.stream_blocks(jax.jit(step), layers, x, slots=2)
    assert len(alive) == 2 * DEPTH
    assert most == 2 * 2, "two leaves a block, two blocks"


def test_an_adapter_that_is_closed_over_keeps_no_copies(params: Any, x: Any, at: Any) -> None:
    layers = on_host(params["layers"], at)

    def loss(adapter: Any) -> Any:
        return dj.stream_blocks(lambda layer, x: step(layer, x + x @ adapter), layers, x).sum()

    def resident(adapter: Any) -> Any:
        y = x
        for layer in models.resident(params["layers"]):
            y = step(layer, y + y @ adapter)
        return y.sum()

    adapter = jnp.full((models.WIDTH, models.WIDTH), 0.01)
    _, pull = jax.vjp(loss, adapter)
    models.close(pull(1.0)[0], jax.grad(resident)(adapter), 1e-4)
    on_device = [leaf for leaf in jax.tree.leaves(pull) if jax.typeof(leaf).memory_space == jax.memory.Space.Device]
    assert sum(leaf.nbytes for leaf in on_device) < 2 * models.BLOCK_NBYTES, "backward stages the blocks again"


def test_a_stack(params: Any, x: Any, at: Any) -> None:
    stack = models.stacked(params)["layers"]

    def body(x: Any, layer: Any) -> Any:
        return models.block(layer, x), x.sum()

    for reverse in (False, True):
        wanted = jax.jit(lambda s, x, r=reverse: jax.lax.scan(body, x, s, reverse=r))(models.resident(stack), x)
        run = jax.jit(lambda s, x, r=reverse: dj.scan_blocks(body, x, s, reverse=r))
        models.close(run(on_host(stack, at), x), wanted)
        models.close(run(models.resident(stack), x), wanted)


def test_errors(params: Any, x: Any, at: Any) -> None:
    layers = on_host(params["layers"], at)
    with pytest.raises(PlanError, match="slots=0"):
        dj.stream_blocks(step, layers, x, slots=0)
    with pytest.raises(GradientError):
        jax.grad(lambda b: dj.stream_blocks(step, b, x).sum())(layers)
    with pytest.raises(SpecError, match="no axis"):
        dj.scan_blocks(lambda x, s: (x, s), x, on_host(np.float32(1), at))


def test_a_program_says_what_it_takes(params: Any, x: Any, at: Any) -> None:
    layers = on_host(params["layers"], at)
    program = jax.jit(lambda b, x: dj.stream_blocks(step, b, x)).lower(layers, x).compile()
    report = dj.inspect_compiled(program)
    memory = program.memory_analysis()
    assert report.host_computations == ()
    assert report.device_nbytes >= memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert report.output_nbytes == x.nbytes


HLO = """
%rows (stack: f32[4,8], i: s32[]) -> f32[1,8] {
  %stack = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,8}
}

%doubled (row: f32[4,8]) -> f32[4,8] {
  %row = f32[4,8]{1,0} parameter(0)
  ROOT %more = f32[4,8]{1,0} add(%row, %row)
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0:S(5)} parameter(0)
  %start = (f32[8,8]{1,0}, f32[8,8]{1,0:S(5)}, u32[]) copy-start(%p)
  %done = f32[8,8]{1,0} copy-done(%start)
  %twice = f32[8,8]{1,0:S(5)} add(%p, %p)
  %stack = f32[4,8]{1,0:S(5)} parameter(1)
  %row-start = ((f32[4,8]{1,0:S(5)}, s32[]), f32[1,8]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%rows
  %row-done = f32[1,8]{1,0} fusion-done(%row-start)
  %fused = f32[4,8]{1,0:S(5)} fusion(%stack), kind=kLoop, calls=%doubled
  %called = f32[8,8]{1,0} call(%p), to_apply=%host, frontend_attributes={_xla_compute_type="host"}
  ROOT %sum = f32[8,8]{1,0} add(%done, %called)
}
"""


def test_host_compute_is_found() -> None:
    assert compiled.host_computations(HLO) == ("twice", "fused", "called")


@pytest.mark.gpu
def test_host_compute_is_found_in_a_program_of_xla(params: Any) -> None:
    at = jax.devices("cuda")[0]
    weight = on_host(params["layers"][0]["w"], at)
    doubled = jax.jit(lambda w: jax.device_put(w * 2, jax.memory.Space.Device)).lower(weight).compile()
    assert dj.inspect_compiled(doubled).host_computations
    moved = jax.jit(lambda w: jax.device_put(w, jax.memory.Space.Device) * 2).lower(weight).compile()
    assert dj.inspect_compiled(moved).host_computations == ()
