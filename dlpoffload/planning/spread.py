"""Which of a row of units are resident, so that those between them follow each other evenly."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["spread"]


def spread(sizes: Sequence[int], room: int) -> list[int]:
    """Pick indices, evenly by bytes, until no other fits in `room` bytes.

    `count` picks lie at the middles of `count` equal stretches of the bytes. For equal sizes any two gaps
    between neighbours differ by at most one, the gap from the last round to the first included: steps follow
    each other.
    """
    ends = list(accumulate(sizes))
    total = ends[-1] if ends else 0

    def picks(count: int) -> list[int]:
        hit = (bisect_right(ends, (2 * j + 1) * total // (2 * count)) for j in range(count))
        return sorted(set(hit)) if total else []

    fits, beyond = 0, len(sizes) + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if sum(sizes[i] for i in picks(middle)) <= room:
            fits = middle
        else:
            beyond = middle
    picked = set(picks(fits))
    room -= sum(sizes[i] for i in picked)
    # sizes that differ leave gaps that something smaller fits in: furthest from its neighbours first
    chosen = sorted(picked)

    def distance(i: int) -> int:
        at = bisect_right(chosen, i)
        return min((abs(i - j) for j in chosen[max(at - 1, 0) : at + 1]), default=len(sizes))

    for i in sorted(range(len(sizes)), key=lambda i: (-distance(i), i)):
        if i not in picked and sizes[i] <= room:
            picked.add(i)
            room -= sizes[i]
    return sorted(picked)
