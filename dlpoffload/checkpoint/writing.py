"""How tensors are laid out in a safetensors file that we write, so that they can be mapped from it as they are.

The header is padded with spaces, which the format allows, until the data start on a multiple of 256 bytes. Gaps between
tensors it does not allow; so they are put in order: first those whose bytes are a multiple of 256, then of 128, and so
on. Only what comes behind a tensor of an odd size is left off the 16 bytes that kernels want.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from ..spec import ALIGNMENT

__all__ = ["FileLayout", "ToStore", "lay_out_file"]

_STEPS: Final = (256, 128, 64, 32, 16, 8, 4, 2, 1)


class ToStore(NamedTuple):
    """One tensor, in the words of the format."""

    stored_dtype: str
    stored_shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file to be.

    Attributes
    ----------
    header : bytes
        Its length and its JSON: the first bytes of the file.
    byte_offsets : dict of str to int
        Where in the file each tensor starts, in the order of the file.
    nbytes : int
        Bytes of the file.
    """

    header: bytes
    byte_offsets: Mapping[str, int]
    nbytes: int


def lay_out_file(tensors: Mapping[str, ToStore], metadata: Mapping[str, str]) -> FileLayout:
    """Lay tensors out one behind the other, aligned as far as can be; alike ones in the order given."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, starts = 0, {}
    for name in sorted(tensors, key=lambda name: next(i for i, n in enumerate(_STEPS) if not tensors[name].nbytes % n)):
        stored_dtype, stored_shape, nbytes = tensors[name]
        entries[name] = {
            "dtype": stored_dtype,
            "shape": list(stored_shape),
            "data_offsets": [at, at + nbytes],
        }
        starts[name] = at
        at += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + at)
