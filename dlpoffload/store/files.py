"""How a checkpoint is mapped: in chunks cut between tensors, and where its units lie in a slot.

Offsets in a file are what they are: headers are padded to 8 bytes only. A unit's slot is therefore laid out like the
unit's bytes in the file, shifted so that what can be aligned is, and one copy moves them all. A tensor that would be
left off 16 bytes, of which kernels take notice, starts anew at an aligned place of the slot, and is a copy of its own.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Final

from ..blocks import check_pinning
from ..checkpoint import Checkpoint, Progress, Watch
from ..driver import Driver, open_driver
from ..errors import AliasError, SpecError
from ..filemap import check_mappable, map_file_range
from ..lifetime import owned_by
from ..memfile import is_in_memory
from ..memory import HostBuffer
from ..registrations import MAX_REGISTRATION
from ..slab import GAP_NBYTES
from ..spec import ALIGNMENT, TensorSpec, aligned
from .homes import Contents, Home, Region
from .layout import near_to
from .pinned import Memory

__all__ = ["KERNEL_ALIGNMENT", "FileHomes", "check_fits", "file_homes", "mapped_contents", "unaligned", "unit_region"]

KERNEL_ALIGNMENT: Final = 16
"""Bytes that kernels want: code and bits are those of aligned weights from here on (cuBLAS, XLA on the GPU)."""

_PAGE: Final = mmap.PAGESIZE
_CHUNK_NBYTES: Final = 1 << 30
"""Bytes of one mapping and registration where nothing larger must be in one piece: registering stalls kernels."""


@dataclass(frozen=True, slots=True)
class _Extent:
    """A tensor in its file."""

    name: str
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class Told:
    """Adds up what several threads map, for one progress callback."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            done = self._done
        if self._progress is not None:  # not under the lock: it may use the store, and so map what is not there yet
            self._progress(done, self.total)

    @contextmanager
    def chunk(self) -> Iterator[Callable[[int], None]]:
        """Count one chunk; when mapping it fails, it is not there, and will be counted anew."""
        counted = 0

        def count(nbytes: int) -> None:
            nonlocal counted
            counted += nbytes
            self(nbytes)

        try:
            yield count
        except BaseException:
            with self._lock:
                self._done -= counted
            raise


@dataclass(slots=True)
class FileHomes:
    """A mapped checkpoint: its chunks, and for each tensor which of them it lies in, and where in its file."""

    homes: list[Home]
    of_name: dict[str, tuple[Home, int]]
    file_offsets: dict[str, int]
    nbytes: int = 0
    """Of all chunks, in whole pages."""


@dataclass(slots=True)
class _Chunk:
    extents: list[_Extent] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.extents[0].start

    @property
    def end(self) -> int:
        return self.extents[-1].end


def file_homes(
    checkpoint: Checkpoint,
    units: Mapping[str, Sequence[str]],
    memory: Memory,
    progress: Progress | None = None,
    names: Mapping[str, str] | None = None,
) -> FileHomes:
    """Cut a checkpoint into chunks, none mapped yet; `names` says which of its tensors, and what each is to be called.

    Raises
    ------
    RegistrationError
        The device cannot pin read-only memory.
    HostMemoryError
        All of it is more than the machine may pin.
    """
    unit_of = {name: unit for unit, names in units.items() for name in names}
    driver, told = open_driver(memory.device), Told(progress)
    found, there_nbytes = FileHomes([], {}, {}), 0
    for shard in checkpoint.shards():
        extents = [
            _Extent(name if names is None else names[name], stored.byte_offset, stored.nbytes)
            for name, stored in shard.tensors.items()
            if names is None or name in names
        ]
        if names is not None and not extents:
            continue
        check_mappable(driver, shard.path)
        watch = shard.watch()
        there = is_in_memory(watch.descriptor)
        full = [extent for extent in extents if extent.nbytes]
        # A file of empty tensors still gives them an address: that of its header.
        chunks = list(_chunks(full, unit_of))
        for chunk in chunks or [_Chunk([_Extent("", 0, 8)])]:
            told.total += chunk.end - chunk.start // _PAGE * _PAGE
            make = partial(_map, watch, chunk.start, chunk.end - chunk.start, driver, memory, told)
            home = Home(chunk.end - chunk.start, make, watch.check_unchanged, in_file=True, file_offset=chunk.start)
            found.homes.append(home)
            chunk_nbytes = aligned(chunk.end, _PAGE) - chunk.start // _PAGE * _PAGE
            found.nbytes += chunk_nbytes
            there_nbytes += chunk_nbytes if there else 0
            for extent in chunk.extents if chunks else ():
                found.of_name[extent.name] = home, extent.start - chunk.start
        for extent in extents:
            found.file_offsets[extent.name] = extent.start
            if not extent.nbytes:
                # Any address does, but an aligned one: that of the first page.
                found.of_name[extent.name] = found.homes[-1], -(found.homes[-1].file_offset % _PAGE)
    check_pinning(found.nbytes, driver, memory.host_budget, there_nbytes=there_nbytes)
    return found


