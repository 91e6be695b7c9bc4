"""`view_of`: take memory in from any producer, by DLPack or by the buffer protocol.

Source: the Python array API standard, ``from_dlpack``; DLPack 1.3.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import index
from typing import Any, Final

from . import _native
from .driver import Driver, open_driver
from .errors import AliasError, ClosedError, DriverNotFoundError, SpecError
from .lifetime import own
from .spec import DType, TensorSpec, dtype
from .view import CPU, CUDA, CUDA_HOST, DEVICE_NAMES, NO_ORDER, Label, View

__all__ = ["view_of"]

_OUR_VERSION: Final = _native.DLPACK_VERSION


def view_of(producer: Any, *, stream: int | None = None) -> View:
    """View the memory of any producer: an object with ``__dlpack__``, or with the buffer protocol.

    *Aliasing*: always the producer's own bytes, never a copy. *Lifetime*: keeps the producer's memory alive until the
    view and everything made from it are gone. *Ordering*: on a CUDA device the producer orders its work before what
    is enqueued on `stream` (the legacy default stream when None).

    Raises
    ------
    AliasError
        The producer gives no such view: it requires a gradient, its strides are negative, its dtype has no DLPack
        code, it would have to copy; or what it says contradicts itself, or describes no memory that can be.
    SpecError
        The object is no producer at all.
    DriverNotFoundError
        Its memory is on a CUDA device, and no driver reaches that.

    Of what the producer's own methods raise, ``BufferError``, ``ValueError`` and ``RuntimeError`` become an
    `AliasError`; anything else is an error inside of the producer, and passes.
    """
    if isinstance(producer, View):
        return producer
    if hasattr(producer, "__dlpack__"):
        try:
            told = _told_device(producer)
            return _import_capsule(_capsule_of(producer, told, stream), told, stream)
        except (BufferError, ValueError, RuntimeError) as error:
            if isinstance(error, ClosedError):
                raise
            if _is_array(producer):  # NumPy exports no dtype of ml_dtypes, but says where they lie
                return _view_of_array(producer)
            raise AliasError(
                f"a {type(producer).__name__} gives no view of its memory: {error}; "
                "pass a detached, strided tensor, or copy it first (HostBuffer.copy_of takes NumPy arrays too)"
            ) from error
    try:
        buffer = memoryview(producer)
    except TypeError:
        raise SpecError(
            f"a {type(producer).__name__} has neither __dlpack__ nor the buffer protocol; "
            "pass a NumPy array, a tensor, a bytearray, an mmap or a View"
        ) from None
    except (BufferError, ValueError) as error:
        raise AliasError(f"a {type(producer).__name__} gives no view of its memory: {error}; open it again") from error
    return _view_of_buffer(buffer)


def _told_device(producer: Any) -> tuple[int, int]:
    """What the producer says of its device, beside the capsule."""
    if not hasattr(producer, "__dlpack_device__"):
        return CPU, 0
    told = producer.__dlpack_device__()
    try:
        kind, number = told
        return index(kind), index(number)
    except (TypeError, ValueError):
        raise AliasError(
            f"its __dlpack_device__ gives a {type(told).__name__} that is no pair of whole numbers"
        ) from None


def _check_device(told: tuple[int, int], device: tuple[int, int]) -> None:
    """Refuse a capsule of another device than was told: its producer then did not order its work for our stream.

    Host memory may have either of its names: torch calls its own page-locked, and CPU in the capsule.
    """
    if told == device or told[0] == CUDA_HOST or {told[0], device[0]} <= {CPU, CUDA_HOST}:
        return
    raise AliasError(f"its __dlpack_device__ says {told}, but its capsule {device}; one of them is not true")


def _capsule_of(producer: Any, told: tuple[int, int], stream: int | None) -> Any:
    # torch's negative bit is not in its memory, and its __dlpack__ refuses only the conjugate one (torch 2.9 to 2.13).
    is_negative = getattr(producer, "is_neg", None)
    if callable(is_negative) and is_negative():
        raise AliasError("it is lazily negated, so its bytes have the other sign; pass x.resolve_neg()")
    # The standard wants stream=None for devices without streams, and some producers check it.
    arguments: dict[str, Any] = {"stream": stream} if told[0] == CUDA else {}
    with _current(told):
        try:
            return producer.__dlpack__(**arguments, max_version=_OUR_VERSION, copy=False)
        except TypeError:
            # A producer older than DLPack 1.0 takes no max_version and no copy; it exports what it has.
            return producer.__dlpack__(**arguments)


def _current(told: tuple[int, int]) -> AbstractContextManager[None]:
    """Make a producer's CUDA device current: torch (2.9 to 2.13) exports nothing of another one."""
    if told[0] != CUDA:
        return nullcontext()
    try:
        return open_driver(f"cuda:{told[1]}").current()
    except (DriverNotFoundError, SpecError):
        return nullcontext()  # there is none; what the capsule says is looked at next


