"""Find the files of a checkpoint and open them: one file, or the shards of an index."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, NoReturn, Self

from ..errors import CheckpointError, OffloadError, SpecError
from ..spec import TensorSpec, format_nbytes
from .assembly import Assembly
from .reading import Progress, read_into
from .recipe import Recipe, assemblies, differences
from .shard import Shard, open_regular, open_shard, without_duplicates

__all__ = ["Checkpoint", "index_text", "open_checkpoint"]

_INDEX_NBYTES: Final = 100_000_000
"""What safetensors allows a header, which says more about each tensor."""


class Checkpoint:
    """An open checkpoint. *Lifetime*: its files stay open until it is closed or dropped.

    Attributes
    ----------
    path : Path
        The file or the index.
    specs : dict[str, TensorSpec]
        Every tensor, row-major, in the order of the bytes: shards by name, tensors by offset. ``F4`` packs
        two values into an element (``float4_e2m1fn_x2``, as in torch); its last length is half the file's.
    metadata : dict[str, str]
        ``__metadata__`` of the file; of several shards the first that has a key counts.
    nbytes : int
        Bytes of all tensors.
    """

    def __init__(self, path: Path, shards: Iterable[Shard], files: ExitStack) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = {}
        self.nbytes = 0
        self._homes: dict[str, Shard] = {}
        for shard in shards:
            for name, stored in shard.tensors.items():
                if name in self._homes:
                    raise CheckpointError(
                        f'tensor "{name}" lies in "{self._homes[name].path}" and in "{shard.path}"; '
                        "the shards do not belong together, fetch them again"
                    )
                self._homes[name] = shard
                self.specs[name] = stored.spec
                self.nbytes += stored.nbytes
            self.metadata = {**shard.metadata, **self.metadata}
        if not self.specs:
            raise CheckpointError(f'"{path}" holds no tensors; there is nothing to read')
        self._files = files.pop_all()

    def shard_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self._homes[name].path

    def shards(self) -> list[Shard]:
        """Every file, in the order of the names."""
        return list(dict.fromkeys(self._homes.values()))

    def on_close(self, call: Callable[[], object]) -> None:
        """Let `close` make a call as well; what is dropped, or still open when the interpreter ends, is closed then."""
        self._files.callback(call)
        weakref.finalize(self, self._files.close)

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._files.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OffloadError(
            f'an open checkpoint, "{self.path}", can be neither pickled nor copied; pass its path and open it there; '
            "of a checkpoint of `share` pass the name, and call open_shared(name) there"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def assemblies(self, specs: Mapping[str, TensorSpec], recipe: Recipe | None = None) -> dict[str, Assembly]:
        """What each of these tensors is made of; without a recipe, the stored tensor of its name.

        Raises
        ------
        CheckpointError
            Some are not here, or in another shape or dtype.
        SpecError
            The recipe means nothing, or the specs are not row-major.
        """
        for name, spec in specs.items():
            if not spec.is_row_major:
                raise SpecError(f'"{name}" is wanted as {spec}, but tensors are read row-major; leave its strides out')
        made, lacking = assemblies(recipe or {}, specs, self.specs)
        missing = (name for name in specs if name not in made)
        wrong = [f'"{name}" is missing' + (f": {lacking[name]}" if name in lacking else "") for name in missing]
        wrong += differences(made, specs)
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f'"{self.path}" has not what is wanted: {"; ".join(wrong[:5])}{more}; correct specs, or make them by '
                "a recipe"
            )
        return made

    def read_into(
        self,
        slabs: Iterable[tuple[memoryview, Mapping[str, int]]],
        progress: Progress | None = None,
        assemblies: Mapping[str, Assembly] | None = None,
    ) -> None:
        """Copy tensors from their files straight into slabs, on several threads.

        *Ordering*: the bytes are there on return. After an error no thread writes to a slab any more.

        Parameters
        ----------
        slabs
            Writable bytes, and where in them each tensor starts; taken over and released. One slab is read
            while the next is asked for, so that an iterator may allocate them one by one.
        progress
            Told the bytes read so far, and in all.
        assemblies
            What tensors in the slabs are made of, by `recipe.assemblies`; others are stored under their names.

        Raises
        ------
        CheckpointError
            A file cannot be read, ends early or changed since it was opened.
        """
        made = assemblies or {}
        nbytes = sum(assembly.spec.nbytes for assembly in made.values()) if made else self.nbytes
        read_into(self._homes, slabs, nbytes, progress, made)


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and read its headers, not its tensors.

    Parameters
    ----------
    source
        A safetensors file, an index (``*.json``), or a folder. In a folder ``model.safetensors`` comes first,
        as in transformers, then ``model.safetensors.index.json``, then the only index or file that there is.

    Raises
    ------
    CheckpointError
        A file is missing, unreadable, damaged, truncated or has an unknown dtype; a shard of the index is
        missing, a shard lacks a tensor, or two shards have the same one. Every file is closed again.
    MissingFrameworkError
        The library safetensors is not installed.
    HostMemoryError
        The process may not map the file, to read its header (``ulimit -v``).
    """
    path = _chosen(Path(source))
    with ExitStack() as files:
        if path.suffix == ".json":
            return _open_sharded(path, files)
        return Checkpoint(path, [open_shard(path, files)], files)


