"""Dtypes, tensor specs, layouts and byte counts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlpoffload.errors import SpecError
from dlpoffload.spec import (
    ALIGNMENT,
    DType,
    TensorSpec,
    aligned,
    dtype,
    dtype_names,
    format_nbytes,
    lay_out,
    parse_nbytes,
)

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


# ----------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", dtype_names())
def test_a_dtype_is_found_by_its_name_and_by_its_dlpack_code(name: str) -> None:
    found = dtype(name)
    assert (str(found), found.name) == (name, name)
    assert dtype((found.code, found.bits, found.lanes)) is found
    assert dtype(found) is found


@pytest.mark.parametrize(
    ("name", "triple"),
    [  # dlpack.h: kDLInt 0, kDLUInt 1, kDLFloat 2, kDLBfloat 4, kDLComplex 5, kDLBool 6, kDLFloat8_* from 7
        ("bool", (6, 8, 1)),
        ("int4", (0, 4, 1)),
        ("int64", (0, 64, 1)),
        ("uint8", (1, 8, 1)),
        ("float16", (2, 16, 1)),
        ("bfloat16", (4, 16, 1)),
        ("complex64", (5, 64, 1)),
        ("float8_e4m3fn", (10, 8, 1)),
        ("float8_e5m2", (12, 8, 1)),
        ("float8_e8m0fnu", (14, 8, 1)),
        ("float4_e2m1fn_x2", (17, 4, 2)),
    ],
)
def test_dlpack_codes_are_those_of_the_header(name: str, triple: tuple[int, int, int]) -> None:
    found = dtype(name)
    assert (found.code, found.bits, found.lanes) == triple


def test_itemsize_counts_lanes_and_refuses_less_than_a_byte() -> None:
    assert dtype("complex128").itemsize == 16
    assert dtype("float4_e2m1fn_x2").itemsize == 1
    with pytest.raises(SpecError, match=r'"float6_e2m3fn" has 6 bits'):
        _ = dtype("float6_e2m3fn").itemsize


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("float31", 'unknown dtype "float31"; known are: bool, bfloat16'),
        ("", 'unknown dtype ""'),
        ((2, 31, 1), "DLPack code 2 with 31 bits"),
        ((2, 32), r"not \(2, 32\)"),
        (float, "a dtype is a name"),
        (None, "a dtype is a name"),
    ],
)
def test_an_unknown_dtype_is_refused_by_name(what: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dtype(what)


# ---------------------------------------------------------------------------------------------- tensor specs


def test_a_spec_is_row_major_unless_it_says_otherwise() -> None:
    spec = TensorSpec([2, 3, 4], "float32")
    assert (spec.shape, spec.strides, spec.numel, spec.nbytes) == ((2, 3, 4), (12, 4, 1), 24, 96)
    assert spec.is_row_major
    assert str(spec) == "float32[2, 3, 4]"
    assert spec == TensorSpec((2, 3, 4), dtype("float32"), (12, 4, 1))
    assert hash(spec) == hash(TensorSpec((2, 3, 4), "float32"))


def test_a_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    assert TensorSpec((), "int64").nbytes == 8
    assert (TensorSpec((3, 0), "int64").nbytes, TensorSpec((3, 0), "int64").numel) == (0, 0)
    assert TensorSpec((3, 0), "int64", (7, 9)).is_row_major


def test_strides_of_dimensions_of_length_one_do_not_count() -> None:
    assert TensorSpec((4, 1), "int8", (1, 77)).is_row_major
    assert not TensorSpec((4, 2), "int8", (1, 4)).is_row_major


@pytest.mark.parametrize(
    ("shape", "name", "strides", "message"),
    [
        ((2, -1), "int8", None, "negative"),
        ((2.0,), "int8", None, "whole numbers"),
        (("2",), "int8", None, "whole numbers"),
        (2, "int8", None, "whole numbers"),
        (None, "int8", None, "whole numbers"),
        ((2, 3), "int8", (1,), "2 dimensions but strides"),
        ((2,), "int8", (-1,), "negative"),
        ((1 << 40, 1 << 40), "int8", None, r"2\^63"),
        ((2, 4), "int4", (8, 1), "row-major strides"),
        ((2,), "floaty", None, "unknown dtype"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(shape: Any, name: str, strides: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TensorSpec(shape, name, strides)


def test_lengths_may_be_anything_with_an_index() -> None:
    numpy = pytest.importorskip("numpy")
    spec = TensorSpec(numpy.array([2, 3]), "int8")
    assert spec.shape == (2, 3)
    assert all(type(n) is int for n in spec.shape)


@given(SHAPES, st.sampled_from(dtype_names()))
def test_a_row_major_spec_takes_exactly_its_bits_in_whole_bytes(shape: tuple[int, ...], name: str) -> None:
    element = dtype(name)
    assert TensorSpec(shape, name).nbytes == math.ceil(math.prod(shape) * element.itembits / 8)


@given(st.data())
def test_a_strided_spec_spans_from_its_first_byte_to_its_last(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    strides = data.draw(st.tuples(*[st.integers(0, 20) for _ in shape]))
    spec = TensorSpec(shape, "float32", strides)
    offsets = [0]
    for n, s in zip(shape, strides, strict=True):
        offsets = [o + i * s for o in offsets for i in range(n)]
    assert spec.nbytes == (4 * (max(offsets) + 1) if offsets else 0)


# --------------------------------------------------------------------------------------------------- layouts


@given(st.lists(st.tuples(SHAPES, st.sampled_from(dtype_names())), max_size=12))
def test_a_layout_aligns_all_and_overlaps_none(tensors: list[tuple[tuple[int, ...], str]]) -> None:
    specs = {str(i): TensorSpec(shape, name) for i, (shape, name) in enumerate(tensors)}
    layout = lay_out(specs)
    spans = sorted((layout.byte_offsets[n], layout.byte_offsets[n] + s.nbytes) for n, s in specs.items() if s.nbytes)
    assert all(start % ALIGNMENT == 0 for start in layout.byte_offsets.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert layout.nbytes == max((end for _, end in spans), default=0)
    gaps = [start - end for (_, end), (start, _) in itertools.pairwise(spans)]
    assert all(gap < ALIGNMENT for gap in gaps)


def test_an_empty_tensor_takes_no_bytes_and_pads_nothing() -> None:
    specs = {"a": TensorSpec((10,), "int8"), "none": TensorSpec((0, 4), "int8")}
    assert lay_out(specs).nbytes == 10


def test_aligned_rounds_up() -> None:
    assert [aligned(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]
    assert aligned(5, 4) == 8


# -------------------------------------------------------------------------------------------------- byte counts


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("0B", 0),
        (" 7 kB ", 7000),
        ("1.5 GB", 1_500_000_000),
        ("20GiB", 20 << 30),
        ("20gib", 20 << 30),
        ("0.1KiB", 102),
        ("2TiB", 2 << 40),
        ("3 MB", 3_000_000),
        ("3MiB", 3 << 20),
    ],
)
def test_byte_counts_are_read(text: int | str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1,5GB", "20 G", "20 Gb/s", "0x10", "inf", "9" * 5000])
def test_text_that_is_no_byte_count_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(SpecError, match=r"KiB, MiB, GiB, TiB \(powers of 1024\)"):
        parse_nbytes(text, "device_budget")


@pytest.mark.parametrize("what", [1.5, True, None, b"1", [1]])
def test_what_is_no_number_of_bytes_is_refused(what: Any) -> None:
    with pytest.raises(SpecError, match="device_budget="):
        parse_nbytes(what, "device_budget")


@pytest.mark.parametrize(
    "what", [1 << 101, 10**5000, -(10**5000), "9" * 1000 + "GB"], ids=["2^101", "more", "less", "text"]
)
def test_a_count_that_no_memory_has_is_refused(what: Any) -> None:
    with pytest.raises(SpecError, match=r"device_budget has \d+ bits"):
        parse_nbytes(what, "device_budget")
    assert parse_nbytes(1 << 100) == 1 << 100


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(SpecError, match=r"nbytes=-5 is negative"):
        parse_nbytes(-5)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1024 bytes (1.00 KiB)"),
        (2 << 30, "2147483648 bytes (2.00 GiB)"),
        (3 << 40, "3298534883328 bytes (3.00 TiB)"),
        (-(5 << 20), "-5242880 bytes (-5.00 MiB)"),
    ],
)
def test_bytes_are_written_before_the_unit(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


def test_a_dtype_is_a_value() -> None:
    assert DType("float32", 2, 32) == dtype("float32")
    with pytest.raises(AttributeError):
        dtype("float32").bits = 16  # type: ignore[misc]


def test_strides_of_many_dimensions_are_no_product() -> None:
    """They may multiply to any number: it is the span of the tensor that must be."""
    shape = (2,) * 20
    spec = TensorSpec(shape, "float64")
    assert TensorSpec(shape, "float64", spec.strides) == spec
    assert spec.nbytes == 8 << 20


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        ((1,) * 65, None, "65 dimensions; a tensor has at most 64"),
        ((1 << 32, 1 << 32), None, r"more than 2\^63 elements"),
        ((3,), (1 << 62,), r"spans more than 2\^63 elements"),
        ((1,), (1 << 63,), r"spans more than 2\^63 elements"),
    ],
)
def test_what_no_memory_can_hold_is_refused(shape: Any, strides: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TensorSpec(shape, "uint8", strides)
