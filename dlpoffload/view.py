"""`View`: bytes that somebody else owns, with a shape, a dtype and a device, handed out as DLPack.

Source: the Python array API standard, ``__dlpack__`` and ``__dlpack_device__``; DLPack 1.3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NoReturn

from . import _native
from .blocks import Block, allocate_device, allocate_pageable, allocate_pinned
from .copies import copied_nbytes, copy_elements
from .driver import Driver, open_driver
from .errors import AliasError, DriverNotFoundError
from .labels import (
    CPU,
    CUDA,
    CUDA_HOST,
    DEVICE_NAMES,
    LEGACY_STREAM,
    NO_ORDER,
    Label,
    check_stream,
    checked_device,
    checked_range,
    device_text,
)
from .spec import DType, TensorSpec

__all__ = [
    "CPU",
    "CUDA",
    "CUDA_HOST",
    "DEVICE_NAMES",
    "NO_ORDER",
    "Label",
    "View",
    "check_stream",
    "checked_range",
]


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
        return self._reshaped(spec, checked_range(spec, byte_offset, self.pointer, self.nbytes, "view"))

    def unguarded(self) -> View:
        """View the same bytes as if they could be written: for a consumer that never writes and reads no flags.

        JAX asks for capsules that cannot say read-only, and writes only to arrays that it was told to donate. Whoever
        writes through this over memory that is mapped read-only ends the process, or the CUDA context.

        *Aliasing*: these bytes. *Lifetime*: keeps them alive.
        """
        made = self._labelled(self.label)
        made.read_only = False
        return made

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
        wanted = self._device(capsule=False) if dl_device is None else checked_device(dl_device)
        check_stream(stream, wanted)
        alias = self if dl_device is None else self._on(wanted)
        if alias is None and copy is False:
            raise AliasError(
                f"{self!r} cannot be aliased on {device_text(wanted)} and copy=False forbids a copy; "
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
                    "max_version=(1, 0) or newer, or for a copy; view.unguarded() is for one that never writes"
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
        # A consumer's kernels may write, and over read-only memory that ends the context: only device_view, by name.
        if kind == CUDA and device[1] == driver.device_id and self.device_pointer is not None and not self.read_only:
            return self._labelled(Label.DEVICE)
        return None

    def _labelled(self, label: Label) -> View:
        made = self._reshaped(self.spec)
        made.label = label
        return made

    def _reshaped(self, spec: TensorSpec, offset: int = 0) -> View:
        """As `view`, unchecked: what is only copied from need not be aligned."""
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

    def _order(self, device: tuple[int, int], stream: int | None) -> None:
        if self._ready is None or stream == NO_ORDER:
            return
        if device[0] == CUDA:
            self._driver().stream_wait_event(LEGACY_STREAM if stream is None else stream, self._ready)
        else:
            self._driver().event_synchronize(self._ready)

    def _settle(self, stream: int | None = None) -> None:
        """Block the host until the bytes are there: what fills them, and what `stream` does to device memory."""
        if stream == NO_ORDER:
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
            raise AliasError(f"{self!r} cannot be copied to {device_text(device)}: {error}") from error
