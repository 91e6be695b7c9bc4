"""A traced function as a flat list of steps, with the weights that each of them needs.

Weights are followed through calls: a `jit`, a checkpoint or a custom derivative around several units is taken apart,
so that they need not be on the device at once. Cheap changes of form (a cast, a transposition) are not steps: they are
made again at each use, since their results are as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jax.extend import core

from ..errors import PlanError
from .origins import CALLS, FORMS, Origin, origins, scan_counts
from .placing import Home

__all__ = ["Id", "Program", "Step", "Value", "flatten"]

_PLAIN: Final = {"jit", "pjit", "closed_call", "core_call"}
_REMAT: Final = {"checkpoint", "remat", "remat2"}


@dataclass(frozen=True, slots=True)
class Id:
    """A value that is computed, by number: variables of one jaxpr stand for several values when it is called twice."""

    number: int


@dataclass(frozen=True, slots=True)
class Value:
    """A value that is known: a literal or a constant."""

    value: Any


Atom = Id | Value


@dataclass(slots=True, eq=False)
class Step:
    """One equation; without one, a barrier that keeps XLA from merging a checkpoint's second pass with its first."""

    equation: Any
    inputs: list[Atom]
    outputs: list[Id]
    weights: tuple[int, ...] = ()
    """Arguments that are weights which it reads, itself or through changes of form."""
    stacks: tuple[int, ...] = ()
    """Arguments that are stacks which it scans."""


@dataclass(slots=True)
class Program:
    """Steps in the order of the trace.

    Attributes
    ----------
    homes : mapping of int to Home
        The arguments that are staged.
    forms : dict of Id to (Id, equation)
        Weights in another form: from which value, and how.
    bases : dict of Id to int
        Of which argument each weight, or weight in another form, is made.
    copies : dict of Id to int
        What is computed from weights alone, and its bytes: as good as a copy of them, should it be kept.
    merged : dict of Id to int
        What is as large as a weight and computed from it and something else, such as an adapter; and its bytes. It may
        also be an activation: a position's embedding added to it.
    origins : dict of Id to Origin
        What every result of a step is made of.
    """

    closed: Any
    homes: Mapping[int, Home]
    arguments: list[Id] = field(default_factory=list)
    constants: list[Id] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[Atom] = field(default_factory=list)
    forms: dict[Id, tuple[Id, Any]] = field(default_factory=dict)
    bases: dict[Id, int] = field(default_factory=dict)
    copies: dict[Id, int] = field(default_factory=dict)
    merged: dict[Id, int] = field(default_factory=dict)
    origins: dict[Id, Origin] = field(default_factory=dict)
    _count: int = 0

    def new(self) -> Id:
        self._count += 1
        return Id(self._count)

    def chain(self, atom: Id) -> list[Any]:
        """The equations that make a weight's other form out of it."""
        equations: list[Any] = []
        while atom in self.forms:
            atom, equation = self.forms[atom]
            equations.append(equation)
        return equations[::-1]


def flatten(closed: Any, homes: Mapping[int, Home], same: Mapping[int, int]) -> Program:
    """Take a closed jaxpr apart into steps.

    Parameters
    ----------
    homes
        Which arguments are staged.
    same
        Those of them that are another one again: tied weights.
    """
    program = Program(closed, homes)
    program.constants = [program.new() for _ in closed.jaxpr.constvars]
    program.arguments = [program.new() for _ in closed.jaxpr.invars]
    program.arguments = [program.arguments[same.get(i, i)] for i in range(len(program.arguments))]
    program.bases = {program.arguments[i]: same.get(i, i) for i in homes}
    program.outputs = _inline(program, closed.jaxpr, program.constants, program.arguments)
    return program


