"""What the values of a program are made of: weights alone, weights and something else, activations.

A value that is as good as a weight must not be kept on the device. It is followed from what makes it through everything
that leaves its size, into the bodies of scans and calls, until a product, a look-up or a reduction makes an activation.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from enum import Flag, auto
from typing import Any, Final

from jax.extend import core

__all__ = ["CALLS", "FORMS", "Origin", "origins", "scan_counts"]

CALLS: Final = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Calls that are their body, and the parameter that has it."""
FORMS: Final = {"convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p"}
"""Changes of form: the same elements."""
_MERGES: Final = {
    *("add", "add_any", "sub", "mul", "div", "max", "min", "select_n"),
    *("dynamic_update_slice", "scatter", "scatter-add"),
}
"""What makes a weight and something else one tensor of the weight's shape."""
_POINTWISE: Final = {
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "conj", "cos"),
    *("cosh", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag", "integer_pow", "is_finite", "log"),
    *("log1p", "logistic", "neg", "nextafter", "pow", "real", "rem", "round", "rsqrt", "sign", "sin", "sinh", "sqrt"),
    *("square", "tan", "tanh", "and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge", "shift_left"),
    *("shift_right_arithmetic", "shift_right_logical", "bitcast_convert_type", "broadcast_in_dim", "reduce_precision"),
    *("rev", "device_put"),
}
"""What else leaves a tensor as large as it is."""
_PARTS: Final = {"slice", "split", "dynamic_slice", "concatenate"}
"""What takes tensors apart, or puts them together."""


class Origin(Flag):
    """What a value is made of; none of these for an argument that is no weight, and what is made of such alone."""

    CONSTANT = auto()
    WEIGHT = auto()
    """Weights, and nothing else but constants."""
    MATRIX = auto()
    """One of these weights has more than one axis."""
    MERGED = auto()
    """It is as large as a weight, and made of it and something else."""
    ACTIVATION = auto()
    """A product with a weight, or a look-up in one, and what depends on it; also what a turn of a scan hands on."""


_NEITHER: Final = Origin(0)


def origins(equation: Any, inputs: Sequence[Origin]) -> list[Origin]:
    """The origins of an equation's results, by those of its inputs."""
    name = equation.primitive.name
    if name == "scan" or name in CALLS:
        return _of_body(equation, inputs)
    some = functools.reduce(operator.or_, inputs, _NEITHER)
    if all(origin & (Origin.WEIGHT | Origin.CONSTANT) for origin in inputs):
        made = some & (Origin.WEIGHT | Origin.MATRIX) or Origin.CONSTANT
        return [made] * len(equation.outvars)
    leaves_size = name in _MERGES or name in FORMS or name in _POINTWISE
    known = leaves_size or name in _PARTS or name.startswith("reduce_")
    made = some & Origin.ACTIVATION
    if some & (Origin.WEIGHT | Origin.MERGED) and not known:
        made = Origin.ACTIVATION
    typed = list(zip(equation.invars, inputs, strict=True))
    shapes = {v.aval.shape: origin for v, origin in typed if origin & Origin.WEIGHT}
    sizes = {v.aval.size for v, origin in typed if origin & Origin.MERGED}

    def is_merged(result: Any) -> bool:
        of = shapes.get(result.aval.shape) if name in _MERGES else None
        if of is not None and (result.aval.ndim > 1 or of & Origin.MATRIX):
            return True
        # Not behind an activation: a position's embedding that was added to one would make all that follows merged.
        followed = (leaves_size and result.aval.size in sizes) or (name in _PARTS and bool(sizes))
        return followed and not made

    return [made | Origin.MERGED if is_merged(result) else made for result in equation.outvars]


def _of_body(equation: Any, inputs: Sequence[Origin]) -> list[Origin]:
    scans = equation.primitive.name == "scan"
    body = equation.params["jaxpr" if scans else CALLS[equation.primitive.name]]
    jaxpr = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    if scans:
        consts, carries, _ = scan_counts(equation.params)
        known.update((v, Origin.ACTIVATION) for v in jaxpr.invars[consts : consts + carries])

    def read(variable: Any) -> Origin:
        return Origin.CONSTANT if isinstance(variable, core.Literal) else known.get(variable, Origin.CONSTANT)

    for inner in jaxpr.eqns:
        made = origins(inner, [read(variable) for variable in inner.invars])
        known.update(zip(inner.outvars, made, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int, int]:
    """How many constants, carries and scanned arguments a scan has, by its parameters."""
    if "num_consts" in params:  # JAX 0.10
        consts, carry = params["num_consts"], params["num_carry"]
        return consts, carry, len(params["jaxpr"].in_avals) - consts - carry
    consts, carry, xs = (len(list(part)) for part in params["ft_in"].unpack())  # JAX 0.11
    return consts, carry, xs
