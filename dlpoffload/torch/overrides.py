"""Attributes put on module instances, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Overrides"]

_ABSENT = object()


class Overrides:
    """Instance attributes that shadow those of the class while a module is offloaded."""

    def __init__(self) -> None:
        self._put: list[tuple[nn.Module, str, Any]] = []

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Shadow one attribute. What was on the instance before is kept."""
        self._put.append((module, name, module.__dict__.get(name, _ABSENT)))
        module.__dict__[name] = value

    def take(self) -> None:
        """Put back what was there before, in reverse order."""
        while self._put:
            module, name, before = self._put.pop()
            if before is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take everything off for the length of a block."""
        ours = [(module, name, module.__dict__.get(name, _ABSENT)) for module, name, _ in self._put]
        before = list(self._put)
        self.take()
        try:
            yield
        finally:
            self._put = before
            for module, name, value in ours:
                if value is not _ABSENT:
                    module.__dict__[name] = value
