"""`HostStore`: named tensors, laid out by unit, bitwise, allocated late and freed whole."""

from __future__ import annotations

import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import permutations
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from dlpoffload import DeviceBuffer, HostBuffer, HostStore, TensorSpec, Unit, View, lifetime, live_buffers
from dlpoffload.driver import open_driver
from dlpoffload.errors import AliasError, ClosedError, HostMemoryError, SpecError
from dlpoffload.spec import ALIGNMENT, dtype, dtype_names
from dlpoffload.store import layout

if TYPE_CHECKING:
    from dlpoffload.driver import Driver

np = pytest.importorskip("numpy")
ml_dtypes = pytest.importorskip("ml_dtypes")


def elements(view: View) -> Any:
    """The elements of a view as raw bytes, one more axis at the end, in the view's own shape."""
    memory = np.frombuffer(view.memoryview(), dtype=np.uint8)
    itemsize = view.dtype.itemsize
    strides = (*(s * itemsize for s in view.strides), 1)
    return np.lib.stride_tricks.as_strided(memory, (*view.shape, itemsize), strides)


def raw(array: Any) -> Any:
    """The same of a NumPy array."""
    return np.ascontiguousarray(array).reshape(array.shape)[..., None].view(np.uint8)


def same(store: HostStore, name: str, array: Any) -> bool:
    found = elements(store.host_view(name))
    return found.shape == raw(array).shape and bool((found == raw(array)).all())


