"""The module tree that an adapter hands over, and the one that names alone suggest."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import PlanError
from ..spec import TensorSpec

__all__ = ["UnitTree", "tree_of_names"]


@dataclass(frozen=True, slots=True)
class UnitTree:
    """A module, as far as planning must know it.

    Attributes
    ----------
    name : str
        Module path, unique in the tree; ``""`` for the root.
    tensors : mapping of str to TensorSpec
        The module's own tensors by their full names. A tensor that several modules share stands once, at the
        lowest node that has all of them below it: only there can one unit serve them all.
    children : tuple of UnitTree
        In the order in which they are expected to run.
    repeated : bool
        A container of like elements: a ``ModuleList``, a ``Sequential``, a stack.
    kind : str
        Class name. Elements of one kind with equal specs are homogeneous; a leaf whose kind contains
        "Embedding", and that holds a matrix, is gathered.
    callable : bool
        Its forward is called, so it can be entered and left as a unit; that of a ``ModuleList`` is not.
    """

    name: str
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    children: tuple[UnitTree, ...] = ()
    repeated: bool = False
    kind: str = ""
    callable: bool = True

    def walk(self) -> Iterator[UnitTree]:
        """Every node of the subtree, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def is_gathered(self) -> bool:
        """An embedding table, of which a step reads a few rows.

        A matrix: the frequencies of a ``RotaryEmbedding`` are read whole.
        """
        named = not self.children and "embedding" in self.kind.lower()
        return named and any(len(spec.shape) > 1 for spec in self.tensors.values())

    def own_units(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Part tensors that are in no unit into units, by name: those of one module together, as its forward needs all.

        One alone, or one that modules below share, is a unit of its own name; several are the module's path and ``*``.
        """
        units: dict[str, tuple[str, ...]] = {}
        for node in self.walk():
            loose = [name for name in node.tensors if name in names]
            own = tuple(name for name in loose if node._below(name) is None)
            if len(own) > 1:
                units[f"{node.name}.*".lstrip(".")] = own
            units.update((name, (name,)) for name in loose if name not in own or len(own) == 1)
        return units

    def at_once(self, unit_of: Mapping[str, str]) -> int:
        """How many units are entered and not left at most, as they run inside of each other; given by tensor.

        A tensor that several modules share counts at the one that it is named after.
        """
        held: dict[str, set[str]] = {}
        for node in self.walk():
            for name in node.tensors:
                if name in unit_of:
                    held.setdefault(node._holder(name).name, set()).add(unit_of[name])

        def most(node: UnitTree, entered: frozenset[str]) -> int:
            entered |= held.get(node.name, frozenset())
            return max([len(entered), *(most(child, entered) for child in node.children)])

        return most(self, frozenset())

    def _below(self, name: str) -> UnitTree | None:
        """The child that a tensor is named after."""
        return next((child for child in self.children if name.startswith(f"{child.name}.")), None)

    def _holder(self, name: str) -> UnitTree:
        below = self._below(name)
        return self if below is None else below._holder(name)

    def specs(self) -> dict[str, TensorSpec]:
        """All tensors of the subtree in its order.

        Raises
        ------
        PlanError
            A tensor, or a module path, that stands twice.
        """
        specs: dict[str, TensorSpec] = {}
        home: dict[str, str] = {}
        paths: set[str] = set()
        for node in self.walk():
            if node.name in paths:
                raise PlanError(f'the module path "{node.name}" stands twice in the tree; paths are unique')
            paths.add(node.name)
            for name, spec in node.tensors.items():
                if name in specs:
                    raise PlanError(
                        f'the tensor "{name}" stands in the modules "{home[name]}" and "{node.name}"; a '
                        "shared tensor stands once, at the lowest module that has both below it"
                    )
                specs[name] = spec
                home[name] = node.name
        return specs

    def gathered(self) -> frozenset[str]:
        """Names of the tensors of all embeddings in the subtree."""
        return frozenset(name for node in self.walk() if node.is_gathered for name in node.tensors)


_TOKEN = re.compile(r"[^./\[\]'\"]+[\]'\"]*")
_NUMBERED = re.compile(r"(.*_)?\d+")
# "embed_tokens", "word_embeddings", "wte", but not the heads "unembed" and "embed_out"
_EMBEDDING = re.compile(r"(?i)(?:(?<!un)embed(?!_?out)|^w[tp]e$)")


@dataclass(slots=True)
class _Draft:
    name: str = ""
    token: str = ""
    spec: TensorSpec | None = None
    below: dict[str, _Draft] = field(default_factory=dict)

    def nbytes(self) -> int:
        return (self.spec.nbytes if self.spec else 0) + sum(d.nbytes() for d in self.below.values())

    def repeats(self) -> bool:
        """Whether children are numbered: "0", "1"; or most bytes lie in those of one stem: "h_0", "h_1"."""
        stems: dict[str, list[_Draft]] = {}
        for child in self.below.values():
            if found := _NUMBERED.fullmatch(child.token):
                if found.group(1) is None:
                    return True
                stems.setdefault(found.group(1), []).append(child)
        half = self.nbytes() / 2
        return any(len(same) > 1 and sum(d.nbytes() for d in same) > half for same in stems.values())

    def freeze(self, parent: str) -> UnitTree:
        tensor = self.spec is not None and not self.below
        embedding = (
            self.spec is not None
            and len(self.spec.shape) == 2
            and any(_EMBEDDING.search(token) for token in (parent, self.token))
        )
        return UnitTree(
            self.name,
            {self.name: self.spec} if self.spec is not None else {},
            tuple(child.freeze(self.token) for child in self.below.values()),
            repeated=self.repeats(),
            kind="Embedding" if tensor and embedding else "",
        )


def tree_of_names(specs: Mapping[str, TensorSpec]) -> UnitTree:
    """Build the tree that the names suggest: paths separated by dots, slashes or brackets, one leaf a tensor.

    A node with numbered children ("layers.3", "layers/3", "layers_3", "['layers'][3]") is a repeated
    container, and a matrix named like an embedding is taken for one. Who knows the modules should build the
    `UnitTree` from them.
    """
    root = _Draft()
    for name, spec in specs.items():
        at = root
        for found in _TOKEN.finditer(name):
            token = found.group()
            at = at.below.setdefault(token, _Draft(name[: found.end()], token.rstrip("]'\"")))
        if at.spec is not None or (at is root and name):  # "a.b" beside "a/b", or nothing but separators
            at = root.below.setdefault(name, _Draft(token=name))
        at.spec = spec
        at.name = name
    return root.freeze("")
