"""Take back what was made before an error, the last first, and let the error itself be what the caller hears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["rolled_back"]


@contextmanager
def rolled_back() -> Iterator[list[Callable[[], object]]]:
    """Collect steps that take back what the block makes; all of them are called, the last first, when it raises.

    A step that fails, too, is a note of the error (an `ExitStack` would raise the step's error in its place).
    """
    steps: list[Callable[[], object]] = []
    try:
        yield steps
    except BaseException as error:
        while steps:
            try:
                steps.pop()()
            except Exception as refused:
                error.add_note(f"and not all of what was made before could be taken back: {refused}")
        raise
