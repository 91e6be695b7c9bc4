"""From leaves and a budget to a plan, and from a plan to arrays in their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ..driver import Driver
from ..errors import AliasError, PlanError, SpecError
from ..lifetime import drain
from ..memory import HostBuffer
from ..planning import CostModel, Placement, Plan, Policy, Unit, all_mapped, pattern_policy, plan
from ..producers import view_of
from ..spec import TensorSpec
from ..store import HostStore
from ..view import Label, View
from .arrays import array_view, device_array, host_label, jax_device
from .leaves import Leaf, check_usable

__all__ = ["Home", "Offloading", "Placed", "check_spec", "usable_in_place"]


@dataclass(frozen=True, slots=True)
class Home:
    """Where one leaf lives.

    Attributes
    ----------
    spec : TensorSpec
    placement : Placement
    unit : str
        The unit that it is staged with; empty when it is not staged, or row by row.
    rows : int
        Length of the leading axis of a stack that is staged row by row; 0 for any other.
    """

    spec: TensorSpec
    placement: Placement
    unit: str = ""
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Offloading:
    """What was asked for; see `offload`."""

    driver: Driver
    device_budget: int | str
    units: Sequence[str] | Mapping[str, Sequence[str]] | None
    stacked: Sequence[str]
    slots: int | None
    policy: Policy
    cost: CostModel | None

    def __post_init__(self) -> None:
        if isinstance(self.stacked, str):
            raise PlanError(f'stacked="{self.stacked}" is one string; pass a list of paths: ["{self.stacked}"]')
        if self.policy is all_mapped and (self.units is not None or self.slots is not None):
            raise PlanError("policy=all_mapped stages nothing, so units and slots have no effect; leave them out")

    def plan(self, leaves: Sequence[Leaf]) -> tuple[Plan, dict[str, Home]]:
        """Decide where each distinct leaf lives. Touches no memory."""
        specs = {leaf.name: leaf.spec for leaf in leaves if leaf.spec is not None and leaf.tied_to == leaf.name}
        if not specs:
            raise PlanError("a tree without arrays has nothing to offload")
        rows = self._rows(specs)
        planned: dict[str, TensorSpec] = {}
        for name in sorted(specs, key=_in_order):  # "layers_10" behind "layers_9", as they run
            planned.update(rows.get(name) or {name: specs[name]})
        decided = self._plan(planned, self.policy)
        mixed = [stack for stack in self.stacked if len(_placements(decided, rows, stack)) > 1]
        if mixed:  # one array has one home, and some of its rows found no room
            forced = pattern_policy({f"{stack}.*": Placement.HOST_STAGED for stack in mixed}, self.policy)
            decided = self._plan(planned, forced)
        unit_of = {name: unit.name for unit in decided.streamed_units for name in unit.tensors}
        homes: dict[str, Home] = {}
        for name, spec in specs.items():
            of = next(iter(rows.get(name, {})), name)
            placement = decided.placements[of]
            staged_rows = len(rows[name]) if name in rows and placement is Placement.HOST_STAGED else 0
            homes[name] = Home(spec, placement, "" if staged_rows else unit_of.get(of, ""), staged_rows)
        return decided, homes

    def _plan(self, specs: Mapping[str, TensorSpec], policy: Policy) -> Plan:
        slots = 2 if self.slots is None else self.slots
        return plan(specs, self.device_budget, units=self.units, slots=slots, policy=policy, cost=self.cost)

    def _rows(self, specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
        """The rows of each leaf of a stack, as the elements of a list of blocks would be named."""
        found: dict[str, dict[str, TensorSpec]] = {}
        for stack in self.stacked:
            below = {name: spec for name, spec in specs.items() if name.startswith(f"{stack}.")}
            if not below:
                near = ", ".join(f'"{name}"' for name in list(specs)[:3])
                raise PlanError(f'stacked names "{stack}", below which there is no leaf among {len(specs)}, as {near}')
            lengths = {name: spec.shape[0] if spec.shape else 0 for name, spec in below.items()}
            if len(set(lengths.values())) > 1 or 0 in lengths.values():
                raise PlanError(
                    f'leaves below "{stack}" have leading axes {lengths}; those of a stack are of one length'
                )
            for name, spec in below.items():
                row = TensorSpec(spec.shape[1:], spec.dtype)
                tail = name[len(stack) + 1 :]
                found[name] = {f"{stack}.{i}.{tail}": row for i in range(spec.shape[0])}
        return found


def _in_order(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _placements(decided: Plan, rows: Mapping[str, Mapping[str, TensorSpec]], stack: str) -> set[Placement]:
    of_stack = (name for leaf, names in rows.items() if leaf.startswith(f"{stack}.") for name in names)
    return {decided.placements[name] for name in of_stack}


class Placed:
    """Arrays by leaf name, in the places that a plan gave them. Once full it only gives them out.

    Host bytes live in a store whose units are those that are staged together; a buffer is allocated when the first of
    its leaves arrives, so that whoever drops the originals on the way needs the weights once and one unit more.
    """

    def __init__(self, driver: Driver, homes: Mapping[str, Home]) -> None:
        self.driver = driver
        self.device = jax_device(driver)
        self.homes = homes
        self.arrays: dict[str, jax.Array] = {}
        self.aliased_nbytes = 0
        self._store: HostStore | None = None
        self._views: dict[str, View] = {}

    def fill(self, leaves: Iterable[Leaf], *, in_place: frozenset[str]) -> Iterable[Leaf]:
        """Put each leaf in its place, and yield it; the caller may drop its value then."""
        host = {
            name: home.spec
            for name, home in self.homes.items()
            if home.placement is not Placement.DEVICE and name not in in_place
        }
        units: dict[str, list[str]] = {}
        for name in host:
            home = self.homes[name]
            if home.rows or home.unit:
                units.setdefault(home.unit or name, []).append(name)
        if host:
            made = [Unit(unit, tuple(names)) for unit, names in units.items()]
            self._store = HostStore.allocate(host, units=made, device=self.driver.device)
        for leaf in leaves:
            if leaf.spec is not None and leaf.tied_to == leaf.name:
                self.arrays[leaf.name] = self._place(leaf.name, leaf.value, leaf.name in in_place)
            yield leaf
            drain()  # a producer's memory is held until our view of it is on the reclaim list and off it again

    def _place(self, name: str, value: Any, in_place: bool) -> jax.Array:
        home = self.homes[name]
        check_usable(name, value)
        if isinstance(value, jax.Array):
            value.block_until_ready()
        if home.placement is Placement.DEVICE:
            check_spec(name, home.spec, value)
            return device_array(value, self.device).block_until_ready()
        if in_place:
            self.aliased_nbytes += home.spec.nbytes
            try:
                return self.hold(name, value)
            except AliasError as error:
                raise AliasError(
                    f'"{name}" cannot be taken in place: {error}. A mapped file has its tensors where they are in the '
                    "file: pass views of HostStore.copy_of instead"
                ) from error
        assert self._store is not None
        self._store.copy_into(name, value)
        return self.hold(name, self._store.host_view(name))

    def hold(self, name: str, view: View) -> jax.Array:
        """An array over a host leaf's bytes, which `overwrite` finds from now on."""
        home = self.homes[name]
        mapped = home.placement is Placement.HOST_MAPPED
        array = array_view(view._labelled(Label.DEVICE if mapped else host_label(self.driver)), accept_read_only=True)
        self._views[name] = view
        return array

    def overwrite(self, name: str, value: Any) -> None:
        """Copy elements over a host leaf's bytes once the device is idle."""
        view = self._views[name]
        if view.read_only:
            raise AliasError(f'the bytes of "{name}" are read-only (a mapped file?); use update("{name}", …)')
        source = HostBuffer.copy_of(value, device=self.driver.device)
        for array in jax.live_arrays(self.device.platform):
            _wait(array)
        self.driver.synchronize()
        view.memoryview()[:] = source.memoryview()

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory that were allocated."""
        return 0 if self._store is None else self._store.host_nbytes


def _wait(array: jax.Array) -> None:
    """Wait until an array is computed, if it is to be: other threads delete and donate arrays meanwhile."""
    try:
        array.block_until_ready()
    except jax.errors.JaxRuntimeError:
        return  # it is deleted, or its computation failed, and so is at an end


def usable_in_place(value: Any, driver: Driver) -> bool:
    """Whether a leaf is a view of pinned memory that the driver's device maps: such bytes are taken as they are."""
    if not isinstance(value, View) or value.host_pointer is None or value.device_pointer is None:
        return False
    return value.spec.is_row_major and value._block_driver is driver


def check_spec(name: str, spec: TensorSpec, value: Any) -> None:
    """Refuse a value of another shape or dtype, or one without bytes here."""
    check_usable(name, value)
    found = view_of(value).spec
    if (found.shape, found.dtype) != (spec.shape, spec.dtype):
        raise SpecError(f'"{name}" is {spec}, but the value is {found}; shape and dtype must be equal')
