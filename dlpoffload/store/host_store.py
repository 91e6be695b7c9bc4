"""`HostStore`: named tensors in exact pinned memory or in a mapped checkpoint, each unit one slab."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ..background import Background
from ..checkpoint import Progress, Recipe, open_checkpoint
from ..errors import AliasError, HostMemoryError, RegistrationError, SpecError
from ..pages import HugePages
from ..rollback import rolled_back
from ..spec import TensorSpec
from .files import mapped_contents
from .filling import FilledTensors
from .layout import Units, checked_units
from .pinned import Memory, Pageable, anonymous_contents, read_contents
from .strides import row_major

__all__ = ["HostStore"]


class HostStore(FilledTensors):
    """Named tensors in host memory: pinned, mapped and exactly as large as they are, or a checkpoint's own pages.

    Tensors of one unit lie in one slab, each aligned to 256 bytes, and the slab is a buffer of its own. The
    others share buffers of at most 1 GiB; a larger tensor has its own. A buffer is allocated when the first
    of its tensors is copied into it or viewed: whoever fills a store unit by unit, and drops the originals on
    the way, needs host memory for the weights once and one unit more.

    In a store of `map_file` the tensors lie as they do in the file, and cannot be written in place; `update` moves a
    tensor to memory of its own first, and so does `copy_out`.

    *Lifetime*: the memory lives until the store is closed or dropped and every view of it is gone.

    Attributes
    ----------
    mode : str
        ``"map"`` or ``"copy"``: whether the store is a checkpoint's own pages or memory of its own.
    because : str
        Why it is so, where `open` chose.
    """

    @classmethod
    def allocate(
        cls,
        specs: Mapping[str, TensorSpec],
        *,
        units: Units | None = None,
        device: str | int | None = None,
        pinned: bool = True,
        pageable: Pageable = "never",
        huge_pages: HugePages = "transparent",
        numa_node: int | None = None,
        host_budget: int | str | None = None,
        background: bool = False,
        progress: Progress | None = None,
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
        pageable
            ``"if_refused"`` takes pageable memory for what cannot be pinned, and `pageable_because` says why.
        huge_pages, numa_node, host_budget
            See `HostBuffer.allocate`.
        background
            Pin all buffers one after the other on a thread, from now on. What is used meanwhile is pinned at once.
            `pinning` says how far it is, waits and cancels.
        progress
            Called with bytes done and bytes in all, on that thread.

        Raises
        ------
        SpecError
            No tensors, a unit with unknown tensors or none, or a tensor in two units; an option without effect.
        HostMemoryError
            With `background`: all of it is more than the machine has to give.
        """
        _check_specs(specs)
        if progress is not None and not background:
            raise SpecError("progress= is told of background pinning; pass background=True as well")
        chosen = pageable if pinned else "always"
        memory = Memory.checked(device, "HostStore.allocate", chosen, huge_pages, numa_node, host_budget)
        checked = checked_units(specs, units)
        store = cls(anonymous_contents(specs, checked, memory), checked, memory)
        if background:
            memory.check(store._to_allocate)
            store._pin(progress)
        return store

    @classmethod
    def copy_of(
        cls,
        source: Mapping[str, Any] | str | os.PathLike[str],
        *,
        units: Units | None = None,
        device: str | int | None = None,
        pageable: Pageable = "never",
        huge_pages: HugePages = "transparent",
        numa_node: int | None = None,
        host_budget: int | str | None = None,
        background: bool = False,
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
        units, device, pageable, huge_pages, numa_node, host_budget
            See `allocate`.
        background
            Pin and read buffer after buffer on a thread; only of a path. What is used meanwhile is read at once.
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
        owner = f'HostStore.copy_of "{source}"' if isinstance(source, str | os.PathLike) else "HostStore.copy_of"
        memory = Memory.checked(device, owner, pageable, huge_pages, numa_node, host_budget)
        if isinstance(source, str | os.PathLike):
            return cls._copy_of_file(Path(source), units, memory, background, progress, specs, recipe)
        if specs is not None or recipe is not None:
            raise SpecError("specs= and recipe= say how to read a checkpoint; a mapping has its own names and specs")
        if not isinstance(source, Mapping):
            raise SpecError(
                f"a store is a copy of a mapping from names to tensors, or of a path, not of a {type(source).__name__}"
            )
        if background:
            raise SpecError("background=True reads a path; a mapping's tensors may change meanwhile")
        specs = {n: row_major(n, p) for n, p in source.items()}
        _check_specs(specs)
        checked = checked_units(specs, units)
        store = cls(anonymous_contents(specs, checked, memory), checked, memory)
        with rolled_back() as undo:
            undo.append(store._discard)
            memory.check(store._to_allocate)
            done = 0
            for name in store._of_name:
                store.copy_into(name, source[name])
                done += store._specs[name].nbytes
                if progress is not None:
                    progress(done, store.nbytes)
        return store

    @classmethod
    def _copy_of_file(
        cls,
        path: Path,
        units: Units | None,
        memory: Memory,
        background: bool,
        progress: Progress | None,
        specs: Mapping[str, TensorSpec] | None,
        recipe: Recipe | None,
    ) -> HostStore:
        with rolled_back() as undo:
            checkpoint = open_checkpoint(path)
            undo.append(checkpoint.close)
            if recipe is not None and specs is None:
                raise SpecError("a recipe makes the tensors that specs= names; pass specs= as well")
            made = None if specs is None else checkpoint.assemblies(specs, recipe)
            wanted = checkpoint.specs if specs is None else specs
            checked = checked_units(wanted, units)
            if background:
                store = cls(read_contents(checkpoint, wanted, checked, memory, made), checked, memory)
                memory.check(store._to_allocate)
                store._pin(progress, (0, checkpoint.close))
                weakref.finalize(store, checkpoint.close)  # cancelled, or dropped: what is not read will not be
                return store
            contents = anonymous_contents(wanted, checked, memory)
            store = cls(contents, checked, memory)
            undo.append(store._discard)
            memory.check(store._to_allocate)
            checkpoint.read_into(store.memoryviews(), progress, made)
            checkpoint.close()
        return store

    @classmethod
    def map_file(
        cls,
        path: str | os.PathLike[str],
        *,
        units: Units | None = None,
        device: str | int | None = None,
        specs: Mapping[str, TensorSpec] | None = None,
        device_views: Iterable[str] = (),
        host_budget: int | str | None = None,
        background: bool = False,
        progress: Progress | None = None,
    ) -> HostStore:
        """Map a checkpoint in safetensors, shared and read-only, and pin its pages in place: no second copy.

        *Aliasing*: the tensors are the file's own pages in the page cache, which all processes share that map it.
        *Lifetime*: the file stays open as long as the store, or a slab of it. It must be neither written nor cut off
        meanwhile: our calls look first and raise `CheckpointError`, but whoever reads a view of a file that was cut
        off is ended by SIGBUS.

        Parameters
        ----------
        path
            A safetensors file, an index, or a folder with either. Pages that are not in memory are read, in parallel.
        units, device
            See `allocate`. A unit's slot is laid out as the unit lies in its files, shifted so that what can be
            aligned is.
        specs
            What the consumer wants some of the tensors to be; another dtype or shape is an error.
        device_views
            Tensors that kernels will read in place: each must lie on a multiple of 16 bytes.
        host_budget
            See `HostBuffer.allocate`. Pinned pages of files count in full.
        background, progress
            See `allocate`. Progress is told of pieces of at most 256 MiB, on the thread that maps them.

        Raises
        ------
        RegistrationError
            The device, or the file system, lets no such pages be pinned. It names `copy_of`.
        AliasError
            A tensor does not lie in the file as the consumer wants it. It names `copy_of`.
        CheckpointError
            The checkpoint is damaged, truncated, incomplete, or changed.
        HostMemoryError
            The machine has not that much to give.
        """
        memory = Memory.checked(device, f'HostStore.map_file "{path}"', "never", "transparent", None, host_budget)
        with open_checkpoint(Path(path)) as checkpoint:
            checked = checked_units(checkpoint.specs, units)
            contents = mapped_contents(checkpoint, checked, memory, specs or {}, device_views, progress)
        store = cls(contents, checked, memory)
        if background:
            store._pin(None)
            return store
        with rolled_back() as undo:
            undo.append(store._discard)
            for home in store._homes:
                home.open()
        return store

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mode: Literal["map", "copy", "auto"] = "auto",
        units: Units | None = None,
        device: str | int | None = None,
        specs: Mapping[str, TensorSpec] | None = None,
        device_views: Iterable[str] = (),
        pageable: Pageable = "never",
        host_budget: int | str | None = None,
        background: bool = False,
        progress: Progress | None = None,
    ) -> HostStore:
        """Open a checkpoint by `map_file` or by `copy_of`; the store's `mode` and `because` say which, and why.

        Parameters
        ----------
        mode
            ``"map"``, ``"copy"``, or ``"auto"``: map, and copy what cannot be mapped. With `background` ``"auto"``
            returns when the first chunk is pinned, since nothing else tells whether the file can be mapped.
        units, device, specs, device_views, host_budget, background, progress
            See `map_file`. A copy has the file's dtypes, too: `specs` only bears on mapping.
        pageable
            See `allocate`; for a copy. With ``"if_refused"`` a copy is also made for want of memory that can be pinned.

        Raises
        ------
        RegistrationError, AliasError
            ``"map"`` was asked for and it cannot be.
        CheckpointError, HostMemoryError, SpecError
            See `map_file` and `copy_of`.
        """
        if mode not in ("map", "copy", "auto"):
            raise SpecError(f'mode={mode!r}; use "map", "copy" or "auto"')
        if mode == "map" and pageable != "never":
            raise SpecError('mode="map" pins or fails, so pageable= has no effect; leave it out')
        because = "asked for"
        if mode != "copy" and pageable != "always":
            try:
                store = cls.map_file(
                    path,
                    units=units,
                    device=device,
                    specs=specs,
                    device_views=device_views,
                    host_budget=host_budget,
                    background=background,
                    progress=progress,
                )
                if background and mode == "auto":
                    with rolled_back() as undo:
                        undo.append(store._discard)
                        store._homes[0].open()  # what can be pinned is known when it was tried, and only then
            except (RegistrationError, AliasError, HostMemoryError) as error:
                if mode == "map" or (isinstance(error, HostMemoryError) and pageable == "never"):
                    raise
                because = str(error)
            else:
                store.because = "asked for" if mode == "map" else "it can be mapped, which costs no second copy"
                return store
        store = cls.copy_of(
            path,
            units=units,
            device=device,
            pageable=pageable,
            host_budget=host_budget,
            background=background,
            progress=progress,
        )
        store.because = because
        return store

    def _pin(self, progress: Progress | None, *more: tuple[int, Callable[[], object]]) -> None:
        steps = [*((home.nbytes, home.open) for home in self._homes), *more]
        self._pinning = Background(steps, sum(nbytes for nbytes, _ in steps), progress)
        self._pinning.cancel_with(self)
        self._pinning.start()


def _check_specs(specs: Mapping[str, TensorSpec]) -> None:
    if not specs:
        raise SpecError("a store of no tensors; pass at least one")
    for name, spec in specs.items():
        if not isinstance(name, str) or not isinstance(spec, TensorSpec):
            raise SpecError(f"specs maps names to TensorSpec, but {name!r} to {spec!r}")
