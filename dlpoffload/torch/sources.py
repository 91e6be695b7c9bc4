"""What weights are read from: a checkpoint in files, or a mapping from names to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils.dlpack import from_dlpack

from ..checkpoint import Assembly, Checkpoint, Progress, open_checkpoint
from ..errors import SpecError
from ..spec import TensorSpec
from .tensors import spec_of, tensor_in

__all__ = ["Slabs", "Source", "Weights", "open_source"]

Weights: TypeAlias = str | os.PathLike[str] | Checkpoint | Mapping[str, Any]
Slabs: TypeAlias = Iterable[tuple[memoryview, Mapping[str, int]]]


class Source(Protocol):
    """Named tensors that can be read into slabs."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, row-major."""

    def read_into(
        self, slabs: Slabs, progress: Progress | None = None, assemblies: Mapping[str, Assembly] | None = None
    ) -> None:
        """As `Checkpoint.read_into`."""


@contextmanager
def open_source(weights: Weights) -> Iterator[Source]:
    """Open a path for the length of a block; a checkpoint that is open stays so.

    Raises
    ------
    SpecError
        It is none of these.
    CheckpointError
        See `open_checkpoint`.
    """
    if isinstance(weights, str | os.PathLike):
        with open_checkpoint(weights) as checkpoint:
            yield checkpoint
    elif isinstance(weights, Checkpoint):
        yield weights
    elif isinstance(weights, Mapping):
        yield _Tensors(weights)
    else:
        raise SpecError(
            "checkpoint= is the path of a checkpoint in safetensors, an open one, or a mapping from names to tensors, "
            f"not a {type(weights).__name__}"
        )


class _Tensors:
    """A mapping's tensors, on whatever device; each is asked for when it is read, and let go of."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self.specs = {}
        for name in tensors:
            found = spec_of(self._tensor(name), name, only_read=True)
            self.specs[name] = TensorSpec(found.shape, found.dtype)

    def _tensor(self, name: str) -> torch.Tensor:
        value = self._tensors[name]
        tensor = value if isinstance(value, torch.Tensor) else from_dlpack(value)
        return tensor.detach()

    def read_into(
        self, slabs: Slabs, progress: Progress | None = None, assemblies: Mapping[str, Assembly] | None = None
    ) -> None:
        for slab, byte_offsets in slabs:
            flat = torch.frombuffer(slab, dtype=torch.uint8)
            for name, start in byte_offsets.items():
                made = (assemblies or {}).get(name) or Assembly.whole(name, self.specs[name])
                target = tensor_in(flat, start, made.spec)
                for box in made.boxes:
                    source = self._tensor(box.name)
                    _part(target, box.target, box.shape).copy_(_part(source, box.start, box.shape))


def _part(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    # As bytes where an element is one: torch does not copy each of its narrow dtypes.
    plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return plain[tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))]
