"""`Lease`: a unit's hold on a slot, from entering it to leaving it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..errors import CudaError, SlotError
from ..view import View

if TYPE_CHECKING:
    from .ring import SlotRing
    from .slots import SlotState
    from .timeline import Timeline

__all__ = ["Lease", "StreamLike", "leased", "stream_handle"]


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
        # Under the ring's lock.
        self._ring = ring
        self._timeline = timeline
        self._state = state
        self._given: dict[str, View] = {}
        self._waited = False
        self._released = False
        self.unit = unit
        self.stream = stream
        self.slot = None if state is None else state.slot
        self._count(+1)

    def wait(self) -> None:
        """Make the lease's stream wait for the unit's copy. Asynchronous, except on the CPU driver's stream 0.

        Raises
        ------
        SlotError
            The lease is released, or was taken on the other side of a capture's border.
        """
        # Not under the lock: the wait of the CPU driver's stream 0 blocks, and while leased `ready` stays what it is.
        self._check()
        ring, timeline, state = self._ring, self._timeline, self._state
        with ring.driver.current():
            self._check_border(self.stream)
            if state is None:
                with ring._lock:
                    events = list(timeline.written.get(self.unit, {}).values())
            else:
                events = [state.ready]
            with ring._timed(timeline, self.stream, None):
                for event in events:
                    ring.driver.stream_wait_event(self.stream, event)
        self._waited = True

    @property
    def sole(self) -> bool:
        """Whether nobody else leases the slot."""
        return self._state is not None and self._state.leases == 1

    def wait_for_readers(self) -> None:
        """Make the lease's stream wait for those who used the slot on other streams, and have left."""
        with self._ring._lock, self._ring.driver.current():
            self._check()
            readers = {} if self._state is None else self._state.readers
            for stream, event in readers.items():
                if stream != self.stream:
                    self._ring.driver.stream_wait_event(self.stream, event)

    def share(self, stream: int | StreamLike) -> Lease:
        """Lease the same slot once more, for another reader of the unit on `stream`."""
        handle = stream_handle(stream)

        def share() -> Lease:
            self._check()
            self._check_border(handle)
            return Lease(self._ring, self.unit, handle, self._timeline, self._state)

        return leased(self._ring, share)

    def release(self) -> None:
        """Mark what is enqueued on the lease's stream so far as the slot's last reader there. Idempotent.

        Should that fail, the slot stays leased.

        Raises
        ------
        SlotError
            The lease was taken before its stream began to capture: release it before that, or after the capture.
        """
        ring, timeline, state = self._ring, self._timeline, self._state
        with ring._lock, ring.driver.current():
            if self._released or ring.closed:
                return
            if ring.driver.capture_id(self.stream) == timeline.capture:
                if ring._timelines.shared and not self._waited:
                    self.wait()  # else nothing would end the copy before a replay, or join it to its capture
                readers = state.readers if state is not None else timeline.mapped_readers.setdefault(self.unit, {})
                timeline.events.mark(readers, self.stream)
            elif not timeline.capture:
                self._check_border(self.stream)
            # else the capture is over, and its work is none of the stream's
            self._end()

    def abandon(self) -> None:
        """Release where nobody will do so again: should no last reader be marked, the host waits for the stream.

        Raises nothing. A slot whose readers cannot be waited for either stays leased, and the ring says why.
        """
        try:
            self.release()
        except CudaError:
            driver = self._ring.driver
            try:
                with self._ring._lock, driver.current(), driver.relaxed():
                    driver.stream_synchronize(self.stream)
                    if not self._released:
                        self._end()
            except CudaError as error:
                if not self._released:
                    self._ring.unleft = error

    def _end(self) -> None:
        self._released = True
        self._count(-1)

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
            read_only = slab.read_only  # which the ring was told by name
            return {name: slab.device_view(name, read_only=read_only) for name in slab.specs}
        buffer = self.slot.buffer
        return {
            name: buffer.device_view(spec.shape, spec.dtype, strides=spec.strides, byte_offset=slab.byte_offsets[name])
            for name, spec in slab.specs.items()
        }

    def _count(self, leases: int) -> None:
        if self._state is None:
            self._timeline.mapped_leases[self.unit] += leases
        else:
            self._state.leases += leases

    def _check_border(self, stream: int) -> None:
        """Refuse to order work of a capture against work outside it: CUDA would, too, and break the capture."""
        if self._ring.driver.capture_id(stream) != self._timeline.capture:
            where = "inside" if self._timeline.capture else "outside"
            raise SlotError(
                f'the lease of unit "{self.unit}" was taken {where} a graph capture and is used across its border; '
                "prefetch, use and release a unit on one side"
            )

    def _check(self) -> None:
        if self._released:
            raise SlotError(f'the lease of unit "{self.unit}" is released; prefetch the unit again')

    def __enter__(self) -> dict[str, View]:
        try:
            self.wait()
            self._given = self.views
        except BaseException:
            self.abandon()
            raise
        return self._given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Else the name after `as` would keep the views, which are good no longer, and a ring from closing.
        self._given.clear()
        try:
            self.release()
        except CudaError:
            self.abandon()
            raise


def leased(ring: SlotRing, make: Callable[[], Lease]) -> Lease:
    """Lease under the ring's lock and in the device's context; given back where leaving that fails."""
    lease: Lease | None = None
    try:
        with ring._lock, ring.driver.current():
            lease = make()
    except BaseException:
        if lease is not None:
            lease.abandon()
        raise
    return lease
