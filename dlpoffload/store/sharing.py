"""`share` and `open_shared`: a checkpoint in memory that one process fills, and others map.

What is handed over is a safetensors file that is memory. So it says itself which tensors lie where, its sizes are
checked as those of any checkpoint, and it goes wherever a checkpoint goes: `HostStore.map_file`, `offload_`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any, Final, TypeAlias

from ..checkpoint import (
    Checkpoint,
    FileLayout,
    Progress,
    Recipe,
    ToStore,
    lay_out_file,
    open_checkpoint,
    stored_as,
)
from ..errors import CheckpointError, SpecError
from ..lifetime import owned_by
from ..memfile import check_sealed, create_file, map_to_fill, seal
from ..memory import HostBuffer
from ..spec import TensorSpec
from .handover import Handover, received
from .strides import packed_source, row_major

__all__ = ["open_shared", "share"]

_LONGEST_S: Final = 2_000_000
"""Sockets wait for less than 2^31 ms."""
_Fill: TypeAlias = Callable[[HostBuffer, Mapping[str, int]], None]


def share(
    source: Mapping[str, Any] | str | os.PathLike[str],
    name: str,
    *,
    specs: Mapping[str, TensorSpec] | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Copy named tensors, or a checkpoint, into memory that other processes of this user map by `open_shared`.

    What is given back is a checkpoint that lies in memory: `HostStore.map_file(checkpoint.path)` and
    ``offload_(..., checkpoint=checkpoint, mode="map")`` use its pages in place, here as in every other process, and
    host memory holds them once. They can be written by nobody any more; what is updated in a store or a module is moved
    to memory of that process first.

    *Aliasing*: never shares bytes with `source`. *Lifetime*: others find it by its name until the checkpoint is closed
    or dropped, or this process ends. The bytes live until the last process that has them open or mapped lets go of
    them, or ends, however it does; nothing is left behind.

    Parameters
    ----------
    source
        As of `HostStore.copy_of`: a mapping from names to producers, or the path of a checkpoint in safetensors.
    name
        What the others ask for; any words without slashes. It is taken at once, so that they can wait for it.
    specs, recipe
        See `HostStore.copy_of`.
    progress
        Called with bytes copied and bytes in all.

    Raises
    ------
    SpecError
        No tensors, a dtype that safetensors has not, or a name or options that mean nothing.
    CheckpointError
        The name is taken; the source is damaged, truncated, incomplete, or changed while it was read.
    HostMemoryError
        The machine has not that much to give.
    OffloadError
        The system is not Linux.

    After any error nothing is shared, and who waits for the name is told.
    """
    with ExitStack() as undo:
        handover = Handover(name)
        undo.callback(handover.close)
        if isinstance(source, str | os.PathLike):
            descriptor = _copy_of_file(Path(source), name, specs, recipe, progress)
        elif not isinstance(source, Mapping):
            raise SpecError(
                f"what is shared is a mapping from names to tensors, or a path, not a {type(source).__name__}"
            )
        elif specs is not None or recipe is not None:
            raise SpecError("specs= and recipe= say how to read a checkpoint; a mapping has its own names and specs")
        else:
            descriptor = _copy_of_tensors(source, name, progress)
        checkpoint = _opened(descriptor, f'"{name}"', handover)
        handover.serve(descriptor)
        undo.pop_all()
    return checkpoint


