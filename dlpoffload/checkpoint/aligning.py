"""Rewrite a checkpoint so that its tensors are aligned in the file, and can be mapped from it as they are."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import CheckpointError
from .opening import index_text, open_checkpoint
from .reading import Progress
from .shard import Shard
from .writing import FileLayout, ToStore, lay_out_file

__all__ = ["Aligned", "align"]

_COPY_NBYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Aligned:
    """What `align` wrote.

    Attributes
    ----------
    files : tuple of Path
        Every file.
    tensors : int
        How many tensors.
    aligned_before, aligned_after : int
        Of them, how many start on a multiple of 16 bytes, which kernels want.
    """

    files: tuple[Path, ...]
    tensors: int
    aligned_before: int
    aligned_after: int


def align(source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress | None = None) -> Aligned:
    """Rewrite a checkpoint with its data, and as many tensors as can be, aligned in the file.

    Parameters
    ----------
    source
        A safetensors file, an index, or a folder with either.
    target
        A file for a file; a folder, made if need be, for a sharded checkpoint. Each file appears whole or not at all.
    progress
        Called with bytes written and bytes in all.

    Raises
    ------
    CheckpointError
        `source` is damaged, changes meanwhile, or is what would be written; `target` cannot be written (a full or
        read-only disk, no permission), or is a device, a pipe or a socket.
    """
    target = Path(target)
    with open_checkpoint(source) as checkpoint:
        shards, sharded = checkpoint.shards(), checkpoint.path.suffix == ".json"
        paths = _targets(checkpoint.path, shards, target, sharded)
        index = target / checkpoint.path.name
        for path in [*paths, index] if sharded else paths:
            _check_replaceable(path)
        before = after = done = 0
        for shard, path in zip(shards, paths, strict=True):
            tensors = {n: ToStore(s.stored_dtype, s.stored_shape, s.nbytes) for n, s in shard.tensors.items()}
            layout = lay_out_file(tensors, shard.metadata)
            before += sum(_is_aligned(stored.byte_offset, stored.nbytes) for stored in shard.tensors.values())
            after += sum(_is_aligned(layout.byte_offsets[n], stored.nbytes) for n, stored in tensors.items())
            _write(shard, path, layout, done, checkpoint.nbytes, progress)
            done += sum(stored.nbytes for stored in shard.tensors.values())
        files = list(paths)
        if sharded:
            text = index_text(checkpoint.path)
            _replace(index, 0o644, lambda file: file.write(text))
            files.append(index)
        return Aligned(tuple(files), len(checkpoint.specs), before, after)


def _targets(source: Path, shards: list[Shard], target: Path, sharded: bool) -> list[Path]:
    if not sharded:
        if target.is_dir():
            target = target / source.name
        paths = [target]
    else:
        paths = [target / shard.path.relative_to(source.parent) for shard in shards]
    for shard, path in zip(shards, paths, strict=True):
        if path.exists() and os.path.samestat(os.fstat(shard.file.fileno()), path.stat()):
            raise CheckpointError(f'"{path}" is what is to be aligned; name another file to write')
    return paths


def _check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket, which others use by that name."""
    try:
        mode = path.stat().st_mode  # of what a link leads to
    except OSError:
        return  # there is nothing, or whoever writes there is told why that cannot be
    if not stat.S_ISREG(mode):
        raise CheckpointError(f'"{path}" is there and no regular file, so it is not replaced; name another file')


def _is_aligned(byte_offset: int, nbytes: int) -> bool:
    return not nbytes or byte_offset % 16 == 0


def _write(shard: Shard, path: Path, layout: FileLayout, done: int, total: int, progress: Progress | None) -> None:
    def body(file: BinaryIO) -> None:
        nonlocal done
        file.write(layout.header)
        for name in layout.byte_offsets:
            stored = shard.tensors[name]
            for at in range(0, stored.nbytes, _COPY_NBYTES):
                nbytes = min(_COPY_NBYTES, stored.nbytes - at)
                file.write(shard.read(stored.byte_offset + at, nbytes))
                done += nbytes
                if progress is not None:
                    progress(done, total)
        shard.check_unchanged()

    _replace(path, stat.S_IMODE(os.fstat(shard.file.fileno()).st_mode), body)


def _replace(path: Path, mode: int, body: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, and move it there when it is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _cannot(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            body(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except OSError as error:
        raise _cannot(path, error) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _cannot(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f'"{path}" cannot be written: {error.strerror}; nothing stands there that did not before')
