"""What XLA made of a program: device memory by its own analysis, and what it computes on the host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["CompiledReport", "inspect_compiled"]

_MOVES: Final = frozenset(
    {
        "parameter", "get-tuple-element", "tuple", "bitcast", "copy", "opt-barrier", "optimization-barrier", "while",
        "call", "conditional", "custom-call", "async", "after-all", "dynamic-slice", "slice", "reshape",
    }
)  # fmt: skip
"""Operations that pass host memory on and compute nothing; their asynchronous forms end in -start, -update, -done."""
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\S+|\([^=]*\)) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")


@dataclass(frozen=True, slots=True)
class CompiledReport:
    """Figures of one compiled program.

    Attributes
    ----------
    temporary_nbytes : int
        Device memory for what is computed on the way: the ring and activations.
    device_argument_nbytes, host_argument_nbytes : int
        Arguments in either memory.
    output_nbytes : int
        Device memory of results that take no argument's place.
    host_computations : tuple of str
        What is computed in host memory ("host compute"), by XLA's names: slow, and never on purpose here.
    """

    temporary_nbytes: int
    device_argument_nbytes: int
    host_argument_nbytes: int
    output_nbytes: int
    host_computations: tuple[str, ...]

    @property
    def device_nbytes(self) -> int:
        """Device memory of the program while it runs, without its code."""
        return self.temporary_nbytes + self.device_argument_nbytes + self.output_nbytes


def inspect_compiled(compiled: Any) -> CompiledReport:
    """Say what a compiled program takes, by ``jax.jit(f).lower(…).compile()``.

    XLA computes on the host what is applied to an array in host memory outside of a streamed function. That is found
    in the compiled program: an operation that is marked for the host, or whose result lies in host memory (``S(5)``).
    """
    memory = compiled.memory_analysis()
    return CompiledReport(
        temporary_nbytes=memory.temp_size_in_bytes,
        device_argument_nbytes=memory.argument_size_in_bytes,
        host_argument_nbytes=memory.host_argument_size_in_bytes,
        output_nbytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        host_computations=host_computations(compiled.as_text()),
    )


def host_computations(text: str) -> tuple[str, ...]:
    """Names of the operations of an HLO module that are computed on the host."""
    moving = _moving_computations(text)
    found: dict[str, None] = {}
    for line in text.splitlines():
        match = _OPERATION.match(line)
        if match is None:
            continue
        name, shape, operation = match.groups()
        kind = _kind(operation)
        called = _CALLED.search(line)
        moves = kind in _MOVES or (kind == "fusion" and called is not None and called.group(1) in moving)
        if '_xla_compute_type="host"' in line or (not moves and "S(5)" in shape):
            found[name] = None
    return tuple(found)


def _kind(operation: str) -> str:
    return operation.removesuffix("-start").removesuffix("-update").removesuffix("-done")


def _moving_computations(text: str) -> frozenset[str]:
    """Computations that only pass memory on: XLA fuses the slice of a stack that it copies to the device."""
    moving: dict[str, bool] = {}
    current = ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            current = head.group(1)
            moving[current] = True
        elif (match := _OPERATION.match(line)) is not None and _kind(match.group(3)) not in _MOVES | {"constant"}:
            moving[current] = False
    return frozenset(name for name, only in moving.items() if only)
