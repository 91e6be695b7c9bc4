"""One layer that was wrapped as soon as it was built: its tensors lie in a slab of its own until all is planned."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from ..driver import Driver
from ..memory import HostBuffer
from ..store import HostStore
from .meta import check_realisable, realise, unrealise
from .placed import copy_span
from .tensors import empty_bytes, tensor_in
from .tree import Entry, Member, collect, unit_tree
from .units import home_tensor
from .watched import exchange_data

__all__ = ["Layer", "new_entries"]

_UNIT = "layer"


def new_entries(module: nn.Module, known: Container[int]) -> list[Entry]:
    """The tensors of a layer, less those that it shares with layers before it, in the order of a unit's slab."""
    entries = [
        entry
        for entry in collect(module, meta=True)
        if entry.spec.nbytes and not any(id(member.tensor) in known for member in entry.members)
    ]
    for entry in entries:
        for member in entry.members:
            if member.tensor.is_meta:
                check_realisable(member.tensor, member.name)
    if not entries:
        return []
    by_name = {entry.name: entry for entry in entries}
    return [by_name[name] for name in unit_tree(module, entries).specs()]


class Layer:
    """A layer and its slab. Tensors that were on meta are zero until somebody writes them.

    Attributes
    ----------
    module : torch.nn.Module
    entries : list of Entry
        In the order of the slab.
    former : dict of int to torch.device
        By id of the tensor object, where it was before; the CPU for those on meta.
    buffer : HostBuffer or None
        None once it is in other hands.
    """

    def __init__(self, module: nn.Module, entries: list[Entry], driver: Driver, *, pinned: bool) -> None:
        self.module = module
        self.entries = entries
        self.former: dict[int, torch.device] = {}
        self._driver = driver
        self._homes: dict[int, int] = {}
        store = HostStore.allocate(
            {entry.name: entry.spec for entry in entries},
            units={_UNIT: [entry.name for entry in entries]},
            device=driver.device,
            pinned=pinned,
        )
        self.buffer: HostBuffer | None = store.slab(_UNIT).buffer
        mapped = pinned and driver.capabilities().map_host_memory
        twins: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for entry in entries:
                view = store.host_view(entry.name)
                host = from_dlpack(view.view((entry.spec.nbytes,), "uint8"))
                for member in entry.members:
                    if not member.tensor.is_meta:
                        copy_span(member, host)
                home = store.device_view(entry.name) if mapped else view
                for member in entry.members:
                    self._point(member, home_tensor(home, member), twins)
        except BaseException:
            while twins:
                unrealise(*twins.pop())
            self.release()
            raise

    def _point(self, member: Member, home: torch.Tensor, twins: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        tensor = member.tensor
        if tensor.is_meta:
            self.former[id(tensor)] = torch.device("cpu")
            twins.append((tensor, realise(tensor, home.device)))
        else:
            self.former[id(tensor)] = tensor.device
        exchange_data(tensor, home)
        self._homes[id(tensor)] = home.data_ptr()

    def is_home(self, member: Member) -> bool:
        """Whether a tensor lies in the slab still."""
        return member.tensor.data_ptr() == self._homes.get(id(member.tensor))

    def members(self) -> Iterator[Member]:
        """Every tensor."""
        for entry in self.entries:
            yield from entry.members

    def release(self) -> None:
        """Give what lies in the slab ordinary memory where it was before, and the slab up."""
        self._driver.synchronize()  # kernels that wrote weights through the mapped views, on whatever stream
        for entry in self.entries:
            ours = [member for member in entry.members if self.is_home(member)]
            if ours:
                flat = empty_bytes(entry.spec.nbytes, self.former[id(ours[0].tensor)])
                for member in ours:
                    copy_span(member, flat)
                for member in ours:
                    exchange_data(member.tensor, tensor_in(flat, member.byte_offset, member.spec))
        self.buffer = None
