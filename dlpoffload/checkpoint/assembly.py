"""What a tensor is made of: rectangles of stored tensors, and the runs of bytes that they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..errors import SpecError
from ..spec import DType, TensorSpec

__all__ = ["Assembly", "Box", "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent bytes of a stored tensor, and where they go in the tensor that is made."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a stored tensor, and where it goes. All in elements.

    Attributes
    ----------
    name : str
        The stored tensor.
    stored : TensorSpec
        What it is, row-major.
    start : tuple of int
        Where the rectangle starts in it.
    shape : tuple of int
    target : tuple of int
        Where it starts in the tensor that is made.
    """

    name: str
    stored: TensorSpec
    start: tuple[int, ...]
    shape: tuple[int, ...]
    target: tuple[int, ...]

    def moved(self, dim: int, offset: int) -> Box:
        """The same rectangle, further along in the tensor that is made."""
        target = (*self.target[:dim], self.target[dim] + offset, *self.target[dim + 1 :])
        return Box(self.name, self.stored, self.start, self.shape, target)

    def cut(self, dim: int, start: int, stop: int) -> Box | None:
        """What of it lies in [start, stop) of the tensor that is made, seen from `start`."""
        first, last = max(self.target[dim], start), min(self.target[dim] + self.shape[dim], stop)
        if first >= last:
            return None

        def put(values: tuple[int, ...], value: int) -> tuple[int, ...]:
            return (*values[:dim], value, *values[dim + 1 :])

        return Box(
            self.name,
            self.stored,
            put(self.start, self.start[dim] + first - self.target[dim]),
            put(self.shape, last - first),
            put(self.target, first - start),
        )

    @property
    def first_byte(self) -> int:
        """Where it starts in the bytes of the stored tensor."""
        return _dot(self.start, self.stored.strides) * self.stored.dtype.itembits // 8

    def runs(self, made: TensorSpec) -> Iterator[Run]:
        """What is adjacent on both sides, in the order of the stored bytes. `made` is row-major as well.

        Raises
        ------
        SpecError
            A run would start or end inside of a byte.
        """
        if not math.prod(self.shape):
            return
        length, outer = 1, len(self.shape)
        while outer:
            outer -= 1
            length *= self.shape[outer]
            if not self.shape[outer] == self.stored.shape[outer] == made.shape[outer]:
                break
        itembits = self.stored.dtype.itembits
        source, target = _dot(self.start, self.stored.strides), _dot(self.target, made.strides)
        for index in product(*map(range, self.shape[:outer])):
            bits = [
                (source + _dot(index, self.stored.strides)) * itembits,
                (target + _dot(index, made.strides)) * itembits,
                length * itembits,
            ]
            if itembits % 8 and (bits[0] % 8 or bits[1] % 8 or (bits[2] % 8 and length != made.numel)):
                raise SpecError(
                    f'"{self.name}" is {self.stored}, whose elements do not end at bytes, and is cut inside of one; '
                    "cut it elsewhere"
                )
            yield Run(bits[0] // 8, bits[1] // 8, -(-bits[2] // 8))


def _dot(index: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(i * stride for i, stride in zip(index, strides, strict=False))


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor as rectangles of stored tensors that cover it. *Aliasing*: none, it is a description.

    Attributes
    ----------
    shape : tuple of int
    dtype : DType
    boxes : tuple of Box
    """

    shape: tuple[int, ...]
    dtype: DType
    boxes: tuple[Box, ...]

    @classmethod
    def whole(cls, name: str, stored: TensorSpec) -> Assembly:
        """One stored tensor as it is."""
        zero = (0,) * len(stored.shape)
        return cls(stored.shape, stored.dtype, (Box(name, stored, zero, stored.shape, zero),))

    @property
    def spec(self) -> TensorSpec:
        """What is made."""
        return TensorSpec(self.shape, self.dtype)

    def check(self) -> None:
        """Raise SpecError where elements narrower than a byte are cut inside of one."""
        if self.dtype.itembits % 8:
            for box in self.boxes:
                for _ in box.runs(self.spec):
                    pass

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the stored tensors, each once."""
        return tuple(dict.fromkeys(box.name for box in self.boxes))