def _chosen(path: Path) -> Path:
    if not os.path.isdir(path):
        return path
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if os.path.exists(path / name):
            return path / name
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            several = _some([one.name for one in found])
            raise CheckpointError(f'"{path}" holds several checkpoints ({several}); pass the path of one')
        if found:
            return found[0]
    if not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(f'"{path}" cannot be looked into: no permission; allow it, or pass the path of a file')
    raise CheckpointError(
        f'"{path}" holds neither "model.safetensors" nor "model.safetensors.index.json"; pass the folder of '
        "a checkpoint in safetensors (files of torch.save are not read: save them with safetensors first)"
    )


def _open_sharded(path: Path, files: ExitStack) -> Checkpoint:
    names_of = _read_index(path)
    shards: list[Shard] = []
    for name, listed in sorted(names_of.items()):
        if not os.path.exists(path.parent / name):
            raise CheckpointError(
                f'"{path}" names shard "{name}" for {_some(listed)}, but there is no such file; fetch it'
            )
        shard = open_shard(path.parent / name, files)
        missing = [tensor for tensor in listed if tensor not in shard.tensors]
        if missing:
            raise CheckpointError(
                f'"{path}" places {_some(missing)} in "{name}", which has no such tensor; '
                "index and shards do not belong together, fetch them again"
            )
        shards.append(shard)
    return Checkpoint(path, shards, files)


def index_text(path: Path) -> bytes:
    """The bytes of an index, which are few: what is larger is none, and is not read into memory."""
    with ExitStack() as files:
        file = open_regular(path, files)
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > _INDEX_NBYTES:
            raise CheckpointError(
                f'"{path}" is no index of a checkpoint: it has {format_nbytes(nbytes)}, which is more than '
                f"{format_nbytes(_INDEX_NBYTES)}; pass the file of the index"
            )
        try:
            return BufferedReader(file).read(nbytes)
        except OSError as error:
            raise CheckpointError(f'"{path}" cannot be read: {error.strerror}; check the disk') from error


def _read_index(path: Path) -> dict[str, list[str]]:
    """The tensors of each shard that an index names."""
    text = index_text(path)
    try:
        index = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'"{path}" is no index of a checkpoint: {error}; fetch it again') from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f'"{path}" is no index of a checkpoint: it has no "weight_map" from tensors to files; fetch it again'
        )
    if not weight_map:
        raise CheckpointError(f'"{path}" names no tensors; there is nothing to read')
    names_of: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, []).append(name)
    for shard in names_of:
        inside = PurePosixPath(shard)
        if inside.is_absolute() or ".." in inside.parts or not inside.name or "\0" in shard:
            raise CheckpointError(
                f'"{path}" names shard {shard!r}, which is no file beside it; do not trust this index'
            )
    return names_of


def _some(names: list[str]) -> str:
    """A few names of many, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f'"{name}"' for name in names[:3]) + more