def _import_capsule(capsule: Any, told: tuple[int, int], stream: int | None) -> View:
    imported = _native.consume(capsule)
    if imported.flags & _native.FLAG_IS_COPIED:
        raise AliasError("the producer copied although a view was asked for; use HostBuffer.copy_of to copy")
    kind, number = imported.device
    _check_device(told, imported.device)
    if kind not in DEVICE_NAMES:
        raise AliasError(f"its memory is on DLPack device ({kind}, {number}), which this library does not reach")
    try:
        element = dtype(imported.dtype)
        if element.itembits % 8 and imported.flags & _native.FLAG_IS_SUBBYTE_TYPE_PADDED:
            raise SpecError(f"each {element} is padded to whole bytes, and views are of packed ones")
        spec = _imported_spec(imported.shape, element, imported.strides)
    except SpecError as error:
        raise AliasError(f"its tensor cannot be described: {error}") from error
    on_host = kind in (CPU, CUDA_HOST)
    held = [imported]
    driver: Driver | None = None
    ready: int | None = None
    release: Callable[[], None] = held.clear
    if kind == CUDA:
        driver = open_driver(f"cuda:{number}")
        if stream != NO_ORDER:
            # The producer ordered its work before `stream`; whoever gets our view on another stream waits for this.
            ready = driver.event_create()
            release = partial(_drop_import, held, driver, ready)
    owner = own("import", spec.nbytes, release)
    if driver is not None and ready is not None:
        driver.event_record(ready, stream or 0)
    return View(
        owner,
        spec,
        label={CPU: Label.CPU, CUDA: Label.DEVICE, CUDA_HOST: Label.PINNED}[kind],
        driver=driver,
        host_pointer=imported.pointer if on_host else None,
        device_pointer=None if on_host else imported.pointer,
        read_only=bool(imported.flags & _native.FLAG_READ_ONLY),
        ready=ready,
    )


def _drop_import(held: list[_native.Import], driver: Driver, ready: int) -> None:
    held.clear()
    driver.event_destroy(ready)


def _imported_spec(shape: tuple[int, ...], element: DType, strides: tuple[int, ...] | None) -> TensorSpec:
    compact = TensorSpec(shape, element)
    if strides is None or compact.numel == 0:
        return compact
    # A stride says nothing where the length is one, and NumPy gives negative ones there too.
    strides = tuple(c if n == 1 else s for n, s, c in zip(shape, strides, compact.strides, strict=True))
    if any(s < 0 for s in strides):
        raise SpecError(f"strides {strides} of shape {shape} run backwards; make a contiguous copy first")
    return TensorSpec(shape, element, strides)


def _is_array(producer: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(producer, numpy.ndarray)


def _view_of_array(array: Any) -> View:
    interface = array.__array_interface__
    pointer, read_only = interface["data"]
    itemsize = array.dtype.itemsize
    try:
        element = dtype(str(array.dtype))
        if element.itembits != itemsize * 8:
            raise SpecError(f"NumPy keeps each in {itemsize} bytes, but DLPack packs them in {element.itembits} bits")
        if any(s % itemsize for s in array.strides):
            raise SpecError(f"byte strides {array.strides} are no multiple of the element; make a contiguous copy")
        spec = _imported_spec(array.shape, element, tuple(s // itemsize for s in array.strides))
    except SpecError as error:
        raise AliasError(f"a NumPy array of dtype {array.dtype} cannot be viewed: {error}") from error
    return _host_view(pointer, spec, array, read_only=read_only)


def _view_of_buffer(buffer: memoryview) -> View:
    if not buffer.c_contiguous:
        raise AliasError("a buffer with gaps between its bytes cannot be viewed; pass a contiguous one")
    pointer = _native.buffer_pointer(buffer)
    return _host_view(pointer, TensorSpec((buffer.nbytes,), "uint8"), buffer, read_only=buffer.readonly)


def _host_view(pointer: int, spec: TensorSpec, keepalive: object, *, read_only: bool) -> View:
    held = [keepalive]
    owner = own("import", spec.nbytes, held.clear)
    return View(
        owner, spec, label=Label.CPU, driver=None, host_pointer=pointer, device_pointer=None, read_only=read_only
    )
