"""Functions whose staged weights pass through a ring while they run: traced, scheduled, and run anew with copies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ..errors import GradientError, SpecError
from .execute import apply_equation, execute, inlined, summary
from .leaves import names_of
from .placing import Home
from .program import Id, Program, flatten
from .report import ProgramReport
from .schedule import schedule
from .staging import computed_type, on_device, tie

__all__ = ["Staging", "Weights", "run_streamed", "streamed"]


@dataclass(frozen=True, slots=True)
class Staging:
    """What a handle knows of its leaves, by name, and whom it tells of a program."""

    homes: Mapping[str, Home]
    tied: Mapping[str, str]
    slots: int
    traced: Callable[[ProgramReport], None]


@dataclass(frozen=True, slots=True)
class Weights:
    """Which arguments of a flat function are weights that are not on the device.

    Attributes
    ----------
    homes : mapping of int to Home
        Of staged arguments.
    frozen : mapping of int to str
        Names of arguments that have no gradient: staged and mapped.
    same : mapping of int to int
        Arguments that are another one again.
    slots : int
    """

    homes: Mapping[int, Home]
    frozen: Mapping[int, str]
    same: Mapping[int, int]
    slots: int

    def shifted(self, count: int) -> Weights:
        """The same for a function with `count` arguments before."""
        return Weights(
            {i + count: home for i, home in self.homes.items()},
            {i + count: name for i, name in self.frozen.items()},
            {i + count: j + count for i, j in self.same.items()},
            self.slots,
        )


def streamed(fun: Callable[..., Any], staging: Staging, argnum: int) -> Callable[..., Any]:
    """See `OffloadHandle.streamed`."""

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not -len(args) <= argnum < len(args):
            raise SpecError(
                f"argnum={argnum}, but the function is called with {len(args)} positional arguments; the tree is taken "
                "by position, not by keyword"
            )
        at = argnum % len(args)
        names, values, structure = names_of(args[at])
        weights = _weights(names, values, staging)
        others, other_structure = jax.tree.flatten((args[:at], args[at + 1 :], kwargs))

        def flat(*leaves: Any) -> Any:
            tree = jax.tree.unflatten(structure, leaves[: len(values)])
            before, after, keywords = jax.tree.unflatten(other_structure, leaves[len(values) :])
            return fun(*before, tree, *after, **keywords)

        name = getattr(fun, "__name__", type(fun).__name__)
        return run_streamed(flat, [*values, *others], weights, name, staging.traced)

    return call


def _weights(names: Sequence[str], values: Sequence[Any], staging: Staging) -> Weights:
    known = {name for name in names if name in staging.homes}
    if known != staging.homes.keys():
        missing = sorted(staging.homes.keys() - known)
        raise SpecError(
            f"the argument is not the offloaded tree: it lacks {len(missing)} of {len(staging.homes)} leaves, such as "
            f'"{missing[0]}"; pass the tree that offload or update gave, or name its position by argnum='
        )
    homes: dict[int, Home] = {}
    frozen: dict[int, str] = {}
    same: dict[int, int] = {}
    first: dict[str, int] = {}
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        home = staging.homes.get(name)
        if home is None or home.placement == "device":
            continue
        found = getattr(value, "dtype", type(value).__name__)
        if tuple(np.shape(value)) != home.spec.shape or str(found) != home.spec.dtype.name:
            raise SpecError(f'"{name}" was offloaded as {home.spec}, but is {found}{list(np.shape(value))} here')
        frozen[index] = name
        if home.placement == "host_staged":
            homes[index] = home
            same[index] = first.setdefault(staging.tied[name], index)
    return Weights(homes, frozen, same, staging.slots)


def run_streamed(
    flat: Callable[..., Any],
    leaves: Sequence[Any],
    weights: Weights,
    name: str,
    traced: Callable[[ProgramReport], None],
) -> Any:
    """Run a function of flat leaves with its weights staged; leaves that are no arrays are constants of the trace.

    Raises
    ------
    SpecError
        Weights are constants of a program that is traced around this.
    """
    closed_over = [what for i, what in weights.frozen.items() if not isinstance(leaves[i], jax.core.Tracer)]
    # An iota is made on the device: nothing is transferred, which a guard may forbid.
    if closed_over and isinstance(jax.lax.iota("int32", 1), jax.core.Tracer):
        raise SpecError(
            f"{len(closed_over)} offloaded leaves ({_listed(closed_over)}) are closed over by a function that jax.jit "
            "traces: they would become constants of its program, on the device, all of them; pass the tree as an "
            "argument of that function"
        )
    moving = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | np.generic)]
    position = {index: i for i, index in enumerate(moving)}
    values = [leaves[index] for index in moving]

    def of_arrays(*arrays: Any) -> Any:
        whole = list(leaves)
        for index, array in zip(moving, arrays, strict=True):
            whole[index] = array
        return flat(*whole)

    inner = Weights(
        {position[i]: home for i, home in weights.homes.items()},
        {position[i]: what for i, what in weights.frozen.items()},
        {position[i]: position[j] for i, j in weights.same.items()},
        weights.slots,
    )
    return _Streamed(of_arrays, values, inner, name, traced).run(values)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names[:3]) + (" …" if len(names) > 3 else "")


class _Streamed:
    """A function of arrays, traced for arguments of these types with all of them on the device."""

    def __init__(
        self,
        fun: Callable[..., Any],
        values: Sequence[Any],
        weights: Weights,
        name: str,
        traced: Callable[[ProgramReport], None],
    ) -> None:
        _check_manual(values)
        types = [on_device(value) for value in values]
        self.closed, shape = jax.make_jaxpr(fun, return_shape=True)(*types)
        _check_manual(self.closed.consts)
        self.structure = jax.tree.structure(shape)
        self.weights = weights
        self.name = name
        self.traced = traced
        self.program: Program = flatten(self.closed, weights.homes, weights.same)

    def run(self, values: Sequence[Any]) -> Any:
        # Constants of the trace may be tracers of a derivative around us, so they are arguments to what has its own.
        consts = list(self.closed.consts)
        return jax.tree.unflatten(self.structure, _differentiable(self, len(consts))(*consts, *values))

    def outputs(self, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Run it, staged."""
        plan = schedule(self.program, self.weights.slots)
        self.traced(summary(self.program, plan, self.weights.slots, self.name))
        return execute(self.program, plan, consts, values, self.weights.slots)


