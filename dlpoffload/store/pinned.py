"""Anonymous memory of a store: how it is allocated, and which of its tensors share a buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from ..blocks import check_pinning, check_taking
from ..checkpoint import Assembly, Checkpoint
from ..driver import open_driver
from ..errors import HostMemoryError, SpecError
from ..lifetime import owned_by
from ..memory import HostBuffer
from ..pages import HugePages, PinOptions, pool_nbytes
from ..spec import TensorSpec, lay_out
from .homes import Contents, Home, Region
from .layout import grouped

__all__ = ["Fill", "Memory", "Pageable", "anonymous_contents", "read_contents"]

Pageable = Literal["never", "if_refused", "always"]
Fill = Callable[[HostBuffer, Mapping[str, int]], None]
"""Fills a fresh buffer whose tensors start at these byte offsets."""


@dataclass(slots=True)
class Memory:
    """How the buffers of one store are allocated.

    Attributes
    ----------
    because : str
        Why some of it is pageable; empty while none is.
    """

    device: str
    owner: str
    pageable: Pageable = "never"
    huge_pages: HugePages = "transparent"
    numa_node: int | None = None
    host_budget: int | None = None
    because: str = ""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def checked(
        cls,
        device: str | int | None,
        owner: str,
        pageable: str,
        huge_pages: str,
        numa_node: int | None,
        host_budget: int | str | None,
    ) -> Memory:
        """The options as a caller gave them, or SpecError."""
        if pageable not in ("never", "if_refused", "always"):
            raise SpecError(f'pageable={pageable!r}; use "never", "if_refused" or "always"')
        options = PinOptions.checked(huge_pages, numa_node, host_budget)
        if pageable == "always" and options != PinOptions():
            raise SpecError('pageable="always" takes none of the options of pinning; leave them out')
        return cls(
            open_driver(device).device,
            owner,
            pageable,  # type: ignore[arg-type]  # checked above
            options.huge_pages,
            options.numa_node,
            options.host_budget,
            "asked for" if pageable == "always" else "",
        )

    def check(self, nbytes: int) -> None:
        """Refuse more than the machine, or the budget, has; before anything is allocated."""
        if self.pageable == "never":
            there_nbytes = min(nbytes, pool_nbytes()) if self.huge_pages == "hugetlb" else 0
            check_pinning(nbytes, open_driver(self.device), self.host_budget, there_nbytes=there_nbytes)
        else:
            check_taking(nbytes)

    def allocate(self, nbytes: int) -> HostBuffer:
        """Allocate one buffer: pinned, or pageable where that was allowed and pinning is refused."""
        with owned_by(self.owner):
            if self.pageable != "always":
                try:
                    buffer = HostBuffer.allocate(
                        nbytes,
                        device=self.device,
                        huge_pages=self.huge_pages,
                        numa_node=self.numa_node,
                        host_budget=self.host_budget,
                    )
                except HostMemoryError as error:
                    if self.pageable == "never":
                        raise
                    self.because = self.because or str(error)
                else:
                    self.notes += (note for note in buffer.notes if note not in self.notes)
                    return buffer
            return HostBuffer.allocate(nbytes, device=self.device, pinned=False)


def allocated(memory: Memory, nbytes: int) -> tuple[HostBuffer, int]:
    """A buffer for one home, which starts where the buffer does."""
    return memory.allocate(nbytes), 0


def _made(memory: Memory, nbytes: int, byte_offsets: Mapping[str, int], fill: Fill | None) -> tuple[HostBuffer, int]:
    buffer = memory.allocate(nbytes)
    if fill is not None:
        fill(buffer, byte_offsets)
    return buffer, 0


def anonymous_contents(
    specs: Mapping[str, TensorSpec],
    units: Mapping[str, tuple[str, ...]],
    memory: Memory,
    fill: Fill | None = None,
) -> Contents:
    """A home for each unit, and homes of at most 1 GiB for what is in none; none is allocated yet."""
    contents = Contents(specs, [], {}, {})

    def add(group: Mapping[str, TensorSpec]) -> Region:
        layout = lay_out(group)
        nbytes = max(layout.nbytes, 1)  # empty tensors alone need an address all the same
        home = Home(nbytes, partial(_made, memory, nbytes, layout.byte_offsets, fill))
        contents.homes.append(home)
        contents.of_name.update((name, (home, layout.byte_offsets[name])) for name in group)
        return Region(group, layout.byte_offsets, layout.nbytes, home)

    for unit, names in units.items():
        contents.of_unit[unit] = add({name: specs[name] for name in names})
    for group in grouped({name: spec for name, spec in specs.items() if name not in contents.of_name}):
        add(group)
    return contents


def read_contents(
    checkpoint: Checkpoint,
    specs: Mapping[str, TensorSpec],
    units: Mapping[str, tuple[str, ...]],
    memory: Memory,
    made: Mapping[str, Assembly] | None,
) -> Contents:
    """The same for a checkpoint, each home read from its files when it is made."""

    def fill(buffer: HostBuffer, byte_offsets: Mapping[str, int]) -> None:
        checkpoint.read_into([(buffer.memoryview(), byte_offsets)], assemblies=made)

    return anonymous_contents(specs, units, memory, fill)
