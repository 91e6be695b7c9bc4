"""Backward stages units again, in the reverse order, through the same ring."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from ..spec import ALIGNMENT
from ..transfer import Lease, Prefetcher, SlotRing
from .saved import Staged
from .tensors import current_stream

if TYPE_CHECKING:
    from .units import StagedUnit

__all__ = ["BackwardStager"]


@dataclass(eq=False, slots=True)
class _Held:
    """A unit that backward uses, and the last node that unpacked a tensor of it."""

    lease: Lease
    generations: tuple[int, ...]
    node: Any


class _Pass:
    """The units that one backward holds on one thread.

    Autograd owns it, by the callback for the end of the pass: after one that raised, it goes with the graph task.
    """

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher
        self.held: dict[StagedUnit, _Held] = {}

    def leave(self, unit: StagedUnit) -> None:
        """End a unit's lease."""
        self._prefetcher.leave(self.held.pop(unit).lease)

    def leave_others(self, node: Any) -> None:
        """End the leases that `node` did not ask for: the kernels of the nodes that did are enqueued by now."""
        for unit in [unit for unit, held in self.held.items() if held.node is not node]:
            self.leave(unit)

    def end(self) -> None:
        """End every lease."""
        while self.held:
            self.leave(next(iter(self.held)))

    def __del__(self) -> None:
        for held in self.held.values():
            held.lease.abandon()


class BackwardStager:
    """Leases slots for saved tensors, from the first that is unpacked of a unit until another node runs.

    A node unpacks all that it saved before it enqueues its kernels. So a lease ends when another node of the same pass
    unpacks something, or recomputes a unit, or with the pass. A pass inside of a pass (a reentrant checkpoint) leaves
    the outer one's leases alone: the node that runs it may go on to read what it has unpacked.
    """

    def __init__(self, ring: SlotRing, slots: list[torch.Tensor], device: torch.device) -> None:
        self._prefetcher = Prefetcher(ring, list(ring.slabs)[::-1])
        self._ring = ring
        self._slots = slots
        self._device = device
        self._lock = threading.Lock()
        # By thread, on which autograd runs one node at a time, and graph task.
        self._passes: WeakValueDictionary[tuple[int, int], _Pass] = WeakValueDictionary()

    def staged_again(self, saved: Staged) -> torch.Tensor:
        """The saved tensor, on the device."""
        saved.check()
        if torch.is_grad_enabled() or self._ring.closed or torch._C._current_graph_task_id() == -1:
            # create_graph: what this backward saves in turn outlives any lease. Or the module was restored since. Or
            # somebody looks at `grad_fn._saved_weight` outside of any backward.
            return self._copied(saved)
        slot = self._hold(saved.unit).lease.slot
        return self._copied(saved) if slot is None else saved.inside(self._slots[slot.index], saved.byte_offset)

    def recomputing(self) -> None:
        """Make room for a unit whose forward runs inside of a backward, that of a checkpoint."""
        task = torch._C._current_graph_task_id()
        if task != -1 and (mine := self._passes.get((threading.get_ident(), task))) is not None:
            mine.leave_others(torch._C._current_autograd_node())

    def _hold(self, unit: StagedUnit) -> _Held:
        node, stream = torch._C._current_autograd_node(), current_stream(self._device)
        mine = self._pass()
        now = unit.generations(0, unit.slab.nbytes)
        held = mine.held.get(unit)
        if held is not None and held.generations == now and held.lease.stream == stream:
            held.node = node
        mine.leave_others(node)
        if unit not in mine.held:
            mine.held[unit] = _Held(self._prefetcher.enter(unit.name, stream=stream), now, node)
        return mine.held[unit]

    def _pass(self) -> _Pass:
        key = threading.get_ident(), torch._C._current_graph_task_id()
        with self._lock:
            mine = self._passes.get(key)
            if mine is None:
                mine = self._passes[key] = _Pass(self._prefetcher)
                torch.autograd.Variable._execution_engine.queue_callback(mine.end)
            return mine

    def abandon(self) -> None:
        """End every lease. Only while no backward runs."""
        with self._lock:
            passes = list(self._passes.values())
        for mine in passes:
            mine.end()

    def _copied(self, saved: Staged) -> torch.Tensor:
        """A copy of its own, on the current stream."""
        # Aligned as it was in the slot: kernels choose other code for other alignments, and the bits could differ.
        shift = saved.byte_offset % ALIGNMENT
        flat = torch.empty(shift + saved.nbytes, dtype=torch.uint8, device=self._device)
        ring, unit, stream = self._ring, saved.unit, current_stream(self._device)
        target = flat.data_ptr() + shift - saved.byte_offset
        copies = unit.slab.copies(saved.byte_offset, saved.nbytes)
        if ring.closed:
            for start, source, nbytes in copies:
                ring.driver.copy(target + start, source, nbytes)
            return saved.inside(flat, shift)
        lease = ring.host_lease(unit.name, stream=stream)
        try:
            lease.wait()
            with ring.driver.current():
                for start, source, nbytes in copies:
                    ring.driver.copy_async(target + start, source, nbytes, stream)
            lease.release()
        except BaseException:
            lease.abandon()
            raise
        return saved.inside(flat, shift)
