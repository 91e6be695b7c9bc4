"""`HostBuffer` and `DeviceBuffer`: memory of exactly the size asked for, handed out as views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .accounting import live_buffers, pinned_nbytes
from .background import Progress
from .blocks import Block, adopt_device, allocate_device, allocate_pageable, allocate_pinned, register
from .buffer import Buffer
from .chunked import allocate_chunked
from .copies import copied_nbytes, copy_elements
from .driver import Driver, open_driver
from .errors import AliasError, RegistrationError, SpecError
from .maps import check_registrable
from .pages import HugePages, PinOptions
from .producers import view_of
from .spec import ALIGNMENT, DType, TensorSpec, format_nbytes, lay_out, parse_nbytes
from .view import CPU, CUDA, Label, View

__all__ = ["DeviceBuffer", "HostBuffer", "live_buffers", "pinned_nbytes"]


class HostBuffer(Buffer):
    """Host memory that the device can read: pinned, mapped, and exactly as large as asked for.

    *Lifetime*: the memory lives until the buffer is closed or dropped and every view of it is gone.
    """

    _kind = "host buffer"

    @classmethod
    def allocate(
        cls,
        nbytes: int | str,
        *,
        device: str | int | None = None,
        pinned: bool = True,
        huge_pages: HugePages = "transparent",
        numa_node: int | None = None,
        host_budget: int | str | None = None,
        background: bool = False,
        chunk_nbytes: int | str = "1GiB",
        progress: Progress | None = None,
    ) -> HostBuffer:
        """Allocate pinned, mapped host memory. Its bytes are zero.

        Parameters
        ----------
        nbytes
            How many, at least one; an int or a string such as ``"2GiB"``.
        device
            For which device; the first CUDA device by default, or the CPU driver where there is none.
        pinned
            False gives pageable memory: it has no device pointer, and copies out of it are slow.
        huge_pages
            ``"transparent"``; ``"hugetlb"`` takes pages of the pool that an administrator reserved, the largest that
            fit, and rounds up to them; ``"never"``. What could not be had stands in `notes`.
        numa_node
            Where the pages come from while it has any; the device's own node by default.
        host_budget
            What this process may pin in all, in the place of what the system says of its memory.
        background
            Pin chunk by chunk on a thread and return at once. A view waits for the chunks that it lies in, and lies in
            one chunk; `pinning` says how far it is, waits and cancels.
        chunk_nbytes
            Bytes of one chunk, in whole huge pages of 2 MiB: registering one stalls kernels that run meanwhile.
        progress
            Called with bytes pinned and bytes in all, on the thread that pins.

        Raises
        ------
        SpecError
            `nbytes` is zero, negative or does not parse; an option that has no effect is given.
        HostMemoryError
            The machine has not that much to give; nothing stays allocated.
        """
        count, driver = parse_nbytes(nbytes), open_driver(device)
        if count == 0:
            raise SpecError("nbytes=0; a host buffer holds at least one byte")
        options = PinOptions.checked(huge_pages, numa_node, host_budget)
        if not pinned:
            if background or progress or options != PinOptions():
                raise SpecError("pinned=False takes none of the options of pinning; leave them out")
            return cls(allocate_pageable(count, driver))
        if background:
            block, pinning = allocate_chunked(count, driver, options, parse_nbytes(chunk_nbytes), progress)
            return cls(block, pinning)
        if progress is not None:
            raise SpecError("progress= is told of chunks; pass background=True as well")
        return cls(allocate_pinned(count, driver, options))

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
    def read_only(self) -> bool:
        """Whether views of this buffer are read-only."""
        return self._open_block().read_only

    @property
    def pinned(self) -> bool:
        """Whether it is page-locked; False of pageable memory."""
        return self._open_block().pinned

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be had when it was allocated, and what was taken in its place."""
        return self._open_block().notes

    @property
    def borders(self) -> tuple[int, ...]:
        """Host addresses inside where one registration ends and the next begins: no copy may cross one."""
        return self._open_block().borders

    def pieces(self, byte_offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Byte offset and bytes of the copies that move a range of this buffer, none across two registrations."""
        return self._open_block().pieces(byte_offset, nbytes)

    def memoryview(self, byte_offset: int = 0, nbytes: int | None = None) -> memoryview:
        """View bytes on the host as a memoryview; it counts as a live view."""
        offset = parse_nbytes(byte_offset, "byte_offset")
        count = max(self.nbytes - offset, 0) if nbytes is None else parse_nbytes(nbytes)
        # No device copies out of it, so it may lie in several chunks.
        spec = TensorSpec((count,), "uint8")
        return self._view_of_spec(self._open_block(), spec, offset, Label.CPU, whole=False).memoryview()

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
        read_only: bool = False,
    ) -> View:
        """View bytes of this buffer as a tensor of the device: kDLCUDA over mapped host memory (UVA, zero-copy).

        *Aliasing*: these bytes, read and written by kernels over the link. *Ordering*: none; the host's writes are
        seen by kernels launched afterwards, and a kernel's by the host after it synchronised.

        Parameters
        ----------
        device
            Which device of the buffer's driver; the buffer's own by default.
        read_only
            Has to be said of memory that is read-only: frameworks do not keep a kernel from writing through the view,
            and a write that reaches such memory is an illegal access, which ends the CUDA context.

        Raises
        ------
        AliasError
            As `host_view`; the device cannot map host memory or does not belong to the buffer's driver; the buffer is
            read-only and `read_only` was not said.
        """
        block = self._open_block()
        if block.read_only and not read_only:
            raise AliasError(
                "this buffer is read-only (a mapped file), and a kernel that writes through a device view of it ends "
                "the CUDA context; say read_only=True where nothing writes, or copy it (HostBuffer.copy_of, "
                "HostStore.copy_out)"
            )
        if device is not None:
            block = self._seen_from(block, open_driver(device))
        return self._view_of_spec(
            block, TensorSpec(shape, dtype, strides), byte_offset, Label.DEVICE, read_only=read_only
        )

    def _seen_from(self, block: Block, driver: Driver) -> Block:
        """The same block with the addresses of another device: pinned memory is portable."""
        own = self._driver()
        if driver is own:
            return block
        if driver.platform != own.platform:
            raise AliasError(f"this buffer is pinned for {own.device}; {driver.device} cannot map it")
        pointer = driver.host_device_pointer(self.host_pointer)
        return replace(block, driver=driver, device_pointer=pointer)

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
