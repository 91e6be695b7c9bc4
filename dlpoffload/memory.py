"""`HostBuffer` and `DeviceBuffer`: memory of exactly the size asked for, handed out as views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .blocks import Block, adopt_device, allocate_device, allocate_pageable, allocate_pinned, pinned_nbytes, register
from .buffer import Buffer
from .copies import copied_nbytes, copy_elements
from .driver import Driver, open_driver
from .errors import AliasError, RegistrationError, SpecError
from .lifetime import live
from .maps import check_registrable
from .producers import view_of
from .spec import ALIGNMENT, DType, TensorSpec, format_nbytes, lay_out, parse_nbytes
from .view import CPU, CUDA, Label, View

__all__ = ["DeviceBuffer", "HostBuffer", "live_buffers", "pinned_nbytes"]


def live_buffers() -> list[tuple[str, int]]:
    """Kind and bytes of every buffer that is not freed yet, closed ones under live views included."""
    return [(resource.kind, resource.nbytes) for resource in live() if resource.kind != "import"]


class HostBuffer(Buffer):
    """Host memory that the device can read: pinned, mapped, and exactly as large as asked for.

    *Lifetime*: the memory lives until the buffer is closed or dropped and every view of it is gone.
    """

    _kind = "host buffer"

    @classmethod
    def allocate(cls, nbytes: int | str, *, device: str | int | None = None, pinned: bool = True) -> HostBuffer:
        """Allocate pinned, mapped host memory. Its bytes are zero.

        Parameters
        ----------
        nbytes
            How many, at least one; an int or a string such as ``"2GiB"``.
        device
            For which device; the first CUDA device by default, or the CPU driver where there is none.
        pinned
            False gives pageable memory: it has no device pointer, and copies out of it are slow.

        Raises
        ------
        SpecError
            `nbytes` is zero, negative or does not parse.
        HostMemoryError
            The machine has not that much to give; nothing stays allocated.
        """
        count = parse_nbytes(nbytes)
        if count == 0:
            raise SpecError("nbytes=0; a host buffer holds at least one byte")
        return cls((allocate_pinned if pinned else allocate_pageable)(count, open_driver(device)))

    @classmethod
    def register(cls, producer: Any, *, device: str | int | None = None) -> HostBuffer:
        """Register memory that exists: pin it in place.

        *Aliasing*: the buffer is the producer's own memory, never a copy. *Lifetime*: the producer's memory is kept
        until the buffer and all its views are gone. Memory that is pinned already is adopted as it is; ranges that
        share pages share one registration. A shared mapping of a file that the driver pins only for reading gives a
        read-only buffer, see `read_only`.

        Parameters
        ----------
        producer
            A NumPy array, a torch tensor on the CPU, a bytearray, an mmap, or anything else with ``__dlpack__`` or
            the buffer protocol. What it exports read-only stays read-only.

        Raises
        ------
        RegistrationError
            These bytes cannot be pinned in place: a private, read-only mapping of a file, memory of another device,
            no bytes at all, or the driver refuses.
        AliasError
            The producer gives no view of its memory.
        """
        source = view_of(producer)
        if source.host_pointer is None:
            raise RegistrationError(f"{source!r} is device memory; only host memory can be pinned in place")
        if source.nbytes == 0:
            raise RegistrationError(f"a {type(producer).__name__} of no bytes cannot be pinned")
        access = check_registrable(source.host_pointer, source.nbytes)
        block = register(
            source.host_pointer,
            source.nbytes,
            open_driver(device),
            read_only=source.read_only,
            access=access,
            keepalive=source,
        )
        return cls(block)

    @classmethod
    def copy_of(cls, source: Any, *, device: str | int | None = None) -> HostBuffer:
        """Copy any producer's elements, in row-major order, into new pinned memory of exactly their size.

        *Aliasing*: never shares bytes with `source`. Elements that lie strided in device memory keep their layout.

        Raises
        ------
        SpecError
            `source` has no bytes, or is no producer.
        HostMemoryError
            The machine has not that much to give.
        """
        view = view_of(source)
        buffer = cls.allocate(copied_nbytes(view, to_host=True), device=device)
        view._settle()
        copy_elements(view, buffer._open_block(), view._block_driver)
        return buffer

    @property
    def host_pointer(self) -> int:
        """Address of the first byte for the CPU."""
        pointer = self._open_block().host_pointer
        assert pointer is not None
        return pointer

    @property
    def pinned(self) -> bool:
        """Whether these bytes are pinned; pageable ones are not."""
        return self._open_block().pinned

    @property
    def read_only(self) -> bool:
        """Whether views of this buffer are read-only."""
        return self._open_block().read_only

    def memoryview(self, byte_offset: int = 0, nbytes: int | None = None) -> memoryview:
        """View bytes on the host as a memoryview; it counts as a live view."""
        offset = parse_nbytes(byte_offset, "byte_offset")
        count = max(self.nbytes - offset, 0) if nbytes is None else parse_nbytes(nbytes)
        return self.host_view((count,), "uint8", byte_offset=offset).memoryview()

    def host_view(
        self,
        shape: Sequence[int],
        dtype: DType | str,
        *,
        strides: Sequence[int] | None = None,
        byte_offset: int = 0,
        label: Label | str = Label.CPU,
    ) -> View:
        """View bytes of this buffer as a tensor for the CPU.

        *Aliasing*: these bytes. *Lifetime*: keeps them alive.

        Parameters
        ----------
        shape, strides
            In elements; row-major when `strides` is left out.
        byte_offset
            Where the first element lies, a multiple of the element's size.
        label
            ``"cpu"``, ``"pinned"`` or ``"pinned_as_cpu"``: what consumers are told, see `Label`.

        Raises
        ------
        SpecError
            Shape, strides, dtype or label mean nothing.
        AliasError
            The tensor would end behind the buffer, or start between elements.
        ClosedError
            The buffer is closed.
        """
        chosen = _label(label)
        if chosen is Label.DEVICE:
            raise SpecError('label="device" is what device_view gives')
        return self._view(shape, dtype, strides, byte_offset, chosen)

    def device_view(
        self,
        shape: Sequence[int],
        dtype: DType | str,
        *,
        strides: Sequence[int] | None = None,
        byte_offset: int = 0,
        device: str | int | None = None,
    ) -> View:
        """View bytes of this buffer as a tensor of the device: kDLCUDA over mapped host memory (UVA, zero-copy).

        *Aliasing*: these bytes, read and written by kernels over the link. *Ordering*: none; the host's writes are
        seen by kernels launched afterwards, and a kernel's by the host after it synchronised.

        Parameters
        ----------
        device
            Which device of the buffer's driver; the buffer's own by default.

        Raises
        ------
        AliasError
            As `host_view`, and when the device cannot map host memory or does not belong to the buffer's driver.
        """
        block = self._open_block()
        if device is not None:
            block = self._seen_from(block, open_driver(device))
        return self._view_of_spec(block, TensorSpec(shape, dtype, strides), byte_offset, Label.DEVICE)

    def _seen_from(self, block: Block, driver: Driver) -> Block:
        """The same block with the addresses of another device: pinned memory is portable."""
        own = self._driver()
        if driver is own:
            return block
        if driver.platform != own.platform:
            raise AliasError(f"this buffer is pinned for {own.device}; {driver.device} cannot map it")
        pointer = driver.host_device_pointer(self.host_pointer)
        return Block(block.owner, driver, block.nbytes, block.host_pointer, pointer, block.pinned, block.read_only)

    def carve(
        self, specs: Mapping[str, TensorSpec], *, byte_offset: int = 0, label: Label | str = Label.CPU
    ) -> dict[str, View]:
        """View many tensors in this buffer, laid out one behind the other, each aligned to 256 bytes.

        *Aliasing*: each is a view of these bytes and none overlaps another. `spec.lay_out` says the bytes needed.

        Raises
        ------
        AliasError
            They do not fit; nothing is handed out.
        """
        block, chosen, start = self._open_block(), _label(label), parse_nbytes(byte_offset, "byte_offset")
        if start % ALIGNMENT:
            raise AliasError(f"byte_offset={start} is not a multiple of {ALIGNMENT}, to which tensors are aligned")
        layout = lay_out(specs)
        if start + layout.nbytes > block.nbytes:
            raise AliasError(
                f"{len(specs)} tensors need {format_nbytes(layout.nbytes)} from byte {start} on, but this host "
                f"buffer has {format_nbytes(block.nbytes)}"
            )
        return {
            name: self._view_of_spec(block, spec, start + layout.byte_offsets[name], chosen)
            for name, spec in specs.items()
        }

    def copy_into(self, source: Any, *, byte_offset: int = 0) -> None:
        """Copy any producer's elements, in row-major order, into this buffer.

        *Aliasing*: none afterwards. *Ordering*: the bytes are there on return.

        Raises
        ------
        AliasError
            They do not fit, or the buffer is read-only.
        """
        view = view_of(source)
        if self.read_only:
            raise AliasError("this buffer is read-only; copy it first (HostBuffer.copy_of)")
        nbytes, start = copied_nbytes(view, to_host=True), parse_nbytes(byte_offset, "byte_offset")
        target = self.host_view((nbytes,), "uint8", byte_offset=start)  # keeps the bytes while they are written
        block = self._open_block()
        view._settle()
        copy_elements(view, replace(block, host_pointer=target.host_pointer, nbytes=nbytes), view._block_driver)


class DeviceBuffer(Buffer):
    """Device memory: what staging slots are made of."""

    _kind = "device buffer"

    @classmethod
    def allocate(cls, nbytes: int | str, *, device: str | int | None = None) -> DeviceBuffer:
        """Allocate device memory through the driver; its bytes are undefined.

        Raises
        ------
        SpecError
            `nbytes` is zero, negative or does not parse.
        DeviceMemoryError
            The device has not that much to give.
        """
        count = parse_nbytes(nbytes)
        if count == 0:
            raise SpecError("nbytes=0; a device buffer holds at least one byte")
        return cls(allocate_device(count, open_driver(device)))

    @classmethod
    def register(cls, producer: Any, *, device: str | int | None = None) -> DeviceBuffer:
        """Register device memory that a framework allocated, so that its accounting stays true.

        *Aliasing*: the producer's own memory. *Lifetime*: it is kept until the buffer and all its views are gone.

        Raises
        ------
        AliasError
            The producer's memory is not on this device.
        """
        driver, view = open_driver(device), view_of(producer)
        wanted = (CPU, 0) if driver.platform == "cpu" else (CUDA, driver.device_id)
        if view.__dlpack_device__() != wanted:
            raise AliasError(f"{view!r} does not lie on {driver.device}")
        if view.nbytes == 0:
            raise SpecError(f"a {type(producer).__name__} of no bytes; a device buffer holds at least one")
        view._settle()  # what the producer still does to these bytes comes before all that we do
        return cls(adopt_device(view.pointer, view.nbytes, driver, read_only=view.read_only, keepalive=view))

    def device_view(
        self,
        shape: Sequence[int],
        dtype: DType | str,
        *,
        strides: Sequence[int] | None = None,
        byte_offset: int = 0,
    ) -> View:
        """View bytes of this buffer as a tensor of the device.

        Raises
        ------
        AliasError
            The tensor would end behind the buffer, or start between elements.
        """
        return self._view(shape, dtype, strides, byte_offset, Label.DEVICE)


def _label(label: Label | str) -> Label:
    try:
        return Label(label)
    except ValueError:
        raise SpecError(
            f"label={label!r} is no label; known are {', '.join(repr(known.value) for known in Label)}"
        ) from None
