"""A checkpoint's own pages as the host home of a module's tensors: which of them qualify, and what the others get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import nn

from ..checkpoint import Assembly, Checkpoint
from ..errors import AliasError, PlanError, RegistrationError
from ..planning import Plan
from ..spec import TensorSpec
from ..store import HostStore, map_some
from .matching import Load
from .origin import Units
from .sources import Source
from .tree import Entry

if TYPE_CHECKING:
    from .placed import Placed

__all__ = ["Mode", "check_mode", "mapped_store", "slot_nbytes"]

Mode: TypeAlias = Literal["map", "copy", "auto"]

_KERNEL_ALIGNMENT = 16
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check_mode(mode: str, checkpoint: object, pageable: str) -> None:
    """Refuse a mode that means nothing here.

    Raises
    ------
    PlanError
        It is none, or has no effect.
    """
    if mode not in ("map", "copy", "auto"):
        raise PlanError(f'mode={mode!r}; use "map", "copy" or "auto"')
    if mode != "copy" and checkpoint is None:
        raise PlanError(f'mode="{mode}" says how a checkpoint is opened, so without checkpoint= it has no effect')
    if mode != "copy" and isinstance(checkpoint, Mapping):
        raise PlanError(
            f'mode="{mode}" maps files, and these weights are a mapping in memory; pass the path of a checkpoint in '
            'safetensors, or mode="copy"'
        )
    if mode == "map" and pageable != "never":
        raise PlanError('mode="map" pins or fails, so pageable= has no effect; leave it out, or say mode="auto"')


def mapped_store(
    source: Source, loads: list[Load], mode: Mode, placed: Placed, specs: Mapping[str, TensorSpec], units: Units
) -> HostStore | None:
    """Map what can be mapped of a module's host tensors. None where all is copied, and `placed` says why.

    Raises
    ------
    AliasError, RegistrationError
        ``"map"`` was asked for and the file does not qualify.
    """
    try:
        if not placed.pinned:
            raise RegistrationError("the memory is pageable, and mapped files are pinned")
        return _mapped(source, loads, mode, placed, specs, units)
    except (AliasError, RegistrationError) as refused:
        if mode == "map":
            raise
        placed.because = str(refused)
        return None


def _mapped(
    source: Source, loads: list[Load], mode: Mode, placed: Placed, specs: Mapping[str, TensorSpec], units: Units
) -> HostStore:
    if not isinstance(source, Checkpoint):
        raise AliasError(
            'these weights are no files that could be mapped; pass the path of a checkpoint, or mode="copy"'
        )
    at = {name: stored.byte_offset for shard in source.shards() for name, stored in shard.tensors.items()}
    staged = {name for names in units.values() for name in names}
    names: dict[str, str] = {}
    for load in loads:
        entry = load.entry
        if entry.name not in specs:
            continue
        for assembly in [load.whole] if load.whole is not None else [assembly for _, assembly in load.parts]:
            _check_plain(entry.name, assembly)
        if load.whole is None or _is_written(entry):
            continue
        stored = load.whole.boxes[0].name
        alignment = load.whole.spec.dtype.itembits // 8 if entry.name in staged else _KERNEL_ALIGNMENT
        if at[stored] % max(alignment, 1) == 0 and stored not in names:
            names[stored] = entry.name
    if not names:
        raise AliasError(
            f'nothing that is to live on the host can be mapped from "{source.path}" as it lies there; say '
            'mode="copy", or rewrite it once with `dlpoffload align`'
        )
    store = map_some(source, names, specs=specs, units=units, device=placed.driver.device)
    slot_nbytes(placed.plan, store)
    store.because = "asked for" if mode == "map" else "it can be mapped, which costs no second copy"
    return store


def slot_nbytes(plan: Plan, store: HostStore | None) -> int:
    """Bytes of a slot: as planned, or more where a unit has gaps because it is laid out as it lies in its file.

    Raises
    ------
    AliasError
        The budget has no room for that.
    """
    needed = max((store.slot_nbytes(unit.name) for unit in plan.streamed_units if store is not None), default=0)
    more = plan.slots * max(needed - plan.slot_nbytes, 0)
    if more and plan.device_nbytes + more > plan.device_budget:
        raise AliasError(
            f"laid out as they lie in their file, units need {more} bytes more of slots than planned, and the budget "
            'has no room for them; raise it by that much, or say mode="copy"'
        )
    return max(needed, plan.slot_nbytes)


def _check_plain(name: str, assembly: Assembly) -> None:
    box = assembly.boxes[0] if len(assembly.boxes) == 1 else None
    if box is None or (box.stored.shape, box.stored.dtype) != (assembly.spec.shape, assembly.spec.dtype):
        raise AliasError(
            f'"{name}" is made of {", ".join(map(repr, assembly.sources))} by slices or concatenations, and a mapped '
            'file can be neither; say mode="copy", which reads the parts into place, or store it as it is wanted'
        )


def _is_written(entry: Entry) -> bool:
    """Whether a forward is known to write it, or it lies inside of a tensor that wraps others: it gets own memory."""
    return any(
        member.outer is not None
        or (attribute in _STATISTICS and isinstance(module, nn.modules.batchnorm._NormBase))
        or (isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None)
        for member in entry.members
        for module, attribute, _ in member.places
    )
