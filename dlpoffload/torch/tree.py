"""From a module to what planning needs: each distinct tensor once, and the tree of modules over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from ..errors import PlanError, SpecError
from ..planning import UnitTree
from ..spec import TensorSpec
from .shells import real_of
from .subclasses import inner_tensors, wraps_others
from .tensors import spec_of, version_of

__all__ = ["INDIVISIBLE", "Entry", "Member", "Outer", "collect", "is_callable", "parts_of", "unit_tree"]

_BOUNDARY: Final = 16
INDIVISIBLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""They hand the weights of their children to kernels and do not call the children, always or on their fast path."""


@dataclass(eq=False, slots=True)
class Outer:
    """A tensor of the module that wraps others (see `subclasses`), and every place that refers to it.

    Attributes
    ----------
    tensor : torch.Tensor
    name : str
        The first qualified name.
    places : list of (module, attribute)
    """

    tensor: torch.Tensor
    name: str
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Member:
    """One tensor object of the module, or inside of one that wraps others, and every place that refers to it.

    Attributes
    ----------
    tensor : torch.Tensor
        The Parameter or buffer. The object stays; its data is swapped.
    spec : TensorSpec
    byte_offset : int
        Where it lies in its entry's bytes.
    places : list of (module, attribute, qualified name)
        Each once, under the first name of its module; the module itself, not what stands for it (see `shells`).
        Inside of a tensor that wraps others, attribute and name go on with the path there: ``"weight.scale"``.
    names : dict of str to (module, attribute)
        Every qualified name: a module that stands at two paths gives its tensors two.
    outer : Outer or None
        The tensor of the module that it is a part of.
    """

    tensor: torch.Tensor
    spec: TensorSpec
    byte_offset: int
    places: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    names: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    outer: Outer | None = None

    @property
    def name(self) -> str:
        """The first qualified name."""
        return self.places[0][2]

    @property
    def of_module(self) -> tuple[str, torch.Tensor]:
        """Name and object of what the module has: the tensor itself, or the one that it is a part of."""
        return (self.name, self.tensor) if self.outer is None else (self.outer.name, self.outer.tensor)

    @property
    def version(self) -> int:
        """Torch's count of in-place writes. Those to a tensor that wraps others do not count inside of it."""
        own = self.tensor._version  # no tensor made in inference mode is taken in, which would have none
        return own if self.outer is None else own + version_of(self.outer.tensor)


@dataclass(eq=False, slots=True)
class Entry:
    """Bytes that are stored once: one tensor, or several whose memory overlaps (tied weights)."""

    name: str
    spec: TensorSpec
    members: list[Member] = field(default_factory=list)


