"""What an offloaded module did: bytes by placement, copies, rates against the link, stalls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..driver import Driver
from ..errors import CudaError, HostMemoryError, RegistrationError
from ..planning import Placement, Plan
from ..reporting import Rows
from ..spec import format_nbytes
from ..transfer import Link, TransferStats, measure_link

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["ByDevice", "Report", "link_of", "snapshot"]

_Shown = TypeVar("_Shown", bound="Plan | Report")
_LINK_NBYTES: Final = 256 << 20
_links: dict[str, Link] = {}
_MODES: Final = {"map": "mapped", "copy": "copied"}


@dataclass(frozen=True, slots=True)
class Report(Rows):
    """A snapshot. Printing it gives a table.

    Attributes
    ----------
    device, description : str
        The device that ran, and what it is.
    plan : Plan
    pinned_nbytes, pageable_nbytes : int
        Host memory of the module's weights.
    pageable_because : str
        Why it is pageable, where it is.
    mode : str
        ``"map"`` where host bytes are a checkpoint's own pages, else ``"copy"``.
    because : str
        Why it is so, where a checkpoint was given.
    file_nbytes : int
        Of the pinned bytes, the pages of files: no second copy.
    moved : tuple of str
        Tensors that were moved out of the file into memory of their own, because they were written or by `copy_out`.
    copied : tuple of str
        Tensors of a mapped module that were never mapped: not in the file, or not as kernels want them.
    device_nbytes : int
        Device memory that was allocated: residents and ring.
    stats : TransferStats
        Copies, late copies, stalls and so on, counted since the module was offloaded.
    link : Link or None
        The link's own rate, measured in this process; None when it was not asked for.
    link_unmeasured : str
        Why it could not be measured: it takes 256 MiB on both sides.
    mapped_home : bool
        Whether staged tensors are the device's view of their host bytes between uses. Where the device cannot map
        host memory they are on the CPU then.
    adopted : tuple of str
        Tensors that somebody gave other bytes (``.data =``) and whose values were taken over.
    replaced : tuple of str
        Names under which the module has another tensor object now, or one that no unit stages and that was given other
        memory. Those are not offloaded: they are where they are, until `OffloadHandle.refresh_` takes them in.
    aliased_outputs : int
        Outputs of units that lay in a slot and were copied.
    asleep : bool
        Whether the module sleeps, and has nothing on the device.
    """

    device: str
    description: str
    plan: Plan
    pinned_nbytes: int
    pageable_nbytes: int
    pageable_because: str
    mode: str
    because: str
    file_nbytes: int
    moved: tuple[str, ...]
    copied: tuple[str, ...]
    device_nbytes: int
    stats: TransferStats
    link: Link | None
    link_unmeasured: str
    mapped_home: bool
    adopted: tuple[str, ...]
    replaced: tuple[str, ...]
    aliased_outputs: int
    asleep: bool

    @property
    def link_share(self) -> float | None:
        """The copies' rate over the link's; None before a copy is timed, or without a measured link."""
        rate = self.stats.copy_gb_per_second
        return None if rate is None or self.link is None else rate / self.link.host_to_device

    def rows(self) -> list[tuple[str, str]]:
        """What is printed, as name and value."""
        plan, stats = self.plan, self.stats
        rows = [("runs on", f"{self.device}, {self.description}")]
        for placement in Placement:
            names = plan.names(placement)
            rows.append((placement.value, f"{len(names)} tensors, {format_nbytes(plan.nbytes(placement))}"))
        rows.append(("ring", f"{plan.slots} slots of {format_nbytes(plan.slot_nbytes)}"))
        rows.append(("device memory", f"{format_nbytes(self.device_nbytes)} of {format_nbytes(plan.device_budget)}"))
        rows.append(("pinned memory", format_nbytes(self.pinned_nbytes)))
        if self.because:
            rows.append(("checkpoint", f"{_MODES[self.mode]}: {self.because}"))
        if self.mode == "map":
            counts = f"{len(self.moved)} tensors moved out of them, {len(self.copied)} never mapped"
            rows.append(("of files", f"{format_nbytes(self.file_nbytes)}; {counts}"))
        if self.pageable_nbytes:
            rows.append(("pageable memory", f"{format_nbytes(self.pageable_nbytes)}, slow: {self.pageable_because}"))
        rows.append(("copies", f"{stats.copies} ({stats.late_copies} late), {format_nbytes(stats.copied_nbytes)}"))
        rate = stats.copy_gb_per_second
        if rate is not None:
            text = f"{rate:.1f} GB/s over {stats.timed_copies} timed copies"
            if self.link_share is not None and self.link is not None:
                text += f", {self.link_share:.0%} of the link ({self.link.host_to_device:.1f} GB/s)"
            rows.append(("copy rate", text))
        rows.append(("stalls", f"{stats.stalls} of {stats.timed_waits} waits, {stats.stall_seconds * 1e3:.1f} ms"))
        rows.append(("fallbacks", f"{stats.mapped_runs} units ran from mapped memory"))
        rows.append(("host waits", str(stats.host_waits)))
        seldom: dict[str, Any] = {
            "asleep": "nothing is on the device until wake()" if self.asleep else "",
            "link": f"not measured: {self.link_unmeasured}" if self.link_unmeasured else "",
            "invalidations": stats.invalidations,
            "write-backs": stats.write_backs,
            "adopted": ", ".join(self.adopted),
            "replaced": ", ".join(self.replaced),
            "outputs copied": self.aliased_outputs,
            "home": "" if self.mapped_home else "on the CPU between uses: the device cannot map these bytes",
        }
        rows += [(name, str(value)) for name, value in seldom.items() if value]
        return rows


class ByDevice(Mapping[str, _Shown]):
    """The plans, or the reports, of a module that is over several devices. Printing it shows them all."""

    def __init__(self, found: Mapping[str, _Shown]) -> None:
        self._found = dict(found)

    def __getitem__(self, device: str) -> _Shown:
        return self._found[device]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(*(part for device, shown in self.items() for part in (device, shown)))

    def __str__(self) -> str:
        return "\n\n".join(f"{device}\n{shown}" for device, shown in self.items())


def snapshot(stats: TransferStats | None) -> TransferStats:
    """A copy of the counters that does not move on."""
    return TransferStats() if stats is None else replace(stats)


def link_of(driver: Driver) -> tuple[Link | None, str]:
    """The link's own rate, measured once for each device and process; or why it could not be."""
    if driver.device not in _links:
        try:
            _links[driver.device] = measure_link(driver, nbytes=_LINK_NBYTES)
        except (HostMemoryError, RegistrationError, CudaError) as refused:
            return None, str(refused)
    return _links[driver.device], ""
