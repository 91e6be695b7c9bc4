"""`Lease`: a unit's hold on a slot, from entering it to leaving it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..errors import SlotError
from ..view import View

if TYPE_CHECKING:
    from .ring import SlotRing
    from .slots import SlotState
    from .timeline import Timeline

__all__ = ["Lease", "StreamLike", "stream_handle"]


class StreamLike(Protocol):
    """An object with ``__cuda_stream__``, such as cuda.core's streams: returns (version, handle)."""

    def __cuda_stream__(self) -> tuple[int, int]: ...


def stream_handle(stream: int | StreamLike) -> int:
    """The handle of a stream given as an int or as an object with ``__cuda_stream__``."""
    if isinstance(stream, int):
        return stream
    _version, handle = stream.__cuda_stream__()
    return int(handle)


class Lease:
    """A unit's hold on a slot, from `SlotRing.prefetch` until `release`.

    As a context manager it gives the views of the unit's tensors: entering makes the stream wait for the copy,
    leaving marks the slot's last reader.

    Attributes
    ----------
    unit : str
    slot : Slot or None
        None when no slot was free: the unit then runs from its mapped views.
    """

    __slots__ = ("_given", "_released", "_ring", "_state", "_timeline", "_waited", "slot", "stream", "unit")

    def __init__(self, ring: SlotRing, unit: str, stream: int, timeline: Timeline, state: SlotState | None) -> None:
        self._ring = ring
        self._timeline = timeline
        self._state = state
        self._given: dict[str, View] = {}
        self._waited = False
        self._released = False
        self.unit = unit
        self.stream = stream
        self.slot = None if state is None else state.slot

    def wait(self) -> None:
        """Make the lease's stream wait for the unit's copy. Asynchronous, except on the CPU driver's stream 0.

        Raises
        ------
        SlotError
            The lease is released, or was taken on the other side of a capture's border.
        """
        self._ring._wait(self)

    def share(self, stream: int | StreamLike) -> Lease:
        """Lease the same slot once more, for another reader of the unit on `stream`."""
        return self._ring._share(self, stream_handle(stream))

    def release(self) -> None:
        """Mark what is enqueued on the lease's stream so far as the slot's last reader there. Idempotent.

        Should that fail, the slot stays leased.

        Raises
        ------
        SlotError
            The lease was taken before its stream began to capture: release it before that, or after the capture.
        """
        self._ring._release(self)

    @property
    def views(self) -> dict[str, View]:
        """View the unit's tensors in the slot, or mapped from the host where there was none.

        *Lifetime*: the views are good until `release`; afterwards the slot's bytes become another unit's.

        Raises
        ------
        SlotError
            The lease is released.
        """
        self._check()
        slab = self._ring.slabs[self.unit]
        if self.slot is None:
            return {name: slab.device_view(name) for name in slab.specs}
        buffer = self.slot.buffer
        return {
            name: buffer.device_view(spec.shape, spec.dtype, strides=spec.strides, byte_offset=slab.byte_offsets[name])
            for name, spec in slab.specs.items()
        }

    def _check(self) -> None:
        if self._released:
            raise SlotError(f'the lease of unit "{self.unit}" is released; prefetch the unit again')

    def __enter__(self) -> dict[str, View]:
        try:
            self.wait()
            self._given = self.views
        except BaseException:
            self.release()
            raise
        return self._given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Else the name after `as` would keep the views, which are good no longer, and a ring from closing.
        self._given.clear()
        self.release()
