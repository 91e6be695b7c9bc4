"""Recipes: slices and concatenations of stored tensors, bitwise those of NumPy, read straight into place."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlpoffload import HostStore, TensorSpec, memory
from dlpoffload.checkpoint import Recipe, assemblies, concat, narrow, open_checkpoint, part, reading
from dlpoffload.errors import CheckpointError, HostMemoryError, SpecError

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def saved(folder: Path, rng: Any, dtype: str = "float32", **shapes: tuple[int, ...]) -> tuple[Path, dict[str, Any]]:
    tensors = {
        name.replace("__", "."): rng.integers(0, 250, size=shape).astype(dtype) for name, shape in shapes.items()
    }
    safetensors_numpy.save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors", tensors


def made(path: Path, recipe: Recipe | None, device: str = "cpu", **wanted: Any) -> dict[str, Any]:
    """Each wanted tensor as the store has it."""
    specs = {name.replace("__", "."): TensorSpec(a.shape, str(a.dtype)) for name, a in wanted.items()}
    with HostStore.copy_of(path, specs=specs, recipe=recipe, device=device) as store:
        assert 0 <= store.pinned_nbytes - sum(spec.nbytes for spec in specs.values()) <= 256 * len(specs)
        return {name: np.from_dlpack(store.host_view(name)).copy() for name in store}


def check(path: Path, recipe: Recipe | None, device: str = "cpu", **wanted: Any) -> None:
    found = made(path, recipe, device, **wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name.replace("__", ".")], array)


# -------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "float16"])
def test_fused_and_sharded(dim: int, dtype: str, device: str, tmp_path: Path, rng: Any) -> None:
    shapes = {f"layers__{i}__{name}": (12, 24) for i in range(3) for name in ("q", "k", "v")}
    path, arrays = saved(tmp_path, rng, dtype, **shapes)
    for rank in range(4):
        ours = functools.partial(part, dim=dim, index=rank, count=4)
        recipe = {"layers.*.qkv": concat(*(ours(f"layers.*.{name}") for name in "qkv"), dim=dim)}
        wanted = {
            f"layers__{i}__qkv": np.concatenate(
                [np.split(arrays[f"layers.{i}.{name}"], 4, axis=dim)[rank] for name in "qkv"], axis=dim
            )
            for i in range(3)
        }
        check(path, recipe, device, **wanted)


def test_a_slice_of_a_concatenation(tmp_path: Path, rng: Any) -> None:
    path, arrays = saved(tmp_path, rng, a=(3, 5, 4), b=(3, 2, 4))
    both = np.concatenate([arrays["a"], arrays["b"]], axis=1)
    check(path, {"x": narrow(concat("a", "b", dim=1), dim=1, start=3, length=3)}, x=both[:, 3:6])
    check(path, {"x": part(concat("a", "b", dim=-2), dim=1, index=6, count=7)}, x=both[:, 6:7])
    check(path, {"x": concat("a", "a", dim=0)}, x=np.concatenate([arrays["a"]] * 2))
    check(path, {"x": narrow("a", dim=2, start=4, length=0)}, x=arrays["a"][:, :, :0])


def test_names_without_a_recipe_are_those_stored(tmp_path: Path, rng: Any) -> None:
    path, arrays = saved(tmp_path, rng, a=(7,), b=(2, 2), c=())
    check(path, None, c=arrays["c"], a=arrays["a"])
    check(path, {"x": "b"}, x=arrays["b"], a=arrays["a"])


def test_the_first_pattern_decides(tmp_path: Path, rng: Any) -> None:
    path, arrays = saved(tmp_path, rng, model__a__w=(4, 2), model__b__w=(4, 2))
    recipe: Recipe = {"a.*": part("model.a.*", dim=0, index=1, count=2), "*": "model.*"}
    check(path, recipe, a__w=arrays["model.a.w"][2:], b__w=arrays["model.b.w"])
    with pytest.raises(SpecError, match=r'"a\.\*" makes nothing.*put it first'):
        check(path, dict(reversed(list(recipe.items()))), a__w=arrays["model.a.w"], b__w=arrays["model.b.w"])


def test_large_rows_and_gaps(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps that are read along, gaps that are not, reads that end inside of rows: the same bytes."""
    path, arrays = saved(tmp_path, rng, "uint8", a=(37, 4096), b=(64, 1500))
    for gap, nbytes in [(0, 1 << 20), (1 << 10, 5000), (1 << 16, 1 << 20), (1 << 16, 777)]:
        monkeypatch.setattr(reading, "_GAP_NBYTES", gap)
        monkeypatch.setattr(reading, "_READ_NBYTES", nbytes)
        recipe = {"x": part("a", dim=1, index=2, count=4), "y": narrow("b", dim=1, start=1, length=1400)}
        check(path, recipe, x=arrays["a"][:, 2048:3072], y=arrays["b"][:, 1:1401])


