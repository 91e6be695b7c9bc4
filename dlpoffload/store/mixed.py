"""Stores of which some tensors lie in a file's own pages, and the others in memory of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from functools import partial
from typing import Final, TypeAlias

from ..checkpoint import Checkpoint
from ..spec import ALIGNMENT, TensorSpec
from .files import check_fits, file_homes, unit_region
from .homes import Contents, Home
from .host_store import HostStore
from .layout import Units, checked_units
from .pinned import Memory, Pageable, allocated, anonymous_contents

__all__ = ["map_some", "replaced"]

_GAP_NBYTES: Final = ALIGNMENT
"""What lies between, such as a tensor that was moved, takes no room in slots, whose size was planned without it."""

_Homes: TypeAlias = Mapping[str, tuple[Home, int]]


def _contents(
    specs: Mapping[str, TensorSpec], units: Mapping[str, tuple[str, ...]], memory: Memory, there: _Homes
) -> Contents:
    """Homes for all tensors: those that are there already, and memory for the others, none allocated yet.

    A unit of which nothing is there gets a slab of its own; of any other unit each tensor that is not there gets memory
    of its own, as if it had been moved.
    """
    mixed = {unit: names for unit, names in units.items() if any(name in there for name in names)}
    apart = {name for names in mixed.values() for name in names}
    plain = {name: spec for name, spec in specs.items() if name not in there and name not in apart}
    contents = anonymous_contents(plain, {u: names for u, names in units.items() if u not in mixed}, memory)
    contents.specs = specs
    contents.of_name.update((name, place) for name, place in there.items() if name in specs)
    for name in specs:
        if name in apart and name not in there:
            home = Home(nbytes := max(specs[name].nbytes, 1), partial(allocated, memory, nbytes))
            contents.of_name[name] = home, 0
    known = {id(home) for home in contents.homes}
    for home, _ in contents.of_name.values():
        if id(home) not in known:
            known.add(id(home))
            contents.homes.append(home)
    for unit, names in mixed.items():
        contents.of_unit[unit] = unit_region(names, specs, contents.homes, contents.of_name, _GAP_NBYTES)
    return contents


def _kept(former: Contents, specs: Mapping[str, TensorSpec], staying: Container[str]) -> _Homes:
    """What a store can take of a former one tensor by tensor: places in files, and memory that holds one tensor."""
    users = Counter(id(home) for home, _ in former.of_name.values())
    return {
        name: (home, byte_offset)
        for name, (home, byte_offset) in former.of_name.items()
        if name in staying and specs.get(name) == former.specs[name] and (home.in_file or users[id(home)] == 1)
    }


def map_some(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    *,
    specs: Mapping[str, TensorSpec],
    units: Units | None = None,
    device: str | int | None = None,
) -> HostStore:
    """Map some tensors of an open checkpoint, under names of their own; the others of the store have memory.

    *Aliasing*, *Lifetime*: see `HostStore.map_file`; the checkpoint itself may be closed. Only the pages of these
    tensors are pinned, and what lies close between them.

    Parameters
    ----------
    checkpoint
        See `checkpoint.open_checkpoint`.
    names
        By the name in the checkpoint the name in the store.
    specs
        Every tensor of the store. Those that are not mapped are allocated when they are used.
    units, device
        See `HostStore.allocate`.

    Raises
    ------
    RegistrationError, AliasError, CheckpointError, HostMemoryError, SpecError
        See `HostStore.map_file` and `HostStore.allocate`.
    """
    memory = Memory.checked(device, f'"{checkpoint.path}"', "never", "transparent", None, None)
    checked = checked_units(specs, units)
    unit_of = {unit: [name for name in mine if name in names.values()] for unit, mine in checked.items()}
    found = file_homes(checkpoint, unit_of, memory, names=names)
    check_fits(checkpoint.path, found, checkpoint.specs, {source: specs[name] for source, name in names.items()}, ())
    store = HostStore(_contents(specs, checked, memory, found.of_name), checked, memory)
    try:
        for home in found.homes:
            home.open()
    except BaseException:
        store._discard()
        raise
    return store


def replaced(
    former: HostStore,
    specs: Mapping[str, TensorSpec],
    staying: Container[str],
    *,
    units: Units | None = None,
    pinned: bool = True,
) -> HostStore:
    """Make a store of the same kind for other tensors, which takes over what stays where it is.

    *Aliasing*: what stays, in memory or in files, is the new store's; `former` is dropped afterwards, not closed.
    """
    checked = checked_units(specs, units)
    kind: Pageable = "never" if pinned else "always"
    if kind != former._memory.pageable:
        return HostStore.allocate(specs, units=units, device=former.device, pinned=pinned)
    there = _kept(former._contents, specs, staying) if former.mode == "map" or former.moved else {}
    store = HostStore(_contents(specs, checked, former._memory, there), checked, former._memory)
    store.because, store._moved = former.because, dict(former.moved)
    store.take_over(former, staying)
    return store
