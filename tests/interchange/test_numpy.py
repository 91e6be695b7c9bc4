"""NumPy in both directions: every dtype it has, every layout, labels, read-only, lifetime."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.errors import AliasError, SpecError
from dlpoffload.producers import view_of
from dlpoffload.spec import dtype, dtype_names
from dlpoffload.view import Label

np = pytest.importorskip("numpy")

NATIVE = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip
EXTENDED = [
    "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
PACKED = ["int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"]
SHAPES = [(), (0,), (5,), (2, 0, 3), (3, 4), (2, 3, 4)]


@pytest.fixture
def buffer(rng: Any) -> Iterator[dlpo.HostBuffer]:
    with dlpo.HostBuffer.allocate(4096, device="cpu") as buffer:
        buffer.memoryview()[:] = rng.integers(0, 256, 4096, dtype=np.uint8).tobytes()
        yield buffer


def as_numpy_dtype(name: str) -> Any:
    return getattr(pytest.importorskip("ml_dtypes"), name) if name in EXTENDED + PACKED else np.dtype(name)


def test_the_lists_here_are_what_the_library_knows() -> None:
    assert set(NATIVE + EXTENDED + PACKED) == set(dtype_names()) - {"uint1", "complex32", "float4_e2m1fn_x2"}


# ------------------------------------------------------------------------------------------- views to arrays


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_numpy_reads_a_view_bit_for_bit_and_writes_through(
    buffer: dlpo.HostBuffer, name: str, shape: tuple[int, ...]
) -> None:
    view = buffer.host_view(shape, name, byte_offset=64)
    if name == "bool":
        view.memoryview()[:] = bytes(i % 2 for i in range(view.nbytes))
    array = np.from_dlpack(view)
    assert (array.dtype, array.shape, array.flags.writeable) == (np.dtype(name), shape, True)
    assert array.tobytes() == bytes(view.memoryview())
    if array.size:
        assert array.ctypes.data == view.pointer
        array[...] = 1
        assert bytes(view.memoryview()) == np.ones(shape, name).tobytes()


@pytest.mark.parametrize("name", EXTENDED)
def test_dtypes_that_numpy_does_not_import_go_through_an_integer_view(buffer: dlpo.HostBuffer, name: str) -> None:
    """The recipe of docs/interchange.md."""
    view = buffer.host_view((3, 4), name)
    with pytest.raises((RuntimeError, BufferError), match="Unsupported dtype"):  # the latter since NumPy 2.5
        np.from_dlpack(view)
    same_width = f"uint{view.dtype.bits}"
    array = np.from_dlpack(view.view(view.shape, same_width)).view(as_numpy_dtype(name))
    assert array.tobytes() == bytes(view.memoryview())
    array[1, 2] = 1.5
    assert view_of(array).spec == view.spec
    assert bytes(view.memoryview()) == array.tobytes()


@pytest.mark.parametrize("shape_and_strides", [((3, 4), (1, 3)), ((3, 4), (9, 2)), ((2, 3), (0, 1)), ((1, 1), (7, 9))])
def test_strides_come_through(buffer: dlpo.HostBuffer, shape_and_strides: Any) -> None:
    shape, strides = shape_and_strides
    view = buffer.host_view(shape, "int32", strides=strides)
    array = np.from_dlpack(view)
    flat = np.frombuffer(view.memoryview(), np.int32)
    wanted = [[flat[i * strides[0] + j * strides[1]] for j in range(shape[1])] for i in range(shape[0])]
    assert array.tolist() == wanted


@pytest.mark.parametrize("label", ["cpu", "pinned", "pinned_as_cpu"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_numpy_takes_every_host_label(buffer: dlpo.HostBuffer, label: str, device: str | None) -> None:
    view = buffer.host_view((8,), "float32", label=label)
    array = np.from_dlpack(view, device=device)
    assert array.ctypes.data == buffer.host_pointer
    assert np.from_dlpack(view, device=device, copy=False).ctypes.data == buffer.host_pointer
    copied = np.from_dlpack(view, device=device, copy=True)
    assert copied.tobytes() == array.tobytes()
    copied.view(np.uint8)[:] ^= 0xFF
    assert not np.array_equal(copied, array)


def test_read_only_views_are_read_only_arrays() -> None:
    array = np.from_dlpack(view_of(b"read only"))
    assert not array.flags.writeable
    assert array.tobytes() == b"read only"
    assert np.from_dlpack(view_of(b"read only"), copy=True).tobytes() == b"read only"


def test_an_array_keeps_the_memory() -> None:
    buffer = dlpo.HostBuffer.copy_of(b"some bytes", device="cpu")
    array = np.from_dlpack(buffer.host_view((8,), "uint8"))
    wanted = array.tobytes()
    assert buffer.live_views == 1
    part = array[2:]
    del buffer, array
    lifetime.drain()
    assert part.tobytes() == wanted[2:]


# ------------------------------------------------------------------------------------------- arrays to views


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE + EXTENDED)
def test_a_view_of_an_array_is_the_array(rng: Any, name: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape)) * dtype(name).itemsize
    data = rng.integers(0, 2 if name == "bool" else 256, count, dtype=np.uint8)
    array = data.view(as_numpy_dtype(name)).reshape(shape)
    view = view_of(array)
    assert (view.dtype.name, view.shape, view.label, view.read_only) == (name, shape, Label.CPU, False)
    assert bytes(view.memoryview()) == array.tobytes()
    if array.size:
        assert view.pointer == array.ctypes.data
        view.memoryview()[:] = bytes(view.nbytes)
        assert array.tobytes() == bytes(view.nbytes)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_strided_arrays_keep_their_strides(name: str) -> None:
    array = np.zeros((4, 6), as_numpy_dtype(name))
    assert view_of(array.T).strides == (1, 6)
    assert view_of(array[::2, 1::3]).strides == (12, 3)
    assert view_of(array[::2, 1::3]).pointer == array.ctypes.data + dtype(name).itemsize
    assert view_of(np.broadcast_to(array[0], (9, 6))).strides == (0, 1)
    assert view_of(array[:, :1]).strides == (6, 1)
    assert view_of(array[:0, ::-1]).nbytes == 0
    assert view_of(array[:1, :1][::-1, ::-1]).spec.is_row_major


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_read_only_arrays_give_read_only_views(name: str) -> None:
    array = np.zeros(4, as_numpy_dtype(name))
    array.flags.writeable = False
    assert view_of(array).read_only
    with dlpo.HostBuffer.register(array, device="cpu") as buffer:
        assert buffer.read_only
        assert not np.from_dlpack(buffer.host_view((4,), "uint8")).flags.writeable


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4)[::-1], "run backwards; make a contiguous copy"),
        (np.zeros((4, 4))[:, ::-1], "run backwards"),
        (np.zeros(4, ">f4"), 'unknown dtype ">f4"'),
        (np.zeros(4, "M8[s]"), "datetime64"),
        (np.zeros(4, "S3"), "unknown dtype"),
        (np.zeros(4, object), "unknown dtype"),
        (np.zeros(4, np.longdouble), "unknown dtype"),
        (np.zeros(4, [("a", "f4"), ("b", "i1")]), "cannot be viewed"),
        (np.zeros(4, [("a", "f4"), ("b", "i1")])["a"], "no multiple of the element"),
    ],
)
def test_an_array_that_dlpack_cannot_describe_is_refused(array: Any, message: str) -> None:
    for call in (view_of, lambda a: dlpo.HostBuffer.register(a, device="cpu"), dlpo.HostBuffer.copy_of):
        with pytest.raises(AliasError, match=message):
            call(array)


@pytest.mark.parametrize("name", PACKED)
def test_an_array_that_keeps_less_than_a_byte_in_a_byte_is_refused(name: str) -> None:
    """DLPack packs several into a byte; a view would read other values."""
    array = np.zeros(8, as_numpy_dtype(name))
    with pytest.raises(AliasError, match=r"NumPy keeps each in 1 bytes, but DLPack packs them"):
        view_of(array)


def test_a_view_keeps_its_array() -> None:
    array = np.arange(6.0)
    view = view_of(array)
    del array
    assert bytes(view.memoryview()) == np.arange(6.0).tobytes()


# ---------------------------------------------------------------------------------------- buffers and arrays


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float8_e4m3fn"])
def test_register_pins_an_array_where_it_is(name: str, device: str) -> None:
    array = np.arange(2000).astype(as_numpy_dtype(name))
    with dlpo.HostBuffer.register(array, device=device) as buffer:
        assert (buffer.host_pointer, buffer.nbytes) == (array.ctypes.data, array.nbytes)
        assert bytes(buffer.memoryview()) == array.tobytes()
        array[7] = 99
        assert bytes(buffer.memoryview()) == array.tobytes()
        buffer.memoryview()[:] = bytes(buffer.nbytes)
        assert not array.astype(np.float64).any()


def test_register_pins_the_span_of_a_strided_array(device: str) -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    part = array[::2, 1:4]
    with dlpo.HostBuffer.register(part, device=device) as buffer:
        assert (buffer.host_pointer, buffer.nbytes) == (array.ctypes.data + 4, 60)
        same = np.from_dlpack(buffer.host_view(part.shape, "int32", strides=(12, 1)))
        same[1, 2] = -1
        assert array[2, 3] == -1
        assert np.array_equal(same, part)
        del same


@pytest.mark.parametrize("name", ["float32", "bfloat16", "bool"])
def test_copies_are_row_major_and_apart(name: str, device: str) -> None:
    array = np.arange(24).reshape(4, 6).astype(as_numpy_dtype(name))
    for source in (array, array.T, array[::2, ::3], np.broadcast_to(array[1], (5, 6)), array[1, 1, ...]):
        with dlpo.HostBuffer.copy_of(source, device=device) as copy:
            assert (copy.nbytes, bytes(copy.memoryview())) == (source.nbytes, source.tobytes())
        with dlpo.HostBuffer.allocate(source.nbytes + 16, device=device) as target:
            target.copy_into(source, byte_offset=8)
            assert bytes(target.memoryview()) == bytes(8) + source.tobytes() + bytes(8)


def test_an_empty_array_cannot_be_registered_or_copied() -> None:
    with pytest.raises(dlpo.RegistrationError, match="of no bytes"):
        dlpo.HostBuffer.register(np.zeros((0, 3)), device="cpu")
    with pytest.raises(SpecError, match="nbytes=0"):
        dlpo.HostBuffer.copy_of(np.zeros((0, 3)), device="cpu")


def test_asarray_is_refused_by_name(buffer: dlpo.HostBuffer) -> None:
    view = buffer.host_view((4,), "int8")
    with pytest.raises(BufferError, match=r"numpy\.from_dlpack"):
        np.asarray(view)
