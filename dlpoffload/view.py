"""`View`: bytes that somebody else owns, with a shape, a dtype and a device, handed out and taken in as DLPack.

Source: the Python array API standard, ``__dlpack__`` and ``__dlpack_device__``; DLPack 1.3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, NoReturn

from . import _native
from .blocks import Block, allocate_device, allocate_pageable, allocate_pinned
from .driver import Driver, open_driver
from .errors import AliasError, ClosedError, DriverNotFoundError, SpecError
from .lifetime import own
from .spec import DType, TensorSpec, dtype, format_nbytes, parse_nbytes

__all__ = ["CPU", "CUDA", "CUDA_HOST", "Label", "View", "checked_range", "copied_nbytes", "copy_elements", "view_of"]

CPU: Final = 1
CUDA: Final = 2
CUDA_HOST: Final = 3
_DEVICE_NAMES: Final = {CPU: "kDLCPU", CUDA: "kDLCUDA", CUDA_HOST: "kDLCUDAHost"}
_LEGACY_STREAM: Final = 1
_NO_ORDER: Final = -1


class Label(Enum):
    """What a view says of its device. Consumers differ in what they take: see docs/interchange.md.

    Attributes
    ----------
    CPU
        Host memory. Every consumer on the CPU takes it.
    PINNED
        Page-locked host memory (kDLCUDAHost). JAX takes it without a copy as ``pinned_host``; torch refuses it.
    PINNED_AS_CPU
        ``__dlpack_device__`` says page-locked, the capsule says CPU. torch, NumPy and JAX all take it, and torch
        exports its own pinned tensors like that.
    DEVICE
        The device's own address (kDLCUDA). On the CPU driver the device is the CPU.
    """

    CPU = "cpu"
    PINNED = "pinned"
    PINNED_AS_CPU = "pinned_as_cpu"
    DEVICE = "device"


class View:
    """A tensor over memory that it does not own.

    *Aliasing*: always shares bytes with what it was made from. *Lifetime*: keeps that memory alive, and so does every
    tensor that a consumer makes from it. Views are made by `HostBuffer`, `DeviceBuffer` and `view_of`.

    Attributes
    ----------
    spec : TensorSpec
        Shape and strides in elements, dtype.
    host_pointer, device_pointer : int or None
        Address of the first element for the CPU and for the device; None where that side cannot reach it.
    label : Label
        Which of the two a consumer is given, and under which DLPack device.
    read_only : bool
        Only versioned capsules can say so; a legacy capsule is then refused.
    """

    __slots__ = (
        "__weakref__",
        "_block_driver",
        "_ready",
        "_reference",
        "device_pointer",
        "host_pointer",
        "label",
        "read_only",
        "spec",
    )

    def __init__(
        self,
        owner: _native.Owner | _native.Reference,
        spec: TensorSpec,
        *,
        label: Label,
        driver: Driver | None,
        host_pointer: int | None,
        device_pointer: int | None,
        read_only: bool = False,
        ready: int | None = None,
    ) -> None:
        self._reference = owner.reference() if isinstance(owner, _native.Owner) else owner
        self._block_driver = driver
        self._ready = ready  # event behind the work that fills the bytes; consumers' streams wait for it
        self.spec = spec
        self.label = label
        self.host_pointer = host_pointer
        self.device_pointer = device_pointer
        self.read_only = read_only

    # -------------------------------------------------------------------------------------- properties
    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths, in elements."""
        return self.spec.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides, in elements."""
        return self.spec.strides

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        return self.spec.nbytes

    @property
    def pointer(self) -> int:
        """The address that consumers of the default label are given."""
        pointer = self.device_pointer if self.label is Label.DEVICE else self.host_pointer
        assert pointer is not None
        return pointer

    def __repr__(self) -> str:
        access = ", read-only" if self.read_only else ""
        return f"View({self.spec}, {self.label.value} at {self.pointer:#x}{access})"

    def memoryview(self) -> memoryview:
        """View the bytes on the host as a one-dimensional memoryview of unsigned bytes.

        *Aliasing*: the same bytes. *Lifetime*: the memoryview keeps the memory alive.

        Raises
        ------
        AliasError
            The host cannot reach the bytes.
        """
        if self.host_pointer is None:
            raise AliasError(f"{self!r} is device memory, which the host cannot reach; use HostBuffer.copy_of(view)")
        array = (ctypes.c_ubyte * self.nbytes).from_address(self.host_pointer)
        array.keepalive = self._reference  # type: ignore[attr-defined]  # a ctypes array has a __dict__
        view = memoryview(array).cast("B")
        return view.toreadonly() if self.read_only else view

    def view(
        self,
        shape: Sequence[int],
        dtype: DType | str,
        *,
        strides: Sequence[int] | None = None,
        byte_offset: int = 0,
    ) -> View:
        """View the same bytes, or some of them, as another tensor.

        *Aliasing*: these bytes. *Lifetime*: keeps them alive.

        Raises
        ------
        AliasError
            The tensor would reach outside of these bytes, or start between elements.
        """
        spec = TensorSpec(shape, dtype, strides)
        offset = checked_range(spec, byte_offset, self.pointer, self.nbytes, "view")
        return View(
            self._reference,
            spec,
            label=self.label,
            driver=self._block_driver,
            host_pointer=None if self.host_pointer is None else self.host_pointer + offset,
            device_pointer=None if self.device_pointer is None else self.device_pointer + offset,
            read_only=self.read_only,
            ready=self._ready,
        )

    def __array__(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: without this, ``numpy.asarray`` would wrap the view in an array of objects and say nothing."""
        raise AliasError(f"numpy.asarray({self!r}) would not view its elements; use numpy.from_dlpack(view)")

    # ------------------------------------------------------------------------------------------ DLPack
    def __dlpack_device__(self) -> tuple[int, int]:
        """The DLPack device type and id of the label."""
        return self._device(capsule=False)

    def _device(self, *, capsule: bool) -> tuple[int, int]:
        if self.label is Label.DEVICE:
            driver = self._driver()
            return (CPU, 0) if driver.platform == "cpu" else (CUDA, driver.device_id)
        if self.label is Label.CPU or (capsule and self.label is Label.PINNED_AS_CPU):
            return (CPU, 0)
        return (CUDA_HOST, 0)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export a capsule, as the array API standard defines it.

        *Aliasing*: the capsule shares the bytes unless `copy` is true, or `dl_device` names a device that cannot
        reach them and `copy` is None; a copy says so in IS_COPIED. *Lifetime*: what the consumer makes of it keeps
        the memory alive. *Ordering*: work of ours that fills the bytes comes before what the consumer enqueues on
        `stream` afterwards.

        Parameters
        ----------
        stream
            For a CUDA device: None or 1 (legacy default), 2 (per thread), a handle, or -1 for no ordering. On the
            CPU only None; for pinned memory a number is let through, since some consumers pass one.
        max_version
            The newest version that the consumer reads. None asks for a legacy capsule.
        dl_device
            The device to export for; the view's own by default.
        copy
            True copies, False never copies, None copies only where it must.

        Raises
        ------
        AliasError
            A ``BufferError``: `copy` is False and the device cannot reach the bytes, the device means nothing here,
            or the view is read-only and the capsule has no way to say it.
        """
        if copy not in (None, True, False):
            raise AliasError(f"copy={copy!r}; the standard knows True, False and None")
        wanted = self._device(capsule=False) if dl_device is None else _checked_device(dl_device)
        _check_stream(stream, wanted)
        alias = self if dl_device is None else self._on(wanted)
        if alias is None and copy is False:
            raise AliasError(
                f"{self!r} cannot be aliased on {_device_text(wanted)} and copy=False forbids a copy; "
                "ask with copy=None, or take a view of memory which that device reaches"
            )
        versioned = max_version is not None and max_version[0] >= 1
        if alias is None or copy:
            view, flags = self._copied(wanted, stream, explicit=dl_device is not None), _native.FLAG_IS_COPIED
        else:
            view, flags = alias, _native.FLAG_READ_ONLY if self.read_only else 0
            if self.read_only and not versioned:
                raise AliasError(
                    f"{self!r} is read-only and a legacy capsule cannot say so; the consumer must ask for "
                    "max_version=(1, 0) or newer, or for a copy"
                )
            self._order(wanted, stream)
        spec = view.spec
        return _native.dlpack_capsule(
            view._reference,
            view.pointer,
            view._device(capsule=True),
            (spec.dtype.code, spec.dtype.bits, spec.dtype.lanes),
            spec.shape,
            spec.strides,
            flags if versioned else 0,
            versioned,
        )

    def _driver(self) -> Driver:
        assert self._block_driver is not None
        return self._block_driver

    def _on(self, device: tuple[int, int]) -> View | None:
        """The same bytes as `device` reaches them, or None when it cannot."""
        if device == self._device(capsule=True):
            return self
        kind = device[0]
        if kind == CPU and self.host_pointer is not None:
            return self._labelled(Label.CPU)
        if device == self._device(capsule=False):  # asked for by name, pinned memory is no longer called CPU
            return self._labelled(Label.PINNED)
        driver = self._block_driver
        if driver is None or driver.platform != "cuda":
            return None
        if kind == CUDA_HOST and device[1] == 0 and self.host_pointer is not None:
            return self._labelled(Label.PINNED)
        if kind == CUDA and device[1] == driver.device_id and self.device_pointer is not None:
            return self._labelled(Label.DEVICE)
        return None

    def _labelled(self, label: Label) -> View:
        return View(
            self._reference,
            self.spec,
            label=label,
            driver=self._block_driver,
            host_pointer=self.host_pointer,
            device_pointer=self.device_pointer,
            read_only=self.read_only,
            ready=self._ready,
        )

    def _order(self, device: tuple[int, int], stream: int | None) -> None:
        if self._ready is None or stream == _NO_ORDER:
            return
        if device[0] == CUDA:
            self._driver().stream_wait_event(_LEGACY_STREAM if stream is None else stream, self._ready)
        else:
            self._driver().event_synchronize(self._ready)

    def _settle(self, stream: int | None = None) -> None:
        """Block the host until the bytes are there: what fills them, and what `stream` does to device memory."""
        if stream == _NO_ORDER:
            return
        if self._ready is not None:
            self._driver().event_synchronize(self._ready)
        if self.label is Label.DEVICE:
            self._driver().stream_synchronize(stream or 0)

    def _copied(self, device: tuple[int, int], stream: int | None, *, explicit: bool) -> View:
        """A view of new memory on `device` that holds a copy of the bytes, made behind the work on `stream`."""
        self._settle(stream)
        kind = device[0]
        driver = self._block_driver
        nbytes = max(copied_nbytes(self, to_host=kind != CUDA), 1)
        block: Block
        if kind == CPU:
            block, label = allocate_pageable(nbytes), Label.CPU
        else:
            driver = self._copy_driver(device)
            if kind == CUDA:
                block, label = allocate_device(nbytes, driver), Label.DEVICE
            else:
                block, label = allocate_pinned(nbytes, driver), Label.PINNED if explicit else self.label
        spec = copy_elements(self, block, driver)
        return View(
            block.owner,
            spec,
            label=label,
            driver=block.driver,
            host_pointer=block.host_pointer,
            device_pointer=block.device_pointer,
        )

    def _copy_driver(self, device: tuple[int, int]) -> Driver:
        own = self._block_driver
        if own is not None and device == self._device(capsule=False):
            return own
        if own is not None and own.platform == "cuda" and device in ((CUDA, own.device_id), (CUDA_HOST, 0)):
            return own
        try:
            return open_driver(f"cuda:{device[1]}")
        except DriverNotFoundError as error:
            raise AliasError(f"{self!r} cannot be copied to {_device_text(device)}: {error}") from error


def copied_nbytes(source: View, *, to_host: bool) -> int:
    """Bytes that `copy_elements` writes: row-major where the host gathers, else the whole span."""
    spec = source.spec
    return TensorSpec(spec.shape, spec.dtype).nbytes if to_host and source.host_pointer is not None else spec.nbytes


def checked_range(spec: TensorSpec, byte_offset: int, pointer: int, nbytes: int, what: str) -> int:
    """The offset of a tensor in `nbytes` bytes at `pointer`, after checking that it lies inside and is aligned."""
    offset = parse_nbytes(byte_offset, "byte_offset")
    if offset + spec.nbytes > nbytes:
        raise AliasError(
            f"a view of {spec} at byte_offset={offset} ends at byte {offset + spec.nbytes}, but this "
            f"{what} has {format_nbytes(nbytes)}; use a smaller shape or a larger buffer"
        )
    if spec.dtype.itembits % 8 == 0 and (pointer + offset) % min(spec.dtype.itemsize, 16):
        raise AliasError(
            f"byte_offset={offset} of a {what} at {pointer:#x} is not aligned to the {spec.dtype.itemsize} bytes "
            f"of a {spec.dtype}; carve() lays tensors out aligned"
        )
    return offset


def copy_elements(source: View, block: Block, driver: Driver | None) -> TensorSpec:
    """Copy a view's elements into a block of `copied_nbytes`; row-major where the host can gather, else strided alike.

    The bytes must have settled.
    """
    spec = source.spec
    if spec.numel == 0:
        return TensorSpec(spec.shape, spec.dtype)
    if source.host_pointer is not None and block.host_pointer is not None:
        if spec.is_row_major:
            _native.copy(block.host_pointer, source.host_pointer, spec.nbytes)
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
    driver.copy(target, pointer, spec.nbytes)
    return spec


def _overlap(start: int, nbytes: int, other: int, other_nbytes: int) -> bool:
    return start < other + other_nbytes and other < start + nbytes


def _check_stream(stream: int | None, device: tuple[int, int]) -> None:
    if stream is None:
        return
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < _NO_ORDER:
        raise AliasError(f"stream={stream!r}; the array API standard knows None and whole numbers from -1 on")
    if device[0] == CPU:
        raise AliasError(f"stream={stream} for {_device_text(device)}, which has no streams; pass None")
    if device[0] == CUDA and stream == 0:
        raise AliasError(
            "stream=0 is ambiguous and the array API standard disallows it for CUDA; "
            "pass 1 (legacy default), 2 (per thread default), a handle, or -1 for no ordering"
        )


def _checked_device(device: tuple[int, int]) -> tuple[int, int]:
    kind, number = int(device[0]), int(device[1])
    if kind not in _DEVICE_NAMES or number < 0 or (number and kind != CUDA):
        raise AliasError(
            f"dl_device={device} is no device of this library; "
            f"known are {', '.join(f'{name} ({value})' for value, name in _DEVICE_NAMES.items())}"
        )
    return kind, number


def _device_text(device: tuple[int, int]) -> str:
    return f"({_DEVICE_NAMES[device[0]]}, {device[1]})"


# ------------------------------------------------------------------------------------------------ consumer
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
        code, or it would have to copy.
    SpecError
        The object is no producer at all.
    """
    if isinstance(producer, View):
        return producer
    if hasattr(producer, "__dlpack__"):
        try:
            return _import_capsule(_capsule_of(producer, stream), stream)
        except (BufferError, ValueError, RuntimeError) as error:
            if isinstance(error, ClosedError):
                raise
            if hasattr(producer, "__array_interface__"):  # NumPy exports no dtype of ml_dtypes, but says where they lie
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
    return _view_of_buffer(buffer)


