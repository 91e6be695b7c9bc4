"""One safetensors file: where each of its tensors lies.

The library `safetensors` validates the header. Byte offsets, which it does not tell, are read from the same
header and held against what it said. Source: "Format" in the README of safetensors.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

from ..errors import CheckpointError, HostMemoryError, MissingFrameworkError, RegistrationError, SpecError
from ..seals import is_sealed
from ..spec import TensorSpec, format_nbytes

__all__ = ["Shard", "Stored", "Watch", "open_regular", "open_shard", "stored_as", "without_duplicates"]

_DTYPES: Final = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn_x2",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies in its file."""

    spec: TensorSpec
    byte_offset: int
    nbytes: int
    stored_dtype: str
    stored_shape: tuple[int, ...]
    """Both as the file has them."""


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """One open file. What is read is the file whose header was read, whatever its path names by then."""

    path: Path
    file: FileIO
    nbytes: int
    changed_ns: int
    tensors: Mapping[str, Stored]
    """By their offsets."""
    metadata: Mapping[str, str]

    def check_unchanged(self) -> None:
        """Raise CheckpointError when somebody wrote to the file since it was opened."""
        _check_unchanged(self.path, self.file.fileno(), self.nbytes, self.changed_ns)

    def read(self, byte_offset: int, nbytes: int) -> bytes:
        """Read a range of the file; CheckpointError when it is not all there."""
        parts = []
        while nbytes:
            try:
                part = os.pread(self.file.fileno(), nbytes, byte_offset)
            except OSError as error:
                raise CheckpointError(
                    f'"{self.path}" cannot be read at byte {byte_offset}: {error.strerror}; check the disk, or fetch '
                    "the file again"
                ) from error
            if not part:
                raise CheckpointError(f'"{self.path}" ends at byte {byte_offset}; fetch the file again')
            parts.append(part)
            byte_offset += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    def watch(self) -> Watch:
        """Keep the file open beyond its checkpoint, and look at it now and then.

        Raises
        ------
        RegistrationError
            Too many files are open.
        """
        try:
            descriptor = os.dup(self.file.fileno())
        except OSError as error:
            raise RegistrationError(
                f'"{self.path}" cannot be mapped: {error.strerror}; each file of a mapped checkpoint is kept open, and '
                "so is each chunk: allow more (ulimit -n), or read it with HostStore.copy_of"
            ) from error
        return Watch(self.path, descriptor, self.nbytes, self.changed_ns)


class Watch:
    """An open file that is used in place. *Lifetime*: it is closed when this is dropped.

    Attributes
    ----------
    path : Path
    descriptor : int
    """

    def __init__(self, path: Path, descriptor: int, nbytes: int, changed_ns: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._nbytes = nbytes
        self._changed_ns = changed_ns
        weakref.finalize(self, os.close, descriptor).atexit = False

    def check_unchanged(self) -> None:
        """Raise CheckpointError when somebody wrote to the file, or cut it off, since it was opened."""
        _check_unchanged(self.path, self.descriptor, self._nbytes, self._changed_ns)


def _check_unchanged(path: Path, descriptor: int, nbytes: int, changed_ns: int) -> None:
    status = os.fstat(descriptor)
    # A write to a sealed file is refused, and sets its time of change all the same.
    if status.st_size != nbytes or (status.st_mtime_ns != changed_ns and not is_sealed(descriptor)):
        now = "as many" if status.st_size == nbytes else str(status.st_size)
        also = ", and another time of change" if status.st_size == nbytes else ""
        raise CheckpointError(
            f'"{path}" changed while it was read: it had {format_nbytes(nbytes)} when it was '
            f"opened and has {now} now{also}; read it again when nobody writes to it"
        )


def open_regular(path: Path, files: ExitStack) -> FileIO:
    """Open a file that has an end: no pipe that waits, no device that never stops; `files` closes it."""
    try:
        file = files.enter_context(open(path, "rb", buffering=0, opener=_open_now))  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f'"{path}" cannot be opened: {reason}; check the path') from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise CheckpointError(f'"{path}" is no regular file; pass a safetensors file, an index or a folder')
    return file


def open_shard(path: Path, files: ExitStack) -> Shard:
    """Open a file and read its header; `files` closes it."""
    file = open_regular(path, files)
    status = os.fstat(file.fileno())
    validated = _validated(path)
    try:
        tensors, metadata = _read_header(path, file.fileno(), status.st_size, validated)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f'"{path}" has a damaged header: {error}; fetch it again') from error
    return Shard(path, file, status.st_size, status.st_mtime_ns, tensors, metadata)


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would otherwise wait here for its writer


