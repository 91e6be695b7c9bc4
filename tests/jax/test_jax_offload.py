"""`offload` and the handle: any tree, same structure, values kept, memory counted, errors typed."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.driver import installed
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import AliasError, ClosedError, GradientError, PlanError, SpecError
from dlpoffload.planning import Placement, all_mapped, all_staged, pattern_policy

jax = pytest.importorskip("jax")
jnp = jax.numpy
dj = pytest.importorskip("dlpoffload.jax")
models = pytest.importorskip("jax_models")


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, Any]:
    return models.blocks(rng, 6)


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def test_every_placement_holds_the_bytes(params: dict[str, Any], at: Any, device: str) -> None:
    params["embed"] = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    budget = 3 * models.BLOCK_NBYTES
    tree, handle = dj.offload(params, budget, device=device, units=["layers.*"])
    plan, report = handle.plan, handle.report()
    assert {plan.nbytes(p) > 0 for p in Placement} == {True}
    assert plan.device_nbytes <= budget
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    for (path, leaf), source in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True):
        assert bits(leaf) == source.tobytes(), path
        assert leaf.devices() == {at}
    host = plan.nbytes(Placement.HOST_MAPPED) + plan.nbytes(Placement.HOST_STAGED)
    assert host <= report.pinned_nbytes < host + 256 * len(plan.specs)
    staged = tree["layers"][0]["w"]
    assert staged.sharding.memory_kind == ("device" if device == "cpu" else "pinned_host")
    assert "host_staged" in str(report)
    handle.close()


def test_no_host_leaf_comes_from_the_pool_of_xla(params: dict[str, Any], at: Any, device: str) -> None:
    tree, handle = dj.offload(params, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, units=["layers.*"])
    ours = [view.host_pointer for view in handle._open()._views.values()]
    assert sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)) == sorted(ours)
    assert all(pointer % 256 == 0 for pointer in ours)
    jax.jit(handle.streamed(models.unrolled))(tree, jnp.ones((2, models.WIDTH))).block_until_ready()
    pinned = [a for a in jax.live_arrays() if a.sharding.memory_kind == "pinned_host"]
    assert {a.unsafe_buffer_pointer() for a in pinned} <= set(ours)


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


jax.tree_util.register_dataclass(Pair, data_fields=["left", "right"], meta_fields=[])


def test_any_tree_and_what_is_no_array_stays(at: Any, device: str) -> None:
    weights = np.arange(4096, dtype=np.float32).reshape(64, 64)
    tree = {
        "pair": Pair(weights, [weights + 1, None]),
        "name": "a string",
        "function": jnp.tanh,
        "number": 3,
        "key": jax.random.key(7),
        "weak": jnp.asarray(2.0),
        "empty": np.zeros((0, 4), np.float32),
        "bf16": jnp.ones((32, 32), jnp.bfloat16),
        "fp8": jnp.ones((32, 32), jnp.float8_e4m3fn),
        "flag": np.array([True, False]),
        "scalar": np.array(5, np.int32),
        "strided": weights.T[::2],
    }
    new, handle = dj.offload(tree, "1MiB", device=device, policy=all_mapped)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    for name in ("name", "function", "number", "key", "weak", "empty"):
        assert new[name] is tree[name]
        assert name in handle.report().kept
    assert new["weak"].weak_type
    for name in ("bf16", "fp8", "flag", "scalar", "strided"):
        assert np.array_equal(np.asarray(new[name]), np.asarray(tree[name]))
        assert new[name].dtype == tree[name].dtype
    assert bits(new["pair"].right[0]) == bits(weights + 1)
    assert "pair.left" in handle.plan.specs


def test_tied_leaves_are_one(at: Any, device: str) -> None:
    weights = np.ones((64, 64), np.float32)
    tree, handle = dj.offload({"a": weights, "b": weights}, 0, device=device, policy=all_mapped)
    assert list(handle.plan.specs) == ["a"]
    assert tree["a"] is tree["b"]
    new = handle.update("b", weights * 2)
    assert bits(new["a"]) == bits(new["b"]) == bits(weights * 2)


def test_the_input_is_not_changed(params: dict[str, Any], at: Any, device: str) -> None:
    on_device = models.resident(params)
    before = jax.tree.map(bits, on_device)
    tree, handle = dj.offload(on_device, 3 * models.BLOCK_NBYTES, device=device, units=["layers.*"])
    handle.overwrite_("layers.1.w", np.zeros((64, 64), np.float32))
    assert jax.tree.map(bits, on_device) == before
    del tree


def test_numpy_memory_is_not_shared(params: dict[str, Any], at: Any, device: str) -> None:
    tree, _ = dj.offload(params, "1GiB", device=device)
    before = bits(tree["layers"][0]["w"])
    params["layers"][0]["w"][:] = 0
    assert bits(tree["layers"][0]["w"]) == before


def test_a_resident_leaf_has_no_bytes_of_a_host_leaf(params: dict[str, Any], at: Any, device: str) -> None:
    mapped, owner = dj.offload(params, 0, device=device, policy=all_mapped)
    tree, handle = dj.offload(mapped, "1GiB", device=device)
    new = handle.update("layers.1.w", mapped["layers"][0]["w"])
    before = bits(mapped["layers"][0]["w"])
    owner.overwrite_("layers.0.w", np.zeros((64, 64), np.float32))
    theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(mapped)}
    assert not theirs & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((tree, new))}
    assert bits(tree["layers"][0]["w"] + 0) == bits(new["layers"][1]["w"] + 0) == before


def test_update_gives_a_new_tree_and_old_ones_keep_their_values(params: dict[str, Any], at: Any, device: str) -> None:
    tree, handle = dj.offload(params, 3 * models.BLOCK_NBYTES, device=device, units=["layers.*"])
    placements = {handle.plan.placements[f"layers.{i}.w"] for i in range(6)}
    assert placements == {Placement.DEVICE, Placement.HOST_STAGED}
    run = jax.jit(handle.streamed(models.unrolled))
    x = jnp.ones((2, models.WIDTH))
    for i in range(6):
        value = np.full((64, 64), i / 64, np.float32)
        new = handle.update(f"layers.{i}.w", value)
        assert bits(new["layers"][i]["w"]) == bits(value)
        params["layers"][i] = {**params["layers"][i], "w": value}
    assert models.same(handle.tree, new)
    models.close(run(new, x), jax.jit(models.unrolled)(models.resident(params), x))
    assert bits(tree["layers"][0]["w"]) != bits(new["layers"][0]["w"])
    assert "layers.1.w" in handle.report().updated


def test_a_leaf_stays_strongly_typed(at: Any, device: str) -> None:
    tree, handle = dj.offload({"scale": jnp.float32(2), "w": np.ones(4, np.float32)}, "1MiB", device=device)
    new = handle.update("scale", jnp.asarray(3.0))
    assert (new["scale"].weak_type, float(new["scale"])) == (False, 3.0)
    run = jax.jit(handle.streamed(lambda p, x: x * p["scale"]))
    results = [run(given, jnp.ones(4, jnp.bfloat16)) for given in (tree, new)]
    assert {result.dtype for result in results} == {jnp.dtype("float32")}


def test_overwriting_reaches_every_tree(params: dict[str, Any], at: Any, device: str) -> None:
    tree, handle = dj.offload(params, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, units=["layers.*"])
    run = jax.jit(handle.streamed(models.unrolled))
    x = jnp.ones((2, models.WIDTH))
    before = np.asarray(run(tree, x))
    value = np.zeros((64, 64), np.float32)
    handle.overwrite_("layers.2.w", value)
    params["layers"][2]["w"] = value
    after = run(tree, x)
    assert bits(after) != bits(before), "a fault in the host bytes reaches the compute"
    models.close(after, jax.jit(models.unrolled)(models.resident(params), x))


def test_overwriting_while_another_thread_donates(
    params: dict[str, Any], at: Any, device: str, monkeypatch: Any
) -> None:
    tree, handle = dj.offload(params, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, units=["layers.*"])
    before, during = jnp.ones(3), jnp.zeros(3)
    before.delete()

    def alive(platform: str) -> Iterator[Any]:
        yield before
        yield during
        during.delete()  # as a donation does, once the list is made

    monkeypatch.setattr(jax, "live_arrays", alive)
    handle.overwrite_("layers.2.w", np.zeros((64, 64), np.float32))
    assert during.is_deleted()
    assert bits(tree["layers"][2]["w"]) == bytes(64 * 64 * 4)


def test_a_resident_leaf_cannot_be_overwritten(params: dict[str, Any], at: Any, device: str) -> None:
    _, handle = dj.offload(params, "1GiB", device=device)
    with pytest.raises(AliasError, match="use update"):
        handle.overwrite_("layers.0.w", np.zeros((64, 64), np.float32))


def test_wrong_values_and_names_are_refused(params: dict[str, Any], at: Any, device: str) -> None:
    _, handle = dj.offload(params, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, units=["layers.*"])
    with pytest.raises(SpecError, match="near to it"):
        handle.update("layers.0.ww", np.zeros((64, 64), np.float32))
    for call in (handle.update, handle.overwrite_):
        with pytest.raises(SpecError, match="must be equal"):
            call("layers.0.w", np.zeros((64, 65), np.float32))
        with pytest.raises(SpecError, match="must be equal"):
            call("layers.0.w", np.zeros((64, 64), np.float16))


def test_values_without_bytes_are_refused(params: dict[str, Any], at: Any, device: str) -> None:
    budget = 2 * models.BLOCK_NBYTES
    _, handle = dj.offload(params, budget, device=device, policy=all_staged, units=["layers.*"])
    deleted = jnp.zeros((64, 64), jnp.float32)
    deleted.delete()
    for call in (handle.update, handle.overwrite_):
        with pytest.raises(SpecError, match=r'"layers.0.w" was deleted'):
            call("layers.0.w", deleted)
        with pytest.raises(SpecError, match=r'"layers.0.w" is traced'):
            jax.eval_shape(lambda value, call=call: call("layers.0.w", value), np.zeros((64, 64), np.float32))
    leaves = jax.tree.leaves(models.resident(params))
    leaves[1].delete()
    for more in ({"policy": all_staged}, {"policy": pattern_policy({"**": "device"})}):
        with pytest.raises(SpecError, match=r'"layers.0.w" was deleted'):
            dj.offload(jax.eval_shape(lambda: params), "1MiB", device=device, leaves=leaves, **more)


def test_closing_frees_when_the_last_array_is_gone(params: dict[str, Any], at: Any, device: str) -> None:
    tree, handle = dj.offload(params, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, units=["layers.*"])
    source = jax.tree.map(bits, params)
    with handle:
        pass
    handle.close()
    for call in (handle.report, lambda: handle.tree, lambda: handle.update("layers.0.w", params["layers"][0]["w"])):
        with pytest.raises(ClosedError, match="offload anew"):
            call()
    assert jax.tree.map(bits, tree) == source
    del tree
    gc.collect()  # and the fixture that looks for leaks sees that nothing is left


def test_donating_consumes_the_input(params: dict[str, Any], at: Any, device: str) -> None:
    on_device = models.resident(params)
    source = jax.tree.map(bits, params)
    tree, handle = dj.offload(on_device, 3 * models.BLOCK_NBYTES, device=device, units=["layers.*"], donate=True)
    for i, layer in enumerate(on_device["layers"]):
        staged = handle.plan.placements[f"layers.{i}.w"] is Placement.HOST_STAGED
        assert layer["w"].is_deleted() == staged
    assert jax.tree.map(bits, tree) == source


def test_leaves_come_one_by_one(params: dict[str, Any], at: Any, device: str) -> None:
    abstract = jax.eval_shape(models.resident, params)
    alive = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def values() -> Iterator[Any]:
        nonlocal alive
        for leaf in jax.tree.leaves(params):
            assert alive <= 1, "the one before is dropped before the next one is asked for"
            alive += 1
            made = np.ndarray.__new__(Counted, leaf.shape, leaf.dtype)
            made[...] = leaf
            yield made
            del made

    tree, _ = dj.offload(abstract, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, leaves=values())
    assert jax.tree.map(bits, tree) == jax.tree.map(bits, params)
    count = len(jax.tree.leaves(params))
    for wrong, message in ((count - 1, "ends after"), (count + 1, "more than")):
        given = [*jax.tree.leaves(params), np.zeros(3, np.float32)][:wrong]
        with pytest.raises(SpecError, match=message):
            dj.offload(abstract, 2 * models.BLOCK_NBYTES, device=device, policy=all_staged, leaves=given)
    with pytest.raises(SpecError, match="leaves="):
        dj.offload(abstract, "1MiB", device=device)


def test_a_weakly_typed_leaf_of_an_abstract_tree_stays_weak(at: Any, device: str) -> None:
    values = {"scale": jnp.asarray(2.0), "w": jnp.ones((8, 8), jnp.float32)}
    abstract = jax.eval_shape(lambda: values)
    assert abstract["scale"].weak_type
    leaves = jax.tree.leaves(values)
    tree, handle = dj.offload(abstract, 0, device=device, policy=all_mapped, leaves=leaves)
    assert tree["scale"] is values["scale"]
    assert dict(handle.report().kept) == {"scale": "weakly typed"}
    large = jax.eval_shape(lambda: jnp.full((600, 600), 1.0))
    with pytest.raises(SpecError, match="weakly typed"):
        dj.offload({"leaf": large}, "2MiB", device=device, leaves=[np.ones((600, 600), np.float32)])


def test_views_are_taken_in_place_and_read_only_ones_too(at: Any, device: str, tmp_path: Any) -> None:
    path = tmp_path / "weights"
    weights = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    path.write_bytes(weights.tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    buffer = dlpo.HostBuffer.register(mapped, device=device)
    size = weights[0].nbytes
    views = {name: buffer.host_view((64, 64), "float32", byte_offset=i * size) for i, name in enumerate("ab")}
    tree, handle = dj.offload(views, 2 * size, device=device, policy=all_staged)
    report = handle.report()
    assert (report.pinned_nbytes, report.aliased_nbytes) == (0, 2 * size)
    assert tree["b"].unsafe_buffer_pointer() == views["b"].host_pointer
    y = jax.jit(handle.streamed(lambda t, x: x @ t["a"] @ t["b"]))(tree, jnp.ones((1, 64)))
    assert np.isfinite(np.asarray(y)).all()
    with pytest.raises(AliasError, match="read-only"):
        handle.overwrite_("a", weights[1])
    new = handle.update("a", weights[1])
    assert bits(new["a"]) == bits(weights[1])
    assert path.read_bytes() == weights.tobytes()


def test_a_view_that_xla_cannot_take_is_named(at: Any, device: str) -> None:
    buffer = dlpo.HostBuffer.copy_of(np.arange(34, dtype=np.float32), device=device)
    views = {"first": buffer.host_view((16,), "float32"), "second": buffer.host_view((16,), "float32", byte_offset=72)}
    with pytest.raises(AliasError, match=r'^"second" cannot be taken in place: .* HostStore\.copy_of'):
        dj.offload(views, "1KiB", device=device, policy=all_staged)
    store = dlpo.HostStore.copy_of(views, device=device)
    tree, handle = dj.offload({n: store.host_view(n) for n in store}, "1KiB", device=device, policy=all_staged)
    assert handle.report().aliased_nbytes == 128
    assert bits(tree["second"]) == np.arange(18, 34, dtype=np.float32).tobytes()


def test_what_another_process_shares_is_taken_in_place(at: Any, device: str) -> None:
    script = """
