"""A resident model beside an offloaded copy of it, and what must be true of the copy besides its outputs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from models import assert_same, distinct_nbytes, tensors_of
from torch import nn

from dlpoffload import live_buffers
from dlpoffload.planning import Placement
from dlpoffload.torch import OffloadHandle, offload_

__all__ = ["Pair", "added_peak"]

_MIB = 1 << 20


@dataclass
class Pair:
    """A model twice: as it is, and offloaded.

    Attributes
    ----------
    allocated : int
        What torch's allocator for the device gave out while the model was offloaded; 0 on the CPU, where it does not
        count.
    ring : int
        Bytes of the slots, as the table of live buffers has them.
    """

    resident: Any
    offloaded: Any
    handle: OffloadHandle
    allocated: int
    ring: int

    @classmethod
    def of(cls, model: nn.Module, device: str, percent: int = 30) -> Pair:
        """Offload a model to a share of its weights by the one line that it takes; a resident copy beside it."""
        resident = copy.deepcopy(model).to(device)
        budget = distinct_nbytes(model) * percent // 100
        before, slots = _allocated(device), _slots()
        handle = offload_(model, budget, device=device)
        return cls(resident, model, handle, _allocated(device) - before, _slots() - slots)

    def each(self) -> Iterator[Any]:
        """The resident model, then the offloaded one."""
        yield from (self.resident, self.offloaded)

    def assert_same(self, run: Callable[[Any], Any], where: str = "") -> Any:
        """Run both and compare every tensor that comes out, bit by bit. Returns what the offloaded one gave."""
        outputs = []
        for model in self.each():
            torch.manual_seed(11)
            outputs.append(run(model))
        assert type(outputs[0]) is type(outputs[1]), where
        assert_same(outputs[1], outputs[0], where)
        return outputs[1]

    def assert_as_planned(self) -> None:
        """The report says that it was really offloaded, and the memory that it takes is what the plan says."""
        plan, report = self.handle.plan, self.handle.report(link=False)
        parts = {placement: plan.nbytes(placement) for placement in Placement}
        assert sum(parts.values()) == plan.total_nbytes == distinct_nbytes(self.resident)
        assert parts[Placement.HOST_STAGED] + parts[Placement.HOST_MAPPED] >= plan.total_nbytes - plan.device_budget
        assert parts[Placement.HOST_STAGED] > 0
        assert report.pinned_nbytes >= parts[Placement.HOST_STAGED] + parts[Placement.HOST_MAPPED]
        assert report.device_nbytes == plan.device_nbytes <= plan.device_budget
        assert report.stats.copies > 0
        assert report.stats.mapped_runs == 0
        assert report.stats.host_waits == 0
        assert report.adopted == report.replaced == ()
        self._assert_device_memory(parts[Placement.DEVICE])

    def _assert_device_memory(self, resident_nbytes: int) -> None:
        plan = self.handle.plan
        assert self.ring == plan.ring_nbytes
        tensors = tensors_of(self.offloaded)
        storages = {}
        for name in plan.names(Placement.DEVICE):
            storage = tensors[name].untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        assert sum(storages.values()) <= resident_nbytes
        assert sum(storages.values()) + self.ring <= plan.device_nbytes
        pieces = len(plan.names(Placement.DEVICE)) + plan.slots
        # torch gives out multiples of 512 bytes, and leaves up to 1 MiB behind a large piece
        assert self.allocated <= plan.device_nbytes + pieces * (_MIB if plan.slot_nbytes > _MIB else 512)


def _allocated(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.memory_allocated(device)


def _slots() -> int:
    return sum(nbytes for kind, nbytes in live_buffers() if kind == "device")


@contextmanager
def added_peak(device: str) -> Iterator[list[int]]:
    """Measure what a block adds to the device's memory at its highest; 0 on the CPU."""
    peak: list[int] = []
    gc.collect()
    before = _allocated(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.append(0 if device == "cpu" else torch.cuda.max_memory_allocated(device) - before)
