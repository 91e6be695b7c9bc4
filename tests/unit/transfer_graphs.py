"""A CPU driver that captures graphs as CUDA does, for tests of what `transfer` does in a capture and beside replays.

Work enqueued on a capturing stream, and on streams that joined it by waiting for an event of the capture, is recorded
instead of run. A replay runs it on streams of the graph's own, ordered by nothing but the edges that were recorded.
What CUDA refuses is refused: waits across the border of a capture, streams that were not joined at its end, and calls
that the global capture mode forbids (CUDA driver API, stream management; CUDA programming guide, graphs).
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NoReturn

from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import CudaError

__all__ = ["Graph", "GraphDriver"]

_CODES = {
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
    "CUDA_ERROR_STREAM_CAPTURE_MERGE": 902,
    "CUDA_ERROR_STREAM_CAPTURE_UNJOINED": 904,
    "CUDA_ERROR_STREAM_CAPTURE_ISOLATION": 905,
    "CUDA_ERROR_CAPTURED_EVENT": 907,
}


def _refuse(call: str, name: str) -> NoReturn:
    raise CudaError(call, _CODES[name], name)


@dataclass
class Node:
    """One piece of work: the stream it was captured on, the nodes it comes after, and how to enqueue it."""

    stream: int
    after: frozenset[int]
    enqueue: Callable[[int, object], None]


@dataclass(eq=False)
class Graph:
    """What was captured."""

    id: int
    origin: int
    nodes: list[Node] = field(default_factory=list)
    tails: dict[int, frozenset[int]] = field(default_factory=dict)
    lanes: dict[int, int] = field(default_factory=dict)
    events: list[int] = field(default_factory=list)
    held: list[Callable[[], None]] = field(default_factory=list)
    ended: bool = False
    broken: bool = False

    def add(self, stream: int, enqueue: Callable[[int, object], None]) -> None:
        self.nodes.append(Node(stream, self.tails[stream], enqueue))
        self.tails[stream] = frozenset({len(self.nodes) - 1})

    def joined(self) -> bool:
        """Whether every node comes before the end of the origin."""
        seen: set[int] = set()
        rest = list(self.tails[self.origin])
        while rest:
            index = rest.pop()
            if index not in seen:
                seen.add(index)
                rest += self.nodes[index].after
        return len(seen) == len(self.nodes)


class GraphDriver(CpuDriver):
    """A `CpuDriver` with graphs. One capture or more may be under way; stream 0 is in none."""

    def __init__(self, *, adversary: int | None = None) -> None:
        super().__init__(adversary=adversary)
        self._ids = itertools.count(1)
        self._graphs: list[Graph] = []
        self._capturing: dict[int, Graph] = {}  # by stream
        self._captured: dict[int, tuple[Graph, frozenset[int]]] = {}  # events whose last record lies in a capture
        self._recorded: set[int] = set()  # events ever recorded
        self._of_thread = threading.local()

    # -------------------------------------------------------------------------------------- the graph
    def begin_capture(self, stream: int) -> None:
        graph = Graph(next(self._ids), stream)
        graph.tails[stream] = frozenset()
        self._capturing[stream] = graph

    def end_capture(self, stream: int) -> Graph:
        graph = self._capturing[stream]
        assert graph.origin == stream
        graph.ended = True
        self._capturing = {s: g for s, g in self._capturing.items() if g is not graph}
        made = replace(graph)
        self._graphs.append(made)
        if made.broken:
            self.destroy(made)
        graph.nodes = []  # the driver, which knows the capture by its events, must not keep what tasks refer to
        if made.broken:
            _refuse("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        if not made.joined():
            _refuse("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_UNJOINED")
        return made

    def replay(
        self,
        graph: Graph,
        stream: int,
        argument: object = None,
        between: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Enqueue a graph behind `stream`; tasks find `argument`. `between` is called after each node."""
        if not graph.lanes:
            graph.lanes = {captured: self.stream_create() for captured in graph.tails}
            graph.events = [self.event_create() for _ in range(len(graph.nodes) + 1)]
        border = graph.events[-1]
        self.event_record(border, stream)
        for lane in graph.lanes.values():
            self.stream_wait_event(lane, border)
        for index, node in enumerate(graph.nodes):
            lane = graph.lanes[node.stream]
            for before in node.after:
                if graph.nodes[before].stream != node.stream:
                    self.stream_wait_event(lane, graph.events[before])
            node.enqueue(lane, argument)
            self.event_record(graph.events[index], lane)
            between(index)
        for lane in graph.lanes.values():
            self.event_record(border, lane)
            self.stream_wait_event(stream, border)
        self.event_record(border, stream)

    def destroy(self, graph: Graph) -> None:
        """End a graph, once its last replay has run: what it held is given up then."""
        self._graphs.remove(graph)
        held, graph.held[:] = [*graph.held], []

        def give_up() -> None:
            for call in held:
                call()

        if not graph.lanes:
            give_up()
            return
        stream = self.stream_create()
        super().stream_wait_event(stream, graph.events[-1])
        super().enqueue(stream, give_up)

    def destroy_graphs(self) -> None:
        """End every graph that was captured."""
        for graph in [*self._graphs]:
            self.destroy(graph)

    @property
    def argument(self) -> object:
        """What the replay was given, for a task that runs in one; None elsewhere."""
        return getattr(self._of_thread, "argument", None)

    def _in_replay(self, call: Callable[[], object], argument: object) -> None:
        self._of_thread.argument = argument
        try:
            call()
        finally:
            self._of_thread.argument = None

    # ------------------------------------------------------------------------------------- the border
    @contextmanager
    def relaxed(self) -> Iterator[None]:
        former = getattr(self._of_thread, "relaxed", False)
        self._of_thread.relaxed = True
        try:
            yield
        finally:
            self._of_thread.relaxed = former

    def _unsafe(self, call: str, *, always: bool = False) -> None:
        if self._capturing and (always or not getattr(self._of_thread, "relaxed", False)):
            for graph in self._capturing.values():
                graph.broken = True
            _refuse(call, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _eager_event(self, call: str, event: int) -> None:
        self._unsafe(call)
        if event in self._captured:
            _refuse(call, "CUDA_ERROR_CAPTURED_EVENT")

    def capture_id(self, stream: int) -> int:
        graph = self._capturing.get(stream)
        if graph is None:
            return 0
        if graph.broken:
            _refuse("cuStreamGetCaptureInfo", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        return graph.id

    def capture_hold(self, stream: int, argument: int, function: int) -> None:
        graph = self._capturing[stream]
        give_up = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
        graph.held.append(lambda: give_up(argument))

    def synchronize(self) -> None:
        self._unsafe("cuCtxSynchronize", always=True)
        super().synchronize()

    def stream_synchronize(self, stream: int) -> None:
        self._unsafe("cuStreamSynchronize", always=stream in self._capturing)
        super().stream_synchronize(stream)

    def event_query(self, event: int) -> bool:
        self._eager_event("cuEventQuery", event)
        return super().event_query(event)

    def event_synchronize(self, event: int) -> None:
        self._eager_event("cuEventSynchronize", event)
        super().event_synchronize(event)

    # --------------------------------------------------------------------------------- what is recorded
    def event_record(self, event: int, stream: int) -> None:
        graph = self._capturing.get(stream)
        self._recorded.add(event)
        if graph is None:
            self._captured.pop(event, None)
            super().event_record(event, stream)
        else:
            self._captured[event] = (graph, graph.tails[stream])

    def event_destroy(self, event: int) -> None:
        super().event_destroy(event)
        self._captured.pop(event, None)
        self._recorded.discard(event)

    def stream_wait_event(self, stream: int, event: int) -> None:
        call = "cuStreamWaitEvent"
        mine = self._capturing.get(stream)
        if event not in self._captured:
            if mine is not None and event in self._recorded:
                mine.broken = True
                _refuse(call, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
            if mine is None:
                super().stream_wait_event(stream, event)
            return
        graph, tail = self._captured[event]
        if graph.ended or stream == 0:
            _refuse(call, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
        if mine is not None and mine is not graph:
            mine.broken = graph.broken = True
            _refuse(call, "CUDA_ERROR_STREAM_CAPTURE_MERGE")
        self._capturing[stream] = graph
        graph.tails[stream] = graph.tails.get(stream, frozenset()) | tail

    def enqueue(self, stream: int, call: Callable[[], object]) -> None:
        graph = self._capturing.get(stream)
        if graph is None:
            super().enqueue(stream, call)
            return
        graph.add(stream, lambda lane, argument: self.enqueue(lane, lambda: self._in_replay(call, argument)))

    def copy_async(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        graph = self._capturing.get(stream)
        if graph is None:
            super().copy_async(destination, source, nbytes, stream)
            return
        graph.add(stream, lambda lane, _: self.copy_async(destination, source, nbytes, lane))