def test_rows_come_by_few_calls(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, arrays = saved(tmp_path, rng, "uint8", a=(5000, 64))
    calls = []
    real = os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda *args: calls.append(1) or real(*args))
    check(path, {"x": part("a", dim=1, index=1, count=2)}, x=arrays["a"][:, 32:])
    assert 1 <= len(calls) <= 12, "one call for each 511 rows, and not for each row"


def test_progress_counts_what_arrives(tmp_path: Path, rng: Any) -> None:
    path, _ = saved(tmp_path, rng, "uint8", a=(1000, 64))
    seen: list[tuple[int, int]] = []
    specs = {"x": TensorSpec((1000, 16), "uint8")}
    HostStore.copy_of(
        path,
        device="cpu",
        specs=specs,
        recipe={"x": part("a", dim=1, index=3, count=4)},
        progress=lambda *at: seen.append(at),
    ).close()
    assert seen[-1] == (16000, 16000)


def test_shards_of_one_tensor_in_two_files(tmp_path: Path, rng: Any) -> None:
    import json

    arrays = {name: rng.integers(0, 250, size=(6, 8)).astype("int32") for name in "ab"}
    for name, array in arrays.items():
        safetensors_numpy.save_file({name: array}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in arrays}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(tmp_path, {"x": concat("b", "a", dim=1)}, x=np.concatenate([arrays["b"], arrays["a"]], axis=1))


@st.composite
def _expressions(draw: Any) -> tuple[Any, Callable[[dict[str, Any]], Any]]:
    """An expression over ``a`` and ``b``, and what NumPy makes of it. Lengths are at least one, along three dims."""
    name = draw(st.sampled_from("ab"))
    expression: Any = name
    steps: list[Callable[[Any], Any]] = []
    lengths = {"a": [4, 6, 5], "b": [4, 3, 5]}[name]
    for _ in range(draw(st.integers(0, 4))):
        dim = draw(st.integers(-3, 2))
        match draw(st.sampled_from(["part", "narrow", "concat"])):
            case "part":
                count = draw(st.sampled_from([n for n in range(1, lengths[dim] + 1) if lengths[dim] % n == 0]))
                index = draw(st.integers(0, count - 1))
                expression = part(expression, dim=dim, index=index, count=count)
                steps.append(lambda x, d=dim, i=index, c=count: np.split(x, c, axis=d)[i])
                lengths[dim] //= count
            case "narrow":
                start = draw(st.integers(0, lengths[dim] - 1))
                length = draw(st.integers(1, lengths[dim] - start))
                expression = narrow(expression, dim=dim, start=start, length=length)
                steps.append(lambda x, d=dim, s=start, n=length: np.take(x, range(s, s + n), axis=d))
                lengths[dim] = length
            case "concat":
                expression = concat(expression, expression, dim=dim)
                steps.append(lambda x, d=dim: np.concatenate([x, x], axis=d))
                lengths[dim] *= 2
    return expression, lambda arrays: functools.reduce(lambda x, step: step(x), steps, arrays[name])


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(_expressions())
def test_any_expression_covers_its_tensor_once(made_of: tuple[Any, Callable[[dict[str, Any]], Any]]) -> None:
    expression, computed = made_of
    shapes = {"a": (4, 6, 5), "b": (4, 3, 5)}
    arrays = {name: np.arange(np.prod(shape), dtype="int16").reshape(shape) for name, shape in shapes.items()}
    stored = {name: TensorSpec(shape, "int16") for name, shape in shapes.items()}
    found, lacking = assemblies({"x": expression}, ["x"], stored)
    wanted = np.ascontiguousarray(computed(arrays))
    assert lacking == {}
    assert set(found["x"].sources) <= stored.keys()
    assert found["x"].shape == wanted.shape
    target, times = bytearray(wanted.nbytes), bytearray(wanted.nbytes)
    for box in found["x"].boxes:
        before = -1
        for run in box.runs(found["x"].spec):
            assert run.source > before, "runs of a box are in the order of the file"
            before = run.source
            target[run.target : run.target + run.nbytes] = arrays[box.name].tobytes()[run.source :][: run.nbytes]
            for at in range(run.target, run.target + run.nbytes):
                times[at] += 1
    assert bytes(target) == wanted.tobytes()
    assert set(times) <= {1}


