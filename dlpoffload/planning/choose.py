"""From a module tree to units: which modules are staged as one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import PlanError
from ..spec import ALIGNMENT, TensorSpec, aligned, parse_nbytes
from .request import CostModel, Unit, checked_slots
from .tree import UnitTree

__all__ = ["choose_units", "matches_path"]


def choose_units(
    tree: UnitTree,
    device_budget: int | str,
    slots: int = 2,
    *,
    units: Sequence[str] | None = None,
    cost: CostModel | None = None,
    elsewhere: Collection[str] = (),
) -> list[Unit]:
    """Choose the modules that are staged as one: no unit lies inside another, with all tensors below it.

    - The elements of the outermost repeated containers, at any depth, are the first candidates, and so is
      what lies outside all containers.
    - A mixture is split down to its experts, one unit each: a step reads a few of them.
    - What does not fit `slots` times into the budget is split into its children, again and again. So is a
      nest of blocks, such as a stage of a U-Net, when the ring would take more than a quarter of the budget.
    - Outside the containers, what is larger than the largest of their units would enlarge the ring for
      everybody: it is split, and a single module that is larger stays loose.
    - Embeddings stay loose, and so does what is too small for a copy of its own: below
      `CostModel.small_nbytes` and 1/64 of the largest unit.

    Parameters
    ----------
    tree : UnitTree
        The root.
    device_budget : int or str
        Bytes, or such as ``"20GiB"``.
    slots : int
        Slots of the ring.
    units : sequence of str, optional
        Patterns on module paths that say exactly which modules are units. Segments are matched one by one
        (`fnmatch`, case matters), ``**`` stands for any number of them: ``"model.layers.*"``,
        ``"**.experts.*"``.
    cost : CostModel, optional
        Its `small_nbytes` is used.
    elsewhere : collection of str
        Names of tensors of the same model in no part of this tree. A pattern may match their modules only.

    Returns
    -------
    list of Unit
        Named by module path, in the order of the tree. Tensors in none of them are loose.

    Raises
    ------
    PlanError
        The tree holds no tensor; a pattern matches nothing, a module inside another's match, or one that is
        never called.
    """
    budget = parse_nbytes(device_budget, "device_budget")
    slots = checked_slots(slots)
    chooser = _Chooser(tree)
    if not chooser.specs:
        raise PlanError(
            f'the module "{tree.name}" ({tree.kind or "of unknown kind"}) has no tensors, so there is '
            "nothing to offload; call it as it is"
        )
    if units is not None:
        return [chooser.unit(node) for node in _named(tree, units, chooser, elsewhere)]
    small = (cost or CostModel()).small_nbytes
    return [chooser.unit(node) for node in chooser.choose(budget // slots // ALIGNMENT * ALIGNMENT, small)]


@dataclass(frozen=True, slots=True)
class _Measure:
    """Figures of a subtree, in bytes as they lie in a slab."""

    nbytes: int
    gathered: int
    blocks: int
    """In composite elements of repeated containers."""
    experts: int
    """In lists of experts."""
    has_container: bool
    """It is or holds a repeated container that holds tensors."""


class _Chooser:
    def __init__(self, tree: UnitTree) -> None:
        self.tree = tree
        self.specs: dict[str, TensorSpec] = tree.specs()
        self.of: dict[str, _Measure] = {}
        self._measure(tree)

    def _measure(self, node: UnitTree) -> _Measure:
        below = [self._measure(child) for child in node.children]
        nbytes = sum(aligned(spec.nbytes) for spec in node.tensors.values()) + sum(m.nbytes for m in below)
        measure = self.of[node.name] = _Measure(
            nbytes,
            nbytes if node.is_gathered else sum(m.gathered for m in below),
            sum(m.nbytes for child, m in zip(node.children, below, strict=True) if self._holds_modules(child))
            if node.repeated
            else sum(m.blocks for m in below),
            nbytes if self._is_experts(node) else sum(m.experts for m in below),
            (node.repeated and nbytes > 0) or any(m.has_container for m in below),
        )
        return measure

    def _holds_modules(self, node: UnitTree) -> bool:
        # in a tree of names every tensor has a node, which is no module
        return any(self.of[child.name].nbytes and child.name not in child.tensors for child in node.children)

    def _is_experts(self, node: UnitTree) -> bool:
        """A list named after experts, whose elements are of one kind and hold equal specs."""
        last = re.split(r"[./\[]", node.name)[-1].lower()
        if not node.repeated or "expert" not in last or len(node.children) < 2:
            return False
        shapes = {(child.kind, tuple(child.specs().values())) for child in node.children}
        return len(shapes) == 1

    def unit(self, node: UnitTree) -> Unit:
        return Unit(node.name, tuple(node.specs()))

    # ------------------------------------------------------------------------------------ candidates
    def choose(self, limit: int, small: int) -> list[UnitTree]:
        """Nodes that become units, given the largest slot that the budget allows."""
        found = self._within(limit)
        # A few modules too large for any slot stay loose. If they are most of the model, that would be
        # offloading in name only, so they are units, as fine as can be, and the plan says what they need.
        too_large = self._sum(node for node, _ in found if self.of[node.name].nbytes > limit)
        if 2 * too_large > self._sum(node for node, _ in found):
            found = self._within(0)
        else:
            found = [(node, inside) for node, inside in found if self.of[node.name].nbytes <= limit]
        slot = max((self.of[node.name].nbytes for node, _ in found), default=0)
        tiny = min(small, slot // 64)
        return [node for node, _ in found if self.of[node.name].nbytes >= max(tiny, 1)]

    def _within(self, limit: int) -> list[tuple[UnitTree, bool]]:
        found = list(self._candidates(self.tree, False, limit))
        inside = [node for node, is_inside in found if is_inside]
        if 2 * self._sum(inside) < self._sum(node for node, _ in found):
            return found
        slot = max((self.of[node.name].nbytes for node in inside), default=0)
        fitted: list[tuple[UnitTree, bool]] = []
        for node, is_inside in found:
            if is_inside:
                fitted.append((node, True))
                continue
            parts = self._candidates(node, False, min(slot, limit))
            fitted += [(part, False) for part, _ in parts if self.of[part.name].nbytes <= slot]
        return fitted

    def _sum(self, nodes: Iterator[UnitTree] | Sequence[UnitTree]) -> int:
        return sum(self.of[node.name].nbytes for node in nodes)

    def _candidates(self, node: UnitTree, inside: bool, limit: int) -> Iterator[tuple[UnitTree, bool]]:
        """Split a subtree; with each part, whether it lies inside a repeated container."""
        measure = self.of[node.name]
        if not measure.nbytes or node.is_gathered:
            return
        below = sum(self.of[child.name].nbytes for child in node.children)
        if (not inside and measure.has_container) or self._must_split(node, measure, limit, below):
            for child in node.children:
                yield from self._candidates(child, inside or node.repeated, limit)
        elif node.callable:
            yield node, inside

    def _must_split(self, node: UnitTree, measure: _Measure, limit: int, below: int) -> bool:
        return (
            not node.callable
            # a module's own tensors are loose once it is split: no gain when they are most of it
            or (measure.nbytes > limit and 2 * below >= measure.nbytes)
            or 2 * measure.gathered >= measure.nbytes
            or 2 * measure.experts > measure.nbytes
            or (2 * measure.blocks > measure.nbytes and 4 * measure.nbytes > limit)
        )


def _named(tree: UnitTree, patterns: Sequence[str], chooser: _Chooser, elsewhere: Collection[str]) -> list[UnitTree]:
    """Nodes that the patterns name, in the order of the tree."""
    if isinstance(patterns, str):
        raise PlanError(f'units="{patterns}" is one string; pass a list of patterns: ["{patterns}"]')
    nodes = [node for node in tree.walk() if chooser.of[node.name].nbytes]
    parts = [_segments(name) for name in elsewhere]
    paths = {tuple(segments[:length]) for segments in parts for length in range(len(segments))}
    chosen: dict[str, UnitTree] = {}
    for pattern in patterns:
        matched = [node for node in nodes if matches_path(pattern, node.name)]
        if not matched and not any(_matches(_segments(pattern), list(path)) for path in paths):
            near = ", ".join(f'"{node.name}"' for node in nodes[1:4])
            raise PlanError(
                f'the pattern "{pattern}" matches none of the {len(nodes)} modules with tensors, such as '
                f'{near}; "*" stands for one segment of a path, "**" for any number'
            )
        for node in matched:
            if not node.callable:
                why = ", or which is split over devices" if elsewhere else ""
                raise PlanError(
                    f'the pattern "{pattern}" matches "{node.name}" ({node.kind}), whose forward is never '
                    f'called{why}, so it cannot be a unit; match its elements: "{node.name}.*"'
                )
            chosen[node.name] = node
    for node in chosen.values():
        for other in node.walk():
            if other is not node and other.name in chosen:
                raise PlanError(
                    f'the patterns {", ".join(patterns)} match "{other.name}" and "{node.name}", which '
                    "contains it; units cannot be nested"
                )
    return [node for node in nodes if node.name in chosen]


def matches_path(pattern: str, path: str) -> bool:
    """Whether a pattern, as `choose_units` takes them, matches a module path."""
    return _matches(_segments(pattern), _segments(path))


def _segments(path: str) -> list[str]:
    return re.split(r"[./]", path) if path else []


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])
