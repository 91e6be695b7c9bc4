"""A scan over a stack of layers in host memory, whose body finds its layer on the device already.

``slots`` layers are unrolled in the body of one loop; the carry takes ``slots - 1`` staged layers from turn to turn,
and each layer is staged as soon as the last reader of its slot has ended. Unrolling is what spares a copy on the
device: a layer that is staged in one turn and read in the next has to be in the same buffer at the end of both, and
with as many layers a turn as there are slots it is.

The barrier is put on the stack, not on the row: XLA makes one copy of a dynamic slice of host memory that leads
straight to the device, and computes on the host where something stands between (HostOffloader, by its source). The copy
engine makes it only where a loop counts the rows; where the index is a constant, a kernel reads the row, 8 % slower
[H100, jax 0.11]. In the loop above, those are the first ``slots - 1`` rows and what is left at the end: nothing in a
long stack, much in a short one, which is therefore cut in two halves, the two turns of a loop that carries no layers.
The price is that at the cut nothing is copied while a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from jax import lax

from .staging import put, tie

__all__ = ["staged_scan"]

Body = Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]

SHORT: Final = 16
"""The most layers of a stack that is cut in halves: half of them are written out in the program."""


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
) -> tuple[list[Any], list[Any]]:
    """Scan `body` over rows of `xs`, which are on the device, and of `stacks`, which are not.

    Parameters
    ----------
    body
        From carry and the rows of all `xs` and then all `stacks` to carry and outputs.
    out_types
        Types of the outputs of one turn.
    """
    turns = _Turns(body, list(xs), list(stacks), length, reverse, slots)
    outputs = [lax.full((length, *kind.shape), 0, kind.dtype) for kind in out_types]
    if 1 < slots <= length // 2 and length <= SHORT and length % 2 == 0:
        return _halves(turns, list(carry), outputs, length // 2)
    state, ring = turns.opened(0, list(carry))
    loops = (length - slots + 1) // slots
    done = 0
    if loops > 1:

        def loop(held: Any, _: None) -> tuple[Any, None]:
            first, state, ring, outputs = held
            state, ring, outputs = turns.run(first, slots, state, ring, outputs, rows=2 * slots - 1)
            return (first + slots, state, ring, outputs), None

        (_, state, ring, outputs), _ = lax.scan(loop, (0, state, ring, outputs), None, length=loops)
        done = loops * slots
    state, _, outputs = turns.run(done, length - done, state, ring, outputs, rows=length - done)
    return state, outputs


def _halves(turns: _Turns, state: list[Any], outputs: list[Any], half: int) -> tuple[list[Any], list[Any]]:
    def loop(held: Any, _: None) -> tuple[Any, None]:
        first, state, outputs = held
        state, ring = turns.opened(first, state)
        state, ring, outputs = turns.run(first, half, state, ring, outputs, rows=half)
        return (first + half, state, outputs), None

    (_, state, outputs), _ = lax.scan(loop, (0, state, outputs), None, length=2)
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

    def opened(self, first: Any, state: list[Any]) -> tuple[list[Any], list[list[Any]]]:
        """Stage the first rows of a ring, all slots but one."""
        ring: list[list[Any]] = []
        for ahead in range(min(self.slots - 1, self.length)):
            state, rows = self.stage(state, first + ahead)
            ring.append(rows)
        return state, ring

    def run(
        self, first: Any, count: int, state: list[Any], ring: list[list[Any]], outputs: list[Any], *, rows: int
    ) -> tuple[list[Any], list[list[Any]], list[Any]]:
        """Run turns one behind the other, and stage ahead as far as to the first `rows` rows from here."""
        ring = list(ring)
        made: list[Any] = []
        for i in range(count):
            turn, ahead = first + i, i + self.slots - 1
            if ahead < rows:
                held, staged = self.stage([*state, *made], first + ahead)
                state, made = held[: len(state)], held[len(state) :]
                ring.append(staged)
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