def open_shared(source: str | os.PathLike[str] | int, *, timeout_s: float = 600.0) -> Checkpoint:
    """Open what another process shares, as a checkpoint whose pages can be mapped; see `share`.

    Nothing is mapped or pinned yet, and no byte is copied. What is not sealed is refused: half-filled bytes are never
    seen.

    Parameters
    ----------
    source
        The name it is shared under. Or the `path` of an open checkpoint of `share`, which is in ``/proc`` and is good
        while that process has it open; or a descriptor that was inherited or received, which stays the caller's.
    timeout_s
        How long to wait for a process that shares under the name, and for it to be done.

    Raises
    ------
    CheckpointError
        Nobody shares under the name in time, or another user; the process that does ended before it was done; the path
        or the descriptor is none of `share`; sizes do not fit each other.
    SpecError
        The name, or the time, means nothing.
    """
    _check_wait(source, timeout_s)
    what = f"descriptor {source}" if isinstance(source, int) else f'"{source}"'
    if isinstance(source, str) and "/" not in source:
        return _opened(received(source, timeout_s), what)
    path = Path(f"/proc/self/fd/{source}") if isinstance(source, int) else Path(source)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:
        raise SpecError(f"{source!r} is no path: {error}; pass the `path` of a checkpoint of `share`") from error
    except OSError as error:
        raise CheckpointError(
            f"{what} cannot be opened: {error.strerror}; it is there while the process that shares it has it open, and "
            "for its user only"
        ) from error
    return _opened(descriptor, what)


def _check_wait(source: object, timeout_s: object) -> None:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, Real) or not 0 <= float(timeout_s) <= _LONGEST_S:
        raise SpecError(f"timeout_s={timeout_s!r} is no time to wait; pass seconds, from 0 to {_LONGEST_S}")
    if isinstance(source, bool) or not isinstance(source, str | os.PathLike | int):
        raise SpecError(f"what is opened is a name, a path or a descriptor, not a {type(source).__name__}")


def _opened(descriptor: int, what: str, handover: Handover | None = None) -> Checkpoint:
    """The checkpoint in a descriptor, which is closed with it."""

    def close() -> None:
        if handover is not None:
            handover.close()
        os.close(descriptor)

    with ExitStack() as undo:
        undo.callback(os.close, descriptor)
        check_sealed(descriptor, what)
        checkpoint = open_checkpoint(f"/proc/{os.getpid()}/fd/{descriptor}")
        undo.pop_all()
    checkpoint.on_close(close)
    return checkpoint


def _copy_of_file(
    path: Path,
    name: str,
    specs: Mapping[str, TensorSpec] | None,
    recipe: Recipe | None,
    progress: Progress | None,
) -> int:
    with open_checkpoint(path) as stored:
        if recipe is not None and specs is None:
            raise SpecError("a recipe makes the tensors that specs= names; pass specs= as well")
        made = None if specs is None else stored.assemblies(specs, recipe)
        wanted = stored.specs if specs is None else specs

        def fill(buffer: HostBuffer, byte_offsets: Mapping[str, int]) -> None:
            stored.read_into([(buffer.memoryview(), byte_offsets)], progress, made)

        return _filled(name, _laid_out(wanted, stored.metadata), fill)


def _copy_of_tensors(tensors: Mapping[str, Any], name: str, progress: Progress | None) -> int:
    specs = {n: row_major(n, producer) for n, producer in tensors.items()}
    total = sum(spec.nbytes for spec in specs.values())

    def fill(buffer: HostBuffer, byte_offsets: Mapping[str, int]) -> None:
        done = 0
        for n, start in byte_offsets.items():
            if specs[n].nbytes:
                buffer.copy_into(packed_source(n, tensors[n], specs[n], None), byte_offset=start)
            done += specs[n].nbytes
            if progress is not None:
                progress(done, total)

    return _filled(name, _laid_out(specs, {}), fill)


def _laid_out(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    if not specs:
        raise SpecError("nothing to share: no tensors; pass at least one")
    return lay_out_file({n: ToStore(*stored_as(n, spec), spec.nbytes) for n, spec in specs.items()}, metadata)


def _filled(name: str, layout: FileLayout, fill: _Fill) -> int:
    """A sealed file in memory; gives a descriptor that reads only."""
    descriptor = create_file(f"dlpoffload:{name}", layout.nbytes)
    try:
        with owned_by(f'share "{name}"'), HostBuffer(map_to_fill(descriptor, layout.nbytes)) as buffer:
            fill(buffer, layout.byte_offsets)
            buffer.memoryview(0, len(layout.header))[:] = layout.header  # last: until then it is no checkpoint
        return seal(descriptor)
    finally:
        os.close(descriptor)
