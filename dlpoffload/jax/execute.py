"""Run the steps of a program, with the copies that its schedule puts between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from .origins import scan_counts
from .program import Atom, Id, Program, Step, Value
from .report import ProgramReport
from .scans import staged_scan
from .schedule import Copy, Schedule
from .staging import computed_type, put, tie, tied_together

__all__ = ["apply_equation", "execute", "inlined", "summary"]


def execute(
    program: Program, schedule: Schedule, consts: Sequence[Any], values: Sequence[Any], slots: int
) -> list[Any]:
    """Run a program. Under a trace this is what writes the staged program down."""
    run = _Run(program, schedule, consts, values, slots)
    for index, window in enumerate(schedule.windows):
        run.copy_before(index)
        for step in program.steps[window.start : window.end]:
            run.step(step, schedule.copy_of[index])
        run.release(index)
    return [run.output(atom) for atom in program.outputs]


def apply_equation(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """Apply one equation of a jaxpr, in the context that it was traced in.

    Source: JAX documentation, "Writing custom Jaxpr interpreters in JAX".
    """
    primitive = equation.primitive
    with equation.ctx.manager:
        made = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
    return list(made) if primitive.multiple_results else [made]


def inlined(jaxpr: Any) -> Callable[..., list[Any]]:
    """A function that applies a jaxpr's equations one by one, those of the calls in it too; nothing is staged."""

    def run(*arguments: Any) -> list[Any]:
        known = dict(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            inner = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
            if inner is None:
                made = apply_equation(equation, inputs)
            else:
                joined = inner.jaxpr.replace(constvars=[], invars=[*inner.jaxpr.constvars, *inner.jaxpr.invars])
                made = inlined(joined)(*inner.consts, *inputs)
            known.update(zip(equation.outvars, made, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    return run


class _Run:
    def __init__(
        self,
        program: Program,
        schedule: Schedule,
        consts: Sequence[Any],
        values: Sequence[Any],
        slots: int,
    ) -> None:
        self.program = program
        self.schedule = schedule
        self.slots = slots
        self.known: dict[Id, Any] = dict(zip(program.constants, consts, strict=True))
        self.known.update(zip(program.arguments, values, strict=True))
        self.host = [self.known[argument] for argument in program.arguments]
        self.staged: dict[tuple[Copy, int], Any] = {}
        self.ends = _ends(schedule)
        self.last_use: dict[Id, int] = {}
        self.window_of: dict[Id, int] = {}
        for at, window in enumerate(schedule.windows):
            for index in range(window.start, window.end):
                step = program.steps[index]
                self.last_use.update((atom, index) for atom in step.inputs if isinstance(atom, Id))
                self.window_of.update((made, at) for made in step.outputs)
        self.last_use.update((atom, len(program.steps)) for atom in program.outputs if isinstance(atom, Id))

    # ------------------------------------------------------------------------------------------ copies
    def copy_before(self, index: int) -> None:
        """Make the copies whose slots are free from this window on, behind the results of their former readers."""
        for copy in self.schedule.copies:
            if copy.boundary == index:
                weights = sorted(copy.weights)
                tied = self.behind(copy.behind, index, [self.host[weight] for weight in weights])
                self.staged.update(((copy, weight), array) for weight, array in zip(weights, put(tied), strict=True))

    def behind(self, first: int | None, index: int, weights: list[Any]) -> list[Any]:
        """Weights that are read only once what the windows from `first` to before `index` have computed is there."""
        if first is None:
            return weights
        start = self.schedule.windows[index].start
        results = [
            made
            for made, window in self.window_of.items()
            if first <= window < index and self.last_use.get(made, -1) >= start and computed_type(self.known[made])
        ]
        # Outside of a trace there is no program whose memory XLA plans: wait, or the copy gets more of it.
        values = [self.known[made] for made in results]
        jax.block_until_ready([value for value in values if not isinstance(value, jax.core.Tracer)])
        tied, held = tie(weights, values)
        self.known.update(zip(results, held, strict=True))
        return tied

    def release(self, index: int) -> None:
        """Drop the copies that no later window reads: outside of a trace they are the device's memory."""
        for copy in self.schedule.copy_of[index].values():
            if self.ends[copy] == index:
                for weight in copy.weights:
                    del self.staged[copy, weight]

    # ------------------------------------------------------------------------------------------- steps
    def step(self, step: Step, copies: Mapping[str, Copy]) -> None:
        if step.stacks:
            made = self._scan(step)
        else:
            inputs = [self.input(atom, copies) for atom in step.inputs]
            made = tied_together(inputs) if step.equation is None else apply_equation(step.equation, inputs)
        self.known.update(zip(step.outputs, made, strict=True))

    def input(self, atom: Atom, copies: Mapping[str, Copy]) -> Any:
        if isinstance(atom, Value):
            return atom.value
        base = self.program.bases.get(atom)
        if base is None:
            return self.known[atom]
        return self._form(atom, self.staged[copies[self.program.homes[base].unit], base])

    def output(self, atom: Atom) -> Any:
        if isinstance(atom, Value):
            return atom.value
        base = self.program.bases.get(atom)
        if base is None:
            return self.known[atom]
        if atom not in self.program.forms:
            return self.host[base]
        return self._form(atom, put([self.host[base]])[0])

    def _form(self, atom: Id, value: Any) -> Any:
        for equation in self.program.chain(atom):
            (value,) = apply_equation(equation, [value])
        return value

    def _scan(self, step: Step) -> list[Any]:
        params = step.equation.params
        consts, carries, _ = scan_counts(params)
        scanned = step.inputs[consts + carries :]
        stacked = [i for i, atom in enumerate(scanned) if isinstance(atom, Id) and atom in self.program.bases]
        plain = [i for i in range(len(scanned)) if i not in stacked]
        atoms = [scanned[i] for i in stacked]
        body = core.jaxpr_as_fun(params["jaxpr"])

        def turn(state: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
            given: list[Any] = [None] * len(scanned)
            for i, row in zip(plain, rows, strict=False):
                given[i] = row
            for i, atom, row in zip(stacked, atoms, rows[len(plain) :], strict=True):
                assert isinstance(atom, Id)
                given[i] = self._form(atom, row)
            made = body(*fixed, *state, *given)
            return list(made[:carries]), list(made[carries:])

        # First: what is read below is what has gone through the barrier.
        index = self.window_of[step.outputs[0]] if step.outputs else 0
        stacks = self.behind(0, index, [self.host[self.program.bases[a]] for a in atoms if isinstance(a, Id)])
        fixed = [self.input(atom, {}) for atom in step.inputs[:consts]]
        state, outputs = staged_scan(
            turn,
            [self.input(atom, {}) for atom in step.inputs[consts : consts + carries]],
            [self.input(scanned[i], {}) for i in plain],
            stacks,
            params["jaxpr"].out_avals[carries:],
            length=params["length"],
            reverse=params["reverse"],
            slots=self.slots,
        )
        return [*state, *outputs]


def _ends(schedule: Schedule) -> dict[Copy, int]:
    """The last window that reads each copy."""
    return {copy: index for index, known in enumerate(schedule.copy_of) for copy in known.values()}


def summary(program: Program, schedule: Schedule, slots: int, name: str) -> ProgramReport:
    """What a program copies at each call."""
    units: list[str] = []
    copies = copied = most = 0
    ends = _ends(schedule)
    for index, window in enumerate(schedule.windows):
        alive = 0
        for copy in schedule.copies:
            nbytes = sum(program.homes[weight].spec.nbytes for weight in copy.weights)
            if copy.boundary == index:
                units.append(copy.unit)
                copies += len(copy.weights)
                copied += nbytes
            alive += nbytes if copy.boundary <= index <= ends[copy] else 0
        for step in program.steps[window.start : window.end]:
            homes = [program.homes[stack] for stack in step.stacks]
            copies += sum(home.rows for home in homes)
            copied += sum(home.spec.nbytes for home in homes)
            alive += sum(home.spec.nbytes // home.rows * min(slots, home.rows) for home in homes)
        most = max(most, alive)
    return ProgramReport(name, copies, copied, tuple(units), most)