# --------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def stored() -> dict[str, TensorSpec]:
    return {
        "l.0.q": TensorSpec((6, 4), "float32"),
        "l.0.k": TensorSpec((2, 4), "float32"),
        "l.0.odd": TensorSpec((6, 5), "float32"),
        "l.0.half": TensorSpec((6, 4), "float16"),
        "s": TensorSpec((), "int64"),
    }


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ({"m.*": "l.*.q"}, SpecError, r'"m\.\*" makes nothing: it matches none of the 2 names, such as .l\.0\.x'),
        ({"l.*.x": "l.*.q", "l.0.x": "l.0.k"}, SpecError, r"only names that entries before it match; put it first"),
        (
            {"l.*.x": concat("l.*.q", "l.*.odd", dim=0)},
            SpecError,
            r"\"l\.0\.x\" by .*float32\[6, 4\] and float32\[6, 5\]",
        ),
        ({"l.*.x": concat("l.*.q", "l.*.half", dim=0)}, SpecError, r"float32\[6, 4\] and float16\[6, 4\].*equal"),
        ({"l.*.x": concat("l.*.q", "s", dim=0)}, SpecError, r"all other lengths must be equal"),
        ({"l.*.x": part("l.*.q", dim=0, index=0, count=4)}, SpecError, r"6 elements along dim=0, which count=4 does"),
        ({"l.*.x": part("l.*.q", dim=2, index=0, count=2)}, SpecError, r"dim=2 of float32\[6, 4\].*has 2 dimensions"),
        ({"l.*.x": part("s", dim=0, index=0, count=1)}, SpecError, r"has 0 dimensions"),
        ({"l.*.x": narrow("l.*.k", dim=0, start=1, length=2)}, SpecError, r"elements 1 to 3 along dim=0.*has 2 there"),
        ({"l.0.x": "l.0.gone"}, CheckpointError, r'its source "l\.0\.gone" is not among the 5 stored tensors'),
        ({"l.*.*": "l.*.q"}, SpecError, r'"l\.\*\.\*" has 2 asterisks, its source "l\.\*\.q" has 1'),
        ({"l.*.x": 3}, SpecError, r"not of a int"),
    ],
)
def test_recipes_that_mean_nothing(
    recipe: Any, error: type[Exception], words: str, stored: dict[str, TensorSpec]
) -> None:
    with pytest.raises(error, match=words):
        assemblies(recipe, ["l.0.x", "s"], stored)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: concat(dim=0), "concat of nothing"),
        (lambda: concat("a", 3, dim=0), "not of a int"),  # type: ignore[arg-type]
        (lambda: part("a", dim=0, index=2, count=2), r"index=2 is none of count=2 parts"),
        (lambda: part("a", dim=0, index=-1, count=2), r"index=-1 is none"),
        (lambda: part("a", dim=0, index=0, count=True), r"count=True is not a whole number"),
        (lambda: part("a", dim="0", index=0, count=1), r"dim='0' is not a whole number"),  # type: ignore[arg-type]
        (lambda: narrow("a", dim=0, start=-1, length=2), r"start=-1 and length=2"),
    ],
)
def test_expressions_that_mean_nothing(make: Callable[[], object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


def test_a_pattern_may_match_more_than_is_stored(stored: dict[str, TensorSpec], tmp_path: Path, rng: Any) -> None:
    """As a prefix does that also fits names that are tied to others; who needs them says what is missing."""
    made, lacking = assemblies({"m.*": "l.*"}, ["m.0.q", "m.0.tied", "other"], stored)
    assert made.keys() == {"m.0.q"}
    assert lacking.keys() == {"m.0.tied"}
    path, _ = saved(tmp_path, rng, l__q=(2,))
    specs = {"m.q": TensorSpec((2,), "float32"), "m.tied": TensorSpec((2,), "float32")}
    with pytest.raises(CheckpointError, match=r'"m\.tied" is missing: its source "l\.tied" is not among the 1 stored'):
        HostStore.copy_of(path, specs=specs, recipe={"m.*": "l.*"}, device="cpu")


def test_elements_of_less_than_a_byte_are_not_cut() -> None:
    stored = {"a": TensorSpec((4, 3), "float6_e2m3fn"), "b": TensorSpec((4, 4), "float6_e2m3fn")}
    with pytest.raises(SpecError, match="cut inside of one"):
        assemblies({"x": part("a", dim=0, index=1, count=4)}, ["x"], stored)
    found, _ = assemblies({"x": part("b", dim=0, index=1, count=4)}, ["x"], stored)
    assert [(run.source, run.nbytes) for run in found["x"].boxes[0].runs(found["x"].spec)] == [(3, 3)]


def test_wanted_otherwise_than_stored(tmp_path: Path, rng: Any) -> None:
    path, _ = saved(tmp_path, rng, a=(4, 2), b=(4, 2))
    specs = {"a": TensorSpec((2, 4), "float32"), "b": TensorSpec((4, 2), "bfloat16"), "c": TensorSpec((1,), "int8")}
    with pytest.raises(CheckpointError) as caught:
        HostStore.copy_of(path, specs=specs, device="cpu")
    for words in (
        '"c" is missing',
        '"a" is float32[4, 2] of a, and wanted as float32[2, 4]',
        "bfloat16[4, 2]",
        "recipe",
    ):
        assert words in str(caught.value)
    with pytest.raises(SpecError, match="read row-major"):
        HostStore.copy_of(path, specs={"a": TensorSpec((4, 2), "float32", (1, 4))}, device="cpu")
    with pytest.raises(SpecError, match="pass specs= as well"):
        HostStore.copy_of(path, recipe={"x": "a"}, device="cpu")
    with pytest.raises(SpecError, match="a mapping has its own names"):
        HostStore.copy_of({"a": np.ones(3)}, specs=specs, device="cpu")


def test_a_refused_buffer_leaves_nothing(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = saved(tmp_path, rng, a=(4, 2), b=(4, 2))
    specs = {"x": TensorSpec((2, 2), "float32"), "y": TensorSpec((2, 2), "float32")}
    recipe = {"x": part("a", dim=0, index=0, count=2), "y": part("b", dim=0, index=1, count=2)}
    real, asked = memory.allocate_pinned, []

    def refusing(nbytes: int, *args: Any, **options: Any) -> Any:
        asked.append(nbytes)
        if len(asked) == 2:
            raise HostMemoryError("refused", nbytes=nbytes)
        return real(nbytes, *args, **options)

    monkeypatch.setattr(memory, "allocate_pinned", refusing)
    with pytest.raises(HostMemoryError, match="refused"):
        HostStore.copy_of(path, specs=specs, recipe=recipe, units={"x": ["x"], "y": ["y"]}, device="cpu")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.assemblies(specs, recipe)["y"].sources == ("b",)
