"""Attributes put on module instances, and taken off again."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["LeftOut", "Override", "Overrides"]


class LeftOut:
    """What a deep copy of an offloaded module has where something of ours was, until `copying` takes it out.

    Attributes
    ----------
    before
        A copy of what had been there before ours; None for nothing.
    """

    def __init__(self, before: object) -> None:
        self.before = before


class Override:
    """Base of what shadows an attribute of a module's class: it belongs to that module, and is left out of its copies.

    Attributes
    ----------
    before
        What was on the instance before; None for nothing.
    stale : bool
        The module's memory is being moved: this stays until what comes next is put in its place, so that other threads
        never meet the module without either.
    """

    before: Any = None
    stale = False

    def __deepcopy__(self, memo: dict[int, Any]) -> LeftOut:
        return LeftOut(copy.deepcopy(self.before, memo))


class Overrides:
    """Instance attributes that shadow those of the class while a module is offloaded."""

    def __init__(self) -> None:
        self._put: list[tuple[nn.Module, str, Override]] = []

    def put(self, module: nn.Module, name: str, value: Override) -> None:
        """Shadow one attribute. What was on the instance before is kept, less what is stale of ours."""
        value.before = _former(module.__dict__.get(name))
        self._put.append((module, name, value))
        module.__dict__[name] = value

    def retire(self) -> None:
        """Say that something else will be put in the place of all this, or that it will be taken."""
        for _, _, value in self._put:
            value.stale = True

    def take(self) -> None:
        """Put back what was there before, in reverse order, where nothing was put in its place."""
        while self._put:
            module, name, value = self._put.pop()
            if module.__dict__.get(name) is not value:
                continue
            before = _former(value.before)
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before


def _former(found: Any) -> Any:
    while isinstance(found, Override) and found.stale:
        found = found.before
    return found