def _check_manual(values: Sequence[Any]) -> None:
    """Refuse values whose type says over which axes of a `shard_map` they vary: the trace knows none of them."""
    for value in values:
        kind = jax.typeof(value)
        varying = getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", ())
        if varying:
            raise SpecError(
                f"a streamed function is given a {kind}, which varies over {_listed(sorted(map(str, varying)))} of a "
                "jax.shard_map around it; pass check_vma=False to that shard_map"
            )


def _differentiable(streamed: _Streamed, count: int) -> Callable[..., list[Any]]:
    """A streamed function with a derivative that is streamed as well, backwards; `count` constants come first."""

    def run(*arguments: Any) -> list[Any]:
        return streamed.outputs(arguments[:count], arguments[count:])

    def forward(*arguments: Any) -> tuple[list[Any], Any]:
        asked = tuple(i for i, argument in enumerate(arguments) if argument.perturbed)
        wrong = [streamed.weights.frozen[i - count] for i in asked if i - count in streamed.weights.frozen]
        if wrong:
            raise GradientError(
                f"a gradient is asked for {len(wrong)} offloaded leaves ({_listed(wrong)}), which would be as large as "
                "they are, on the device; differentiate with respect to inputs and adapters, or keep those leaves on "
                "the device"
            )
        return _forward(streamed, count, [argument.value for argument in arguments], asked)

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        pulled: tuple[Any, ...] = residuals(cotangents)
        return pulled

    differentiable: Any = jax.custom_vjp(run)
    differentiable.defvjp(forward, backward, symbolic_zeros=True)
    result: Callable[..., list[Any]] = differentiable
    return result


