"""Strides of a source against strides of the store: which bytes to take, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import AliasError, SpecError
from ..memory import HostBuffer
from ..producers import view_of
from ..spec import TensorSpec
from ..view import View

__all__ = ["packed_for", "packed_source", "row_major", "viewed"]


def packed_for(view: View, spec: TensorSpec, name: str, device: str | None) -> View:
    """A view whose elements, taken in row-major order, are the bytes that `spec` spans.

    *Aliasing*: the source's bytes; but device memory that must be gathered is copied to the host first.

    Raises
    ------
    AliasError
        `spec` leaves gaps between elements, or repeats them, and the source has other strides.
    """
    if _equal_strides(view.spec, spec):
        return view.view((view.nbytes,), "uint8")
    order = sorted(range(len(spec.shape)), key=lambda axis: -spec.strides[axis])
    if not _permuted(spec, order).is_row_major:
        raise AliasError(
            f'tensor "{name}" of this store is {spec}, which leaves gaps between elements or repeats them, '
            f"and the source has strides {view.strides}; copy from a source with the same strides"
        )
    if view.host_pointer is None:  # a device copies spans, the host gathers
        copied = HostBuffer.copy_of(view, device=device)
        view = copied.host_view(view.shape, view.dtype, strides=view.strides)
    taken = _permuted(view.spec, order)
    return view._reshaped(taken)


def _equal_strides(one: TensorSpec, other: TensorSpec) -> bool:
    return all(n == 1 or s == o for n, s, o in zip(one.shape, one.strides, other.strides, strict=True))


def _permuted(spec: TensorSpec, order: Sequence[int]) -> TensorSpec:
    shape, strides = ([lengths[axis] for axis in order] for lengths in (spec.shape, spec.strides))
    return TensorSpec(shape, spec.dtype, strides)


def packed_source(name: str, source: Any, spec: TensorSpec, device: str | None) -> View:
    """View a source of a stored tensor as the bytes that `spec` spans.

    Raises
    ------
    SpecError
        Its shape or dtype is another one.
    AliasError
        It gives no view of its memory; or see `packed_for`.
    """
    view = viewed(name, source)
    if (view.shape, view.dtype) != (spec.shape, spec.dtype):
        raise SpecError(
            f'tensor "{name}" of this store is {spec}, but the {type(source).__name__} to copy is '
            f"{view.spec}; shape and dtype must be equal"
        )
    return packed_for(view, spec, name, device) if spec.nbytes else view


def viewed(name: str, producer: Any) -> View:
    """A view of one tensor of a mapping; errors name it."""
    try:
        return view_of(producer)
    except (AliasError, SpecError) as error:
        raise type(error)(f'tensor "{name}": {error}') from error


def row_major(name: str, producer: Any) -> TensorSpec:
    """What a tensor of a mapping is once its elements are in row-major order."""
    spec = viewed(name, producer).spec
    return TensorSpec(spec.shape, spec.dtype)