def random_bytes(rng: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of `dtype` whose bits are anything."""
    itemsize = np.dtype(dtype).itemsize
    data = rng.integers(0, 256, size=math.prod(shape) * itemsize, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture
def weights(rng: Any) -> dict[str, Any]:
    return {
        "embed": random_bytes(rng, (50, 16), ml_dtypes.bfloat16),
        "0.w": random_bytes(rng, (17, 5), "f4"),
        "0.b": random_bytes(rng, (5,), ml_dtypes.float8_e4m3fn),
        "1.w": random_bytes(rng, (17, 5), "f4"),
        "1.b": random_bytes(rng, (5,), ml_dtypes.float8_e5m2),
        "1.none": np.empty((0, 8), "f2"),
        "scale": random_bytes(rng, (), "f8"),
    }


UNITS = {"0": ("0.w", "0.b"), "1": ("1.none", "1.w", "1.b")}


# ---------------------------------------------------------------------------------------------- copies in


def test_copy_of_a_mapping(weights: dict[str, Any], device: str) -> None:
    with HostStore.copy_of(weights, units=UNITS, device=device) as store:
        assert store.names == tuple(store) == tuple(weights)
        assert len(store) == 7
        assert "embed" in store
        assert "1" not in store
        assert store.device == device
        assert store.nbytes == sum(array.nbytes for array in weights.values())
        assert store.units == UNITS
        for name, array in weights.items():
            assert store.specs[name] == TensorSpec(array.shape, str(array.dtype))
            assert same(store, name, array)


def numpy_dtypes() -> dict[str, Any]:
    """Every dtype that NumPy keeps as DLPack describes it (of a byte or more)."""
    found = {name: getattr(ml_dtypes, name, None) or getattr(np, name, None) for name in dtype_names()}
    return {
        name: scalar
        for name, scalar in found.items()
        if scalar is not None and np.dtype(scalar).itemsize * 8 == dtype(name).itembits
    }


@pytest.mark.parametrize("name", numpy_dtypes())
def test_every_dtype_of_numpy(name: str, rng: Any) -> None:
    array = random_bytes(rng, (3, 4), numpy_dtypes()[name])
    if name == "bool":
        array = rng.integers(0, 2, size=(3, 4)).astype(bool)
    with HostStore.copy_of({"x": array, "back": array.T}, device="cpu") as store:
        assert same(store, "x", array)
        assert same(store, "back", array.T)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_of_torch(torch: ModuleType, device: str) -> None:
    tensors = {}
    for torch_dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            data = torch.randint(0, 256, (4 * torch_dtype.itemsize,), dtype=torch.uint8)
            values = (data % 2 if torch_dtype is torch.bool else data).view(torch_dtype)
            tensors[str(torch_dtype)] = torch.from_dlpack(values).reshape(2, 2).t()
        except (RuntimeError, BufferError, TypeError, AttributeError):  # quantised, sub-byte: none through DLPack
            continue
    assert {"torch.bfloat16", "torch.float8_e4m3fn", "torch.complex64", "torch.bool"} <= set(tensors)
    with HostStore.copy_of(tensors, device=device) as store:
        for name, tensor in tensors.items():
            back = torch.from_dlpack(store.host_view(name))
            assert back.dtype == tensor.dtype
            assert back.stride() == (2, 1)
            assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
            del back


def test_arrays_of_jax(jax: ModuleType) -> None:
    import jax.numpy as jnp

    arrays = {
        "bf16": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4),
        "fp8": jnp.arange(5).astype(jnp.float8_e4m3fn),
        "scalar": jnp.float32(2.5),
    }
    with HostStore.copy_of(arrays, device="cpu") as store:
        for name, array in arrays.items():
            assert same(store, name, np.asarray(array))


def test_a_copy_shares_nothing(device: str) -> None:
    source = np.arange(10)
    with HostStore.copy_of({"x": source, "y": source}, device=device) as store:
        source[0] = 77
        assert same(store, "x", np.arange(10))
        x = np.from_dlpack(store.host_view("x"))
        again = np.from_dlpack(store.host_view("x"))
        x[1] = 55
        assert again[1] == 55
        assert source[1] == 1
        assert same(store, "y", np.arange(10))
        del x, again


def test_device_view_is_the_same_memory(torch: ModuleType, device: str) -> None:
    values = torch.randn(33, 7).bfloat16()
    with HostStore.copy_of({"pad": torch.zeros(3), "w": values}, device=device) as store:
        there = torch.from_dlpack(store.device_view("w"))
        assert there.device == torch.device(device)
        assert torch.equal(there.cpu(), values)
        there.zero_()
        del there
        if device != "cpu":
            torch.cuda.synchronize()
        assert not torch.from_dlpack(store.host_view("w")).any()
        gc.collect()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_sources_in_device_memory(device: str, order: tuple[int, ...], rng: Any) -> None:
    shape = (3, 4, 5)
    values = rng.standard_normal([shape[axis] for axis in order]).transpose(np.argsort(order))
    strides = [s // 8 for s in values.strides]
    specs = {"turned": TensorSpec(shape, "float64"), "alike": TensorSpec(shape, "float64", strides)}
    driver = open_driver(device)
    with DeviceBuffer.allocate(480, device=device) as there, HostStore.allocate(specs, device=device) as store:
        packed = np.ascontiguousarray(values.transpose(order))
        driver.copy(there.device_pointer, packed.ctypes.data, 480)
        source = there.device_view(shape, "float64", strides=strides)
        assert source.host_pointer is None
        for name in specs:
            store.copy_into(name, source)
            assert np.array_equal(np.from_dlpack(store.host_view(name)), values)
        del source


def test_tensors_of_torch_on_the_device(torch: ModuleType, cuda_driver: Driver) -> None:
    values = torch.randn(6, 5, 4, device=cuda_driver.device)
    tensors = {"plain": values, "turned": values.permute(2, 0, 1), "gaps": values[:, ::2], "one": values[1, 1, 1]}
    with HostStore.copy_of(tensors, device=cuda_driver.device) as store:
        for name, tensor in tensors.items():
            assert torch.equal(torch.from_dlpack(store.host_view(name)), tensor.cpu())


def test_copy_into_replaces(weights: dict[str, Any], rng: Any) -> None:
    with HostStore.copy_of(weights, units=UNITS, device="cpu") as store:
        new = random_bytes(rng, (5, 17), "f4").T
        store.copy_into("1.w", new)
        for name, array in weights.items():
            assert same(store, name, new if name == "1.w" else array)


def test_a_source_need_not_be_aligned(rng: Any) -> None:
    """A tensor out of the middle of a file's bytes: kernels would mind, a copy does not."""
    data = rng.bytes(1 + 8 * 12)
    array = np.frombuffer(data, "f8", 12, offset=1).reshape(3, 4)
    assert array.ctypes.data % 8
    for source in (array, array.T, array[:, ::2]):
        with HostStore.copy_of({"x": source}, device="cpu") as store:
            assert bytes(store.host_view("x").memoryview()) == source.tobytes()


def test_copy_into_itself_turned_is_refused_not_garbled() -> None:
    square = np.arange(9.0).reshape(3, 3)
    with HostStore.copy_of({"x": square}, device="cpu") as store:
        turned = np.from_dlpack(store.host_view("x")).T
        with pytest.raises(AliasError, match="overlaps"):
            store.copy_into("x", turned)
        del turned
        gc.collect()
        store.copy_into("x", store.host_view("x"))
        assert same(store, "x", square)


def test_threads_that_fill_a_store_together(rng: Any) -> None:
    arrays = {f"{i}": random_bytes(rng, (i + 1, 9), "f4") for i in range(200)}
    specs = {name: TensorSpec(array.shape, "float32") for name, array in arrays.items()}
    units = {f"unit {u}": [f"{i}" for i in range(u, 200, 4)] for u in range(4)}
    before = len(live_buffers())
    barrier = threading.Barrier(8)

    def fill(start: int) -> None:
        barrier.wait()
        for i in range(start, 200, 8):
            store.copy_into(f"{i}", arrays[f"{i}"])

    with HostStore.allocate(specs, units=units, device="cpu") as store:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fill, range(8)))
        assert len(live_buffers()) - before == 4
        assert all(same(store, name, array) for name, array in arrays.items())