def _forward(
    streamed: _Streamed, count: int, values: Sequence[Any], asked: tuple[int, ...]
) -> tuple[list[Any], jax.tree_util.Partial]:
    """Run forward, staged, and keep what the backward pass needs: of staged leaves not the copy, but the leaf."""
    jaxpr = streamed.closed.jaxpr
    joined = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    whole = inlined(joined)  # a call would save its cast weights for the way back, not the weights

    def linearised(*arguments: Any) -> Any:
        def of(*moved: Any) -> Any:
            merged = list(arguments)
            for i, value in zip(asked, moved, strict=True):
                merged[i] = value
            return whole(*merged)

        return jax.vjp(of, *(arguments[i] for i in asked))

    weights = streamed.weights.shifted(count)
    made = _Streamed(linearised, values, weights, f"{streamed.name} forward", streamed.traced)
    program, first = made.program, len(streamed.closed.out_avals)
    homes: dict[int, Home] = {}
    forms: dict[int, list[Any]] = {}
    for i, atom in enumerate(program.outputs[first:]):
        if isinstance(atom, Id) and atom in program.bases:
            base = program.bases[atom]
            homes[i], forms[i] = program.homes[base], program.chain(atom)
            program.outputs[first + i] = program.arguments[base]
    out, pull = made.run(values)
    residuals = jax.tree.leaves(pull)
    # The function itself is static: it holds no arrays, but what the trace knows of them.
    backward = functools.partial(
        _backward, streamed, made.structure.children()[1], forms, homes, asked, count + len(jaxpr.invars)
    )
    return out, jax.tree_util.Partial(backward, *residuals)


def _backward(
    streamed: _Streamed,
    structure: Any,
    forms: Mapping[int, list[Any]],
    homes: Mapping[int, Home],
    asked: tuple[int, ...],
    arguments: int,
    *flat: Any,
) -> tuple[Any, ...]:
    """Run backward, staged in the order in which it needs weights."""
    *residuals, cotangents = flat
    types = streamed.closed.out_avals
    moving = [i for i, kind in enumerate(types) if jax.numpy.issubdtype(kind.dtype, jax.numpy.inexact)]
    given = [_instantiated(cotangents[i]) for i in moving]
    # The ring of the way back opens when that of the way there is through, or both would be on the device at once. The
    # cotangents alone do not say so: that of a loss is the constant one.
    staged = list(homes)
    kept = [i for i, value in enumerate(residuals) if i not in homes and computed_type(value)]
    tied, held = tie([residuals[i] for i in staged], [*(residuals[i] for i in kept), *given])
    for i, value in zip([*staged, *kept], [*tied, *held], strict=False):
        residuals[i] = value
    given = held[len(kept) :]

    def back(*leaves: Any) -> Any:
        restored = list(leaves[: len(residuals)])
        for i, chain in forms.items():
            for equation in chain:
                (restored[i],) = apply_equation(equation, [restored[i]])
        pull = jax.tree.unflatten(structure, restored)
        full: list[Any] = [np.zeros(kind.shape, jax.dtypes.float0) for kind in types]
        for i, value in zip(moving, leaves[len(residuals) :], strict=True):
            full[i] = value
        return pull(full)

    weights = Weights(homes, {}, {}, streamed.weights.slots)
    name = f"{streamed.name} backward"
    try:
        pulled = _Streamed(back, [*residuals, *given], weights, name, streamed.traced)
    except NameError as error:
        unbound = _unbound(streamed.closed.effects)
        if not unbound:
            raise
        raise GradientError(
            f"the axis {_listed(unbound)} is named by a streamed function inside of a jax.vmap, and the derivative is "
            "taken around both: JAX runs the way back outside of that jax.vmap; take the derivative inside of it, or "
            "put the jax.vmap inside of handle.streamed"
        ) from error
    result: list[Any] = [None] * arguments
    for i, value in zip(asked, pulled.run([*residuals, *given]), strict=True):
        result[i] = value
    return tuple(result)


def _unbound(effects: Iterable[Any]) -> list[str]:
    """The names of axes that a program uses (psum) and that are not there now."""
    names = []
    for axis in [effect.name for effect in effects if hasattr(effect, "name")]:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            names.append(str(axis))
    return sorted(names)


def _instantiated(cotangent: Any) -> Any:
    if isinstance(cotangent, SymbolicZero):
        return jax.numpy.zeros(cotangent.aval.shape, cotangent.aval.dtype)
    return cotangent
