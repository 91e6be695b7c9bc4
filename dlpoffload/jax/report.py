"""What an offloaded tree is, and what the programs that stream it do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..planning import Placement, Plan
from ..reporting import Rows
from ..spec import format_nbytes

__all__ = ["ProgramReport", "Report"]


@dataclass(frozen=True, slots=True)
class ProgramReport:
    """What one traced program stages at each call. XLA runs it: these are counts of the program, not of a clock.

    Attributes
    ----------
    name : str
        Of the function.
    copies, copied_nbytes : int
        Leaves that are copied from host memory to the device, and their bytes; rows of a scanned stack one by one.
    units : tuple of str
        The units in the order in which they are staged; a unit that is used again later is there again.
    ring_nbytes : int
        The most bytes of staged leaves that the program lets be alive at once.
    """

    name: str
    copies: int
    copied_nbytes: int
    units: tuple[str, ...]
    ring_nbytes: int


@dataclass(frozen=True, slots=True)
class Report(Rows):
    """A snapshot. Printing it gives a table.

    Attributes
    ----------
    device, description : str
        The device that runs, and what it is.
    plan : Plan
    pinned_nbytes : int
        Host memory that was allocated for the tree.
    aliased_nbytes : int
        Host memory of others that leaves are views of.
    device_nbytes : int
        Device memory: residents, and the ring while a program runs.
    kept : mapping of str to str
        Leaves that were left as they are, and why.
    updated : tuple of str
        Leaves that `update` gave bytes of their own.
    programs : tuple of ProgramReport
        The programs traced so far, in order.
    """

    device: str
    description: str
    plan: Plan
    pinned_nbytes: int
    aliased_nbytes: int
    device_nbytes: int
    kept: Mapping[str, str]
    updated: tuple[str, ...]
    programs: tuple[ProgramReport, ...]

    def rows(self) -> list[tuple[str, str]]:
        """What is printed, as name and value."""
        plan = self.plan
        rows = [("runs on", f"{self.device}, {self.description}")]
        for placement in Placement:
            names = plan.names(placement)
            rows.append((placement.value, f"{len(names)} tensors, {format_nbytes(plan.nbytes(placement))}"))
        rows.append(("ring", f"{plan.slots} slots of {format_nbytes(plan.slot_nbytes)}"))
        rows.append(("device memory", f"{format_nbytes(self.device_nbytes)} of {format_nbytes(plan.device_budget)}"))
        rows.append(("pinned memory", format_nbytes(self.pinned_nbytes)))
        if self.aliased_nbytes:
            rows.append(("taken in place", format_nbytes(self.aliased_nbytes)))
        for name, why in self.kept.items():
            rows.append(("left as it is", f"{name}: {why}"))
        if self.updated:
            rows.append(("updated", ", ".join(self.updated)))
        for program in self.programs:
            ring = f"at most {format_nbytes(program.ring_nbytes)} staged at once"
            text = f"{program.copies} copies a call, {format_nbytes(program.copied_nbytes)}; {ring}"
            rows.append((f"program {program.name}", text))
        return rows
