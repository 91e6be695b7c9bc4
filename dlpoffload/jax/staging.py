"""The one way in which weights reach the device inside a program: tied by a barrier, then put.

Source: `jax.lax.optimization_barrier` ("prevents the compiler from moving operations across it"), and
`jax.memory.Space`, memory as a part of an array's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import jax

__all__ = ["COMPILER_OPTIONS", "computed_type", "on_device", "put", "tie", "tied_together"]


COMPILER_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({"xla_gpu_graph_min_graph_size": 2**31 - 1})
"""For ``jax.jit(…, compiler_options=dict(COMPILER_OPTIONS))``: copies inside a scan run beside its compute.

XLA puts a loop into one CUDA graph, and there each operation waits for the one before, copies for compute too [H100,
jax 0.11.2, by a profile]. A program of this least size is never reached, so that nothing is put into a graph.
"""


def put(weights: Sequence[Any]) -> list[Any]:
    """Copies on the device, of what lies in host memory."""
    return [jax.device_put(weight, jax.memory.Space.Device) for weight in weights]


def tie(weights: Sequence[Any], results: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The same values, with the weights to be read only when the results are there.

    What computes on goes through the barrier too: XLA takes results that nobody uses behind it out of the barrier
    again (AlgebraicSimplifier::HandleOptimizationBarrier).
    """
    if not weights or not results:
        return list(weights), list(results)
    tied = jax.lax.optimization_barrier((tuple(weights), tuple(results)))
    return list(tied[0]), list(tied[1])


def tied_together(values: Sequence[Any]) -> list[Any]:
    """The same values, none of which is there before all are."""
    held = list(values)
    through = [i for i, value in enumerate(held) if computed_type(value)]
    for i, value in zip(through, jax.lax.optimization_barrier([held[i] for i in through]), strict=True):
        held[i] = value
    return held


def on_device(value: Any) -> jax.ShapeDtypeStruct:
    """The type of a value once it is on the device; weakly typed as it was."""
    kind = jax.typeof(value)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=getattr(kind, "weak_type", False))


def computed_type(value: Any) -> bool:
    """Whether a value can go through a barrier: numbers can, keys, tokens and zeros without bits cannot."""
    kind = getattr(jax.typeof(value), "dtype", None)
    return kind is not None and kind != jax.dtypes.float0 and not jax.dtypes.issubdtype(kind, jax.dtypes.extended)
