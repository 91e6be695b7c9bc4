"""Read tensors from many files into slabs: positional, scattering reads on several threads.

``preadv`` runs without the GIL, has no file position that threads would share, and fills in one call tensors
that lie side by side in a file, but 256-byte aligned in a slab.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from ..errors import CheckpointError
from ..readers import Readers
from .assembly import Assembly
from .shard import Shard

__all__ = ["Progress", "read_into"]

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes of the whole, on the thread that asked."""

_READERS: Final = 8
_READ_NBYTES: Final = 16 << 20
_READ_PARTS: Final = 1022
"""Parts of one scattering read; Linux takes at most 1024 (IOV_MAX)."""
_GAP_NBYTES: Final = 64 << 10
"""Bytes between two runs that are read along, and dropped, sooner than asked for by a call of their own."""
_DROPPED: Final = -1
_PENDING: Final = 4 * _READERS
"""Tasks handed to the threads and not done: enough to keep them busy, and few enough to describe."""


@dataclass(slots=True)
class _Read:
    """One positional read: a stretch of a file, scattered to parts of a slab as (byte offset, bytes).

    The rows of a slice lie in the file with gaps between them. Those go to one scrap of memory that nobody reads, so
    that the rows come into place by one call and without a copy.
    """

    shard: Shard
    byte_offset: int
    parts: list[tuple[int, int]] = field(default_factory=list)
    nbytes: int = 0
    dropped_nbytes: int = 0

    @property
    def end(self) -> int:
        return self.byte_offset + self.nbytes

    def add(self, gap: int, target: int, nbytes: int) -> None:
        if gap:
            self.parts.append((_DROPPED, gap))
            self.dropped_nbytes += gap
        self.parts.append((target, nbytes))
        self.nbytes += gap + nbytes

    def run(self, slab: memoryview, scrap: memoryview) -> int:
        targets = [
            scrap[:nbytes] if start == _DROPPED else slab[start : start + nbytes] for start, nbytes in self.parts
        ]
        first, done = 0, 0
        try:
            while first < len(targets):
                count = self._preadv(targets[first:], self.byte_offset + done)
                done += count
                while first < len(targets) and count >= targets[first].nbytes:
                    count -= targets[first].nbytes
                    first += 1
                if count:
                    rest = targets[first][count:]
                    targets[first].release()
                    targets[first] = rest
        finally:
            # A traceback on its way out holds this frame, and the memory must be free for all that.
            for target in targets:
                target.release()
        return done - self.dropped_nbytes

    def _preadv(self, targets: list[memoryview], byte_offset: int) -> int:
        try:
            count = os.preadv(self.shard.file.fileno(), targets, byte_offset)
        except OSError as error:
            raise CheckpointError(
                f'"{self.shard.path}" cannot be read at byte {byte_offset}: {error.strerror}; '
                "check the disk, or fetch the file again"
            ) from error
        if count == 0:
            self.shard.check_unchanged()
            raise CheckpointError(f'"{self.shard.path}" ends at byte {byte_offset}; fetch the file again')
        return count


def read_into(
    homes: Mapping[str, Shard],
    slabs: Iterable[tuple[memoryview, Mapping[str, int]]],
    nbytes: int,
    progress: Progress | None,
    assemblies: Mapping[str, Assembly],
) -> None:
    """Fill slabs from the files that each tensor lies in; see `Checkpoint.read_into`."""
    held: list[memoryview] = []
    done = 0
    scrap = memoryview(bytearray(_GAP_NBYTES))

    def collect(most: int, *, block: bool) -> None:
        nonlocal done
        for count in readers.results(most, block=block):
            done += count
            if progress is not None:
                progress(done, nbytes)

    try:
        with Readers(_READERS) as readers:  # which ends when no thread writes any more
            for slab, byte_offsets in slabs:
                held.append(slab)
                for reads in _together(_reads(homes, byte_offsets, assemblies)):
                    readers.submit(partial(_run, reads, slab, scrap))
                    collect(readers.pending - _PENDING, block=True)
                collect(readers.pending, block=False)
            collect(readers.pending, block=True)
    finally:
        for slab in held:
            slab.release()
    for shard in dict.fromkeys(homes.values()):
        shard.check_unchanged()


def _run(reads: list[_Read], slab: memoryview, scrap: memoryview) -> int:
    return sum(read.run(slab, scrap) for read in reads)


def _together(reads: Iterable[_Read]) -> Iterator[list[_Read]]:
    """What one thread is given at once: handing a small read over costs more than doing it."""
    together: list[_Read] = []
    nbytes = 0
    for read in reads:
        if together and nbytes + read.nbytes > _READ_NBYTES:
            yield together
            together, nbytes = [], 0
        together.append(read)
        nbytes += read.nbytes
    if together:
        yield together


def _reads(
    homes: Mapping[str, Shard], byte_offsets: Mapping[str, int], assemblies: Mapping[str, Assembly]
) -> Iterator[_Read]:
    """The reads that fill one slab: neighbours in a file together, large tensors in pieces."""
    read: _Read | None = None
    for shard, source, target, nbytes in _extents(homes, byte_offsets, assemblies):
        gap = 0 if read is None else source - read.end
        if read is not None and not (
            read.shard is shard
            and 0 <= gap <= _GAP_NBYTES
            and read.nbytes + gap + nbytes <= _READ_NBYTES
            and len(read.parts) < _READ_PARTS
        ):
            yield read
            read = None
        if read is None:
            read, gap = _Read(shard, source), 0
        read.add(gap, target, nbytes)
    if read is not None:
        yield read


def _extents(
    homes: Mapping[str, Shard], byte_offsets: Mapping[str, int], assemblies: Mapping[str, Assembly]
) -> Iterator[tuple[Shard, int, int, int]]:
    """Of every piece: file, byte offset in it, byte offset in the slab, bytes; in the order of the files."""
    boxes = []
    for name, start in byte_offsets.items():
        made = assemblies.get(name) or Assembly.whole(name, homes[name].tensors[name].spec)
        spec = made.spec
        for box in made.boxes:
            shard = homes[box.name]
            boxes.append((shard, shard.tensors[box.name].byte_offset, box, spec, start))
    for shard, stored, box, spec, start in sorted(boxes, key=lambda b: (b[0].file.fileno(), b[1] + b[2].first_byte)):
        for run in box.runs(spec):
            for done in range(0, run.nbytes, _READ_NBYTES):
                nbytes = min(_READ_NBYTES, run.nbytes - done)
                yield shard, stored + run.source + done, start + run.target + done, nbytes
