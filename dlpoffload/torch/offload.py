"""`offload_`: from a module and a budget to a handle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import overload

from torch import nn

from ..checkpoint import Recipe
from ..driver import Driver, open_driver
from ..errors import OffloadError, PlanError
from ..planning import CostModel, Policy, balanced
from .device_map import Budgets, Device, DeviceMap, by_device
from .handle import OffloadHandle
from .installed import handle_of
from .loading import FromCheckpoint
from .mapping import Mode, check_mode
from .offloading import Offloading, Pageable
from .sources import Weights, open_source
from .split import SplitHandle
from .watched import is_watched

__all__ = ["offload_", "refuse_offloaded"]


@overload
def offload_(
    module: nn.Module,
    device_budget: int | str,
    *,
    device: str | int | None = None,
    device_map: None = None,
    units: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    slots: int | None = None,
    policy: Policy = balanced,
    cost: CostModel | None = None,
    pageable: Pageable = "never",
    stage_unmapped: bool = False,
    checkpoint: Weights | None = None,
    mode: Mode = "copy",
    recipe: Recipe | None = None,
    strict: bool = True,
) -> OffloadHandle: ...


@overload
def offload_(
    module: nn.Module,
    device_budget: Budgets,
    *,
    device: None = None,
    device_map: Mapping[str, Device],
    units: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    slots: int | None = None,
    policy: Policy = balanced,
    cost: CostModel | None = None,
    pageable: Pageable = "never",
    stage_unmapped: bool = False,
    checkpoint: Weights | None = None,
    mode: Mode = "copy",
    recipe: Recipe | None = None,
    strict: bool = True,
) -> SplitHandle: ...


def offload_(
    module: nn.Module,
    device_budget: int | str | Budgets,
    *,
    device: str | int | None = None,
    device_map: Mapping[str, Device] | None = None,
    units: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    slots: int | None = None,
    policy: Policy = balanced,
    cost: CostModel | None = None,
    pageable: Pageable = "never",
    stage_unmapped: bool = False,
    checkpoint: Weights | None = None,
    mode: Mode = "copy",
    recipe: Recipe | None = None,
    strict: bool = True,
) -> OffloadHandle | SplitHandle:
    """Offload a module's parameters and buffers under a budget of device memory, in place.

    What the plan keeps on the device is moved there; the rest goes to pinned host memory of exactly its size, and is
    mapped, or staged through a ring of slots while its unit runs. The module computes the same bits as before, on
    `device`; give it inputs there.

    *Aliasing*: parameters stay the same objects; their data is replaced. *Lifetime*: everything lives as long as the
    module, or until `OffloadHandle.restore_`. *Ordering*: on the stream that is current when the module is called.

    Parameters
    ----------
    module
        Any module, on the CPU or on a device; with `checkpoint` on ``meta``, wholly or partly.
    device_budget
        Bytes on the device for residents and ring together, or such as ``"20GiB"``. Activations do not count. With
        `device_map`: a mapping from each device to its bytes.
    device
        Where it runs; the first CUDA device by default, or the CPU driver where there is none.
    device_map
        Which module is on which of several devices, as ``{"": "cuda:0", "model.layers.16": "cuda:1"}``: by module
        paths, or patterns on them. Of what holds for a module the nearest counts: its own path, then that of the
        module around it, and so on; ``""`` is the whole. Inputs are moved to the device of a part of what is split, and
        of what the map names; outputs stay, but those of the whole go to the device of the first input. A forward that
        mixes tensors of two devices then raises PlanError, which says what to map.
    units
        What is staged together: patterns on module paths (``"model.layers.*"``). Left out, the repeated containers
        are found. See `planning.choose_units`.
    slots
        Slots of the ring: 2 when left out, which overlaps copies with compute, and one more for each staged unit that
        others run inside of.
    policy
        Where what lives: `planning.balanced`, `all_mapped`, `all_staged`, a `pattern_policy`, or your own.
    cost
        What the link costs; see `planning.CostModel`.
    pageable
        ``"never"``: memory that cannot be pinned is an error. ``"if_refused"``: take pageable memory then.
        ``"always"``: pin nothing. Copies from pageable memory are slow, and the report says so.
    stage_unmapped
        Where the device cannot map host memory, or it is pageable: stage what would be mapped, each tensor as a unit
        of its own. Otherwise that is an error.
    checkpoint
        Where the weights are read from, straight to where they will live: a safetensors file, an index or a folder,
        an open `Checkpoint`, or a mapping from names to tensors. Tensors on ``meta`` become real, as the same objects,
        and are on the CPU when the module is restored. What is not on ``meta`` is read over where it is stored, and
        kept where it is not.
    mode
        How the checkpoint becomes the host's bytes. ``"copy"`` reads it into pinned memory. ``"map"`` pins the file's
        own pages: no second copy, and tensors that are read-only until `OffloadHandle.update` or
        `OffloadHandle.copy_out` moves them. ``"auto"`` maps where it can, and copies otherwise; the report says why.
    recipe
        How the module's tensors are made of stored ones by slices and concatenations; see `checkpoint.recipe`.
    strict
        As in ``load_state_dict``. False keeps what is not on ``meta`` and not stored, and ignores what is stored and
        not asked for.

    Raises
    ------
    PlanError
        No parameters or buffers; the budget cannot hold the ring (the message names the smallest that can); a
        pattern that matches nothing; an argument that has no effect; a tensor on no device of `device_map`, or tied
        ones on two.
    SpecError
        A tensor that is sparse or on ``meta``, a device or budget that means nothing.
    DriverNotFoundError
        No such device.
    OffloadError
        The module, or one inside it, is offloaded already.
    HostMemoryError, DeviceMemoryError
        Memory was refused.
    RegistrationError, AliasError
        ``mode="map"``, and the device, the file system or the file does not allow it.
    CheckpointError
        The checkpoint is damaged, or does not fit the module; the message names every tensor and what to do.

    After any error the module is as it was; what was on ``meta`` still is.
    """
    if checkpoint is None and (recipe is not None or not strict):
        raise PlanError("recipe= and strict= say how a checkpoint is read, so without checkpoint= they have no effect")
    check_mode(mode, checkpoint, pageable)

    def offloading(driver: Driver, nbytes: int | str) -> Offloading:
        return Offloading(driver, nbytes, units, slots, policy, cost, pageable, stage_unmapped)

    made: Callable[..., OffloadHandle | SplitHandle]
    if device_map is None and not isinstance(device_budget, Mapping):
        made = partial(OffloadHandle, module, offloading(open_driver(device), device_budget))
    else:
        mapped, budgets = _over_devices(device_map, device_budget, device)
        each = {name: offloading(driver, budgets[name]) for name, driver in mapped.drivers.items()}
        made = partial(SplitHandle, module, mapped, each)
    refuse_offloaded(module)
    if checkpoint is None:
        return made()
    with open_source(checkpoint) as source:
        return made(FromCheckpoint(source, recipe, strict, mode))


def _over_devices(
    device_map: Mapping[str, Device] | None, device_budget: int | str | Budgets, device: object
) -> tuple[DeviceMap, dict[str, int | str]]:
    """The map and its budgets, or PlanError where they do not belong together."""
    if not isinstance(device_budget, Mapping):
        raise PlanError(
            f"device_budget={device_budget!r} is one number, but device_map names several devices; give each one "
            'its own: {"cuda:0": "20GiB", "cuda:1": "10GiB"}'
        )
    if device_map is None:
        raise PlanError(
            "device_budget is by device, so device_map= must say which module is on which; give one number for "
            "one device"
        )
    if device is not None:
        raise PlanError(f"device={device!r} has no effect beside device_map=; leave it out")
    mapped, budgets = DeviceMap(device_map), by_device(device_budget)
    mapped.check_budgets(budgets)
    return mapped, budgets


def refuse_offloaded(module: nn.Module) -> None:
    """Raise OffloadError where a module, or one inside of it, is offloaded."""
    for path, inside in module.named_modules():
        handle = handle_of(inside)
        if handle is not None:
            raise OffloadError(
                f'"{path or type(module).__name__}" is offloaded already, to {handle.device}; '
                "restore_() that first, or offload the outer module once"
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_watched(tensor):
            raise OffloadError(
                f'"{name}" is a tensor of another module, too, which is offloaded; restore_() that first, or offload '
                "one module that holds both"
            )
