"""Recipes: how the tensors of a model are made of those of a checkpoint, by slices and concatenations.

A recipe maps patterns on a model's names to expressions of stored names, and is written down once for all layers::

    recipe = {
        "*.qkv_proj.weight": concat(
            *(part(f"*.{name}_proj.weight", dim=0, index=rank, count=ranks) for name in "qkv"), dim=0
        ),
        "*.down_proj.weight": part("*.down_proj.weight", dim=1, index=rank, count=ranks),
        "lm_head.weight": "model.embed_tokens.weight",
    }

Nothing is computed: an expression comes down to runs of bytes, which are read from the files to where they belong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ..errors import CheckpointError, SpecError
from ..spec import TensorSpec
from .assembly import Assembly

__all__ = ["Recipe", "Source", "assemblies", "concat", "differences", "narrow", "part"]


class Expression(Protocol):
    """What `concat`, `part` and `narrow` make."""

    def names(self) -> Iterable[str]:
        """The stored names in it, with their asterisks."""

    def assemble(self, stored: Mapping[str, TensorSpec], found: tuple[str, ...]) -> Assembly:
        """What it is made of; `found` is what the asterisks of the pattern matched."""


Source: TypeAlias = str | Expression
Recipe: TypeAlias = Mapping[str, Source]


def concat(*sources: Source, dim: int) -> Expression:
    """Put tensors one behind the other along a dimension: q, k and v, or gate and up.

    Parameters
    ----------
    sources
        Stored names, or expressions; at least one. Their other lengths and their dtypes must be equal.
    dim
        Counted from the end when negative.
    """
    if not sources:
        raise SpecError("concat of nothing; give at least one tensor")
    return _Concat(tuple(_expression(source) for source in sources), _whole("dim", dim))


def part(source: Source, *, dim: int, index: int, count: int) -> Expression:
    """One of `count` equal parts along a dimension, such as a tensor-parallel rank's.

    Raises
    ------
    SpecError
        `index` is not one of `count`; when it is used, `count` does not divide the length.
    """
    index, count = _whole("index", index), _whole("count", count)
    if not 0 <= index < count:
        raise SpecError(f"index={index} is none of count={count} parts; they are counted from 0")
    return _Part(_expression(source), _whole("dim", dim), index, count)


def narrow(source: Source, *, dim: int, start: int, length: int) -> Expression:
    """The elements from `start` on, `length` of them, along a dimension."""
    start, length = _whole("start", start), _whole("length", length)
    if start < 0 or length < 0:
        raise SpecError(f"start={start} and length={length} count elements; both are zero or more")
    return _Narrow(_expression(source), _whole("dim", dim), start, length)


def assemblies(
    recipe: Recipe, wanted: Iterable[str], stored: Mapping[str, TensorSpec]
) -> tuple[dict[str, Assembly], dict[str, str]]:
    """What each wanted tensor that can be made is made of; and of those that lack a stored tensor, which.

    The first pattern that matches a name makes it; ``*`` stands for any characters, dots included, and what it
    matched goes into the asterisks of the sources, in their order. A name that no pattern matches is the stored tensor
    of that name, if there is one.

    Raises
    ------
    SpecError
        A pattern that makes nothing, sources with another number of asterisks, lengths or dtypes that do not fit.
    CheckpointError
        A source of an entry without asterisks is not stored.
    """
    names = list(wanted)
    left = dict(recipe)
    patterns = [(pattern, _compiled(pattern), _checked(pattern, source)) for pattern, source in recipe.items()]
    made: dict[str, Assembly] = {}
    lacking: dict[str, str] = {}
    for name in names:
        for pattern, compiled, expression in patterns:
            match = compiled.fullmatch(name)
            if match is None and name != pattern:
                continue
            left.pop(pattern, None)
            try:
                made[name] = expression.assemble(stored, () if match is None else match.groups())
                made[name].check()
            except (SpecError, CheckpointError) as error:
                if isinstance(error, CheckpointError) and "*" in pattern:
                    lacking[name] = str(error)  # it may be one that nobody needs: tied to another, or not persistent
                else:
                    raise type(error)(f'"{name}" by the recipe\'s "{pattern}": {error}') from error
            break
        else:
            if name in stored:
                made[name] = Assembly.whole(name, stored[name])
    if left:
        pattern = next(iter(left))
        hidden = any(_compiled(pattern).fullmatch(name) for name in names)
        raise SpecError(
            f'the recipe\'s "{pattern}" makes nothing: it matches '
            + (
                "only names that entries before it match; put it first"
                if hidden
                else f"none of the {len(names)} names, such as {', '.join(repr(name) for name in names[:3])}"
            )
        )
    return made, lacking


def differences(made: Mapping[str, Assembly], wanted: Mapping[str, TensorSpec]) -> list[str]:
    """What a checkpoint makes in another shape or dtype than is wanted, one line for each."""
    return [
        f'"{name}" is {assembly.spec} of {", ".join(assembly.sources)}, and wanted as '
        f"{TensorSpec(wanted[name].shape, wanted[name].dtype)}"
        for name, assembly in made.items()
        if (assembly.shape, assembly.dtype) != (wanted[name].shape, wanted[name].dtype)
    ]


@dataclass(frozen=True, slots=True)
class _Stored:
    name: str

    def names(self) -> Iterable[str]:
        yield self.name

    def assemble(self, stored: Mapping[str, TensorSpec], found: tuple[str, ...]) -> Assembly:
        name = self.name
        for asterisk in found:
            name = name.replace("*", asterisk, 1)
        if name not in stored:
            raise CheckpointError(
                f'its source "{name}" is not among the {len(stored)} stored tensors, such as '
                f"{', '.join(repr(known) for known in list(stored)[:3])}; correct the recipe, or fetch the checkpoint"
            )
        return Assembly.whole(name, stored[name])


@dataclass(frozen=True, slots=True)
class _Concat:
    sources: tuple[Expression, ...]
    dim: int

    def names(self) -> Iterable[str]:
        return (name for source in self.sources for name in source.names())

    def assemble(self, stored: Mapping[str, TensorSpec], found: tuple[str, ...]) -> Assembly:
        parts = [source.assemble(stored, found) for source in self.sources]
        first = parts[0]
        dim = _dim(self.dim, first)
        boxes = []
        end = 0
        for made in parts:
            lengths, others = list(first.shape), list(made.shape)
            if len(lengths) == len(others):
                lengths[dim] = others[dim] = 0
            if lengths != others or made.dtype != first.dtype:
                raise SpecError(
                    f"concat along dim={self.dim} of {first.spec} and {made.spec} "
                    f"({', '.join(first.sources)} and {', '.join(made.sources)}): dtypes and all other lengths must "
                    "be equal"
                )
            boxes += [box.moved(dim, end) for box in made.boxes]
            end += made.shape[dim]
        return Assembly((*first.shape[:dim], end, *first.shape[dim + 1 :]), first.dtype, tuple(boxes))


@dataclass(frozen=True, slots=True)
class _Narrow:
    source: Expression
    dim: int
    start: int
    length: int

    def names(self) -> Iterable[str]:
        return self.source.names()

    def assemble(self, stored: Mapping[str, TensorSpec], found: tuple[str, ...]) -> Assembly:
        made = self.source.assemble(stored, found)
        dim = _dim(self.dim, made)
        if self.start + self.length > made.shape[dim]:
            raise SpecError(
                f"elements {self.start} to {self.start + self.length} along dim={self.dim} are asked of {made.spec} "
                f"({', '.join(made.sources)}), which has {made.shape[dim]} there"
            )
        return _cut(made, dim, self.start, self.length)


@dataclass(frozen=True, slots=True)
class _Part:
    source: Expression
    dim: int
    index: int
    count: int

    def names(self) -> Iterable[str]:
        return self.source.names()

    def assemble(self, stored: Mapping[str, TensorSpec], found: tuple[str, ...]) -> Assembly:
        made = self.source.assemble(stored, found)
        dim = _dim(self.dim, made)
        length, rest = divmod(made.shape[dim], self.count)
        if rest:
            raise SpecError(
                f"{made.spec} ({', '.join(made.sources)}) has {made.shape[dim]} elements along dim={self.dim}, which "
                f"count={self.count} does not divide; narrow() takes unequal parts"
            )
        return _cut(made, dim, self.index * length, length)


def _cut(made: Assembly, dim: int, start: int, length: int) -> Assembly:
    boxes = (box.cut(dim, start, start + length) for box in made.boxes)
    shape = (*made.shape[:dim], length, *made.shape[dim + 1 :])
    return Assembly(shape, made.dtype, tuple(box for box in boxes if box is not None))


def _dim(dim: int, made: Assembly) -> int:
    rank = len(made.shape)
    if not -rank <= dim < rank:
        raise SpecError(f"dim={dim} of {made.spec} ({', '.join(made.sources)}), which has {rank} dimensions")
    return dim % rank


def _expression(source: Source) -> Expression:
    if isinstance(source, str):
        return _Stored(source)
    if isinstance(source, _Stored | _Concat | _Narrow | _Part):
        return source
    raise SpecError(f"a recipe is made of names, concat, part and narrow, not of a {type(source).__name__}")


def _checked(pattern: str, source: Source) -> Expression:
    expression = _expression(source)
    asterisks = pattern.count("*")
    for name in expression.names():
        if name.count("*") not in (0, asterisks):
            raise SpecError(
                f'the recipe\'s "{pattern}" has {asterisks} asterisks, its source "{name}" has {name.count("*")}; '
                "each stands for what the one of the pattern matched, so their numbers must be equal"
            )
    return expression


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(piece) for piece in pattern.split("*")), re.DOTALL)


def _whole(what: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise SpecError(f"{what}={value!r} is not a whole number")
    return value.__index__()