# ------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("as_units", [False, True])
def test_a_unit_is_one_slab(weights: dict[str, Any], as_units: bool) -> None:
    units: Any = [Unit(name, names) for name, names in UNITS.items()] if as_units else UNITS
    with HostStore.copy_of(weights, units=units, device="cpu") as store:
        slabs = {unit: store.slab(unit) for unit in UNITS}
        assert slabs["0"].buffer is not slabs["1"].buffer
        for unit, names in UNITS.items():
            slab = slabs[unit]
            assert dict(slab.specs) == {name: store.specs[name] for name in names}
            assert slab.byte_offset + slab.nbytes == slab.buffer.nbytes
            taken = sorted((slab.byte_offsets[n], slab.specs[n].nbytes) for n in names if slab.specs[n].nbytes)
            assert all(start % ALIGNMENT == 0 for start, _ in taken)
            ends = [start + nbytes for start, nbytes in taken]
            assert all(end <= start for end, (start, _) in zip(ends, taken[1:], strict=False))
            assert slab.nbytes == ends[-1], "no byte behind the last tensor"
            memory = slab.buffer.memoryview()
            for name in names:
                start = slab.byte_offset + slab.byte_offsets[name]
                assert memory[start : start + slab.specs[name].nbytes] == weights[name].tobytes()
                assert slab.host_view(name).pointer == store.host_view(name).pointer
            del memory


def test_tensors_of_no_unit_share_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_GROUP_NBYTES", 4096)
    sizes = [1000, 3000, 72, 5000, 1, 4096, 4000, 96]
    arrays = {f"{i}": np.full(size, i, dtype=np.uint8) for i, size in enumerate(sizes)}
    before = len(live_buffers())
    with HostStore.copy_of(arrays, device="cpu") as store:
        made = sorted(nbytes for _, nbytes in live_buffers()[before:])
        # 1000 and, from 1024 on, 3000 | 72, since the next start is 4096 | 5000 | 1 | 4096 | 4000 | 96
        assert made == sorted([1024 + 3000, 72, 5000, 1, 4096, 4000, 96])
        assert store.pinned_nbytes == sum(made)
        assert all(same(store, name, array) for name, array in arrays.items())


