"""`Closing`: what is closed at the end of a ``with`` block."""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn, Self

from .errors import OffloadError

__all__ = ["Closing"]


class Closing:
    """Base of what has `close`. An exception that leaves the block is never replaced by one of closing."""

    _called = "it"
    """What a note calls it."""

    def close(self) -> None:
        """Free it now. Idempotent."""
        raise NotImplementedError

    def _check_open(self) -> object:
        """Raise ClosedError where it is closed."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Give it up where closing was refused and nobody will ask again: it is freed with its last user."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OffloadError(
            f"a {type(self).__name__} is memory of this process, and can be neither pickled nor copied; let other "
            "processes map its tensors: share(tensors, name) here, open_shared(name) there"
        )

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as refused:
            if error is None:
                raise
            # The exception on its way out matters more; its traceback may well be what holds the views.
            error.add_note(f"while leaving {self._called}: {refused}")
            self._let_go()