import sys, numpy as np, dlpoffload as dlpo
weights = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
kept = dlpo.share({"a": weights[0], "b": weights[1]}, sys.argv[1])
sys.stdin.readline()
"""
    name = f"jax of {os.getpid()} on {device}"
    filler = subprocess.Popen([sys.executable, "-c", script, name], stdin=subprocess.PIPE)
    try:
        shared = dlpo.open_shared(name, timeout_s=60)
    finally:
        filler.kill()  # what is open lives on
        filler.communicate()
    store = dlpo.HostStore.map_file(shared.path, device=device)
    shared.close()
    weights = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    tree, handle = dj.offload({n: store.host_view(n) for n in store}, 32768, device=device, policy=all_staged)
    report = handle.report()
    assert (report.pinned_nbytes, report.aliased_nbytes) == (0, weights.nbytes)
    y = jax.jit(handle.streamed(lambda t, x: (x @ t["a"] @ t["b"], t["a"] + 0)))(tree, jnp.ones((1, 64)))
    assert bits(y[1]) == bits(weights[0])
    with pytest.raises(AliasError, match="read-only"):
        handle.overwrite_("a", weights[1])
    assert bits(handle.update("a", weights[1])["a"]) == bits(weights[1])
    assert bytes(store.host_view("a").memoryview()) == weights[0].tobytes()


def test_leaves_that_cannot_be_offloaded_say_what_to_do(at: Any, device: str) -> None:
    def refused(leaf: Any, message: str, error: type[Exception] = SpecError) -> None:
        with pytest.raises(error, match=message):
            dj.offload({"leaf": leaf}, "1MiB", device=device)

    refused(np.zeros(4), "x64")
    refused(np.zeros(4, np.int64), '"leaf" is int64')
    refused(jnp.zeros(8, "int4"), "uint8")
    refused(np.array(["a"]), "nothing to offload", PlanError)
    refused(jax.ShapeDtypeStruct((3,), jnp.float32), "leaves=")
    deleted = jnp.ones(3, jnp.float32)
    deleted.delete()
    refused(deleted, "deleted")
    refused(jnp.full((600, 600), 1.0), "weakly typed")
    with pytest.raises(SpecError, match="outside of jit"):
        jax.jit(lambda a: dj.offload({"leaf": a}, "1MiB", device=device)[0])(jnp.ones(3))
    with jax.enable_x64(True):
        tree, _ = dj.offload({"leaf": np.arange(4.0)}, 0, device=device, policy=all_mapped)
        assert tree["leaf"].dtype == "float64"


def test_refused_memory_leaves_nothing_behind(params: dict[str, Any], at: Any) -> None:
    before = jax.tree.map(bits, params)
    driver = CpuDriver(host_limit_nbytes=4 * models.BLOCK_NBYTES)
    with installed(driver):
        with pytest.raises(dlpo.HostMemoryError):
            dj.offload(params, 2 * models.BLOCK_NBYTES, device="cpu", policy=all_staged, units=["layers.*"])
        gc.collect()
        lifetime.drain()  # the reclaim thread may be at it
        assert jax.tree.map(bits, params) == before
        assert driver._pinned_nbytes() == 0


def test_arguments_without_effect_are_errors(params: dict[str, Any], at: Any, device: str) -> None:
    with pytest.raises(PlanError, match="no effect"):
        dj.offload(params, 0, device=device, policy=all_mapped, slots=3)
    with pytest.raises(PlanError, match="below which there is no leaf"):
        dj.offload(params, "1MiB", device=device, stacked=["nothing"])
    with pytest.raises(PlanError, match="one string"):
        dj.offload(params, "1MiB", device=device, stacked="layers")
    with pytest.raises(PlanError, match="of one length"):
        dj.offload({"s": {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 3), np.float32)}}, 1, stacked=["s"])
    with pytest.raises(PlanError, match="more than"):
        dj.offload(params, 100, device=device, policy=all_staged, units=["layers.*"])
    with pytest.raises(dlpo.DriverNotFoundError):
        dj.offload(params, "1MiB", device="cuda:17")


def test_gradients_of_offloaded_leaves_are_errors(params: dict[str, Any], at: Any, device: str) -> None:
    policy = pattern_policy({"layers.0.*": "device", "layers.1.*": "host_mapped"}, all_staged)
    tree, handle = dj.offload(params, 4 * models.BLOCK_NBYTES, device=device, policy=policy, units=["layers.*"])
    run = handle.streamed(models.unrolled)
    x = jnp.ones((2, models.WIDTH))

    def loss(w: Any, i: int) -> Any:
        layers = list(tree["layers"])
        layers[i] = {**layers[i], "w": w}
        return run({"layers": layers}, x).sum()

    def plain(w: Any) -> Any:
        layers = [{**models.resident(params["layers"][0]), "w": w}, *models.resident(params["layers"][1:])]
        return models.unrolled({"layers": layers}, x).sum()

    for i in (1, 2):
        with pytest.raises(GradientError, match=rf"layers\.{i}\.w"):
            jax.grad(loss)(jnp.ones((64, 64)), i)
    resident = tree["layers"][0]["w"]
    models.close(jax.grad(loss)(resident, 0), jax.grad(plain)(resident))