def _chunks(extents: Sequence[_Extent], unit_of: Mapping[str, str]) -> Iterator[_Chunk]:
    """Cut between tensors, at most 1 GiB each unless one tensor, or one unit, is larger."""
    chunk = _Chunk()
    for unit, neighbours in groupby(extents, lambda extent: unit_of.get(extent.name)):
        run = list(neighbours)
        for part in [run] if unit is not None else [[extent] for extent in run]:
            if chunk.extents and part[-1].end - chunk.start > _CHUNK_NBYTES:
                yield chunk
                chunk = _Chunk()
            for extent in part:
                # What is not asked for is not pinned either.
                far = chunk.extents and extent.start - chunk.end > GAP_NBYTES
                if far or (chunk.extents and extent.end - chunk.start > MAX_REGISTRATION):
                    yield chunk
                    chunk = _Chunk()
                chunk.extents.append(extent)
    if chunk.extents:
        yield chunk


def _map(watch: Watch, start: int, nbytes: int, driver: Driver, memory: Memory, told: Told) -> tuple[HostBuffer, int]:
    watch.check_unchanged()
    with owned_by(memory.owner), told.chunk() as done:
        block, shift = map_file_range(
            watch.path, watch.descriptor, start, nbytes, driver, host_budget=memory.host_budget, done=done
        )
    return HostBuffer(block), shift


def mapped_contents(
    checkpoint: Checkpoint,
    units: Mapping[str, tuple[str, ...]],
    memory: Memory,
    wanted: Mapping[str, TensorSpec],
    device_views: Iterable[str],
    progress: Progress | None,
) -> Contents:
    """The homes of a checkpoint's tensors in its own files, none mapped yet; refuses what a consumer cannot use."""
    specs = checkpoint.specs
    found = file_homes(checkpoint, units, memory, progress)
    check_fits(checkpoint.path, found, specs, wanted, device_views)
    of_unit = {unit: unit_region(names, specs, found.homes, found.of_name) for unit, names in units.items()}
    return Contents(specs, found.homes, found.of_name, of_unit)


def check_fits(
    path: Path,
    found: FileHomes,
    specs: Mapping[str, TensorSpec],
    wanted: Mapping[str, TensorSpec],
    device_views: Iterable[str],
) -> None:
    """Refuse a mapping whose tensors a consumer cannot use as they lie in the file.

    Raises
    ------
    SpecError
        A tensor is wanted that the checkpoint has not.
    AliasError
        A tensor has another dtype or shape than is wanted, or is to be read by kernels and not aligned for them.
    """
    for name, spec in wanted.items():
        have = specs.get(name)
        if have is None:
            raise SpecError(f'no tensor "{name}" in "{path}"{near_to(name, specs)}')
        if (have.shape, have.dtype) != (spec.shape, spec.dtype) or not spec.is_row_major:
            raise AliasError(
                f'tensor "{name}" of "{path}" is {have}, and {spec} is wanted: a mapped file cannot be cast; '
                "read it with HostStore.copy_of and cast it, or save it as it is wanted"
            )
    for name in device_views:
        if name not in specs:
            raise SpecError(f'no tensor "{name}" in "{path}"{near_to(name, specs)}')
        if specs[name].nbytes and (offset := found.file_offsets[name]) % KERNEL_ALIGNMENT:
            raise AliasError(unaligned(name, offset))


def unaligned(name: str, byte_offset: int) -> str:
    """The words of a tensor that lies in its file where kernels cannot read it well."""
    return (
        f'tensor "{name}" starts at byte {byte_offset} of its file, which is no multiple of the {KERNEL_ALIGNMENT} '
        "bytes that kernels want; read the checkpoint with HostStore.copy_of, or rewrite it once with "
        "`dlpoffload align`"
    )


def unit_region(
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    homes: Sequence[Home],
    of_name: Mapping[str, tuple[Home, int]],
    gap_nbytes: int = GAP_NBYTES,
) -> Region:
    """Lay a unit out in its slot as it lies in its files, gaps of that size included; what lies in memory is last."""
    order = {id(home): index for index, home in enumerate(homes)}
    full = [name for name in names if specs[name].nbytes]
    placed = sorted(
        (order[id(home)], home.file_offset + byte_offset, specs[name].nbytes, name)
        for name, (home, byte_offset) in ((name, of_name[name]) for name in full)
        if home.in_file
    )
    byte_offsets = dict.fromkeys(names, 0)
    end = 0
    for run in _runs(placed, gap_nbytes):
        shift = _shift(run)
        base = aligned(end) + (run[0].start - shift) % ALIGNMENT - run[0].start
        for extent in run:
            byte_offsets[extent.name] = base + extent.start
            end = base + extent.end
    for name in full:
        if not of_name[name][0].in_file:
            byte_offsets[name] = aligned(end)
            end = byte_offsets[name] + specs[name].nbytes
    return Region({name: specs[name] for name in names}, byte_offsets, end)


def _runs(placed: Sequence[tuple[int, int, int, str]], gap_nbytes: int) -> Iterator[list[_Extent]]:
    """Tensors that one copy moves: near to each other in one chunk, and apart by whole 16 bytes."""
    run: list[_Extent] = []
    of = -1
    for home, start, nbytes, name in placed:
        extent = _Extent(name, start, nbytes)
        near = run and home == of and extent.start - run[-1].end <= gap_nbytes
        if run and not (near and (extent.start - run[0].start) % KERNEL_ALIGNMENT == 0):
            yield run
            run = []
        of = home
        run.append(extent)
    if run:
        yield run


def _shift(run: Sequence[_Extent]) -> int:
    """The remainder modulo 256 that most bytes of a run have: those are what the slot aligns to 256."""
    nbytes: Counter[int] = Counter()
    for extent in run:
        nbytes[extent.start % ALIGNMENT] += extent.nbytes
    return nbytes.most_common(1)[0][0]
