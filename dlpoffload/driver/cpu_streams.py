"""Streams and events of the CPU driver: worker threads, CUDA's order, and an adversary that runs work late.

A stream runs what its queue holds once it is *demanded*. Without an adversary everything is demanded when
it is enqueued. With one, each piece of work draws eager (it demands itself, and so whatever lies before it in
its queue) or lazy: a lazy piece runs only when somebody waits for what lies behind it. A worker that comes to
a wait demands the stream it waits for. So demand travels along the order that the program states, and along
nothing else: an order that the program forgot to state is broken, in the same way for the same seed. To that
end an enqueuing call returns when all eager work is done. Asking (`event_query`) demands nothing, so a loop
that only asks may never end.

Source of the semantics: CUDA driver API, stream management and event management.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .cpu_process import track
from .cpu_queue import Event, Failure, Record, Stream, Wait, Work
from .refusals import cuda_error

__all__ = ["StreamStats", "Streams"]

_FIRST_HANDLE: Final = 16
"""Handles 1 and 2 name streams of their own in CUDA (legacy, per thread); ours keep clear of them."""
_LAZY: Final = 0.75
"""The share of lazy work. An eager piece pulls all that lies before it: with half, little would be late."""
_GRACE_S: Final = 1.0
"""How long an enqueuing call waits for eager work behind a callable that does not come back."""
_EXIT_S: Final = 1.0
"""How long the interpreter's exit waits for tasks that run."""


@dataclass(slots=True)
class StreamStats:
    """How often the host was held up.

    Attributes
    ----------
    host_waits : int
        Calls of `event_synchronize` and `stream_synchronize`.
    reader_waits : int
        Waits of stream 0 for an event that had not been reached, so that the calling thread was blocked.
    drains : int
        Calls that freed or unregistered memory, and so waited for every stream.
    """

    host_waits: int = 0
    reader_waits: int = 0
    drains: int = 0


