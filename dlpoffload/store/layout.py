"""Which tensors share a buffer, and where in it each of them lies."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from ..errors import SpecError
from ..spec import TensorSpec, aligned

__all__ = ["Units", "checked_units", "grouped", "near_to"]

_GROUP_NBYTES: Final = 1 << 30
"""Tensors of no unit share buffers of at most this: longer registrations stall kernels that run meanwhile."""

_NEIGHBOURS: Final = 128


class NamedUnit(Protocol):
    """A unit as `planning` describes it: a name, and the tensors that are staged together."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Sequence[str]: ...


Units = Mapping[str, Iterable[str]] | Iterable[NamedUnit]


def grouped(specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    """Cut tensors of no unit into groups for one buffer each, in their order."""
    group: dict[str, TensorSpec] = {}
    end = 0
    for name, spec in specs.items():
        nbytes = spec.nbytes
        if group and aligned(end) + nbytes > _GROUP_NBYTES:
            yield group
            group, end = {}, 0
        group[name] = spec
        end = aligned(end) + nbytes
    if group:
        yield group


def checked_units(specs: Mapping[str, TensorSpec], units: Units | None) -> dict[str, tuple[str, ...]]:
    """The tensors of each unit, or SpecError: unknown or doubled names, no names."""
    if units is None:
        return {}
    pairs: Iterable[tuple[str, Any]]
    pairs = units.items() if isinstance(units, Mapping) else [(unit.name, unit.tensors) for unit in units]
    checked: dict[str, tuple[str, ...]] = {}
    unit_of: dict[str, str] = {}
    for unit, given in pairs:
        if isinstance(given, str):
            raise SpecError(f'unit "{unit}" is a sequence of tensor names, not the string "{given}"')
        names = tuple(given)
        if unit in checked:
            raise SpecError(f'unit "{unit}" is given twice; give every unit its own name')
        if not names:
            raise SpecError(f'unit "{unit}" has no tensors; leave it out')
        for name in names:
            if name not in specs:
                raise SpecError(f'unit "{unit}" has unknown tensor "{name}"{near_to(name, specs)}')
            if name in unit_of:
                raise SpecError(f'tensor "{name}" is in "{unit_of[name]}" and in "{unit}"; leave one out')
            unit_of[name] = unit
        checked[unit] = names
    return checked


def near_to(name: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known."""
    found = difflib.get_close_matches(str(name), _neighbours(str(name), list(known)), n=3)
    return f"; near to it are {', '.join(map(repr, found))}" if found else ""


def _neighbours(name: str, known: list[str]) -> Iterable[str]:
    """Of many names those that begin, or end, most like this one: to compare it with each would take seconds."""
    if len(known) <= 4 * _NEIGHBOURS:
        return known
    found: set[str] = set()
    for direction in (1, -1):
        ordered = sorted(other[::direction] for other in known)
        at = bisect.bisect(ordered, name[::direction])
        found.update(other[::direction] for other in ordered[max(at - _NEIGHBOURS, 0) : at + _NEIGHBOURS])
    return found
