"""Pure policy: from specs, a budget and costs to placements. No memory, no framework, no driver.

An adapter hands over a `UnitTree`, or anybody the specs by name; `choose_units` says what is staged as one, a
policy says where every tensor lives, and `plan` holds its answer against the budget.
"""

from __future__ import annotations

from .balanced import balanced
from .choose import choose_units, matches_path
from .planner import plan
from .plans import Plan
from .policy import all_mapped, all_staged, pattern_policy
from .request import CostModel, Decision, Placement, PlanRequest, Policy, Unit
from .tree import UnitTree, tree_of_names

__all__ = [
    "CostModel",
    "Decision",
    "Placement",
    "Plan",
    "PlanRequest",
    "Policy",
    "Unit",
    "UnitTree",
    "all_mapped",
    "all_staged",
    "balanced",
    "choose_units",
    "matches_path",
    "pattern_policy",
    "plan",
    "tree_of_names",
]
