"""Policies that force a placement: on everything, or on what a pattern matches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import PlanError
from .balanced import balanced
from .request import Decision, Placement, PlanRequest, Policy, matching

__all__ = ["all_mapped", "all_staged", "balanced", "pattern_policy"]


def all_mapped(request: PlanRequest) -> dict[str, Decision]:
    """Map everything: no device memory, each access crosses the link."""
    return dict.fromkeys(request.specs, Decision(Placement.HOST_MAPPED, "everything is mapped"))


def all_staged(request: PlanRequest) -> dict[str, Decision]:
    """Stage everything: nothing is resident but the ring. A loose tensor becomes a unit of its own."""
    return dict.fromkeys(request.specs, Decision(Placement.HOST_STAGED, "everything is staged"))


def pattern_policy(placements: Mapping[str, Placement | str], base: Policy = balanced) -> Policy:
    """Make a policy that places what the patterns match as they say, and leaves the rest to `base`.

    Parameters
    ----------
    placements : mapping of str to Placement or str
        From shell patterns on tensor names (`fnmatch`, case matters, ``*`` crosses dots) to placements, for
        example ``{"*.embed*": "host_mapped"}``. The first pattern that matches a name decides it.
    base : Policy
        Decides the rest, and is told what is decided already in `PlanRequest.fixed`.

    Raises
    ------
    PlanError
        Now, for a value that is no placement; when planning, for a pattern that decides nothing.
    """
    parsed = {
        pattern: Placement.parse(value, f'the placement for the pattern "{pattern}"')
        for pattern, value in placements.items()
    }

    def policy(request: PlanRequest) -> dict[str, Placement | str | Decision]:
        reasons: dict[str, str] = {}
        fixed: dict[str, Placement] = {}
        for pattern, placement in parsed.items():
            matched = matching(pattern, request.specs)
            new = [name for name in matched if name not in fixed]
            if not new and not matching(pattern, request.elsewhere):
                raise PlanError(
                    f'the pattern "{pattern}" matches '
                    + (
                        f"{len(matched)} tensors that patterns before it have placed; put it first"
                        if matched
                        else f"none of the {len(request.specs)} tensors, such as "
                        + ", ".join(f'"{name}"' for name in list(request.specs)[:3])
                    )
                )
            fixed.update(dict.fromkeys(new, placement))
            reasons.update(dict.fromkeys(new, f'the pattern "{pattern}"'))
        # what the caller had fixed stays as it was
        inner = replace(request, fixed={**fixed, **request.fixed})
        answer: dict[str, Placement | str | Decision] = dict(base(inner))
        answer.update({name: Decision(fixed[name], reasons[name]) for name in fixed})
        answer.update(request.fixed)
        return answer

    policy.__name__ = policy.__qualname__ = f"pattern_policy over {getattr(base, '__name__', repr(base))}"
    return policy
