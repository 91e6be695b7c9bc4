"""What a ring did: counts, bytes, and times read from events that have passed, so that nobody waits for a figure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final

from ..driver import Driver

__all__ = ["TransferStats"]

_MIN_STALL_MS: Final = 0.02
"""Two event records behind each other lie some microseconds apart even when nothing is waited for."""
_ONE_OF: Final = 8
"""Of how many one is timed after the first ones: the events of each cost the host as much as the copy itself."""


@dataclass(slots=True)
class TransferStats:
    """Counters of one ring since it was made.

    Attributes
    ----------
    copies, copied_nbytes : int
        Copies enqueued from host slabs into slots.
    late_copies : int
        Those enqueued only when their unit was entered, because nobody had foreseen it.
    hits : int
        Units entered whose slot held them, or whose copy was enqueued, already.
    mapped_runs : int
        Units that found no free slot and ran from their mapped view.
    invalidations : int
        Slots emptied because the host bytes behind them changed.
    write_backs : int
        Tensors written inside their unit and copied back to the host.
    host_waits : int
        Times the host blocked: never inside a step, only before it writes host bytes and on close. (It also does so
        once when a capture begins.)
    timed_copies, timed_nbytes, copy_seconds
        The copies whose events have been read, and the time they took.
    timed_waits, stalls, stall_seconds
        The waits of a compute stream for a copy whose events have been read, those that took time, and the time.

    The first hundreds are all timed, later ones now and then.
    """

    copies: int = 0
    copied_nbytes: int = 0
    late_copies: int = 0
    hits: int = 0
    mapped_runs: int = 0
    invalidations: int = 0
    write_backs: int = 0
    host_waits: int = 0
    timed_copies: int = 0
    timed_nbytes: int = 0
    copy_seconds: float = 0.0
    timed_waits: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0

    @property
    def copy_gb_per_second(self) -> float | None:
        """Rate of the timed copies in 10^9 bytes a second; None before one is timed."""
        return self.timed_nbytes / self.copy_seconds / 1e9 if self.copy_seconds else None


@dataclass(slots=True)
class Stopwatch:
    """Brackets work on a stream with timing events, and reads them when they have passed."""

    driver: Driver
    free: list[int] = field(default_factory=list)
    pending: deque[tuple[int, int, int | None]] = field(default_factory=deque)
    limit: int = 256
    seen: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def timed(self, stream: int, nbytes: int | None) -> AbstractContextManager[None]:
        """Bracket a copy of `nbytes`, or a wait when None; not all of many, nor where too many are unread."""
        kind = nbytes is None
        self.seen[kind] += 1
        spare = self.seen[kind] > self.limit and self.seen[kind] % _ONE_OF
        return nullcontext() if spare or len(self.pending) >= self.limit else self._bracketed(stream, nbytes)

    @contextmanager
    def _bracketed(self, stream: int, nbytes: int | None) -> Iterator[None]:
        pair: list[int] = []
        try:
            self._record(pair, stream)
            yield
            self._record(pair, stream)
        except BaseException:
            self.free += pair
            raise
        self.pending.append((pair[0], pair[1], nbytes))

    def _record(self, pair: list[int], stream: int) -> None:
        try:
            pair.append(self.free.pop())  # other threads take events, too
        except IndexError:
            pair.append(self.driver.event_create(timing=True))
        self.driver.event_record(pair[-1], stream)

    def read(self, stats: TransferStats) -> None:
        """Add the times of what has passed to `stats`; never waits."""
        while self.pending:
            start, end, nbytes = self.pending[0]
            if not self.driver.event_query(end):
                return
            self.pending.popleft()
            try:
                milliseconds = self.driver.event_elapsed_ms(start, end)
            finally:
                self.free += (start, end)
            if nbytes is not None:
                stats.timed_copies += 1
                stats.timed_nbytes += nbytes
                stats.copy_seconds += milliseconds / 1e3
            else:
                stats.timed_waits += 1
                if milliseconds > _MIN_STALL_MS:
                    stats.stalls += 1
                    stats.stall_seconds += milliseconds / 1e3

    def close(self) -> None:
        """Destroy every event."""
        for start, end, _ in self.pending:
            self.free += (start, end)
        self.pending.clear()
        with ExitStack() as closing:  # all of them, whichever the driver refuses
            while self.free:
                closing.callback(self.driver.event_destroy, self.free.pop())
