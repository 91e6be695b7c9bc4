"""Backward stages units again, in the reverse order, through the same ring."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..spec import ALIGNMENT
from ..transfer import Lease, Prefetcher, SlotRing
from .saved import Staged
from .tensors import current_stream

if TYPE_CHECKING:
    from .staging import StagedUnit

__all__ = ["BackwardStager"]


@dataclass(eq=False, slots=True)
class _Held:
    """A unit that backward uses, and the last node that unpacked a tensor of it."""

    lease: Lease
    generations: tuple[int, ...]
    node: Any


class BackwardStager:
    """Leases slots for saved tensors, from the first that is unpacked of a unit until another node runs.

    A node unpacks all that it saved before it enqueues its kernels. So a lease ends when a node that did not use it
    unpacks something on the same thread, or with the pass: by then the kernels of the nodes that used it are enqueued.
    After a backward that raised, its leases end with the next one, or when the ring is closed.
    """

    def __init__(
        self,
        ring: SlotRing,
        slots: list[torch.Tensor],
        device: torch.device,
        look_over: Callable[[StagedUnit], None],
    ) -> None:
        self._look_over = look_over
        self._prefetcher = Prefetcher(ring, list(ring.slabs)[::-1])
        self._ring = ring
        self._slots = slots
        self._device = device
        self._lock = threading.Lock()
        self._held: dict[int, dict[StagedUnit, _Held]] = {}  # by thread: autograd runs one node at a time on each

    def staged_again(self, saved: Staged) -> torch.Tensor:
        """The saved tensor, on the device."""
        self._look_over(saved.unit)
        saved.check()
        if torch.is_grad_enabled() or self._ring.closed:
            # create_graph: what this backward saves in turn outlives any lease. Or the module was restored since.
            return self._copied(saved)
        slot = self._hold(saved.unit).lease.slot
        return self._copied(saved) if slot is None else saved.inside(self._slots[slot.index], saved.byte_offset)

    def _hold(self, unit: StagedUnit) -> _Held:
        node = torch._C._current_autograd_node()
        with self._lock:
            mine = self._held.setdefault(threading.get_ident(), {})
        now = unit.generations(0, unit.slab.nbytes)
        for other, held in list(mine.items()):
            if held.node is not node and (other is not unit or held.generations != now):
                self._leave(mine, other)
        if unit not in mine:
            if not mine:
                torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, mine))
            lease = self._prefetcher.enter(unit.name, stream=current_stream(self._device))
            mine[unit] = _Held(lease, now, node)
        mine[unit].node = node
        return mine[unit]

    def _leave(self, mine: dict[StagedUnit, _Held], unit: StagedUnit) -> None:
        held = mine.pop(unit, None)
        if held is not None:
            self._prefetcher.leave(held.lease)

    def _end(self, mine: dict[StagedUnit, _Held]) -> None:
        for unit in list(mine):
            self._leave(mine, unit)

    def abandon(self) -> None:
        """End every lease, also those of a backward that raised. Only while no backward runs."""
        with self._lock:
            passes = list(self._held.values())
            self._held.clear()
        for mine in passes:
            self._end(mine)

    def _copied(self, saved: Staged) -> torch.Tensor:
        """A copy of its own, on the current stream."""
        # Aligned as it was in the slot: kernels choose other code for other alignments, and the bits could differ.
        shift = saved.byte_offset % ALIGNMENT
        flat = torch.empty(shift + saved.nbytes, dtype=torch.uint8, device=self._device)
        ring, unit, stream = self._ring, saved.unit, current_stream(self._device)
        target, source = flat.data_ptr() + shift, unit.slab.host_pointer + saved.byte_offset
        if ring.closed:
            ring.driver.copy(target, source, saved.nbytes)
            return saved.inside(flat, shift)
        lease = ring.host_lease(unit.name, stream=stream)
        try:
            lease.wait()
            with ring.driver.current():
                ring.driver.copy_async(target, source, saved.nbytes, stream)
        finally:
            lease.release()
        return saved.inside(flat, shift)
