"""Homes: the buffers of a store, each made when the first of its tensors is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from ..errors import ClosedError, SpecError
from ..memory import HostBuffer
from ..slab import Place, Places, Slab
from ..spec import TensorSpec

__all__ = ["Contents", "Home", "Region"]


def _nothing() -> None:
    """Anonymous memory changes under nobody."""


def _gone() -> NoReturn:
    raise ClosedError("this tensor's memory was closed with its store; make a new one")


class Home:
    """One buffer, or the promise of one.

    Attributes
    ----------
    nbytes : int
        Bytes that it holds, or will.
    buffer : HostBuffer or None
        None until `open`.
    look : callable
        Raises when the bytes are no longer what they were.
    in_file : bool
        It is a part of a file, shared and read-only.
    file_offset : int
        Where in the file it starts.
    """

    def __init__(
        self,
        nbytes: int,
        make: Callable[[], tuple[HostBuffer, int]],
        look: Callable[[], None] = _nothing,
        *,
        in_file: bool = False,
        file_offset: int = 0,
    ) -> None:
        self.nbytes: Final = nbytes
        self.look: Final = look
        self.in_file: Final = in_file
        self.file_offset: Final = file_offset
        self.buffer: HostBuffer | None = None
        self._make = make
        self._shift = 0
        self._making = False
        self._lock = threading.RLock()

    @classmethod
    def of(cls, buffer: HostBuffer) -> Home:
        """The home of one tensor in a buffer of its own."""
        home = cls(buffer.nbytes, _gone)
        home.buffer = buffer
        return home

    def open(self) -> tuple[HostBuffer, int]:
        """The buffer, made now if need be, and where in it the home starts."""
        with self._lock:
            if self.buffer is None:
                if self._making:  # by this very thread, which the lock lets in
                    raise SpecError(
                        "these tensors are used by the progress callback of their own memory, which is not there yet; "
                        "use them after it, or other ones"
                    )
                self._making = True
                try:
                    self.buffer, self._shift = self._make()
                finally:
                    self._making = False
            return self.buffer, self._shift

    def place(self, byte_offset: int) -> Place:
        """Where a byte of this home lies, after a look at it."""
        self.look()
        buffer, shift = self.open()
        return Place(buffer, shift + byte_offset)

    def adopt(self, other: Home) -> None:
        """Take another home's buffer for its own, unless it has one, or the other has none."""
        with self._lock, other._lock:
            if self.buffer is None and other.buffer is not None:
                self.buffer, self._shift = other.buffer, other._shift

    def take(self) -> HostBuffer | None:
        """Take the buffer away, if there is one, for good: who is about to open the home does not make another."""
        with self._lock:
            buffer, self.buffer = self.buffer, None
            self._make = _gone
            return buffer


@dataclass(eq=False, slots=True)
class Region:
    """The tensors that are staged together, and where each lies in a slot.

    Attributes
    ----------
    home : Home or None
        Where they lie in just that order; None where they are scattered.
    """

    specs: Mapping[str, TensorSpec]
    byte_offsets: Mapping[str, int]
    nbytes: int
    home: Home | None = None
    places: Places | None = None

    def slab(self, homes: Mapping[str, tuple[Home, int]]) -> Slab:
        """The slab of this unit; `homes` says where its tensors lie when they are scattered."""
        if self.home is not None:
            buffer, shift = self.home.open()
            return Slab(buffer, shift, self.nbytes, self.byte_offsets, self.specs)
        if self.places is None:
            of = {name: homes[name][0].place(homes[name][1]) for name in self.specs}
            self.places = Places(of, {name: homes[name][0].look for name in self.specs})
        self.places.look()
        first = next(iter(self.places.of.values()))
        return Slab(first.buffer, first.byte_offset, self.nbytes, self.byte_offsets, self.specs, self.places)


@dataclass(eq=False, slots=True)
class Contents:
    """All tensors of a store: their homes, and the units they are staged in.

    Attributes
    ----------
    homes : list of Home
        Every buffer, in the order in which they are made.
    of_name : dict
        For each tensor its home and where in it the tensor starts.
    of_unit : dict of str to Region
    """

    specs: Mapping[str, TensorSpec]
    homes: list[Home]
    of_name: dict[str, tuple[Home, int]]
    of_unit: dict[str, Region]

    def offsets(self) -> list[tuple[Home, dict[str, int]]]:
        """Each home with its tensors, and where in it each of them starts."""
        found: dict[int, dict[str, int]] = {id(home): {} for home in self.homes}
        for name, (home, byte_offset) in self.of_name.items():
            found[id(home)][name] = byte_offset
        return [(home, found[id(home)]) for home in self.homes]

    def take_over(self, former: Contents, staying: Container[str]) -> None:
        """Take each home of `former` that holds the same tensors in the same places, all of them staying."""
        known = {tuple(offsets.items()): home for home, offsets in former.offsets() if not home.in_file}
        for home, offsets in self.offsets():
            same = known.get(tuple(offsets.items()))
            if same is not None and all(n in staying and former.specs[n] == self.specs[n] for n in offsets):
                home.adopt(same)
