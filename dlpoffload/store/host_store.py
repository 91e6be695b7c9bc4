"""`HostStore`: named tensors in exact pinned memory, those of one unit beside each other in one slab."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from ..checkpoint import Progress, Recipe, open_checkpoint
from ..driver import open_driver
from ..errors import AliasError, ClosedError, SpecError
from ..lifetime import drain
from ..limits import check_host_budget
from ..memory import HostBuffer
from ..producers import view_of
from ..slab import Slab
from ..spec import TensorSpec, format_nbytes
from ..view import Label, View
from .layout import Region, Units, checked_units, grouped, near_to
from .strides import packed_for

__all__ = ["HostStore"]


class HostStore:
    """Named tensors in host memory that is pinned, mapped and exactly as large as they are.

    Tensors of one unit lie in one slab, each aligned to 256 bytes, and the slab is a buffer of its own. The
    others share buffers of at most 1 GiB; a larger tensor has its own. A buffer is allocated when the first
    of its tensors is copied into it or viewed: whoever fills a store unit by unit, and drops the originals on
    the way, needs host memory for the weights once and one unit more.

    *Lifetime*: the memory lives until the store is closed or dropped and every view of it is gone.
    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], units: Mapping[str, tuple[str, ...]], device: str, *, pinned: bool
    ) -> None:
        self._specs = dict(specs)
        self._nbytes = sum(spec.nbytes for spec in specs.values())
        self._units = dict(units)
        self._device = device
        self._pinned = pinned
        self._lock = threading.RLock()
        self._closed = False
        self._of_unit = {unit: Region.of({n: specs[n] for n in names}) for unit, names in units.items()}
        in_units = {name for names in units.values() for name in names}
        others = {name: spec for name, spec in specs.items() if name not in in_units}
        self._regions = [*self._of_unit.values(), *map(Region.of, grouped(others))]
        self._of_name = {name: region for region in self._regions for name in region.specs}

    # ----------------------------------------------------------------------------------------- creation
    @classmethod
    def allocate(
        cls,
        specs: Mapping[str, TensorSpec],
        *,
        units: Units | None = None,
        device: str | int | None = None,
        pinned: bool = True,
    ) -> HostStore:
        """Allocate a store for tensors that are copied into it later; until then their bytes are zero.

        Each buffer is allocated upon the first `slab`, `copy_into` or view of one of its tensors. That call
        raises `HostMemoryError` when the machine has not that much to give; the store stays as it was.

        Parameters
        ----------
        specs
            The tensors. Strides are kept.
        units
            What is staged together: unit name to tensor names, or a plan's units. Tensors may be in none.
        device
            For which device; the first CUDA device by default, or the CPU driver where there is none.
        pinned
            False gives pageable memory; see `HostBuffer.allocate`.

        Raises
        ------
        SpecError
            No tensors, a unit with unknown tensors or none, or a tensor in two units.
        """
        if not specs:
            raise SpecError("a store of no tensors; pass at least one")
        for name, spec in specs.items():
            if not isinstance(name, str) or not isinstance(spec, TensorSpec):
                raise SpecError(f"specs maps names to TensorSpec, but {name!r} to {spec!r}")
        return cls(specs, checked_units(specs, units), open_driver(device).device, pinned=pinned)

    @classmethod
    def copy_of(
        cls,
        source: Mapping[str, Any] | str | os.PathLike[str],
        *,
        units: Units | None = None,
        device: str | int | None = None,
        progress: Progress | None = None,
        specs: Mapping[str, TensorSpec] | None = None,
        recipe: Recipe | None = None,
    ) -> HostStore:
        """Copy named tensors, or a checkpoint in safetensors, into new pinned memory of exactly their size.

        *Aliasing*: never shares bytes with `source`. Files are read straight into place, on several threads;
        nothing but the store itself ever holds the whole. After an error nothing stays allocated or open.

        Parameters
        ----------
        source
            A mapping from names to producers (NumPy arrays, tensors of torch or JAX, views), or the path of a
            safetensors file, an index, or a folder with either; see `checkpoint.open_checkpoint`. Tensors
            become row-major, and each name has bytes of its own.
        units, device
            See `allocate`.
        progress
            Called with bytes done and bytes in all.
        specs
            Of a path: the tensors that are wanted, row-major, when they are not those that are stored.
        recipe
            How those are made of stored ones; see `checkpoint.recipe`. Slices and concatenations are read into place.

        Raises
        ------
        CheckpointError
            The checkpoint is damaged, truncated, incomplete, or changed while it was read, or has not what is wanted.
        SpecError, AliasError
            `specs` or `recipe` mean nothing or have no effect.
            Something in the mapping gives no view of its memory; the message names it.
        HostMemoryError
            The machine has not that much to give.
        """
        if isinstance(source, str | os.PathLike):
            with open_checkpoint(Path(source)) as checkpoint, ExitStack() as undo:
                if recipe is not None and specs is None:
                    raise SpecError("a recipe makes the tensors that specs= names; pass specs= as well")
                made = None if specs is None else checkpoint.assemblies(specs, recipe)
                store = cls.allocate(checkpoint.specs if specs is None else specs, units=units, device=device)
                undo.callback(store._discard)
                check_host_budget(store._allocated_nbytes)
                checkpoint.read_into(store.memoryviews(), progress, made)
                undo.pop_all()
            return store
        if specs is not None or recipe is not None:
            raise SpecError("specs= and recipe= say how to read a checkpoint; a mapping has its own names and specs")
        if not isinstance(source, Mapping):
            raise SpecError(
                f"a store is a copy of a mapping from names to tensors, or of a path, not of a {type(source).__name__}"
            )
        store = cls.allocate({n: _row_major(n, p) for n, p in source.items()}, units=units, device=device)
        with ExitStack() as undo:
            undo.callback(store._discard)
            check_host_budget(store._allocated_nbytes)
            done = 0
            for name in store._of_name:
                store.copy_into(name, source[name])
                done += store._specs[name].nbytes
                if progress is not None:
                    progress(done, store.nbytes)
            undo.pop_all()
        return store

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
        """Pinned bytes of the buffers that are allocated by now: tensors, and less than 256 bytes between two."""
        return self.host_nbytes if self._pinned else 0

    @property
    def host_nbytes(self) -> int:
        """Bytes of the buffers that are allocated by now, pinned or not."""
        with self._lock:
            return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def _allocated_nbytes(self) -> int:
        """Bytes of all buffers once they are allocated."""
        return sum(region.buffer_nbytes for region in self._regions)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def live_views(self) -> int:
        """Views, capsules and consumers' tensors that are alive over this store."""
        with self._lock:
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
        """View one tensor on the host. *Aliasing*: these bytes. See `HostBuffer.host_view`."""
        return self._slab(self._region(name)).host_view(name, label=label)

    def device_view(self, name: str, device: str | int | None = None) -> View:
        """View one tensor as the device maps it. *Aliasing*: these bytes. See `HostBuffer.device_view`."""
        return self._slab(self._region(name)).device_view(name, device=device)

    def slab(self, unit: str) -> Slab:
        """View a unit's bytes as one slab, so that one copy moves all of it.

        *Aliasing*: these bytes. *Lifetime*: the slab keeps the buffer, but closing the store closes it.

        Raises
        ------
        SpecError
            The store has no such unit.
        """
        return self._slab(self._unit(unit))

    def _unit(self, unit: str) -> Region:
        region = self._of_unit.get(unit)
        if region is None:
            raise SpecError(f'no unit "{unit}" among {len(self._units)}{near_to(unit, self._units)}')
        return region

    def memoryviews(self, names: Container[str] | None = None) -> Iterator[tuple[memoryview, Mapping[str, int]]]:
        """View the bytes of each buffer, allocated when its turn comes, and where its tensors start.

        *Aliasing*: these bytes, writable. `Checkpoint.read_into` takes this.

        Parameters
        ----------
        names
            Only the buffers of these tensors, and of each buffer only those.
        """
        for region in self._regions:
            starts = {n: start for n, start in region.byte_offsets.items() if names is None or n in names}
            if starts:
                yield self._buffer(region).memoryview(), starts

    def adopt(self, unit: str, buffer: HostBuffer) -> None:
        """Adopt a buffer that holds a unit's tensors already, as `slab` lays them out.

        *Aliasing*: the buffer's own bytes. *Lifetime*: as if the store had allocated it.

        Raises
        ------
        SpecError
            The store has no such unit, or has memory for it; the buffer is of another size or kind, or for another
            device.
        """
        region = self._unit(unit)
        with self._lock:
            found = (buffer.nbytes, buffer.pinned, buffer.device)
            wanted = (region.buffer_nbytes, self._pinned, self._device)
            if region.buffer is not None or found != wanted:
                raise SpecError(
                    f'unit "{unit}" '
                    + ("has memory already" if region.buffer is not None else f"takes a buffer of {wanted}")
                    + f", so it cannot adopt one of {found} (bytes, pinned, device)"
                )
            region.buffer = buffer

    def _region(self, name: str) -> Region:
        region = self._of_name.get(name)
        if region is None:
            raise SpecError(f'no tensor "{name}" among {len(self)}{near_to(name, self._specs)}')
        return region

    def _slab(self, region: Region) -> Slab:
        return Slab(self._buffer(region), 0, region.nbytes, region.byte_offsets, region.specs)

    def _buffer(self, region: Region) -> HostBuffer:
        with self._lock:
            if self._closed:
                raise ClosedError(f"this store of {format_nbytes(self.nbytes)} is closed; make a new one")
            if region.buffer is None:
                region.buffer = HostBuffer.allocate(region.buffer_nbytes, device=self._device, pinned=self._pinned)
            return region.buffer

    def take_over(self, former: HostStore, staying: Container[str]) -> None:
        """Take buffers of the store that this one replaces: those of the same tensors in the same places.

        *Aliasing*: the bytes of `former`, which is dropped afterwards, not closed. Nothing is copied.

        Parameters
        ----------
        staying
            Tensors whose bytes in `former` are to stay. A buffer that holds any other is not taken.
        """
        with self._lock, former._lock:
            if (self._device, self._pinned) != (former._device, former._pinned):
                return
            known = {tuple(region.byte_offsets.items()): region for region in former._regions}
            for region in self._regions:
                same = known.get(tuple(region.byte_offsets.items()))
                if same is not None and same.specs == region.specs and all(name in staying for name in region.specs):
                    region.buffer = region.buffer or same.buffer

    def _buffers(self) -> list[HostBuffer]:
        return [region.buffer for region in self._regions if region.buffer is not None]

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
            `source` gives no view of its memory, or the tensor's strides leave gaps and the source's differ.
        HostMemoryError
            The tensor's buffer was not allocated yet, and the machine has not that much to give.
        """
        region, view = self._region(name), _viewed(name, source)
        spec = self._specs[name]
        if (view.shape, view.dtype) != (spec.shape, spec.dtype):
            raise SpecError(
                f'tensor "{name}" of this store is {spec}, but the {type(source).__name__} to copy is '
                f"{view.spec}; shape and dtype must be equal"
            )
        buffer = self._buffer(region)
        if spec.nbytes:
            packed = packed_for(view, spec, name, self._device)
            buffer.copy_into(packed, byte_offset=region.byte_offsets[name])

    # ------------------------------------------------------------------------------------------ closing
    def close(self) -> None:
        """Free the memory now. Idempotent.

        Raises
        ------
        ClosedError
            Views are alive; the message says how many. The whole store stays open.
        """
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

    def _discard(self) -> None:
        """End the store; a buffer that is viewed all the same is freed when its last view is gone."""
        with self._lock:
            self._closed = True
            for region in reversed(self._regions):
                buffer, region.buffer = region.buffer, None
                if buffer is not None:
                    with suppress(ClosedError):
                        buffer.close()

    def __enter__(self) -> Self:
        if self._closed:
            raise ClosedError(f"this store of {format_nbytes(self.nbytes)} is closed; make a new one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ClosedError as refused:
            if error is None:
                raise
            # The exception on its way out matters more; its traceback may well be what holds the views.
            error.add_note(f"while leaving the store: {refused}")
            self._discard()


def _viewed(name: str, producer: Any) -> View:
    try:
        return view_of(producer)
    except (AliasError, SpecError) as error:
        raise type(error)(f'tensor "{name}": {error}') from error


def _row_major(name: str, producer: Any) -> TensorSpec:
    spec = _viewed(name, producer).spec
    return TensorSpec(spec.shape, spec.dtype)
