"""What a unit is to torch: the module's tensor objects, where they are at home, and what was left there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from ..slab import Slab
from ..transfer import Lease
from ..view import View
from .tensors import Place, place_of, tensor_over
from .tree import Member
from .watched import exchange_data, is_noted, written_as_data

__all__ = ["Data", "StagedMember", "StagedUnit", "home_tensor"]

_STATISTIC_NBYTES: Final = 64 << 10


def home_tensor(view: View, member: Member) -> torch.Tensor:
    """View a member's bytes inside the view of its entry."""
    return tensor_over(view.view((member.spec.nbytes,), "uint8", byte_offset=member.byte_offset), member.spec)


@dataclass(eq=False, slots=True)
class StagedMember:
    """A tensor of a staged unit: the object that the module held, its home, and what was left there.

    Attributes
    ----------
    version : int
        Torch's count of in-place writes when we looked last.
    generation : int
        How often the bytes changed; what autograd saved before refers to older ones.
    home_place : Place
        Where its home is in the slab: where `home` is, unless somebody moved that (``share_memory_``).
    tensor : torch.Tensor
        The Parameter or buffer object.
    keepers : tuple of torch.nn.Module
        Modules whose running statistic it may be: a small floating buffer. In training, what `F.batch_norm` writes
        there is counted by no version.
    """

    member: Member
    entry: str
    slab_offset: int
    home: torch.Tensor
    version: int
    generation: int = 0
    home_place: Place = field(init=False)
    tensor: torch.Tensor = field(init=False)
    keepers: tuple[nn.Module, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.tensor = self.member.tensor
        self.home_place = place_of(self.home)
        small = self.tensor.is_floating_point() and self.member.spec.nbytes <= _STATISTIC_NBYTES
        places = self.member.places if small else []
        self.keepers = tuple(module for module, attribute, _ in places if attribute in module._buffers)

    @property
    def is_buffer(self) -> bool:
        """Whether a module has it, or what it is inside of, as a buffer."""
        return any(attribute.split(".")[0] in module._buffers for module, attribute, _ in self.member.places)

    @property
    def at_home(self) -> bool:
        """Whether the tensor has the bytes that we gave it between uses."""
        return place_of(self.tensor) == self.home_place

    @property
    def written_unseen(self) -> bool:
        """Whether its unit's forward may write it without torch's count going up."""
        return any(keeper.training for keeper in self.keepers)

    def was_written(self) -> bool:
        """Whether torch saw a write since we looked last."""
        written = written_as_data(self.tensor)
        return written or self.member.version != self.version

    def overlaps(self, byte_offset: int, nbytes: int) -> bool:
        """Whether it has bytes of a range of the slab."""
        start = self.slab_offset
        return start < byte_offset + nbytes and byte_offset < start + self.member.spec.nbytes


class Data:
    """What a unit's tensors are pointed at, in the order of its members.

    Attributes
    ----------
    tensors : list of torch.Tensor
    places : list of Place
        Of these tensors, which never change.
    addresses : list of int
        Of their first elements, looked at whenever the unit is entered or left.
    storages : list of int
        What torch knows all storages of a slot by in which these tensors may lie; of homes none.
    """

    __slots__ = ("_kept", "addresses", "places", "storages", "tensors")

    def __init__(self, tensors: Iterable[torch.Tensor], storages: Sequence[torch.UntypedStorage] = ()) -> None:
        self.tensors = list(tensors)
        self.places: list[Place] = [place_of(tensor) for tensor in self.tensors]
        self.addresses = [place[0] for place in self.places]
        self._kept = tuple(storages)
        self.storages = [storage._cdata for storage in storages]

    def replace(self, index: int, tensor: torch.Tensor) -> None:
        """Put another tensor in the place of one."""
        self.tensors[index] = tensor
        self.places[index] = place_of(tensor)
        self.addresses[index] = self.places[index][0]


@dataclass(eq=False, slots=True)
class StagedUnit:
    """A module whose tensors are staged together.

    Attributes
    ----------
    read_only : list of torch.Tensor
        Those at home in a mapped file: guarded but in a slot.
    own : frozenset of int
        Ids of its tensor objects, and of those that wrap them.
    active : list of Lease
        Of the calls that are inside the unit's forward now; the first one's slot is where the parameters point.
    users : int
        What referred to the slot before the parameters did.
    overlapping : list of StagedMember
        Those that share bytes with another.
    """

    name: str
    modules: list[nn.Module]
    slab: Slab
    members: list[StagedMember]
    read_only: list[torch.Tensor] = field(default_factory=list)
    slot_data: dict[int, Data] = field(default_factory=dict)
    active: list[Lease] = field(default_factory=list)
    users: int = 0
    own: frozenset[int] = field(init=False)
    overlapping: list[StagedMember] = field(init=False)
    homes: Data = field(init=False)

    def __post_init__(self) -> None:
        self.homes = Data(staged.home for staged in self.members)
        self.own = frozenset(
            id(tensor) for staged in self.members for tensor in (staged.tensor, staged.member.of_module[1])
        )
        entries = [staged.entry for staged in self.members]
        self.overlapping = [staged for staged in self.members if entries.count(staged.entry) > 1]

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Name and tensor of what the module has, by which every member is reached."""
        return [staged.member.of_module for staged in self.members]

    def untouched(self, data: Data) -> bool:
        """Whether a quick look finds every tensor where it was put, and nothing done to it: nearly always so.

        Of a place it compares the address: shape, strides and dtype change by ``.data =``, which is noted, or in place
        (`t_`, `set_`, `resize_`), which torch counts as a write.
        """
        for staged, address in zip(self.members, data.addresses, strict=True):
            tensor = staged.tensor
            if (
                tensor.data_ptr() != address
                or staged.member.version != staged.version
                or is_noted(tensor)
                or (staged.keepers and staged.written_unseen)
            ):
                return False
        return True

    def point(self, data: Data) -> None:
        """Give every tensor other data."""
        for staged, put in zip(self.members, data.tensors, strict=True):
            exchange_data(staged.tensor, put)

    def give_home(self, staged: StagedMember, home: torch.Tensor) -> None:
        """Let a member be at home in other bytes from now on."""
        staged.home, staged.home_place = home, place_of(home)
        self.homes.replace(self.members.index(staged), home)

    def release(self) -> None:
        """Let go of slots and homes."""
        self.slot_data.clear()
        self.homes = Data(())

    def generations(self, byte_offset: int, nbytes: int) -> tuple[int, ...]:
        """How often a range of the slab changed."""
        return tuple(staged.generation for staged in self.members if staged.overlaps(byte_offset, nbytes))

    def touch(self, written: StagedMember) -> None:
        """Count a change of a tensor, and so of those that share bytes with it."""
        for staged in self.members:
            if staged.overlaps(written.slab_offset, written.member.spec.nbytes):
                staged.generation += 1
