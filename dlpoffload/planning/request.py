"""What a policy is asked and what it answers: placements, units, costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeAlias

from ..errors import PlanError
from ..spec import TensorSpec, aligned, lay_out

__all__ = ["CostModel", "Decision", "Placement", "PlanRequest", "Policy", "Unit"]


Memory: TypeAlias = Literal["separate", "coherent", "unified"]


class Placement(StrEnum):
    """Where a tensor's bytes live, and so how a kernel reads them."""

    DEVICE = "device"
    """Device memory, read directly."""
    HOST_MAPPED = "host_mapped"
    """Pinned, mapped host memory, read over the link at each access."""
    HOST_STAGED = "host_staged"
    """Pinned host memory, read from a device slot that an enqueued copy has filled."""

    @classmethod
    def parse(cls, what: object, where: str) -> Placement:
        """Read a placement or its value; `where` says who gave it, for the error."""
        try:
            return cls(what)  # type: ignore[arg-type]
        except ValueError:
            known = ", ".join(f'"{p}"' for p in cls)
            raise PlanError(f"{where} is {what!r}, which is no placement; use one of {known}") from None


@dataclass(frozen=True, slots=True)
class Unit:
    """What is staged together: one slab in host memory, one slot on the device, one copy.

    Attributes
    ----------
    name : str
        A module path, or any name that no other unit has.
    tensors : tuple of str
        Names in the specs, in the order in which they lie in the slab.
    """

    name: str
    tensors: tuple[str, ...]

    def slab_nbytes(self, specs: Mapping[str, TensorSpec]) -> int:
        """Bytes of the unit's slab: `spec.lay_out` of its tensors, starts aligned to 256, end not padded."""
        return lay_out({name: specs[name] for name in self.tensors}).nbytes


@dataclass(frozen=True, slots=True)
class CostModel:
    """What the link costs. The defaults were measured on an H100 at PCIe gen 5 x16; GB is 10^9 bytes.

    Attributes
    ----------
    link_gb_per_s : float
        Rate of one large copy from pinned host memory to the device.
    mapped_gb_per_s : float
        Rate at which kernels read mapped host memory once. It holds for products of up to some 256 rows:
        beyond, each tile row reads the weights again.
    small_nbytes : int
        Below this a copy wastes the link (18.6 GB/s at 256 KiB, 47.5 at 1 MiB), so a module below it is no
        unit of its own, and a tensor below it that is in no unit is the first to be resident.
    memory : str or None
        What host memory is to the device: "separate"; "coherent", read through the host's page tables (GH200, GB200);
        "unified", the same memory (GB10). In the latter two, staging copies are a loss. None asks the driver in
        `torch.offload_`, and is "separate" elsewhere.
    """

    link_gb_per_s: float = 54.0
    mapped_gb_per_s: float = 50.0
    small_nbytes: int = 1 << 20
    memory: Memory | None = None

    def __post_init__(self) -> None:
        if not (self.link_gb_per_s > 0 and self.mapped_gb_per_s > 0):
            raise PlanError(
                f"link_gb_per_s={self.link_gb_per_s!r} and mapped_gb_per_s={self.mapped_gb_per_s!r} are "
                "rates; both must be above zero"
            )
        if self.memory not in (None, "separate", "coherent", "unified"):
            raise PlanError(f'memory={self.memory!r}; use "separate", "coherent" or "unified"')
        if self.small_nbytes < 0:
            raise PlanError(f"small_nbytes={self.small_nbytes!r} is negative; it is a count of bytes")

    def seconds(self, *, staged_nbytes: int, mapped_nbytes: int) -> float:
        """Seconds that the link is busy when so many bytes are copied, and so many read where they are."""
        return staged_nbytes / (self.link_gb_per_s * 1e9) + mapped_nbytes / (self.mapped_gb_per_s * 1e9)


class Decision(NamedTuple):
    """Where a tensor lives, and why in a few words."""

    placement: Placement
    reason: str


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Everything that a policy may look at.

    Attributes
    ----------
    specs : mapping of str to TensorSpec
        Each distinct tensor once.
    units : tuple of Unit
        In the order in which they are expected to run. No tensor is in two of them; tensors in none are
        *loose*.
    device_budget : int
        Bytes that residents and ring together may take on the device.
    slots : int
        Slots of the ring, should anything be streamed.
    gathered : frozenset of str
        Loose tensors of which a step reads a few rows (embeddings): nearly free when mapped.
    cost : CostModel
        What the link costs.
    fixed : mapping of str to Placement
        Decided already; a policy that places these otherwise is overruled, so it should count them.
    elsewhere : frozenset of str
        Names of tensors of the same model that are planned apart, for another device. A pattern may match those only.
    """

    specs: Mapping[str, TensorSpec]
    units: tuple[Unit, ...]
    device_budget: int
    slots: int = 2
    gathered: frozenset[str] = frozenset()
    cost: CostModel = field(default_factory=CostModel)
    fixed: Mapping[str, Placement] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()

    @property
    def loose(self) -> tuple[str, ...]:
        """Names of the tensors in no unit, in the order of the specs."""
        taken = {name for unit in self.units for name in unit.tensors}
        return tuple(name for name in self.specs if name not in taken)

    def resident_nbytes(self, names: Iterable[str]) -> int:
        """Bytes that these tensors take on the device: each tensor's own, rounded up to 256."""
        return sum(aligned(self.specs[name].nbytes) for name in names)


Policy: TypeAlias = Callable[[PlanRequest], "Mapping[str, Placement | str | Decision]"]
"""Gives every tensor of a request a placement, with a reason if it likes."""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that a shell pattern matches, or the one that it spells (which may hold brackets)."""
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def checked_slots(slots: int) -> int:
    """Give a number of slots back, or raise the PlanError that says why it is none."""
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise PlanError(f"slots={slots!r} is no number of slots; use 2, more to look further ahead, 1 without overlap")
    return slots