def test_pinned_bytes_are_the_weights(rng: Any) -> None:
    arrays = {f"{i}": random_bytes(rng, (512, 256), "f2") for i in range(8)}
    with HostStore.copy_of(arrays, units={"a": ["0", "1"], "b": ["2"]}, device="cpu") as store:
        assert store.pinned_nbytes == store.nbytes == 8 << 18


@pytest.mark.parametrize("units", [None, {"all": ["a", "b"]}, {"one": ["a"], "two": ["b"]}])
def test_a_store_of_nothing_but_empty_tensors(units: Any) -> None:
    with HostStore.copy_of({"a": np.empty((0,)), "b": np.empty((3, 0), "i2")}, units=units, device="cpu") as store:
        assert store.nbytes == 0
        assert np.from_dlpack(store.host_view("a")).shape == (0,)
        assert np.from_dlpack(store.host_view("b")).shape == (3, 0)
        assert all(store.slab(unit).nbytes == 0 for unit in store.units)


def test_empty_tensors_cost_nothing() -> None:
    arrays = {"w": np.arange(10, dtype=np.uint8), "none": np.empty((0, 3)), "last": np.empty((0,))}
    with HostStore.copy_of(arrays, units={"u": list(arrays)}, device="cpu") as store:
        assert store.slab("u").nbytes == store.pinned_nbytes == 10
        assert np.from_dlpack(store.host_view("last")).shape == (0,)


