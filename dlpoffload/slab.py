"""`Slab`: the host bytes of one unit, and the copies that bring them into a slot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .errors import AliasError, SlotError
from .lifetime import Owner
from .memory import HostBuffer
from .spec import ALIGNMENT, TensorSpec
from .view import Label, View

__all__ = ["GAP_NBYTES", "Copy", "Place", "Places", "Slab"]

GAP_NBYTES: Final = 128 << 10
"""Bytes between two tensors of a file that one copy takes along: moving them costs less than another copy."""


class Place(NamedTuple):
    """Where one tensor lies on the host, when it is not where the slab starts."""

    buffer: HostBuffer
    byte_offset: int


class Copy(NamedTuple):
    """One copy that fills a part of a slot: where in the slot, from where on the host, how many bytes."""

    byte_offset: int
    host_pointer: int
    nbytes: int


@dataclass(eq=False, slots=True)
class Places:
    """Where the tensors of a unit lie that is not one range of one buffer: in a file, or partly moved out of it.

    Attributes
    ----------
    of : dict of str to Place
        By tensor; empty ones may be missing.
    looks : dict of str to callable
        Raises when a tensor's bytes are no longer what they were: a file that was written to or cut off.
    """

    of: dict[str, Place]
    looks: dict[str, Callable[[], None]]
    _copies: list[Copy] | None = None
    _graphs: list[Owner] = field(default_factory=list)

    def check_movable(self, name: str) -> None:
        """Raise SlotError while a captured graph can be replayed: it would copy from the old place for ever."""
        self._graphs = [graph for graph in self._graphs if graph.users]
        if self._graphs:
            raise SlotError(
                f'"{name}" cannot be moved out of its file: {len(self._graphs)} captured graphs can still be replayed, '
                "and would go on copying from there; drop them first (del graph), and capture again afterwards"
            )

    def captured(self, graph: Owner) -> None:
        """Say that a graph copies from these places, as long as it has users."""
        self._graphs.append(graph)

    def move(self, name: str, place: Place, look: Callable[[], None]) -> None:
        """Say that a tensor lies elsewhere now."""
        self.of[name], self.looks[name] = place, look
        self._copies = None

    def look(self) -> None:
        """Raise CheckpointError when a file that tensors lie in was written to or cut off."""
        for look in dict.fromkeys(self.looks.values()):
            look()

    def copies(self, byte_offsets: Mapping[str, int], specs: Mapping[str, TensorSpec]) -> list[Copy]:
        """The copies of the whole unit, in the order of the slot."""
        self.look()
        if self._copies is None:
            self._copies = list(self._joined(byte_offsets, specs))
        return self._copies

    def _joined(self, byte_offsets: Mapping[str, int], specs: Mapping[str, TensorSpec]) -> Iterator[Copy]:
        run: tuple[HostBuffer, int, int, int] | None = None  # buffer, where in it, where in the slot, bytes
        for name in sorted(byte_offsets, key=byte_offsets.__getitem__):
            nbytes, slot = specs[name].nbytes, byte_offsets[name]
            if not nbytes:
                continue
            buffer, offset = self.of[name]
            if run is not None:
                gap = slot - (run[2] + run[3])
                if buffer is run[0] and offset - run[1] == slot - run[2] and 0 <= gap <= GAP_NBYTES:
                    run = (*run[:3], slot - run[2] + nbytes)
                    continue
                yield from _pieces(*run)
            run = (buffer, offset, slot, nbytes)
        if run is not None:
            yield from _pieces(*run)


def _pieces(buffer: HostBuffer, byte_offset: int, slot_offset: int, nbytes: int) -> Iterator[Copy]:
    """One copy, cut where one registration ends and the next begins."""
    base = buffer.host_pointer
    for start, count in buffer.pieces(byte_offset, nbytes):
        yield Copy(slot_offset + start - byte_offset, base + start, count)


@dataclass(frozen=True, slots=True)
class Slab:
    """The host bytes of a unit: a range of one `HostBuffer`, or `places` where the tensors lie elsewhere.

    Attributes
    ----------
    buffer : HostBuffer
        Keeps the bytes alive.
    byte_offset : int
        Where the slab starts in the buffer.
    nbytes : int
        Bytes of the slot that holds the unit: from its first byte to the end of the last tensor.
    byte_offsets : Mapping[str, int]
        Where each tensor starts in the slot, and in the slab where that is one range.
    specs : Mapping[str, TensorSpec]
        What each tensor is.
    places : Places or None
        Where tensors lie that are not in the range; it stays true when one of them is moved.
    """

    buffer: HostBuffer
    byte_offset: int
    nbytes: int
    byte_offsets: Mapping[str, int]
    specs: Mapping[str, TensorSpec]
    places: Places | None = field(default=None)

    @property
    def host_pointer(self) -> int:
        """Address of the first byte for the CPU.

        Raises
        ------
        AliasError
            The unit is not one range; `copies` says what to copy.
        """
        if self.places is not None:
            raise AliasError(
                "this unit lies in a file, or in several places, and has no first byte; take Slab.copies to copy it, "
                "and Slab.host_view for one tensor"
            )
        return self.buffer.host_pointer + self.byte_offset

    @property
    def read_only(self) -> bool:
        """Whether one of the tensors lies in memory that must not be written."""
        if self.places is None:
            return self.buffer.read_only
        return any(place.buffer.read_only for place in self.places.of.values())

    @property
    def alignment(self) -> int:
        """Bytes of which every tensor starts on a multiple in a slot: 256; of a mapped file also less, at least 16."""
        return math.gcd(ALIGNMENT, *(self.byte_offsets[name] for name, spec in self.specs.items() if spec.nbytes))

    def copies(self, byte_offset: int = 0, nbytes: int | None = None) -> list[Copy]:
        """The copies that fill a range of the unit's slot, the whole by default; none crosses two registrations.

        Bytes between tensors may be any.

        Raises
        ------
        CheckpointError
            The file that the unit is mapped from was written to or cut off.
        """
        end = self.nbytes if nbytes is None else byte_offset + nbytes
        if self.places is None:
            if not self.buffer.borders:
                return [Copy(byte_offset, self.host_pointer + byte_offset, end - byte_offset)]
            return list(_pieces(self.buffer, self.byte_offset + byte_offset, byte_offset, end - byte_offset))
        whole = self.places.copies(self.byte_offsets, self.specs)
        if (byte_offset, end) == (0, self.nbytes):
            return whole
        parts = []
        for start, pointer, count in whole:
            first, last = max(start, byte_offset), min(start + count, end)
            if first < last:
                parts.append(Copy(first, pointer + first - start, last - first))
        return parts

    @property
    def buffers(self) -> list[HostBuffer]:
        """Every buffer that its bytes lie in now."""
        if self.places is None:
            return [self.buffer]
        return list({id(place.buffer): place.buffer for place in self.places.of.values()}.values())

    def captured(self, graph: Owner) -> None:
        """Say that a captured graph copies from here: what it reads is not moved while it can be replayed."""
        if self.places is not None:
            self.places.captured(graph)

    def host_view(self, name: str, *, label: Label | str = Label.CPU) -> View:
        """View one tensor of the slab on the host; see `HostBuffer.host_view`."""
        spec, (buffer, offset) = self.specs[name], self._place(name)
        return buffer.host_view(spec.shape, spec.dtype, strides=spec.strides, byte_offset=offset, label=label)

    def device_view(self, name: str, *, device: str | int | None = None, read_only: bool = False) -> View:
        """View one tensor of the slab as the device maps it; see `HostBuffer.device_view`."""
        spec, (buffer, offset) = self.specs[name], self._place(name)
        return buffer.device_view(
            spec.shape, spec.dtype, strides=spec.strides, byte_offset=offset, device=device, read_only=read_only
        )

    def _place(self, name: str) -> Place:
        if self.places is None:
            return Place(self.buffer, self.byte_offset + self.byte_offsets[name])
        self.places.looks[name]()
        return self.places.of[name]
