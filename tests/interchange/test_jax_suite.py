"""The cases of JAX's public suite of DLPack, for any producer, in our own words: its wheel ships no tests.

Source: ``DLPackTest`` in ``tests/array_interoperability_test.py`` of JAX, what it asks of arrays of NumPy, torch and
TensorFlow. What `test_jax.py` has is not said again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from reliability import check_row, functions_of

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.spec import TensorSpec, dtype

jax = pytest.importorskip("jax")
jnp = jax.numpy
np = pytest.importorskip("numpy")

DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
SHAPES = [(), (4,), (3, 4), (2, 3, 4), (3, 1), (1, 4), (2, 1, 4), (0,), (0, 4), (3, 0)]
NO_COPY = pytest.mark.xfail(
    strict=True, reason="jax.numpy.from_dlpack does not pass copy=True on to the producer, and aliases on the CPU"
)
MEMORY = ["cpu", *(pytest.param(label, marks=pytest.mark.gpu) for label in ("pinned", "pinned_as_cpu", "device"))]

Make = Callable[..., tuple[Any, Any, dlpo.HostBuffer]]


def _settled(buffer: dlpo.HostBuffer) -> int:
    """Views alive once XLA, which drops the last reference on a thread of its own, has done so."""
    deadline = time.monotonic() + 3
    while buffer.live_views and time.monotonic() < deadline:
        time.sleep(0.01)
        gc.collect()
        lifetime.drain()
    return buffer.live_views


@pytest.fixture
def make(rng: Any) -> Iterator[Make]:
    """A view over memory of one kind, its values, and the buffer."""
    made: list[dlpo.HostBuffer] = []

    def view(memory: str, shape: tuple[int, ...], name: str, strides: Any = None) -> tuple[Any, Any, dlpo.HostBuffer]:
        spec = TensorSpec(shape, name, strides)
        buffer = dlpo.HostBuffer.allocate(max(spec.nbytes, 1), device="cpu" if memory == "cpu" else 0)
        made.append(buffer)
        count = spec.nbytes // dtype(name).itemsize
        values = rng.integers(0, 2 if name == "bool" else 50, count).astype(jnp.dtype(name))
        buffer.memoryview(0, spec.nbytes)[:] = values.tobytes()
        wanted = np.ndarray(shape, values.dtype, values.tobytes(), strides=[s * values.itemsize for s in spec.strides])
        if memory == "device":
            return buffer.device_view(shape, name, strides=strides), wanted, buffer
        return buffer.host_view(shape, name, strides=strides, label=memory), wanted, buffer

    yield view
    for buffer in made:
        assert _settled(buffer) == 0, "an array that is gone keeps the memory"
        buffer.close()


def where(memory: str) -> dict[str, Any]:
    return {"device": jax.devices("cpu")[0]} if memory == "cpu" else {}


def same(array: Any, wanted: Any) -> bool:
    return (array.dtype, array.shape) == (wanted.dtype, wanted.shape) and (
        np.asarray(array).tobytes() == np.ascontiguousarray(wanted).tobytes()
    )


def pointer_of(view: Any) -> int:
    return int(view.pointer)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_shape_of_every_dtype(make: Make, name: str, shape: tuple[int, ...], memory: str) -> None:
    with jax.enable_x64(True):
        view, wanted, _ = make(memory, shape, name)
        array = jnp.from_dlpack(view, **where(memory))
        assert same(array, wanted)
        if array.size:
            assert array.unsafe_buffer_pointer() == pointer_of(view)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("copy", [None, False])
def test_no_copy_that_is_not_asked_for(make: Make, copy: bool | None, memory: str) -> None:
    view, wanted, _ = make(memory, (3, 4), "float32")
    array = jnp.from_dlpack(view, copy=copy, **where(memory))
    assert same(array, wanted)
    assert array.unsafe_buffer_pointer() == pointer_of(view)


@pytest.mark.parametrize("memory", [pytest.param("cpu", marks=NO_COPY)])
def test_a_copy_that_is_asked_for(make: Make, memory: str) -> None:
    view, wanted, _ = make(memory, (3, 4), "float32")
    array = jnp.from_dlpack(view, copy=True, **where(memory))
    assert same(array, wanted)
    aliases = array.unsafe_buffer_pointer() == pointer_of(view)
    del array, view  # a failure's traceback would keep them
    assert not aliases


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("consume", ["jax.dlpack", "jax.numpy"])
def test_both_doors(make: Make, consume: str, memory: str) -> None:
    view, wanted, _ = make(memory, (3, 4), "int32")
    door = jax.dlpack.from_dlpack if consume == "jax.dlpack" else jnp.from_dlpack
    assert same(door(view, **where(memory)), wanted)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 4), (1, 3)), ((2, 3, 4), (1, 2, 6)), ((2, 3, 4), (4, 8, 1)), ((1, 5), (9, 1))], ids=str
)
def test_layouts_other_than_row_major(make: Make, shape: Any, strides: Any, memory: str) -> None:
    view, wanted, _ = make(memory, shape, "float32", strides)
    array = jnp.from_dlpack(view, **where(memory))
    assert same(array, wanted)
    assert array.unsafe_buffer_pointer() == pointer_of(view)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_program_computes_on_what_was_taken(make: Make, memory: str) -> None:
    view, wanted, _ = make(memory, (16, 16), "float32")
    array = jnp.from_dlpack(view, **where(memory))
    if array.sharding.memory_kind == "pinned_host":  # no program computes there; a copy of it is where one does
        device = next(iter(array.devices()))
        array = jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind="device"))
    assert np.array_equal(np.asarray(jax.jit(lambda a: 2 * a + 1)(array)), 2 * wanted + 1)


@pytest.mark.parametrize("memory", MEMORY)
def test_the_array_outlives_view_and_buffer(make: Make, memory: str) -> None:
    view, wanted, buffer = make(memory, (3, 4), "float32")
    array = jnp.from_dlpack(view, **where(memory))
    del view
    assert buffer.live_views == 1
    assert same(array, wanted)
    del array
    assert _settled(buffer) == 0


@pytest.mark.parametrize("memory", MEMORY)
def test_a_view_is_consumed_as_often_as_one_likes(make: Make, memory: str) -> None:
    view, wanted, buffer = make(memory, (3, 4), "float32")
    arrays = [jnp.from_dlpack(view, **where(memory)) for _ in range(3)]
    assert all(same(array, wanted) for array in arrays)
    assert buffer.live_views == 4
    del arrays


def test_onward_to_numpy_without_a_copy(make: Make) -> None:
    view, wanted, _ = make("cpu", (3, 4), "float32")
    array = jnp.from_dlpack(view, **where("cpu"))
    onward = np.from_dlpack(array)
    assert np.array_equal(onward, wanted)
    assert onward.ctypes.data == pointer_of(view)


def test_a_raw_capsule_is_no_array(make: Make) -> None:
    """JAX takes producers only; the capsule that it refuses gives its memory up."""
    view, _, buffer = make("cpu", (3, 4), "float32")
    with pytest.raises((TypeError, AttributeError)):
        jnp.from_dlpack(view.__dlpack__())
    del view
    assert _settled(buffer) == 0


CASES = functions_of(globals())


def test_the_docs_have_the_numbers() -> None:
    check_row("JAX, cases of its public suite", CASES)
