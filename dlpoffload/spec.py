"""Tensor specs, dtypes and byte counts: pure values, no memory.

Dtype codes are those of ``dlpack.h`` (``DLDataTypeCode``, v1.3); names are those of NumPy and ``ml_dtypes``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .errors import SpecError

__all__ = [
    "ALIGNMENT",
    "DType",
    "Layout",
    "TensorSpec",
    "aligned",
    "dtype",
    "dtype_names",
    "format_nbytes",
    "lay_out",
    "parse_nbytes",
]

_MAX_NDIM: Final = 64
"""As in NumPy and the array API; the native core takes no more."""
_MOST: Final = (1 << 63) - 1
_MOST_NBYTES: Final = 1 << 100
"""No tensor, and no sum of them, has as many: larger counts are mistakes, and no text or float holds all of them."""

ALIGNMENT: Final = 256
"""Bytes to which every tensor inside a buffer is aligned: XLA wants 64 on the CPU, kernels 16; cuMemAlloc gives 256."""


@dataclass(frozen=True, slots=True)
class DType:
    """An element type as DLPack describes it: type code, bits of one lane, number of lanes."""

    name: str
    code: int
    bits: int
    lanes: int = 1

    @property
    def itembits(self) -> int:
        """Bits of one element, all lanes together."""
        return self.bits * self.lanes

    @property
    def itemsize(self) -> int:
        """Bytes of one element.

        Raises
        ------
        SpecError
            An element narrower than a byte has no whole number of bytes.
        """
        if self.itembits % 8:
            raise SpecError(
                f'dtype "{self.name}" has {self.itembits} bits an element, not a whole number of bytes; '
                "ask nbytes of the whole tensor instead"
            )
        return self.itembits // 8

    def __str__(self) -> str:
        return self.name


def _dtype_table() -> dict[str, DType]:
    rows = [("bool", 6, 8, 1), ("bfloat16", 4, 16, 1)]
    rows += [(f"int{bits}", 0, bits, 1) for bits in (2, 4, 8, 16, 32, 64)]
    rows += [(f"uint{bits}", 1, bits, 1) for bits in (1, 2, 4, 8, 16, 32, 64)]
    rows += [(f"float{bits}", 2, bits, 1) for bits in (16, 32, 64)]
    rows += [(f"complex{bits}", 5, bits, 1) for bits in (32, 64, 128)]
    rows += [
        ("float8_e3m4", 7, 8, 1),
        ("float8_e4m3", 8, 8, 1),
        ("float8_e4m3b11fnuz", 9, 8, 1),
        ("float8_e4m3fn", 10, 8, 1),
        ("float8_e4m3fnuz", 11, 8, 1),
        ("float8_e5m2", 12, 8, 1),
        ("float8_e5m2fnuz", 13, 8, 1),
        ("float8_e8m0fnu", 14, 8, 1),
        ("float6_e2m3fn", 15, 6, 1),
        ("float6_e3m2fn", 16, 6, 1),
        ("float4_e2m1fn", 17, 4, 1),
        # torch packs two fp4 values into an element and says so with two lanes
        ("float4_e2m1fn_x2", 17, 4, 2),
    ]
    return {name: DType(name, code, bits, lanes) for name, code, bits, lanes in rows}


_DTYPES: Final = _dtype_table()
_BY_CODE: Final = {(d.code, d.bits, d.lanes): d for d in _DTYPES.values()}


def dtype_names() -> tuple[str, ...]:
    """Every dtype name that `dtype` knows."""
    return tuple(_DTYPES)


def dtype(what: DType | str | tuple[int, int, int]) -> DType:
    """Look a dtype up by name, by DLPack ``(code, bits, lanes)``, or give a `DType` back.

    Raises
    ------
    SpecError
        Nothing in the table has that name or code.
    """
    if isinstance(what, DType):
        return what
    if isinstance(what, str):
        found = _DTYPES.get(what)
        if found is None:
            raise SpecError(f'unknown dtype "{what}"; known are: {", ".join(_DTYPES)}')
        return found
    if isinstance(what, tuple) and len(what) == 3:
        found = _BY_CODE.get(what)
        if found is None:
            code, bits, lanes = what
            raise SpecError(
                f"no dtype has the DLPack code {code} with {bits} bits and {lanes} lanes; "
                "view the bytes as uint8 instead"
            )
        return found
    raise SpecError(
        f'a dtype is a name such as "bfloat16" or a DLPack (code, bits, lanes), not {what!r}; '
        "str() of a NumPy dtype is such a name"
    )


@dataclass(frozen=True, slots=True, init=False)
class TensorSpec:
    """What a tensor is, without its bytes: shape, dtype and strides.

    Parameters
    ----------
    shape : sequence of int
        In elements; ``()`` is a scalar, a zero makes it empty.
    dtype : DType or str
        Element type.
    strides : sequence of int, optional
        In elements, none negative; row-major when left out.

    Raises
    ------
    SpecError
        Negative or non-integer lengths, an unknown dtype, strides that do not fit the shape.
    """

    shape: tuple[int, ...]
    dtype: DType
    strides: tuple[int, ...]

    def __init__(self, shape: Sequence[int], dtype: DType | str, strides: Sequence[int] | None = None) -> None:
        shape = _lengths("shape", shape)
        if math.prod(n for n in shape if n) > _MOST:
            raise SpecError(f"shape {shape} describes more than 2^63 elements")
        element = globals()["dtype"](dtype)
        compact = _row_major(shape)
        if strides is None:
            strides = compact
        else:
            strides = _lengths("strides", strides)
            if len(strides) != len(shape):
                raise SpecError(f"shape {shape} has {len(shape)} dimensions but strides {strides} have {len(strides)}")
            if max(strides, default=0) > _MOST or (all(shape) and _span(shape, strides) > _MOST):
                raise SpecError(f"shape {shape} with strides {strides} spans more than 2^63 elements")
        if element.itembits % 8 and strides != compact:
            raise SpecError(
                f'dtype "{element.name}" packs several elements into a byte, so strides {strides} of shape '
                f"{shape} are not addressable; use row-major strides {compact}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", element)
        object.__setattr__(self, "strides", strides)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last one: the span that the tensor lives in."""
        if self.numel == 0:
            return 0
        return -(-_span(self.shape, self.strides) * self.dtype.itembits // 8)

    @property
    def is_row_major(self) -> bool:
        """Whether the strides are those of a C-contiguous tensor (dimensions of length one do not count)."""
        if self.numel == 0:
            return True
        wanted = _row_major(self.shape)
        return all(n == 1 or s == w for n, s, w in zip(self.shape, self.strides, wanted, strict=True))

    def __str__(self) -> str:
        layout = "" if self.is_row_major else f" strides {self.strides}"
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{layout}"


def _lengths(what: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        given = tuple(values)
        lengths = tuple(n.__index__() for n in given)
    except (TypeError, AttributeError):
        raise SpecError(f"{what} is a sequence of whole numbers, not {values!r}") from None
    if len(lengths) > _MAX_NDIM:
        raise SpecError(f"{what} has {len(lengths)} dimensions; a tensor has at most {_MAX_NDIM}")
    if any(n < 0 for n in lengths):
        raise SpecError(f"{what} {lengths} has a negative entry; lengths are zero or more")
    return lengths


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one, of a tensor that has any."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment` bytes."""
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors lie in one slab: a byte offset for each name, and the bytes of the whole."""

    byte_offsets: Mapping[str, int]
    nbytes: int


def lay_out(specs: Mapping[str, TensorSpec], alignment: int = ALIGNMENT) -> Layout:
    """Lay tensors out one behind the other, each start aligned, without overlap.

    The end is not padded: the slab is exactly as large as its last byte demands.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, spec in specs.items():
        start = aligned(end, alignment) if spec.nbytes else 0  # an empty tensor lies anywhere and takes nothing
        offsets[name] = start
        end = max(end, start + spec.nbytes)
    return Layout(offsets, end)


_UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_NBYTES = re.compile(r"\s*(\d{1,1000}(?:\.\d{1,1000})?)\s*([A-Za-z]*)\s*")


def parse_nbytes(what: int | str, name: str = "nbytes") -> int:
    """Read a count of bytes: an int, or a string such as ``"20GiB"`` or ``"1.5 GB"``.

    GB is 10^9 bytes, GiB is 2^30.

    Raises
    ------
    SpecError
        It does not parse, is negative, or is more than 2^100.
    """
    if isinstance(what, str):
        match = _NBYTES.fullmatch(what)
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            raise SpecError(
                f'{name}="{what}" is not a count of bytes; write a whole number of bytes, or a number with one of '
                "the units B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"
            )
        whole, _, fraction = match.group(1).partition(".")
        scale: int = 10 ** len(fraction)
        return _checked_count(int(whole + fraction) * unit // scale, name)
    if isinstance(what, bool) or not hasattr(what, "__index__"):
        raise SpecError(f'{name}={what!r} is not a count of bytes; pass an int or a string such as "20GiB"')
    count: int = what.__index__()
    if -_MOST_NBYTES <= count < 0:
        raise SpecError(f"{name}={count} is negative; a count of bytes is zero or more")
    return _checked_count(count, name)


def _checked_count(count: int, name: str) -> int:
    if abs(count) > _MOST_NBYTES:
        raise SpecError(f"{name} has {count.bit_length()} bits, and no count of bytes has more than 100")
    return count


def format_nbytes(nbytes: int) -> str:
    """Bytes first, then a readable unit: ``"2147483648 bytes (2.00 GiB)"``."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= scale:
            return f"{nbytes} bytes ({nbytes / scale:.2f} {unit})"
    return f"{nbytes} bytes"
