"""`array_view`: JAX arrays over our bytes, and the other way round; lifetime, donation, refusals."""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.errors import AliasError, SpecError
from dlpoffload.producers import view_of

jax = pytest.importorskip("jax")
array_view = pytest.importorskip("dlpoffload.jax").array_view


def label(device: str) -> str:
    return "cpu" if device == "cpu" else "pinned"


def gone(buffer: dlpo.HostBuffer) -> bool:
    """Whether nothing uses a buffer any more; XLA drops the last reference on a thread of its own."""
    deadline = time.monotonic() + 5
    while buffer.live_views and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return not buffer.live_views


@pytest.fixture
def buffer(device: str, at: Any) -> Iterator[dlpo.HostBuffer]:
    made = dlpo.HostBuffer.allocate(1 << 16, device=device)
    made.memoryview()[:] = bytes(range(256)) * 256
    yield made
    jax.clear_caches()
    assert gone(made)
    made.close()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "float8_e4m3fn", "uint16"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_an_array_is_the_bytes(buffer: dlpo.HostBuffer, device: str, at: Any, name: str, where: str) -> None:
    host = buffer.host_view((16, 8), name, byte_offset=512)
    view = buffer.device_view((16, 8), name, byte_offset=512) if where == "device" else host
    if where == "host" and device != "cpu":
        view = buffer.host_view((16, 8), name, byte_offset=512, label="pinned")
    array = array_view(view)
    assert array.devices() == {at}
    kind = "pinned_host" if where == "host" and device != "cpu" else "device"
    assert array.sharding.memory_kind == kind
    assert array.unsafe_buffer_pointer() == view.pointer
    assert np.asarray(array).tobytes() == bytes(host.memoryview())
    host.memoryview()[:] = bytes(reversed(bytes(host.memoryview())))
    again = jax.jit(lambda a: jax.device_put(a, jax.memory.Space.Device))(array)  # not what NumPy has cached
    assert np.asarray(again).tobytes() == bytes(host.memoryview())


def test_a_scalar_and_a_transposition(buffer: dlpo.HostBuffer, device: str) -> None:
    scalar = buffer.host_view((), "float32", label=label(device))
    assert np.asarray(array_view(scalar)).tobytes() == bytes(range(4))
    turned = buffer.host_view((3, 4), "int32", strides=(1, 3), label=label(device))
    assert np.array_equal(np.asarray(array_view(turned)), np.from_dlpack(turned._labelled(dlpo.Label.CPU)))


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_a_jax_array_is_viewed_without_a_copy(at: Any, kind: str) -> None:
    sharding = jax.sharding.SingleDeviceSharding(at, memory_kind=kind)
    array = jax.device_put(np.arange(1000, dtype=np.int32), sharding).block_until_ready()
    view = view_of(array)
    assert view.pointer == array.unsafe_buffer_pointer()
    if view.host_pointer is not None:
        assert bytes(view.memoryview()) == np.arange(1000, dtype=np.int32).tobytes()


def test_a_donation_leaves_the_bytes(buffer: dlpo.HostBuffer, device: str) -> None:
    view = buffer.device_view((4096,), "float32")
    host = buffer.host_view((4096,), "float32").memoryview()
    host[:] = np.ones(4096, np.float32).tobytes()
    array = array_view(view)
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    with suppress(RuntimeError, ValueError):  # some versions of XLA refuse aloud, some compute without the donation
        assert (np.asarray(add(array)) == 2).all()
    assert not array.is_deleted()
    assert (np.asarray(array) == 1).all()
    assert bytes(host) == np.ones(4096, np.float32).tobytes()


def test_memory_lives_as_long_as_its_last_array(buffer: dlpo.HostBuffer, device: str) -> None:
    array = array_view(buffer.host_view((64,), "uint8", label=label(device)))
    wanted = np.asarray(array).tobytes()
    double = jax.jit(lambda a: jax.device_put(a, jax.memory.Space.Device) * 2)
    double(array).block_until_ready()
    jax.clear_caches()
    assert buffer.live_views
    with pytest.raises(dlpo.ClosedError):
        buffer.close()
    other = array_view(buffer.host_view((64,), "uint8", label=label(device)))
    array.delete()
    assert np.asarray(other).tobytes() == wanted
    del array, other
    assert gone(buffer)


def test_an_array_outlives_its_buffer(device: str, at: Any) -> None:
    array = array_view(
        dlpo.HostBuffer.copy_of(b"weights!" * 32, device=device).host_view((256,), "uint8", label=label(device))
    )
    lifetime.drain()
    assert np.asarray(array).tobytes() == b"weights!" * 32


def test_read_only_memory_has_a_way_in(at: Any, device: str, tmp_path: Any) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 64)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = dlpo.HostBuffer.register(mapped, device=device).host_view((4096,), "float32", label=label(device))
    assert view.read_only
    with pytest.raises(AliasError, match="accept_read_only"):
        array_view(view)
    array = array_view(view, accept_read_only=True)
    assert array.unsafe_buffer_pointer() == view.pointer
    keep = jax.jit(lambda a: jax.device_put(a, jax.memory.Space.Device) + 1)
    keep(array).block_until_ready()
    assert np.asarray(array).tobytes() == path.read_bytes()


def test_what_jax_would_copy_or_change_is_refused(buffer: dlpo.HostBuffer, device: str) -> None:
    with pytest.raises(AliasError, match="multiple of"):
        array_view(buffer.host_view((8,), "float32", byte_offset=4, label=label(device)))
    with pytest.raises(AliasError, match="packs it"):
        array_view(buffer.host_view((3, 4), "int32", strides=(5, 1), label=label(device)))
    with pytest.raises(SpecError, match="x64"):
        array_view(buffer.host_view((8,), "float64", label=label(device)))
    with pytest.raises(SpecError, match="uint8"):
        array_view(buffer.host_view((8,), "int4", label=label(device)))
    with jax.enable_x64(True):
        assert array_view(buffer.host_view((8,), "int64", label=label(device))).dtype == "int64"