def _inline(program: Program, jaxpr: Any, constants: Sequence[Atom], arguments: Sequence[Atom]) -> list[Atom]:
    known: dict[Any, Atom] = dict(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def atom(variable: Any) -> Atom:
        return Value(variable.val) if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        inputs = [atom(variable) for variable in equation.invars]
        outputs = _append(program, equation, inputs)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [atom(variable) for variable in jaxpr.outvars]


def _append(program: Program, equation: Any, inputs: list[Atom]) -> Sequence[Atom]:
    bases = [program.bases.get(atom) if isinstance(atom, Id) else None for atom in inputs]
    weights = list(dict.fromkeys(base for base in bases if base is not None))
    name = equation.primitive.name
    if name in FORMS and len(weights) == 1 and len(inputs) == 1:
        made = program.new()
        assert isinstance(inputs[0], Id)
        program.forms[made] = (inputs[0], equation)
        program.bases[made] = weights[0]
        return [made]
    stacks = [base for base in weights if program.homes[base].rows]
    places = {program.homes[base].unit for base in weights}
    # A plain call is always taken apart: what it makes of weights alone (a cast) may be saved for a backward pass.
    if weights and name in CALLS and (name in _PLAIN or len(places) > 1 or stacks):
        inner = equation.params[CALLS[name]]
        if name in _REMAT and equation.params.get("differentiated") and equation.params.get("prevent_cse"):
            inputs = _barrier(program, inputs)
        constants = [Value(c) for c in inner.consts] if isinstance(inner, core.ClosedJaxpr) else []
        return _inline(program, inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner, constants, inputs)
    outputs = [program.new() for _ in equation.outvars]
    step = Step(equation, inputs, outputs, tuple(weights))
    if stacks:
        step.stacks = _scanned(program, equation, inputs, stacks)
        step.weights = tuple(base for base in weights if base not in stacks)
    program.steps.append(step)
    made_of = origins(equation, [_origin(program, atom) for atom in inputs])
    for made, variable, origin in zip(outputs, equation.outvars, made_of, strict=True):
        # Not a constant any more: a small weight times a table of positions is not a copy of the weight.
        program.origins[made] = origin & ~Origin.CONSTANT
        if origin & (Origin.WEIGHT | Origin.MERGED):
            kept = program.copies if origin & Origin.WEIGHT else program.merged
            kept[made] = variable.aval.size * variable.aval.dtype.itemsize
    return outputs


def _origin(program: Program, atom: Atom) -> Origin:
    if isinstance(atom, Value):
        return Origin.CONSTANT
    base = program.bases.get(atom)
    if base is None:
        return program.origins.get(atom, Origin(0))
    home = program.homes[base]
    return Origin.WEIGHT | Origin.MATRIX if len(home.spec.shape) - bool(home.rows) > 1 else Origin.WEIGHT


def _barrier(program: Program, inputs: Sequence[Atom]) -> list[Atom]:
    """What a checkpoint's second pass starts from, behind a barrier, as JAX itself lowers it."""
    computed = [atom for atom in inputs if isinstance(atom, Id) and atom not in program.bases]
    fresh = {atom: program.new() for atom in computed}
    program.origins.update((made, program.origins[atom]) for atom, made in fresh.items() if atom in program.origins)
    if fresh:
        program.steps.append(Step(None, list(fresh), list(fresh.values())))
    return [fresh.get(atom, atom) if isinstance(atom, Id) else atom for atom in inputs]


def _scanned(program: Program, equation: Any, inputs: Sequence[Atom], stacks: Sequence[int]) -> tuple[int, ...]:
    """The stacks that a scan takes row by row.

    Raises
    ------
    PlanError
        A stack is used as a whole.
    """
    if equation.primitive.name == "scan":
        bases = [program.bases.get(atom) if isinstance(atom, Id) else None for atom in inputs]
        first = sum(scan_counts(equation.params)[:2])
        whole = any(base in stacks for base in bases[:first])
        changed = (program.chain(atom) for atom in inputs if isinstance(atom, Id) and program.bases.get(atom) in stacks)
        if not whole and all(e.primitive.name == "convert_element_type" for chain in changed for e in chain):
            return tuple(stacks)
    where = [program.homes[base].spec for base in stacks]
    raise PlanError(
        f'"{equation.primitive.name}" uses the whole of a stack {where[0]}, which is staged row by row; scan over it '
        "(jax.lax.scan, nnx.scan), leave its path out of stacked=, or, where that scan is inside of this loop or "
        "conditional, call handle.streamed in there"
    )
