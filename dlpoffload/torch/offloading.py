"""The arguments of `offload_`, and what they make of a module: a plan, and everything in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..driver import Driver
from ..errors import CudaError, HostMemoryError, PlanError, RegistrationError
from ..planning import CostModel, Plan, Policy, Unit, UnitTree, all_mapped, all_staged, choose_units, plan
from .origin import Former, Start
from .placed import Placed
from .tree import Entry, collect, unit_tree

__all__ = ["Offloading", "Pageable", "retired"]

Pageable = Literal["never", "if_refused", "always"]


@dataclass(frozen=True, slots=True)
class Offloading:
    """What was asked for; see `offload_`."""

    driver: Driver
    device_budget: int | str
    units: Sequence[str] | Mapping[str, Sequence[str]] | None
    slots: int | None
    policy: Policy
    cost: CostModel | None
    pageable: Pageable
    stage_unmapped: bool
    elsewhere: frozenset[str] = frozenset()
    """Names of the model's tensors on other devices; units and patterns may mean those."""

    def __post_init__(self) -> None:
        if self.pageable not in ("never", "if_refused", "always"):
            raise PlanError(f'pageable={self.pageable!r}; use "never", "if_refused" or "always"')
        if self.policy is all_mapped and (self.units is not None or self.slots is not None):
            raise PlanError("policy=all_mapped stages nothing, so units and slots have no effect; leave them out")
        if self.policy in (all_mapped, all_staged) and self.cost is not None:
            raise PlanError(f"policy={self.policy.__name__} weighs no costs, so cost has no effect; leave it out")

    def plan(
        self, module: nn.Module, *, pinned: bool, former: Sequence[Unit] = (), meta: bool = False
    ) -> tuple[list[Entry], Plan]:
        """Each distinct tensor of a module, and where it is to live. Changes nothing.

        The units stay those of the former plan where the budget allows it.
        """
        entries = collect(module, meta=meta)
        if not any(entry.spec.nbytes for entry in entries):
            raise PlanError(f"a {type(module).__name__} without parameters and buffers has nothing to offload")
        tree = unit_tree(module, entries)
        slots = 2 if self.slots is None else self.slots
        units = self.units
        mapped = pinned and self.driver.capabilities().map_host_memory
        chosen = self._with_loose(tree, slots) if self.stage_unmapped and not mapped else None
        cost = self.cost
        if mapped and (cost is None or cost.memory is None):
            cost = replace(cost or CostModel(), memory=self.driver.capabilities().memory)

        def planned(units: Any, slots: int = slots) -> Plan:
            return plan(
                tree,
                self.device_budget,
                units=units,
                slots=slots,
                policy=self.policy,
                cost=cost,
                elsewhere=self.elsewhere,
            )

        if former and self.policy is not all_mapped:
            with suppress(PlanError):
                return entries, self._nested(planned, former, mapped)
        return entries, self._nested(planned, units if chosen is None else chosen, mapped)

    def _nested(self, planned: Callable[..., Plan], units: Any, mapped: bool) -> Plan:
        """A plan with slots enough where units run inside of each other: each of them holds one.

        One more is filled meanwhile, where the budget has it for the same units; smaller units are the last resort.
        """
        made = planned(units)
        if made.at_once > 1 and self.slots is None:
            more = [slots for slots in (made.at_once + 1, made.at_once) if slots > made.slots]
            for slots in more:
                with suppress(PlanError):
                    return planned(made.units, slots)
            for slots in more if made.at_once > made.slots else ():
                with suppress(PlanError):
                    return planned(units, slots)
        if made.at_once > made.slots and not mapped:
            raise PlanError(
                f"{made.at_once} units run inside of each other and hold a slot each, and the ring has {made.slots}: "
                f"say slots={made.at_once + 1}, raise the budget, or place what is in no repeated block on the device"
            )
        return made

    def current(self, module: nn.Module, decided: Plan, *, pinned: bool, asleep: bool = False) -> Plan:
        """A plan; one made anew where the module holds other tensors by now than that places."""
        if {entry.name: entry.spec for entry in collect(module)} == decided.specs:
            return decided
        made = self.plan(module, pinned=pinned, former=decided.units)[1]
        return made.asleep() if asleep else made

    def _with_loose(self, tree: UnitTree, slots: int) -> list[Unit]:
        """The units, and those of what is in none, so that nothing need be mapped."""
        if isinstance(self.units, Mapping):
            chosen = [Unit(name, tuple(names)) for name, names in self.units.items()]
        else:
            chosen = choose_units(
                tree, self.device_budget, slots, units=self.units, cost=self.cost, elsewhere=self.elsewhere
            )
        inside = {name for unit in chosen for name in unit.tensors}
        loose = tree.own_units([name for name in tree.specs() if name not in inside])
        return [*chosen, *(Unit(name, tensors) for name, tensors in loose.items())]

    def place(self, module: nn.Module, former: Former | None = None, start: Start | None = None) -> Placed:
        """Plan, and put everything in its place. After an error every tensor is in memory of its former kind."""
        with torch.inference_mode(False), torch.no_grad():
            if self.pageable == "always":
                return self._place(module, former, start, pinned=False)
            try:
                return self._place(module, former, start, pinned=True)
            except (HostMemoryError, RegistrationError) as refused:
                if self.pageable == "never":
                    raise
                placed = self._place(module, former, start, pinned=False)
                placed.pageable_because = str(refused)
                return placed

    def move_back(self, former: Placed, *, asleep: bool) -> Placed:
        """Place a module by its former plan, after another was refused: slabs that were left by then are given up."""
        decided = self.current(former.module, former.plan, pinned=former.pinned, asleep=asleep)
        return self.move(former, decided, back=True)

    def move(self, former: Placed, decided: Plan, *, back: bool = False) -> Placed:
        """Place a module by another plan, in memory of the same kind, after `former` was retired."""
        module, record = former.module, former.former()
        if back:
            former.store = None
        placed = Placed(module, collect(module), decided, self.driver, pinned=former.pinned, former=record)
        placed.pageable_because = former.pageable_because
        return placed

    def _place(self, module: nn.Module, former: Former | None, start: Start | None, *, pinned: bool) -> Placed:
        entries, decided = self.plan(module, pinned=pinned, meta=start is not None and start.meta)
        origin = None
        if start is not None:
            former, origin = Former(dict(start.former), None, {}), start.origin(module, entries, pinned=pinned)
        return Placed(module, entries, decided, self.driver, pinned=pinned, former=former, origin=origin)


def retired(placed: Placed) -> CudaError | None:
    """Retire; what the driver would not destroy of a ring that is closed all the same, for the caller to raise."""
    try:
        placed.retire()
    except CudaError as error:
        if not placed.retired:
            raise
        return error
    return None
