"""`Slab`: the contiguous host bytes of one unit, so that one copy stages all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .memory import HostBuffer
from .spec import TensorSpec
from .view import Label, View

__all__ = ["Slab"]


@dataclass(frozen=True, slots=True)
class Slab:
    """A range of one `HostBuffer` in which the tensors of a unit lie, each aligned to 256 bytes.

    Attributes
    ----------
    buffer : HostBuffer
        Keeps the bytes alive.
    byte_offset : int
        Where the slab starts in the buffer.
    nbytes : int
        From the first byte to the end of the last tensor: what one copy moves.
    byte_offsets : Mapping[str, int]
        Where each tensor starts, counted from the start of the slab.
    specs : Mapping[str, TensorSpec]
        What each tensor is.
    """

    buffer: HostBuffer
    byte_offset: int
    nbytes: int
    byte_offsets: Mapping[str, int]
    specs: Mapping[str, TensorSpec]

    @property
    def host_pointer(self) -> int:
        """Address of the first byte for the CPU."""
        return self.buffer.host_pointer + self.byte_offset

    def host_view(self, name: str, *, label: Label | str = Label.CPU) -> View:
        """View one tensor of the slab on the host; see `HostBuffer.host_view`."""
        spec = self.specs[name]
        offset = self.byte_offset + self.byte_offsets[name]
        return self.buffer.host_view(spec.shape, spec.dtype, strides=spec.strides, byte_offset=offset, label=label)

    def device_view(self, name: str, *, device: str | int | None = None) -> View:
        """View one tensor of the slab as the device maps it; see `HostBuffer.device_view`."""
        spec = self.specs[name]
        offset = self.byte_offset + self.byte_offsets[name]
        return self.buffer.device_view(spec.shape, spec.dtype, strides=spec.strides, byte_offset=offset, device=device)
