"""Where the bytes of a module come from, when they are not simply copied from where its tensors are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import nn

from ..planning import Plan
from ..spec import TensorSpec
from ..store import HostStore
from .tensors import Place
from .tree import Entry

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["Former", "Origin", "Start", "Units"]

Units: TypeAlias = Mapping[str, tuple[str, ...]]


@dataclass(eq=False, slots=True)
class Former:
    """What a module that is placed anew was before.

    Attributes
    ----------
    devices : dict of int to torch.device
        By id of the tensor object, where each tensor was before it was offloaded at first.
    store : HostStore or None
        Where they are at home now. Slabs that stay what they are are taken over, and the store is let go of then.
    homes : dict of str to list of Place
        For each entry, where its members' data is.
    """

    devices: dict[int, torch.device]
    store: HostStore | None
    homes: dict[str, list[Place | None]]


class Origin:
    """Used by `Placed` while it places a module's tensors. This one does nothing: everything is copied."""

    def units(self, decided: Plan) -> Mapping[str, tuple[str, ...]]:
        """What shall have a slab of its own in the store, beside the streamed units."""
        return {}

    def store(self, placed: Placed, specs: Mapping[str, TensorSpec], units: Units) -> HostStore | None:
        """A store in which some of the tensors are already; None has one allocated."""
        return None

    def fill(self, placed: Placed) -> None:
        """Bring bytes into the store, before the first tensor is placed."""

    def place(self, placed: Placed, entry: Entry) -> bool:
        """Point an entry's tensors to where its bytes are. False leaves that, and copying them, to `placed`."""
        return False

    def rollback(self) -> None:
        """Give what `place` pointed elsewhere the bytes that it had."""

    def settle(self) -> Iterable[tuple[Entry, torch.device]]:
        """Nothing can fail any more: let go of what was kept for that.

        Returns what `place` took care of, and on which device it is to be when the module is restored.
        """
        return ()


class Start(Protocol):
    """What is special about offloading a module for the first time."""

    @property
    def meta(self) -> bool:
        """Whether tensors may be on meta."""

    @property
    def former(self) -> Mapping[int, torch.device]:
        """By id of the tensor object, on which device it was at first, where that is not where it is now."""

    def origin(self, module: nn.Module, entries: list[Entry], *, pinned: bool) -> Origin:
        """Made anew for each attempt."""
