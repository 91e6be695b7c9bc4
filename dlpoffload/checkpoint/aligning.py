"""Rewrite a checkpoint so that its tensors are aligned in the file, and can be mapped from it as they are.

The header is padded with spaces, which the format allows, until the data start on a multiple of 256 bytes. Gaps between
tensors it does not allow; so they are put in order: first those whose bytes are a multiple of 256, then of 128, and so
on. Only what comes behind a tensor of an odd size is left off the 16 bytes that kernels want.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import CheckpointError
from ..spec import ALIGNMENT
from .opening import index_text, open_checkpoint
from .reading import Progress
from .shard import Shard

__all__ = ["Aligned", "align"]

_STEPS: Final = (256, 128, 64, 32, 16, 8, 4, 2, 1)
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
        read-only disk, no permission).
    """
    target = Path(target)
    with open_checkpoint(source) as checkpoint:
        shards, sharded = checkpoint.shards(), checkpoint.path.suffix == ".json"
        paths = _targets(checkpoint.path, shards, target, sharded)
        before = after = done = 0
        for shard, path in zip(shards, paths, strict=True):
            order = _ordered(shard)
            header = _header(shard, order)
            before += sum(_is_aligned(stored.byte_offset, stored.nbytes) for stored in shard.tensors.values())
            after += _count_aligned(shard, order, len(header))
            _write(shard, path, header, order, done, checkpoint.nbytes, progress)
            done += sum(stored.nbytes for stored in shard.tensors.values())
        files = list(paths)
        if sharded:
            index = target / checkpoint.path.name
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


def _ordered(shard: Shard) -> list[str]:
    """Tensors of whole 256 bytes first, then of 128, and so on; in the order of the file among themselves."""
    return sorted(shard.tensors, key=lambda name: next(i for i, n in enumerate(_STEPS) if not _nbytes(shard, name) % n))


def _nbytes(shard: Shard, name: str) -> int:
    return shard.tensors[name].nbytes


def _is_aligned(byte_offset: int, nbytes: int) -> bool:
    return not nbytes or byte_offset % 16 == 0


def _count_aligned(shard: Shard, order: list[str], start: int) -> int:
    count = 0
    for name in order:
        count += _is_aligned(start, _nbytes(shard, name))
        start += _nbytes(shard, name)
    return count


def _header(shard: Shard, order: list[str]) -> bytes:
    """Length and JSON, padded so that the data start on a multiple of 256 bytes of the file."""
    entries: dict[str, object] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    at = 0
    for name in order:
        stored = shard.tensors[name]
        entries[name] = {
            "dtype": stored.stored_dtype,
            "shape": list(stored.stored_shape),
            "data_offsets": [at, at + stored.nbytes],
        }
        at += stored.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(
    shard: Shard, path: Path, header: bytes, order: list[str], done: int, total: int, progress: Progress | None
) -> None:
    def body(file: BinaryIO) -> None:
        nonlocal done
        file.write(header)
        for name in order:
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