# ------------------------------------------------------------------------------------------------ strides


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("source_order", list(permutations(range(3))))
def test_elements_land_under_the_strides_of_the_spec(
    order: tuple[int, ...], source_order: tuple[int, ...], rng: Any
) -> None:
    shape = (3, 4, 5)

    def laid_out(by: tuple[int, ...]) -> Any:
        """Uninitialised, with axis by[0] outermost in memory."""
        return np.empty([shape[axis] for axis in by], "f4").transpose(np.argsort(by))

    source = laid_out(source_order)
    source[...] = rng.standard_normal(shape)
    strides = [s // 4 for s in laid_out(order).strides]
    with HostStore.allocate({"x": TensorSpec(shape, "float32", strides)}, device="cpu") as store:
        store.copy_into("x", source)
        view = store.host_view("x")
        assert view.strides == tuple(strides)
        assert np.array_equal(np.from_dlpack(view), source)
        del view


def test_lengths_of_one_have_any_stride(rng: Any) -> None:
    source = rng.standard_normal((1, 4, 1, 3))
    spec = TensorSpec((1, 4, 1, 3), "float64", (99, 1, 0, 4))
    with HostStore.allocate({"x": spec}, device="cpu") as store:
        store.copy_into("x", source)
        assert np.array_equal(np.from_dlpack(store.host_view("x")), source)


def test_strides_with_gaps_or_repeats_take_the_same_strides_only() -> None:
    base = np.arange(24.0).reshape(4, 6)
    gaps, repeats = base[:, :4], np.broadcast_to(np.arange(3.0), (4, 3))
    specs = {"gaps": TensorSpec((4, 4), "float64", (6, 1)), "repeats": TensorSpec((4, 3), "float64", (0, 1))}
    with HostStore.allocate(specs, device="cpu") as store:
        store.copy_into("gaps", gaps)
        store.copy_into("repeats", repeats)
        assert np.array_equal(np.from_dlpack(store.host_view("gaps")), gaps)
        assert np.array_equal(np.from_dlpack(store.host_view("repeats")), repeats)
        for name, array in (("gaps", gaps), ("repeats", repeats)):
            with pytest.raises(AliasError, match=f'"{name}".*same strides'):
                store.copy_into(name, np.zeros(array.shape))
            assert np.array_equal(np.from_dlpack(store.host_view(name)), array), "nothing was written"


def test_copy_of_makes_row_major() -> None:
    source = np.broadcast_to(np.arange(3.0), (4, 3))[::1, ::2]
    with HostStore.copy_of({"x": source}, device="cpu") as store:
        assert store.specs["x"] == TensorSpec((4, 2), "float64")
        assert store.nbytes == 64
        assert np.array_equal(np.from_dlpack(store.host_view("x")), source)


# --------------------------------------------------------------------------------- allocation and its end


def test_buffers_are_allocated_one_by_one(weights: dict[str, Any]) -> None:
    specs = {name: TensorSpec(a.shape, str(a.dtype)) for name, a in weights.items()}
    before = live_buffers()
    with HostStore.allocate(specs, units=UNITS, device="cpu") as store:
        assert live_buffers() == before
        assert store.pinned_nbytes == 0
        store.copy_into("1.b", weights["1.b"])
        first = store.pinned_nbytes
        assert first == store.slab("1").buffer.nbytes
        assert not elements(store.host_view("1.w")).any(), "fresh memory is zero"
        assert store.pinned_nbytes == first
        store.host_view("embed")
        assert store.pinned_nbytes > first


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Allocations until one is refused."""
    left = [0]
    allocate = HostBuffer.allocate.__func__

    def limited(cls: type[HostBuffer], nbytes: int, **options: Any) -> HostBuffer:
        if not left[0]:
            raise HostMemoryError("no more", nbytes=nbytes)
        left[0] -= 1
        return allocate(cls, nbytes, **options)

    monkeypatch.setattr(HostBuffer, "allocate", classmethod(limited))
    return left


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_copy_of_that_is_refused_half_way_frees_everything(
    weights: dict[str, Any], refusing: list[int], granted: int, tmp_path: Any
) -> None:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    plain = {name: np.frombuffer(a.tobytes(), np.uint8) for name, a in weights.items()}
    safetensors_numpy.save_file(plain, tmp_path / "x.safetensors")
    before = live_buffers()
    for source in (weights, tmp_path):
        refusing[0] = granted
        with pytest.raises(HostMemoryError):
            HostStore.copy_of(source, units=UNITS, device="cpu")
        lifetime.drain()
        assert live_buffers() == before


def test_progress_of_a_mapping_and_its_end(weights: dict[str, Any]) -> None:
    nbytes = sum(array.nbytes for array in weights.values())
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == total:
            raise KeyboardInterrupt

    before = live_buffers()
    try:
        HostStore.copy_of(weights, units=UNITS, device="cpu", progress=stop)
    except KeyboardInterrupt:
        assert live_buffers() == before  # freed at once, not when the traceback goes
    assert seen == sorted(seen)
    assert seen[-1] == (nbytes, nbytes)


def test_copy_into_that_is_refused_keeps_the_rest(weights: dict[str, Any], refusing: list[int]) -> None:
    specs = {name: TensorSpec(a.shape, str(a.dtype)) for name, a in weights.items()}
    refusing[0] = 1
    with HostStore.allocate(specs, units=UNITS, device="cpu") as store:
        store.copy_into("0.w", weights["0.w"])
        with pytest.raises(HostMemoryError):
            store.copy_into("1.w", weights["1.w"])
        assert same(store, "0.w", weights["0.w"])
        refusing[0] = 1
        store.copy_into("1.w", weights["1.w"])
        assert same(store, "1.w", weights["1.w"])


def test_more_than_the_machine_has() -> None:
    before = live_buffers()
    with HostStore.allocate({"x": TensorSpec((1 << 55,), "uint8")}, device="cpu") as store:
        with pytest.raises(HostMemoryError) as raised:
            store.host_view("x")
        assert raised.value.nbytes == 1 << 55
        assert live_buffers() == before


def test_close_frees_and_refuses(weights: dict[str, Any]) -> None:
    before = live_buffers()
    store = HostStore.copy_of(weights, units=UNITS, device="cpu")
    assert len(live_buffers()) == len(before) + 3
    store.close()
    store.close()
    assert live_buffers() == before
    assert store.closed
    assert store.pinned_nbytes == store.live_views == 0
    assert "closed" in repr(store)
    for use in (
        lambda: store.host_view("embed"),
        lambda: store.device_view("embed"),
        lambda: store.slab("0"),
        lambda: store.copy_into("embed", weights["embed"]),
        lambda: store.copy_into("1.none", weights["1.none"]),
        store.__enter__,
    ):
        with pytest.raises(ClosedError):
            use()


def test_closing_under_views_frees_nothing(weights: dict[str, Any]) -> None:
    store = HostStore.copy_of(weights, units=UNITS, device="cpu")
    before = live_buffers()
    array = np.from_dlpack(store.host_view("1.w"))
    views = [store.host_view("embed"), store.host_view("scale")]
    assert store.live_views == 3
    with pytest.raises(ClosedError, match="3 live views"):
        store.close()
    assert live_buffers() == before
    assert not store.closed
    assert np.array_equal(array.view(np.uint8), weights["1.w"].view(np.uint8))
    assert same(store, "0.b", weights["0.b"])
    del views, array
    store.close()


def test_a_dropped_store_lives_as_long_as_its_views(weights: dict[str, Any]) -> None:
    store = HostStore.copy_of(weights, units=UNITS, device="cpu")
    view = store.host_view("1.w")
    del store
    gc.collect()
    lifetime.drain()
    assert (elements(view) == raw(weights["1.w"])).all()


def test_leaving_the_block_hides_no_exception(weights: dict[str, Any]) -> None:
    class OursError(Exception):
        pass

    def body() -> None:
        with HostStore.copy_of(weights, device="cpu") as store:
            view = store.host_view("embed")
            raise OursError(view.shape)

    with pytest.raises(OursError) as raised:
        body()
    assert any("1 live view" in note for note in raised.value.__notes__)

    with pytest.raises(ClosedError), HostStore.copy_of(weights, device="cpu") as store:
        view = store.host_view("embed")
    del view
    store.close()


# ---------------------------------------------------------------------------------------------- bad input


def test_copy_into_of_another_tensor(weights: dict[str, Any]) -> None:
    with HostStore.copy_of(weights, device="cpu") as store:
        for array, words in (
            (np.zeros((5, 17), "f4"), r"float32\[5, 17\]"),
            (np.zeros((17, 5), "i4"), r"int32\[17, 5\]"),
            (np.zeros((85,), "f4"), r"float32\[85\]"),
        ):
            with pytest.raises(SpecError, match=rf'"0.w".*float32\[17, 5\].*{words}'):
                store.copy_into("0.w", array)
        with pytest.raises(SpecError, match=r'"0\.w"'):
            store.copy_into("0.w", [1, 2])
        with pytest.raises(SpecError, match=r"'0\.w'"):
            store.copy_into("0.W", weights["0.w"])
        assert all(same(store, name, array) for name, array in weights.items())


def test_unknown_names(weights: dict[str, Any]) -> None:
    with HostStore.copy_of(weights, units=UNITS, device="cpu") as store:
        with pytest.raises(SpecError, match=r"\"embedd\".*near to it are 'embed'"):
            store.host_view("embedd")
        with pytest.raises(SpecError, match='"nothing of the sort"'):
            store.device_view("nothing of the sort")
        with pytest.raises(SpecError, match='no unit "2"'):
            store.slab("2")


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ({"u": ["a", "c"]}, '"u" has unknown tensor "c"'),
        ({"u": ["a"], "v": ["b", "a"]}, '"a" is in "u" and in "v"'),
        ({"u": ["a", "a"]}, '"a" is in "u" and in "u"'),
        ({"u": []}, '"u" has no tensors'),
        ({"u": "a"}, "not the string"),
        ([Unit("u", ("a",)), Unit("u", ("b",))], '"u" is given twice'),
    ],
)
def test_units_that_mean_nothing(units: Any, words: str) -> None:
    before = live_buffers()
    with pytest.raises(SpecError, match=words):
        HostStore.copy_of({"a": np.zeros(3), "b": np.zeros(3)}, units=units, device="cpu")
    assert live_buffers() == before


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ({}, SpecError, "no tensors"),
        (7, SpecError, "not of a int"),
        ([np.zeros(3)], SpecError, "not of a list"),
        ({"a": np.zeros(3), "b": 7}, SpecError, '"b"'),
        ({"a": np.zeros(3), 3: np.zeros(3)}, SpecError, "3"),
        ({"a": np.zeros(3), "back": np.arange(3)[::-1]}, AliasError, '"back".*backwards'),
        ({"a": np.zeros(3), "words": np.array(["x"])}, AliasError, '"words"'),
    ],
)
def test_sources_that_are_none(source: Any, error: type[Exception], words: str) -> None:
    before = live_buffers()
    with pytest.raises(error, match=words):
        HostStore.copy_of(source, device="cpu")
    assert live_buffers() == before


def test_a_tensor_that_requires_a_gradient_is_named(torch: ModuleType) -> None:
    with pytest.raises(AliasError, match=r'"w".*detach'):
        HostStore.copy_of({"w": torch.zeros(3, requires_grad=True)}, device="cpu")


@pytest.mark.parametrize("specs", [{}, {"a": (3, 4)}, {3: TensorSpec((3,), "int8")}])
def test_specs_that_are_none(specs: Any) -> None:
    with pytest.raises(SpecError):
        HostStore.allocate(specs, device="cpu")


def test_a_device_that_is_none() -> None:
    with pytest.raises(SpecError, match="gpu"):
        HostStore.allocate({"a": TensorSpec((3,), "int8")}, device="gpu")


def test_adopted_buffers_are_a_units_bytes() -> None:
    specs = {"a": TensorSpec((3,), "float32"), "b": TensorSpec((5,), "int8"), "c": TensorSpec((2,), "int8")}
    units = {"first": ("a", "b"), "second": ("c",)}
    buffer = HostBuffer.allocate(256 + 5, device="cpu")
    buffer.memoryview()[256:261] = bytes(range(5))
    with HostStore.allocate(specs, units=units, device="cpu") as store:
        with pytest.raises(SpecError, match=r"takes a buffer of \(2, True, 'cpu'\), .* one of \(261, True, 'cpu'\)"):
            store.adopt("second", buffer)
        store.adopt("first", buffer)
        assert bytes(store.host_view("b").memoryview()) == bytes(range(5))
        assert store.pinned_nbytes == 261
        with pytest.raises(SpecError, match="has memory already"):
            store.adopt("first", buffer)
        with pytest.raises(SpecError, match='no unit "third"'):
            store.adopt("third", buffer)
        with pytest.raises(SpecError, match=r"\(261, False, 'cpu'\)"):
            HostStore.allocate(specs, units=units, device="cpu").adopt(
                "first", HostBuffer.allocate(261, device="cpu", pinned=False)
            )
    assert buffer.closed, "it went with the store"


def test_memoryviews_allocate_what_is_asked_for() -> None:
    specs = {name: TensorSpec((300,), "int8") for name in "abc"}
    with HostStore.allocate(specs, units={"first": ("a", "b")}, device="cpu") as store:
        for view, starts in store.memoryviews({"b"}):
            assert starts == {"b": 512}
            view[starts["b"]] = 7
            del view
        assert store.host_nbytes == 512 + 300
        assert store.host_view("b").memoryview()[0] == 7
        assert [starts for _, starts in store.memoryviews()] == [{"a": 0, "b": 512}, {"c": 0}]


@pytest.mark.parametrize(
    "mistyped",
    [
        "layers.12345.mlp.w.wieght",
        "lyaers.12345.mlp.w.weight",
        "layers.12345.mpl.w.weight",
        "model.layers.12345.mlp.w.weight",
        "layers.12345.mlp.w",
    ],
)
def test_a_mistyped_name_among_many_is_compared_with_few(mistyped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def counted(word: str, possibilities: Any, **options: Any) -> list[str]:
        candidates = list(possibilities)
        compared.append(len(candidates))
        return get_close_matches(word, candidates, **options)

    monkeypatch.setattr("difflib.get_close_matches", counted)
    names = [f"layers.{at}.mlp.w.weight" for at in range(20_000)]
    assert "'layers.12345.mlp.w.weight'" in layout.near_to(mistyped, names)
    assert compared[0] < 1000