class Streams:
    """All streams and events of one CPU driver.

    Parameters
    ----------
    adversary
        Seed of the adversary; None for none.
    """

    def __init__(self, adversary: int | None = None) -> None:
        self.stats = StreamStats()
        self.adversary = None if adversary is None else random.Random(adversary)
        self._handles = itertools.count(_FIRST_HANDLE)
        self._streams: dict[int, Stream] = {}
        self._draining: set[Stream] = set()  # destroyed, with work left
        self._events: dict[int, Event] = {}
        self._stopped = False
        self._make_locks()
        track(self)

    def _make_locks(self) -> None:
        # Re-entrant: the collector may run a finaliser that frees memory, and so drains, under the lock.
        self.lock = threading.RLock()
        self._progress = threading.Condition(self.lock)  # something ended, anywhere
        self._workers: set[int] = set()  # idents of our threads

    # ----------------------------------------------------------------------------------------- streams
    def stream_create(self) -> int:
        with self.lock:
            self._check_running("cuStreamCreate")
            stream = Stream(next(self._handles), threading.Condition(self.lock))
            self._streams[stream.handle] = stream
        # Not under the lock: whoever starts a thread waits for it to begin, and where it does the collector may run a
        # finaliser, which waits for the lock.
        self._start(stream)
        return stream.handle

    def stream_destroy(self, handle: int) -> None:
        """Forget the handle at once; what is enqueued still runs, then the thread ends."""
        with self.lock:
            stream = self._stream("cuStreamDestroy", handle)
            del self._streams[handle]
            self._close(stream)

    def stream_synchronize(self, handle: int) -> None:
        with self.lock:
            self.stats.host_waits += 1
            if handle == 0:
                return
            stream = self._stream("cuStreamSynchronize", handle)
            self._await("cuStreamSynchronize", [stream])
            _raise("cuStreamSynchronize", stream.failure)

    def synchronize(self) -> None:
        with self.lock:
            self.stats.host_waits += 1
            streams = [*self._streams.values(), *self._draining]
            self._await("cuCtxSynchronize", streams)
            for stream in streams:
                _raise("cuCtxSynchronize", stream.failure)

    def drain(self, call: str) -> None:
        """Wait for everything enqueued on any stream so far. Errors of tasks stay with their streams."""
        with self.lock:
            self.stats.drains += 1
            self._await(call, [*self._streams.values(), *self._draining])

    def enqueue(self, name: str, handle: int, call: Callable[[], object], *, foreign: bool = False) -> None:
        """Enqueue work; on stream 0 it runs at once, on the calling thread. `name` is the driver call it stands for."""
        if handle == 0:
            call()
            return
        with self.lock:
            stream = self._stream(name, handle)
            self._check_running(name)
            work = Work(stream.next_ticket(), call, foreign)
            self._append(stream, work)
            if self.adversary is None or self.adversary.random() >= _LAZY:
                stream.demand(work.ticket)
            self._settle()

    # ------------------------------------------------------------------------------------------ events
    def event_create(self, *, timing: bool = False) -> int:
        with self.lock:
            handle = next(self._handles)
            self._events[handle] = Event(timing)
            return handle

    def event_destroy(self, handle: int) -> None:
        with self.lock:
            self._event("cuEventDestroy", handle)
            del self._events[handle]

    def event_record(self, handle: int, stream_handle: int) -> None:
        with self.lock:
            event = self._event("cuEventRecord", handle)
            if stream_handle == 0:
                event.last = Record(0, None)
                event.last.reach(None)
                return
            stream = self._stream("cuEventRecord", stream_handle)
            self._check_running("cuEventRecord")
            event.last = Record(stream.next_ticket(), stream)
            self._append(stream, event.last)
            self._settle()

    def stream_wait_event(self, stream_handle: int, handle: int) -> None:
        with self.lock:
            record = self._event("cuStreamWaitEvent", handle).last
            stream = self._stream("cuStreamWaitEvent", stream_handle) if stream_handle else None
            if record is None:
                return
            if stream is None:
                self.stats.reader_waits += not record.reached
                self._reach("cuStreamWaitEvent", record)
                return
            self._check_running("cuStreamWaitEvent")
            self._append(stream, Wait(stream.next_ticket(), record))
            self._settle()

    def event_query(self, handle: int) -> bool:
        with self.lock:
            record = self._event("cuEventQuery", handle).last
            if record is None:
                return True
            if record.reached:
                _raise("cuEventQuery", record.failure)
            return record.reached

    def event_synchronize(self, handle: int) -> None:
        with self.lock:
            self.stats.host_waits += 1
            record = self._event("cuEventSynchronize", handle).last
            if record is not None:
                self._reach("cuEventSynchronize", record)

    def event_elapsed_ms(self, start: int, end: int) -> float:
        call = "cuEventElapsedTime"
        with self.lock:
            times = []
            for handle in (start, end):
                event = self._event(call, handle)
                if not event.timing:
                    raise cuda_error(call, "CUDA_ERROR_INVALID_HANDLE", "made without timing=True")
                if event.last is None:
                    raise cuda_error(call, "CUDA_ERROR_INVALID_HANDLE", "the event was never recorded")
                if not event.last.reached:
                    raise cuda_error(call, "CUDA_ERROR_NOT_READY", "a record has not been reached yet")
                _raise(call, event.last.failure)
                times.append(event.last.time_s)
            return (times[1] - times[0]) * 1e3

    # ------------------------------------------------------------------------------------------ ending
    def close(self) -> None:
        """Let every stream run out and its thread end. Does not wait; handles are gone."""
        with self.lock:
            for stream in list(self._streams.values()):
                self._close(stream)
            self._streams.clear()
            self._events.clear()

    def stop(self) -> None:
        """End the threads without running what is left: the interpreter ends."""
        with self.lock:
            self._stopped = True
            streams = [*self._streams.values(), *self._draining]
            for stream in streams:
                stream.discard()
                stream.wake.notify_all()
            self._progress.notify_all()
        deadline = time.monotonic() + _EXIT_S
        for stream in streams:
            if stream.thread is not None and stream.thread is not threading.current_thread():
                stream.thread.join(max(0.0, deadline - time.monotonic()))

    def after_fork_in_child(self) -> None:
        """The child has the handles and the tables, but neither the threads nor what they had to do."""
        self._make_locks()
        for stream in list(self._streams.values()):
            stream.discard()
            stream.thread = None
            stream.wake = threading.Condition(self.lock)
        for stream in self._draining:
            stream.discard()
        self._draining.clear()

    # ----------------------------------------------------------------------------------------- helpers
    def _stream(self, call: str, handle: int) -> Stream:
        try:
            return self._streams[handle]
        except KeyError:
            raise cuda_error(call, "CUDA_ERROR_INVALID_HANDLE", f"{handle} is no stream") from None

    def _event(self, call: str, handle: int) -> Event:
        try:
            return self._events[handle]
        except KeyError:
            raise cuda_error(call, "CUDA_ERROR_INVALID_HANDLE", f"{handle} is no event") from None

    def _check_running(self, call: str) -> None:
        if self._stopped:
            raise cuda_error(call, "CUDA_ERROR_DEINITIALIZED", "the interpreter is ending")

    def _append(self, stream: Stream, item: Work | Record | Wait) -> None:
        stream.queue.append(item)
        self._start(stream)
        if self.adversary is None:
            stream.demand(item.ticket)
        else:
            stream.wake.notify_all()  # a record or a wait may be free to go

    def _await(self, call: str, streams: list[Stream]) -> None:
        tickets = [(stream, stream.enqueued) for stream in streams]
        for stream, ticket in tickets:
            stream.demand(ticket)
        self._block(call, lambda: all(stream.completed >= ticket for stream, ticket in tickets))

    def _reach(self, call: str, record: Record) -> None:
        if not record.reached:
            assert record.stream is not None  # a record of stream 0 is reached when it is made
            record.stream.demand(record.ticket)
            self._block(call, lambda: record.reached)
        _raise(call, record.failure)

    def _block(self, call: str, done: Callable[[], bool]) -> None:
        if done():
            return
        if threading.get_ident() in self._workers:
            raise cuda_error(call, "CUDA_ERROR_NOT_PERMITTED", "a task of a stream may not wait for streams")
        self._progress.wait_for(done)

    def _settle(self) -> None:
        """Wait until the adversary's eager work is done, so that what runs early is early in every run."""
        if self.adversary is not None and threading.get_ident() not in self._workers:
            streams = [*self._streams.values(), *self._draining]
            while not self._progress.wait_for(lambda: all(stream.at_rest() for stream in streams), _GRACE_S):
                if any(stream.running is not None and stream.running.foreign for stream in streams):
                    return

    def _wake_all(self) -> None:
        for stream in (*self._streams.values(), *self._draining):
            stream.wake.notify_all()

    def _close(self, stream: Stream) -> None:
        stream.closing = True
        if stream.thread is not None:
            self._draining.add(stream)
            stream.demanded = stream.enqueued
            stream.wake.notify_all()

    # ----------------------------------------------------------------------------------------- workers
    def _start(self, stream: Stream) -> None:
        if stream.thread is None:
            stream.thread = threading.Thread(
                target=self._run, args=(stream,), name=f"dlpoffload-stream-{stream.handle}", daemon=True
            )
            stream.thread.start()

    def _run(self, stream: Stream) -> None:
        with self.lock:
            self._workers.add(threading.get_ident())
        while (work := self._take(stream)) is not None:
            failure = None
            try:
                work.call()
            except BaseException as error:  # not even SystemExit ends a worker: others wait for its records
                failure = Failure(error)
            del work  # and what it closes over, before the stream is said to be done with it
            with self.lock:
                stream.running = None
                if stream.queue:  # else the exit discarded it meanwhile
                    stream.fail(failure)
                    stream.finish()
                self._progress.notify_all()
        with self.lock:
            self._workers.discard(threading.get_ident())
            self._draining.discard(stream)
            failure = stream.failure
            self._progress.notify_all()
        if failure is not None and not failure.reported and not self._stopped:
            # Nobody can ask the stream any more, so the error goes where errors of threads go.
            failure.reported = True
            _report(failure.error)

    def _take(self, stream: Stream) -> Work | None:
        """The next work to run; None when the stream has ended. Deals with waits and records on the way."""
        with self.lock:
            while not self._stopped:
                if not stream.due():
                    if stream.closing and not stream.queue:
                        return None
                    stream.wake.wait()
                    continue
                head = stream.queue[0]
                if isinstance(head, Wait):
                    if not head.record.reached:
                        assert head.record.stream is not None
                        head.record.stream.demand(head.record.ticket)
                        self._progress.wait()
                        continue
                    stream.fail(head.record.failure)
                elif isinstance(head, Record):
                    head.reach(stream.failure)
                    if self.adversary is not None:
                        self._wake_all()  # a wait for this record, which nobody has demanded, is over
                elif stream.failure is None:
                    stream.running = head
                    return head
                stream.finish()
                self._progress.notify_all()
            return None


def _raise(call: str, failure: Failure | None) -> None:
    if failure is not None:
        failure.reported = True
        detail = f"a task of the stream raised {type(failure.error).__name__}: {failure.error}"
        raise cuda_error(call, "CUDA_ERROR_LAUNCH_FAILED", detail) from failure.error


def _report(error: BaseException) -> None:
    thread = threading.current_thread()
    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, thread)))