def _validated(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor by the library.

    It checks that the offsets cover the file without gap or overlap, and that shapes and dtypes fit them.
    """
    try:
        import safetensors

        with safetensors.safe_open(path, framework="numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except ImportError as error:
        raise MissingFrameworkError(
            f"reading a checkpoint needs safetensors and numpy ({error}): pip install safetensors numpy"
        ) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f'"{path}" is damaged, truncated or no safetensors file: {error}; '
            "fetch it again (files of torch.save are not read: save them with safetensors first)"
        ) from error
    except OSError as error:
        # The library calls whatever it cannot open missing, and a moment ago we could.
        raise CheckpointError(
            f'"{path}" cannot be mapped: {error}; see that it is still there, and that not too many files are open '
            "(ulimit -n)"
        ) from error
    except MemoryError as error:
        nbytes = os.stat(path).st_size
        raise HostMemoryError(
            f'the library safetensors maps all of "{path}", {format_nbytes(nbytes)}, to read its header, and was '
            f"refused: {error}; raise the limit of this process's address space (ulimit -v)",
            nbytes=nbytes,
            limit="address space",
        ) from error


def _read_header(
    path: Path, descriptor: int, nbytes: int, validated: dict[str, tuple[str, list[int]]]
) -> tuple[dict[str, Stored], dict[str, str]]:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    data = 8 + length
    if data > nbytes:
        raise CheckpointError(f'"{path}" of {format_nbytes(nbytes)} ends inside its header; fetch it again')
    header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=without_duplicates)
    metadata = header.pop("__metadata__", None) or {}  # null means none, to the library as well
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != validated:
        raise CheckpointError(
            f'"{path}" changed while it was opened: its header is not the one that was validated; '
            "open it again when nobody writes to it"
        )
    tensors: dict[str, Stored] = {}
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        spec = _spec_of(path, name, entry["dtype"], entry["shape"])
        if not (0 <= begin <= end <= nbytes - data and end - begin == spec.nbytes):
            raise CheckpointError(
                f'"{path}" places tensor "{name}" of {format_nbytes(spec.nbytes)} at bytes {begin} to {end} '
                f"of the {nbytes - data} behind its header; fetch it again"
            )
        tensors[name] = Stored(spec, data + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return tensors, metadata


def _spec_of(path: Path, name: str, stored_dtype: str, shape: list[int]) -> TensorSpec:
    known = _DTYPES.get(stored_dtype)
    if known is None:
        raise CheckpointError(
            f'"{path}" stores tensor "{name}" as {stored_dtype}; known are {", ".join(_DTYPES)}; convert it first'
        )
    if stored_dtype == "F4":
        if not shape or shape[-1] % 2:
            raise CheckpointError(
                f'"{path}" stores tensor "{name}" as F4 of shape {shape}, but two values share a byte; '
                "save it with an even last length"
            )
        shape = [*shape[:-1], shape[-1] // 2]
    try:
        return TensorSpec(shape, known)
    except SpecError as error:
        raise CheckpointError(f'"{path}" stores tensor "{name}", which means nothing: {error}') from error


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; Python and safetensors would silently let the last of two equal keys count."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f'"{key}" stands in it twice')
            seen.add(key)
    return found


def check_name(name: object) -> None:
    """Raise SpecError unless a tensor can stand under a name in a header."""
    try:
        if isinstance(name, str) and name.encode() and name != "__metadata__":
            return
        why = "it is another part of the header" if isinstance(name, str) and name else "it is no string of characters"
    except UnicodeEncodeError:
        why = "it has characters that UTF-8 has not"
    raise SpecError(f"no tensor can be called {name!r} in safetensors: {why}; rename it")


def stored_as(name: str, spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape under which a row-major tensor stands in a header.

    Raises
    ------
    SpecError
        The format has no such dtype, or no such name.
    """
    check_name(name)
    for stored_dtype, known in _DTYPES.items():
        if known == spec.dtype.name:
            halves = stored_dtype == "F4"
            return stored_dtype, (*spec.shape[:-1], 2 * spec.shape[-1]) if halves and spec.shape else spec.shape
    raise SpecError(
        f'tensor "{name}" is {spec}, and safetensors has no such dtype; known are {", ".join(_DTYPES.values())}; view '
        "the bytes as uint8"
    )
