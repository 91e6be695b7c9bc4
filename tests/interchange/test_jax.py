"""JAX on the CPU in both directions: legacy capsules, compact strides, 64-byte alignment, read-only."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.errors import AliasError
from dlpoffload.producers import view_of
from dlpoffload.spec import dtype

jax = pytest.importorskip("jax")
jnp = jax.numpy
np = pytest.importorskip("numpy")

NAMES = [
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16", "float32", "complex64",
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
WIDE = ["int64", "uint64", "float64", "complex128"]
REFUSED = ["int2", "int4", "uint1", "uint2", "uint4", "complex32", "float6_e2m3fn", "float4_e2m1fn_x2"]


@pytest.fixture
def buffer(rng: Any) -> Iterator[dlpo.HostBuffer]:
    buffer = dlpo.HostBuffer.allocate(4096, device="cpu")
    buffer.memoryview()[:] = rng.integers(0, 256, 4096, dtype=np.uint8).tobytes()
    yield buffer
    # XLA drops the last reference to an array's memory on a thread of its own.
    for _ in range(1000):
        gc.collect()
        if not buffer.live_views:
            break
        time.sleep(0.01)
    buffer.close()


@pytest.fixture
def cpu() -> Any:
    return jax.devices("cpu")[0]


VERSIONED = jax.__version_info__ >= (0, 12)
"""Whether JAX asks for capsules that can say read-only."""


def taken(view: Any, cpu: Any, **options: Any) -> Any:
    return jnp.from_dlpack(view, device=cpu, **options)


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_jax_reads_a_view_bit_for_bit(buffer: dlpo.HostBuffer, cpu: Any, name: str, shape: tuple[int, ...]) -> None:
    view = buffer.host_view(shape, name, byte_offset=256)
    if name == "bool":
        view.memoryview()[:] = bytes(i % 2 for i in range(view.nbytes))
    array = taken(view, cpu)
    assert (array.dtype.name, array.shape) == (name, shape)
    assert bits(array) == bytes(view.memoryview())
    if array.size:
        assert array.unsafe_buffer_pointer() == view.pointer, "zero-copy"


@pytest.mark.parametrize("name", WIDE)
def test_jax_narrows_wide_types_unless_x64_is_on(buffer: dlpo.HostBuffer, cpu: Any, name: str) -> None:
    view = buffer.host_view((4,), name)
    view.memoryview()[:] = np.arange(4).astype(name).tobytes()
    narrow = taken(view, cpu)
    assert narrow.dtype.itemsize == view.dtype.itemsize // 2
    with jax.enable_x64(True):
        wide = taken(view, cpu)
        assert wide.dtype.name == name
        assert wide.unsafe_buffer_pointer() == view.pointer
        assert bits(wide) == bytes(view.memoryview())


@pytest.mark.parametrize("name", REFUSED)
def test_dtypes_that_jax_refuses_come_as_bytes(buffer: dlpo.HostBuffer, cpu: Any, name: str) -> None:
    view = buffer.host_view((8,), name)
    with pytest.raises(RuntimeError, match="UNIMPLEMENTED"):
        taken(view, cpu)
    assert bits(taken(view.view((view.nbytes,), "uint8"), cpu)) == bytes(view.memoryview())


def test_jax_takes_a_transposition_and_no_gaps(buffer: dlpo.HostBuffer, cpu: Any) -> None:
    view = buffer.host_view((3, 4), "int32", strides=(1, 3))
    assert bits(taken(view, cpu)) == np.ascontiguousarray(np.from_dlpack(view)).tobytes()
    with pytest.raises(RuntimeError, match="compact"):
        taken(buffer.host_view((3, 4), "int32", strides=(5, 1)), cpu)


def test_jax_copies_what_is_not_aligned_to_64_bytes(buffer: dlpo.HostBuffer, cpu: Any) -> None:
    view = buffer.host_view((8,), "float32", byte_offset=4)
    array = taken(view, cpu)
    assert array.unsafe_buffer_pointer() != view.pointer
    assert bits(array) == bytes(view.memoryview())
    carved = buffer.carve({"a": dlpo.TensorSpec((3,), "int8"), "b": dlpo.TensorSpec((8,), "float32")})
    assert all(taken(v, cpu).unsafe_buffer_pointer() == v.pointer for v in carved.values())


def test_jax_aliases_even_when_asked_to_copy(buffer: dlpo.HostBuffer, cpu: Any) -> None:
    """It does not pass `copy` on; docs/interchange.md says what to do instead."""
    view = buffer.host_view((8,), "float32")
    assert taken(view, cpu, copy=True).unsafe_buffer_pointer() == view.pointer
    apart = taken(Copied(view), cpu)
    assert apart.unsafe_buffer_pointer() != view.pointer
    assert bits(apart) == bytes(view.memoryview())


class Copied:
    """A producer whose every export is a copy: the way to hand read-only memory to a consumer of legacy capsules."""

    def __init__(self, view: dlpo.View) -> None:
        self.view = view

    def __dlpack__(self, **asked: Any) -> Any:
        return self.view.__dlpack__(**{**asked, "copy": True})

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.view.__dlpack_device__()


class Asked:
    """Notes what a consumer asks a view for."""

    def __init__(self, view: dlpo.View) -> None:
        self.view = view
        self.asked: dict[str, Any] = {}

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = asked
        return self.view.__dlpack__(**asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.view.__dlpack_device__()


def test_read_only_memory_reaches_jax_as_a_copy_or_through_numpy(cpu: Any) -> None:
    memory = bytes(range(256)) * 4
    view = view_of(memory)
    producer = Asked(view)
    if VERSIONED:
        assert bits(taken(producer, cpu)) == memory
        assert producer.asked["max_version"] >= (1, 0)
    else:
        with pytest.raises(BufferError, match="a legacy capsule cannot say so"):
            taken(producer, cpu)
        assert "max_version" not in producer.asked
    assert bits(taken(Copied(view), cpu)) == memory
    assert bits(jnp.asarray(np.from_dlpack(view), device=cpu)) == memory


@pytest.mark.skipif(not VERSIONED, reason="JAX before 0.12 takes no read-only memory")
def test_a_donation_leaves_read_only_memory(cpu: Any) -> None:
    buffer = dlpo.HostBuffer.allocate(4096, device="cpu")
    buffer.memoryview()[:] = memory = bytes(range(256)) * 16
    view = buffer.host_view((1024,), "float32")
    view.read_only = True
    array = taken(view, cpu)
    jax.jit(lambda a: a * 2, donate_argnums=0)(array).block_until_ready()
    assert bytes(buffer.memoryview()) == memory


def test_an_array_keeps_the_memory(cpu: Any) -> None:
    buffer = dlpo.HostBuffer.copy_of(bytes(range(250, 256)) + b"ab", device="cpu")
    array = taken(buffer.host_view((8,), "uint8"), cpu)
    wanted = bits(array)
    assert buffer.live_views == 1
    del buffer
    lifetime.drain()
    assert bits(array) == wanted
    assert bits(jax.jit(lambda a: a + 1)(array)) == bytes((b + 1) % 256 for b in wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_of_an_array_is_the_array(rng: Any, cpu: Any, name: str) -> None:
    data = rng.integers(0, 2 if name == "bool" else 256, 12 * dtype(name).itemsize, dtype=np.uint8)
    array = jax.device_put(data.view(jnp.dtype(name)).reshape(3, 4), cpu).block_until_ready()
    view = view_of(array)
    assert (view.dtype.name, view.shape, view.pointer) == (name, (3, 4), array.unsafe_buffer_pointer())
    assert bytes(view.memoryview()) == data.tobytes()
    with dlpo.HostBuffer.copy_of(array, device="cpu") as copy:
        assert bytes(copy.memoryview()) == data.tobytes()


@pytest.mark.parametrize("name", ["int4", "uint4", "int2"])
def test_an_array_that_jax_does_not_export_is_refused(cpu: Any, name: str) -> None:
    array = jnp.zeros(8, name, device=cpu)
    with pytest.raises(AliasError, match="gives no view of its memory"):
        view_of(array)


def test_an_array_is_pinned_where_it_is(cpu: Any) -> None:
    array = jnp.arange(1000.0, device=cpu).block_until_ready()
    with dlpo.HostBuffer.register(array, device="cpu") as buffer:
        assert buffer.host_pointer == array.unsafe_buffer_pointer()
        assert bytes(buffer.memoryview()) == bits(array)
    del array
