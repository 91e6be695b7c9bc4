"""A unit's tensors in a slot: which storages they have, and how many refer to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import from_dlpack

from .tensors import tensor_in
from .units import Data

if TYPE_CHECKING:
    from .units import StagedMember

__all__ = ["data_in", "users_of"]


def data_in(slot: torch.Tensor, members: Sequence[StagedMember]) -> Data:
    """View a unit's tensors in a slot.

    Not all in one storage: what torch compiles takes all that has one storage for views of each other if one of them is
    written, and refuses those of several dtypes. So buffers, which a forward may write, have storages of their own, and
    parameters have one for each dtype. Those that do share bytes go on sharing a storage.

    *Aliasing*: each of these storages is the whole slot's memory. So by its address it is known as the slot's, and no
    two tensors have the same offset: by that torch tells views of one tensor (``cache[0]``, ``cache[1]``) apart.
    *Lifetime*: every tensor keeps the slot.
    """
    written: set[str] = {staged.entry for staged in members if staged.is_buffer}
    wholes: dict[object, torch.Tensor] = {}
    first: dict[str, object] = {}
    tensors = []
    with torch.inference_mode(False), torch.no_grad():
        for staged in members:
            dtype = first.setdefault(staged.entry, staged.member.spec.dtype)
            key = staged.entry if staged.entry in written else dtype
            if key not in wholes:
                wholes[key] = from_dlpack(torch._C._to_dlpack(slot)) if wholes else slot
            tensors.append(tensor_in(wholes[key], staged.slab_offset, staged.member.spec))
    return Data(tensors, [whole.untyped_storage() for whole in wholes.values()])


def users_of(data: Data) -> int:
    """How many tensors, and whatever else, refer to the storages of a unit's tensors in a slot, and to the slot's."""
    return sum(int(torch._C._storage_Use_Count(storage)) for storage in data.storages)