def _capsule_of(producer: Any, stream: int | None) -> Any:
    kind = int(producer.__dlpack_device__()[0]) if hasattr(producer, "__dlpack_device__") else CPU
    # The standard wants stream=None for devices without streams, and some producers check it.
    arguments: dict[str, Any] = {"stream": stream} if kind == CUDA else {}
    try:
        return producer.__dlpack__(**arguments, max_version=_OUR_VERSION, copy=False)
    except TypeError:
        # A producer older than DLPack 1.0 takes no max_version and no copy; it exports what it has.
        return producer.__dlpack__(**arguments)


def _import_capsule(capsule: Any, stream: int | None) -> View:
    imported = _native.consume(capsule)
    if imported.flags & _native.FLAG_IS_COPIED:
        raise AliasError("the producer copied although a view was asked for; use HostBuffer.copy_of to copy")
    kind, number = imported.device
    if kind not in _DEVICE_NAMES:
        raise AliasError(f"its memory is on DLPack device ({kind}, {number}), which this library does not reach")
    try:
        spec = _imported_spec(imported.shape, dtype(imported.dtype), imported.strides)
    except SpecError as error:
        raise AliasError(f"its tensor cannot be described: {error}") from error
    on_host = kind in (CPU, CUDA_HOST)
    held = [imported]
    driver: Driver | None = None
    ready: int | None = None
    release: Callable[[], None] = held.clear
    if kind == CUDA:
        driver = open_driver(f"cuda:{number}")
        if stream != _NO_ORDER:
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
