"""What a stream of the CPU driver is made of: a queue of work, records and waits, each with a ticket.

Nothing here takes a lock or starts a thread; `cpu_streams` does, and holds its lock around everything here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Event", "Failure", "Record", "Stream", "Wait", "Work"]


@dataclass(eq=False, slots=True)
class Failure:
    """What a task raised; streams that waited for its stream share it. `reported` once the host was told."""

    error: BaseException
    reported: bool = False


@dataclass(eq=False, slots=True)
class Work:
    """A copy or a fill, or somebody else's callable, of which nobody knows when it comes back."""

    ticket: int
    call: Callable[[], object]
    foreign: bool


@dataclass(eq=False, slots=True)
class Record:
    """One `event_record`: a place in the order of a stream. Whoever waits holds the record, not the event.

    `stream` is None for the default stream, where a record is reached when it is made.
    """

    ticket: int
    stream: Stream | None
    reached: bool = False
    failure: Failure | None = None
    time_s: float = 0.0

    def reach(self, failure: Failure | None) -> None:
        self.reached, self.failure, self.time_s = True, failure, time.perf_counter()


@dataclass(eq=False, slots=True)
class Wait:
    """One `stream_wait_event`: it holds the record that was the event's last when the wait was made."""

    ticket: int
    record: Record


@dataclass(eq=False, slots=True)
class Event:
    """A name for its last record."""

    timing: bool
    last: Record | None = None


class Stream:
    """A queue, and how far its worker may go and has come."""

    def __init__(self, handle: int, wake: threading.Condition) -> None:
        self.handle = handle
        self.queue: deque[Work | Record | Wait] = deque()
        self.enqueued = 0  # the last ticket given out
        self.completed = 0  # the last ticket whose item ended
        self.demanded = 0  # tickets up to this one are to run
        self.running: Work | None = None
        self.closing = False
        self.failure: Failure | None = None  # of the first task that raised; it stays
        self.thread: threading.Thread | None = None
        self.wake = wake

    def next_ticket(self) -> int:
        self.enqueued += 1
        return self.enqueued

    def demand(self, ticket: int) -> None:
        """Let everything up to `ticket` run."""
        if ticket > self.demanded:
            self.demanded = ticket
            self.wake.notify_all()

    def due(self) -> bool:
        """Whether the head may be taken now; records, and waits that are over, may go without demand."""
        if not self.queue:
            return False
        head = self.queue[0]
        free = isinstance(head, Record) or (isinstance(head, Wait) and head.record.reached)
        return free or head.ticket <= self.demanded

    def at_rest(self) -> bool:
        """Whether nothing happens here until somebody demands something or another stream goes on."""
        if self.running is not None:
            return False
        if not self.due():
            return True
        head = self.queue[0]
        if not isinstance(head, Wait) or head.record.reached:
            return False
        other = head.record.stream
        return other is not None and other.demanded >= head.record.ticket

    def finish(self) -> None:
        """Take the head away: it has ended."""
        self.completed = self.queue.popleft().ticket

    def fail(self, failure: Failure | None) -> None:
        """Keep the first failure: what is enqueued behind it would work on wrong bytes, and is skipped."""
        if self.failure is None:
            self.failure = failure

    def discard(self) -> None:
        """Drop what has not run; whoever waits for it waits no longer."""
        for item in self.queue:
            if isinstance(item, Record):
                item.reach(self.failure)
        self.queue.clear()
        self.completed = self.demanded = self.enqueued
        self.running = None