def collect(root: nn.Module, *, meta: bool = False) -> list[Entry]:
    """Every parameter and buffer of a module, tied ones joined; those on meta only where they are allowed."""
    members: dict[int, Member] = {}
    outers: dict[int, Outer] = {}
    seen: set[int] = set()
    for path, found in root.named_modules(remove_duplicate=False):
        module = real_of(found)
        if isinstance(module, torch.jit.ScriptModule):
            raise SpecError(
                f'"{path or type(module).__name__}" is a {type(module).__name__}: compiled code that holds its tensors '
                "itself, so that none can be exchanged; offload the module that it was made of, and compile with "
                "torch.compile"
            )
        for attribute, tensor, outer in _own_tensors(found):
            name = f"{path}.{attribute}" if path else attribute
            member = members.get(id(tensor))
            if outer is not None and tensor.is_meta:
                raise SpecError(
                    f'"{name}" lies on meta inside of a {type(outer).__name__}; build that off meta, with its weights'
                )
            if member is None:
                member = members[id(tensor)] = Member(tensor, spec_of(tensor, name, meta=meta), 0)
            if outer is not None:
                known = outers.setdefault(
                    id(outer), Outer(outer, name.removesuffix(attribute) + attribute.split(".")[0])
                )
                member.outer = member.outer or known
                if (place := (module, attribute.split(".")[0])) not in known.places:
                    known.places.append(place)
            member.names[name] = module, attribute
            if id(module) not in seen:
                member.places.append((module, attribute, name))
        seen.add(id(module))
    return [_entry(group) for group in _overlapping(list(members.values()))]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Attribute and tensor, of plain ones; of one that wraps others those inside of it, and itself."""
    for table in (module._parameters, module._buffers):
        for attribute, tensor in table.items():
            if wraps_others(tensor):
                assert tensor is not None
                yield from ((f"{attribute}.{path}", inner, tensor) for path, inner in inner_tensors(tensor))
            elif tensor is not None:
                yield attribute, tensor, None


def _overlapping(members: list[Member]) -> Iterator[list[Member]]:
    """Groups of members whose bytes overlap, in the order of their first member."""
    groups: dict[int, list[Member]] = {}
    spans: dict[object, list[tuple[int, int, Member]]] = {}
    for member in members:
        groups[id(member)] = [member]
        if member.spec.nbytes:
            where, start = _place_of(member.tensor)
            spans.setdefault(where, []).append((start, start + member.spec.nbytes, member))
    for device_spans in spans.values():
        reach, joined = 0, None
        for start, end, member in sorted(device_spans, key=lambda span: span[:2]):
            if joined is not None and start < reach:
                group = groups[id(joined)]
                group.append(member)
                groups[id(member)] = group
            else:
                joined = member
            reach = max(reach, end)
    seen: set[int] = set()
    for member in members:
        group = groups[id(member)]
        if id(group) not in seen:
            seen.add(id(group))
            yield sorted(group, key=members.index) if len(group) > 1 else group


def _place_of(tensor: torch.Tensor) -> tuple[object, int]:
    """In what address space a tensor lies, and where. On meta, where all addresses are zero, each storage is one."""
    if tensor.is_meta:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()
    return tensor.device, tensor.data_ptr()


def _entry(group: list[Member]) -> Entry:
    first = group[0]
    if len(group) == 1:
        return Entry(first.name, first.spec, group)
    starts = [_place_of(member.tensor)[1] for member in group]
    same = all(member.spec == first.spec for member in group) and len(set(starts)) == 1
    # Each member where its dtype wants it: the entry begins on a boundary of all, as the allocation does.
    start = min(starts) if same else min(starts) // _BOUNDARY * _BOUNDARY
    end = max(at + member.spec.nbytes for at, member in zip(starts, group, strict=True))
    for at, member in zip(starts, group, strict=True):
        member.byte_offset = at - start
    return Entry(first.name, first.spec if same else TensorSpec((end - start,), "uint8"), group)


def unit_tree(root: nn.Module, entries: list[Entry]) -> UnitTree:
    """The tree of modules, each entry at the lowest module that has all its places below it."""
    paths = {id(real_of(module)): path for path, module in root.named_modules(remove_duplicate=True)}
    whole = {paths[id(module)] for module in root.modules() if isinstance(module, INDIVISIBLE)}
    own: dict[str, dict[str, TensorSpec]] = {}
    for entry in entries:
        modules = [paths[id(place[0])].split(".") for member in entry.members for place in member.places]
        common = modules[0]
        for segments in modules[1:]:
            length = next(
                (i for i, (a, b) in enumerate(zip(common, segments, strict=False)) if a != b),
                min(len(common), len(segments)),
            )
            common = common[:length]
        ancestors = (".".join(common[:length]) for length in range(len(common) + 1))
        path = next((ancestor for ancestor in ancestors if ancestor in whole), ".".join(common))
        own.setdefault(path, {})[entry.name] = entry.spec
    seen: set[int] = set()

    def node(module: nn.Module, path: str) -> UnitTree:
        seen.add(id(module))
        children = tuple(
            node(child, f"{path}.{name}" if path else name)
            for name, child in module.named_children()
            if id(child) not in seen
        )
        real = real_of(module)
        return UnitTree(
            name=path,
            tensors=own.get(path, {}),
            children=() if path in whole else children,
            repeated=isinstance(real, nn.ModuleList | nn.Sequential | nn.ModuleDict),
            kind=type(real).__name__,
            callable=real is module and is_callable(module),
        )

    if not entries:
        raise PlanError(f"a {type(root).__name__} without parameters and buffers has nothing to offload")
    return node(root, "")


def is_callable(module: nn.Module) -> bool:
    """Whether the module has a forward of its own: a ModuleList has none."""
    unimplemented = getattr(nn.modules.module, "_forward_unimplemented", None)
    return type(module).forward is not unimplemented


def parts_of(name: str, names: Mapping[str, tuple[Member, str]]) -> dict[str, str]:
    """Names of the tensors inside of one that wraps others, by their paths in it.

    Parameters
    ----------
    names
        By qualified name: the member, and the attribute of the module, with the path inside of it.
    """
    start = name + "."
    return {
        known.removeprefix(start): known
        for known, (member, attribute) in names.items()
        if known.startswith(start) and member.outer is not None and name.endswith(attribute.split(".")[0])
    }
