"""Copy a view's elements into a block: gathered row-major where the host can, else strided as they are."""

from __future__ import annotations

from typing import Protocol

from . import _native
from .blocks import Block
from .driver import Driver
from .errors import AliasError
from .pages import host_threads
from .registrations import uncrossed
from .spec import TensorSpec

__all__ = ["Elements", "copied_nbytes", "copy_elements"]


class Elements(Protocol):
    """What a view is to a copy."""

    spec: TensorSpec
    host_pointer: int | None

    @property
    def pointer(self) -> int: ...


def copied_nbytes(source: Elements, *, to_host: bool) -> int:
    """Bytes that `copy_elements` writes: row-major where the host gathers, else the whole span."""
    spec = source.spec
    return TensorSpec(spec.shape, spec.dtype).nbytes if to_host and source.host_pointer is not None else spec.nbytes


def copy_elements(source: Elements, block: Block, driver: Driver | None) -> TensorSpec:
    """Copy a view's elements into a block of `copied_nbytes`; row-major where the host can gather, else strided alike.

    The bytes must have settled.
    """
    spec = source.spec
    if spec.numel == 0:
        return TensorSpec(spec.shape, spec.dtype)
    if source.host_pointer is not None and block.host_pointer is not None:
        if spec.is_row_major:
            _native.copy(block.host_pointer, source.host_pointer, spec.nbytes, host_threads())
            return spec
        packed = TensorSpec(spec.shape, spec.dtype)
        if _overlap(source.host_pointer, spec.nbytes, block.host_pointer, packed.nbytes):
            raise AliasError(f"{source!r} overlaps the bytes that it is to be gathered into; copy it elsewhere first")
        _native.copy_strided(block.host_pointer, source.host_pointer, spec.dtype.itemsize, spec.shape, spec.strides)
        return packed
    pointer = source.pointer if source.host_pointer is None else source.host_pointer
    target = block.device_pointer if block.host_pointer is None else block.host_pointer
    assert driver is not None
    assert target is not None
    host = source.host_pointer if block.host_pointer is None else block.host_pointer
    whole = [(0, spec.nbytes)] if host is None else uncrossed(host, spec.nbytes, driver)
    for at, nbytes in whole:
        driver.copy(target + at, pointer + at, nbytes)
    return spec


def _overlap(start: int, nbytes: int, other: int, other_nbytes: int) -> bool:
    return start < other + other_nbytes and other < start + nbytes
