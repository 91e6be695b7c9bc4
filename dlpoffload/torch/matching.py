"""A module's tensors against those of a checkpoint: which is read into which, or the one error that says it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ..checkpoint import Assembly, Recipe, assemblies, differences
from ..errors import CheckpointError, SpecError
from ..spec import TensorSpec
from .meta import check_realisable
from .tree import Entry, Member

__all__ = ["Load", "matched"]

_SHOWN = 5


@dataclass(frozen=True, eq=False, slots=True)
class Load:
    """What is read into one entry.

    Attributes
    ----------
    whole : Assembly or None
        What all of its bytes are made of, when they can be read straight into their place.
    parts : list of (Member, Assembly)
        Otherwise what is read for each of its tensors, in the order in which torch would load them.
    covered : list of Member
        Those that have their values from the checkpoint then.
    """

    entry: Entry
    whole: Assembly | None
    parts: list[tuple[Member, Assembly]]
    covered: list[Member]

    def into(self, entry: Entry) -> Load:
        """The same for another record of the same tensors."""
        twins = {id(member.tensor): member for member in entry.members}
        parts = [(twins[id(member.tensor)], assembly) for member, assembly in self.parts]
        return Load(entry, self.whole, parts, [twins[id(member.tensor)] for member in self.covered])


def matched(
    module: nn.Module, entries: list[Entry], stored: Mapping[str, TensorSpec], recipe: Recipe | None, *, strict: bool
) -> list[Load]:
    """What is read into each entry that the checkpoint has something for.

    Raises
    ------
    CheckpointError
        A tensor on meta that nothing is stored for; with `strict` any parameter or persistent buffer, or something
        stored that is not asked for; another shape or dtype.
    SpecError
        The recipe means nothing, or a tensor on meta cannot be given bytes in place.
    """
    members = {name: member for entry in entries for member in entry.members for name in member.names}
    wanted = {name: member.spec for name, member in members.items()}
    made, lacking = assemblies(recipe or {}, wanted, stored)
    loads = [_load(entry, made) for entry in entries]
    missing = [m for load in loads for m in load.entry.members if m not in load.covered and _is_needed(m, strict)]
    used = {source for assembly in made.values() for source in assembly.sources}
    unexpected = [f'"{name}" ({spec})' for name, spec in stored.items() if strict and name not in used]
    different = differences(made, wanted)
    cast = any(made[name].shape == wanted[name].shape and made[name].dtype != wanted[name].dtype for name in made)
    if missing or unexpected or different:
        raise CheckpointError(
            f"the checkpoint's {len(stored)} tensors do not fit the {type(module).__name__}: "
            + "; ".join(
                f"{len(found)} {what}: {_some(found)}"
                for what, found in (
                    ("missing", [_lack(member, lacking) for member in missing]),
                    ("unexpected", unexpected),
                    ("of another shape or dtype", different),
                )
                if found
            )
            + f". To do: {'; '.join(_remedies(missing, unexpected, different, cast))}"
        )
    for load in loads:
        for member in load.entry.members:
            if member.tensor.is_meta:
                check_realisable(member.tensor, member.name)
        for member, _ in load.parts:
            if any(stride == 0 and n > 1 for n, stride in zip(member.spec.shape, member.spec.strides, strict=True)):
                raise SpecError(
                    f'"{member.name}" has strides {member.spec.strides}, so that elements share bytes and cannot be '
                    "loaded; make it contiguous, or leave it out of the checkpoint"
                )
    found = [load for load in loads if load.covered]
    if not found:
        raise CheckpointError(
            f"none of the checkpoint's {len(stored)} tensors is one of the {type(module).__name__}'s {len(members)}, "
            "so it has no effect; leave it out, or name them by a recipe"
        )
    return found


def _load(entry: Entry, made: Mapping[str, Assembly]) -> Load:
    first = entry.members[0]
    if all(member.byte_offset == 0 and member.spec == first.spec for member in entry.members):
        # Tied tensors may be stored under several names; torch loads them all, so that the last one counts.
        names = [name for member in entry.members for name in member.names if name in made]
        if not names:
            return Load(entry, None, [], [])
        assembly = made[names[-1]]
        whole = first.spec.is_row_major
        return Load(entry, assembly if whole else None, [] if whole else [(first, assembly)], entry.members)
    parts = []
    for member in entry.members:
        names = [name for name in member.names if name in made]
        parts += [(member, made[names[-1]])] if names else []
    return Load(entry, None, parts, [member for member, _ in parts])


def _is_needed(member: Member, strict: bool) -> bool:
    return member.tensor.is_meta or (strict and member.outer is None and _is_persistent(member))


def _is_persistent(member: Member) -> bool:
    return not all(attribute in module._non_persistent_buffers_set for module, attribute in member.names.values())


def _lack(member: Member, lacking: Mapping[str, str]) -> str:
    kind = "" if _is_persistent(member) else ", a buffer that is not persistent"
    why = next((f": {lacking[name]}" for name in member.names if name in lacking), "")
    return f'"{member.name}" ({member.spec}{kind}){why}'


def _some(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _remedies(missing: list[Member], unexpected: list[str], different: list[str], cast: bool) -> Iterator[str]:
    if any(_is_persistent(member) for member in missing):
        yield "say by a recipe what missing tensors are made of"
    if not all(_is_persistent(member) for member in missing):
        yield (
            "build buffers that are computed and not stored off meta (accelerate: include_buffers=False), so that they "
            "are kept"
        )
    if unexpected:
        yield "leave unexpected ones out by strict=False"
    if different:
        yield "build the module with the shapes and the dtype of the checkpoint, or convert the file"
    if cast:
        yield (
            "or read it with HostStore.copy_of, cast its tensors, and pass them as a mapping, with the default "
            'mode="copy": no file is cast'
        )
