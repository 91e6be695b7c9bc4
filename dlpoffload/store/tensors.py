"""`StoredTensors`: what a `HostStore` is once it is made: views, copies in, and its end."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import Any, Literal

from ..background import Background
from ..closing import Closing
from ..errors import AliasError, ClosedError, SpecError
from ..lifetime import drain
from ..memory import HostBuffer
from ..slab import Place, Slab
from ..spec import TensorSpec, format_nbytes
from ..view import Label, View
from .files import KERNEL_ALIGNMENT, unaligned
from .homes import Contents, Home, Region
from .layout import near_to
from .pinned import Memory
from .strides import packed_source

__all__ = ["StoredTensors"]


def _close_unviewed(buffer: HostBuffer) -> None:
    with suppress(ClosedError):
        buffer.close()


class StoredTensors(Closing):
    """Named tensors and their homes."""

    _called = "the store"

    def __init__(self, contents: Contents, units: Mapping[str, tuple[str, ...]], memory: Memory) -> None:
        specs = contents.specs
        self.mode: Literal["map", "copy"] = "map" if any(home.in_file for home in contents.homes) else "copy"
        self.because = ""
        self._specs = dict(specs)
        self._nbytes = sum(spec.nbytes for spec in specs.values())
        self._units = dict(units)
        self._unit_of = {name: unit for unit, names in units.items() for name in names}
        self._memory = memory
        self._device = memory.device
        self._lock = threading.RLock()
        self._closed = False
        self._contents = contents
        self._homes = contents.homes
        self._of_name = contents.of_name
        self._of_unit = contents.of_unit
        self._moved: dict[str, int] = {}
        self._pinning: Background | None = None

    # --------------------------------------------------------------------------------------- properties
    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name, in the order of the source."""
        return MappingProxyType(self._specs)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the source."""
        return tuple(self._specs)

    @property
    def units(self) -> Mapping[str, tuple[str, ...]]:
        """The tensors of each unit."""
        return MappingProxyType(self._units)

    @property
    def device(self) -> str:
        """The device that the memory is pinned for."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._nbytes

    @property
    def pinned_nbytes(self) -> int:
        """Pinned bytes of the buffers that are there by now: tensors, and less than 256 bytes between two."""
        return sum(buffer.nbytes for buffer in self._buffers() if buffer.pinned)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the buffers that are there by now, pinned or not, pages of mapped files included."""
        return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def file_nbytes(self) -> int:
        """Of them, the file's own pages: no second copy of it."""
        return sum(home.buffer.nbytes for home in self._homes if home.in_file and home.buffer is not None)

    @property
    def pageable_because(self) -> str:
        """Why some of it is pageable; empty while none is."""
        return self._memory.because

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be had when buffers were allocated, and what was taken in its place."""
        return tuple(self._memory.notes)

    @property
    def moved(self) -> Mapping[str, int]:
        """Bytes of each tensor that was moved out of its file into memory of its own, because it was written."""
        return MappingProxyType(self._moved)

    @property
    def unaligned(self) -> tuple[str, ...]:
        """Tensors of a mapped file that kernels cannot read well in place: not on a multiple of 16 bytes."""
        return tuple(name for name in self._specs if self._misplaced(name) is not None)

    @property
    def pinning(self) -> Background | None:
        """How far pinning in the background is; None where there is none."""
        return self._pinning

    @property
    def _to_allocate(self) -> int:
        """Bytes of all buffers once they are there."""
        return sum(home.nbytes for home in self._homes)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def live_views(self) -> int:
        """Views, capsules and consumers' tensors that are alive over this store."""
        return sum(buffer.live_views for buffer in self._buffers())

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        state = "closed host store" if self._closed else "host store"
        return f"<{state} of {len(self)} tensors, {self.nbytes} bytes, on {self._device}>"

    # -------------------------------------------------------------------------------------------- views
    def host_view(self, name: str, label: Label | str = Label.CPU) -> View:
        """View one tensor on the host. *Aliasing*: these bytes. See `HostBuffer.host_view`.

        Of a mapped file the view is read-only. NumPy and JAX keep to that; torch does not, and a write through its
        tensor ends the process: use `update`, or `copy_out` first.

        Raises
        ------
        CheckpointError
            The file was written to or cut off.
        AliasError
            The tensor lies in its file between elements.
        """
        spec = self._spec(name)
        buffer, offset = self._place(name)
        try:
            return buffer.host_view(spec.shape, spec.dtype, strides=spec.strides, byte_offset=offset, label=label)
        except AliasError as error:
            if self._misplaced(name) is None:
                raise
            raise AliasError(f"{unaligned(name, self._misplaced(name) or 0)} [{error}]") from error

    def device_view(self, name: str, device: str | int | None = None, *, read_only: bool = False) -> View:
        """View one tensor as the device maps it. *Aliasing*: these bytes. See `HostBuffer.device_view`.

        Raises
        ------
        CheckpointError
            The file was written to or cut off.
        AliasError
            The tensor lies in a mapped file and `read_only` was not said, or lies there where kernels cannot read it.
        """
        spec = self._spec(name)
        buffer, offset = self._place(name)
        if spec.nbytes and (misplaced := self._misplaced(name)) is not None:
            raise AliasError(unaligned(name, misplaced))
        return buffer.device_view(
            spec.shape, spec.dtype, strides=spec.strides, byte_offset=offset, device=device, read_only=read_only
        )

    def is_read_only(self, name: str) -> bool:
        """Whether a tensor lies in a mapped file: `update` and `copy_out` move it, and nothing writes it in place."""
        self._spec(name)
        return self._of_name[name][0].in_file

    def slab(self, unit: str) -> Slab:
        """View a unit's bytes as one slab, so that one copy moves all of it, or as few as there can be.

        *Aliasing*: these bytes. *Lifetime*: the slab keeps the buffer, but closing the store closes it. It stays true
        when a tensor is moved.

        Raises
        ------
        SpecError
            The store has no such unit.
        CheckpointError
            The file was written to or cut off.
        """
        region = self._region(unit)
        with self._lock:
            self._check_open()
            return region.slab(self._of_name)

    def slot_nbytes(self, unit: str) -> int:
        """Bytes of a slot that holds a unit; nothing is allocated for the answer."""
        return self._region(unit).nbytes

    def _region(self, unit: str) -> Region:
        region = self._of_unit.get(unit)
        if region is None:
            raise SpecError(f'no unit "{unit}" among {len(self._units)}{near_to(unit, self._units)}')
        return region

    def _spec(self, name: str) -> TensorSpec:
        spec = self._specs.get(name)
        if spec is None:
            raise SpecError(f'no tensor "{name}" among {len(self)}{near_to(name, self._specs)}')
        return spec

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this store of {format_nbytes(self.nbytes)} is closed; make a new one")

    def _place(self, name: str) -> Place:
        self._check_open()
        home, byte_offset = self._of_name[name]
        return home.place(byte_offset)

    def _misplaced(self, name: str) -> int | None:
        """The byte of its file that a tensor starts at, where that is no place for kernels."""
        home, byte_offset = self._of_name[name]
        at = home.file_offset + byte_offset
        return at if home.in_file and at % KERNEL_ALIGNMENT and self._specs[name].nbytes else None

    def take_over(self, former: StoredTensors, staying: Container[str]) -> None:
        """Take buffers of the store that this one replaces: those of the same tensors in the same places.

        *Aliasing*: the bytes of `former`, which is dropped afterwards, not closed. Nothing is copied. What lies in a
        mapped file is not taken.

        Parameters
        ----------
        staying
            Tensors whose bytes in `former` are to stay. A buffer that holds any other is not taken.
        """
        with self._lock, former._lock:
            if (self._device, self._memory.pageable) == (former._device, former._memory.pageable):
                self._contents.take_over(former._contents, staying)

    def _buffers(self) -> list[HostBuffer]:
        return [buffer for home in self._homes if (buffer := home.buffer) is not None]

    # ------------------------------------------------------------------------------------------- copies
    def copy_into(self, name: str, source: Any) -> None:
        """Copy any producer's elements into one tensor of the store.

        *Aliasing*: none afterwards. *Ordering*: the bytes are there on return; copies out of the store that
        are enqueued already are not waited for.

        Parameters
        ----------
        name
            Which tensor.
        source
            A NumPy array, a tensor, a view, on the host or a device; same shape and dtype, any strides.

        Raises
        ------
        SpecError
            No such tensor, or shape or dtype differ.
        AliasError
            `source` gives no view of its memory, or the tensor's strides leave gaps and the source's differ; the
            tensor lies in a mapped file (`update` moves it first).
        HostMemoryError
            The tensor's buffer was not allocated yet, and the machine has not that much to give.
        """
        spec = self._spec(name)
        packed = packed_source(name, source, spec, self._device)
        if self._of_name[name][0].in_file:
            raise AliasError(
                f'tensor "{name}" lies in a mapped file, which is never written; update() moves it to memory of its '
                "own first"
            )
        buffer, offset = self._place(name)
        if spec.nbytes:
            buffer.copy_into(packed, byte_offset=offset)

    def update(self, name: str, source: Any) -> bool:
        """Copy any producer's elements into one tensor; if it lies in a mapped file, into memory of its own.

        The file is not touched. *Ordering*: as `copy_into`; copies enqueued out of the file read what was there. Slabs
        of the store know the new place, and slots and views that were made before do not.

        Returns
        -------
        bool
            Whether the tensor was moved; `moved` counts them.

        Raises
        ------
        SpecError, AliasError, HostMemoryError
            As `copy_into`; nothing was moved then.
        SlotError
            A captured graph that copies from the file can still be replayed.
        """
        if not self.is_read_only(name):
            self.copy_into(name, source)
            return False
        return self._move(name, packed_source(name, source, self._specs[name], self._device))

    def copy_out(self, name: str) -> bool:
        """Copy one tensor out of its mapped file into pinned memory of its own, so that it can be written.

        Views made before stay on the file. Returns and raises as `update` does; False where it is writable already.
        """
        self._spec(name)
        with self._lock:
            return self.is_read_only(name) and self._move(name, None)

    def _move(self, name: str, packed: View | None) -> bool:
        nbytes = self._specs[name].nbytes
        with self._lock:
            self._check_open()
            old = self._of_name[name]
            if not old[0].in_file:  # another thread was quicker
                if packed is not None and nbytes:
                    self._place(name).buffer.copy_into(packed)
                return False
            unit = self._unit_of.get(name)
            places = None if unit is None else self._of_unit[unit].places
            if places is not None:
                places.check_movable(name)
            buffer = self._memory.allocate(max(nbytes, 1))
            if nbytes:
                buffer.copy_into(self._bytes(name) if packed is None else packed)
            home = Home.of(buffer)
            self._homes.append(home)
            self._of_name[name] = home, 0
            if places is not None:
                places.move(name, Place(buffer, 0), home.look)
            self._moved[name] = nbytes
            return True

    def _bytes(self, name: str) -> memoryview:
        buffer, offset = self._place(name)
        return buffer.memoryview(offset, self._specs[name].nbytes)

    # ------------------------------------------------------------------------------------------ closing
    def close(self) -> None:
        """Free the memory now. Idempotent.

        Raises
        ------
        ClosedError
            Views are alive; the message says how many. The whole store stays open.
        CudaError, RegistrationError
            The driver would not take some of the memory back. The store is closed, and that memory stays allocated.
        """
        self._stop()
        drain()
        with self._lock:
            users = self.live_views
            if users:
                raise ClosedError(
                    f"{users} live view{'s' if users > 1 else ''} (or tensors made from views) still use "
                    f"this store of {format_nbytes(self.nbytes)}; drop them first, or drop the store instead "
                    "of closing it: it is freed when the last view is gone"
                )
            self._discard()

    def _stop(self) -> None:
        if self._pinning is not None:
            self._pinning.cancel()
            self._pinning.join()

    def _discard(self) -> None:
        """End the store; a buffer that is viewed all the same is freed when its last view is gone."""
        self._stop()
        with self._lock:
            self._closed = True
            for region in self._of_unit.values():
                region.places = None  # which hold the buffers
            with ExitStack() as closing:  # all of them, the last one first, whichever refuses
                for home in self._homes:
                    if (buffer := home.take()) is not None:
                        closing.callback(_close_unviewed, buffer)

    def _let_go(self) -> None:
        self._discard()
