"""A scan over a stack of layers in host memory, whose body finds its layer on the device already.

``slots`` layers are unrolled in the body of one loop; the carry takes ``slots - 1`` staged layers from turn to turn,
and each layer is staged as soon as the last reader of its slot has ended. Unrolling is what spares a copy on the
device: a layer that is staged in one turn and read in the next has to be in the same buffer at the end of both, and
with as many layers a turn as there are slots it is.

The barrier is put on the stack, not on the row: XLA makes one copy of a dynamic slice of host memory that leads
straight to the device, and computes on the host where something stands between (HostOffloader, by its source).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from .staging import put, tie

__all__ = ["staged_scan"]

Body = Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]


def staged_scan(
    body: Body,
    carry: Sequence[Any],
    xs: Sequence[Any],
    stacks: Sequence[Any],
    out_types: Sequence[Any],
    *,
    length: int,
    reverse: bool,
    slots: int,
    unroll: bool,
) -> tuple[list[Any], list[Any]]:
    """Scan `body` over rows of `xs`, which are on the device, and of `stacks`, which are not.

    Parameters
    ----------
    body
        From carry and the rows of all `xs` and then all `stacks` to carry and outputs.
    out_types
        Types of the outputs of one turn.
    unroll
        Write every turn out, without a loop.
    """
    turns = _Turns(body, list(xs), list(stacks), length, reverse, slots)
    outputs = [lax.full((length, *kind.shape), 0, kind.dtype) for kind in out_types]
    ring: list[list[Any]] = []
    state = list(carry)
    for ahead in range(min(slots - 1, length)):
        state, rows = turns.stage(state, ahead)
        ring.append(rows)
    loops = 0 if unroll else (length - slots + 1) // slots
    done = 0
    if loops > 1:

        def loop(held: Any, _: None) -> tuple[Any, None]:
            first, state, ring, outputs = held
            state, ring, outputs = turns.run(first, slots, state, ring, outputs)
            return (first + slots, state, ring, outputs), None

        (_, state, ring, outputs), _ = lax.scan(loop, (0, state, ring, outputs), None, length=loops)
        done = loops * slots
    state, _, outputs = turns.run(done, length - done, state, ring, outputs, last=True)
    return state, outputs


class _Turns:
    def __init__(self, body: Body, xs: list[Any], stacks: list[Any], length: int, reverse: bool, slots: int) -> None:
        self.body = body
        self.xs = xs
        self.stacks = stacks
        self.length = length
        self.reverse = reverse
        self.slots = slots

    def _row(self, turn: Any) -> Any:
        return self.length - 1 - turn if self.reverse else turn

    def stage(self, results: Sequence[Any], turn: Any) -> tuple[list[Any], list[Any]]:
        """Stage the rows of one turn behind `results`."""
        stacks, held = tie(self.stacks, results)
        row = self._row(turn)
        return held, put([lax.dynamic_index_in_dim(stack, row, keepdims=False) for stack in stacks])

    def run(
        self, first: Any, count: int, state: list[Any], ring: list[list[Any]], outputs: list[Any], *, last: bool = False
    ) -> tuple[list[Any], list[list[Any]], list[Any]]:
        """Run turns one behind the other; the last ones of all stage nothing more."""
        ring = list(ring)
        made: list[Any] = []
        for i in range(count):
            turn, ahead = first + i, first + i + self.slots - 1
            if not last or ahead < self.length:
                held, rows = self.stage([*state, *made], ahead)
                state, made = held[: len(state)], held[len(state) :]
                ring.append(rows)
            if i:
                outputs = self._store(outputs, made, turn - 1)
            given = [lax.dynamic_index_in_dim(x, self._row(turn), keepdims=False) for x in self.xs]
            state, made = self.body(state, [*given, *ring.pop(0)])
        if count:
            outputs = self._store(outputs, made, first + count - 1)
        return state, ring, outputs

    def _store(self, outputs: list[Any], made: list[Any], turn: Any) -> list[Any]:
        return [
            lax.dynamic_update_index_in_dim(output, value, self._row(turn), 0)
            for output, value in zip(outputs, made, strict=True)
        ]
