"""`offload`: from a pytree and a budget to a tree of the same structure, and a handle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from ..driver import open_driver
from ..errors import SpecError
from ..planning import CostModel, Placement, Policy, balanced
from .handle import OffloadHandle
from .leaves import Leaf, collect
from .placing import Offloading, Placed, usable_in_place

__all__ = ["offload"]


def offload(
    tree: Any,
    device_budget: int | str,
    *,
    device: str | int | None = None,
    units: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    stacked: Sequence[str] = (),
    slots: int | None = None,
    policy: Policy = balanced,
    cost: CostModel | None = None,
    leaves: Iterable[Any] | None = None,
    donate: bool = False,
) -> tuple[Any, OffloadHandle]:
    """Offload a pytree of weights under a budget of device memory; the tree that comes back is a new one.

    Its leaves are arrays on the device, arrays over mapped host memory (``device`` arrays whose bytes the device reads
    over the link), or arrays in pinned host memory, which `OffloadHandle.streamed` stages through a ring while a
    program runs. On the CPU all three are arrays of the one memory that there is.

    *Aliasing*: host leaves never share bytes with `tree`, except row-major `View`s of pinned memory that the device
    maps, which are taken as they are: that is the way in for a `HostStore`, read-only or not. Resident leaves that lie
    on the device already are the same arrays. *Lifetime*: each array keeps its bytes; see `OffloadHandle.close`.
    *Ordering*: waits for the leaves to be computed; the bytes are in place on return.

    Parameters
    ----------
    tree
        Dicts, lists, dataclasses, Linen params, an `nnx.State` or `nnx.Module`, an Equinox module. Leaves are JAX
        arrays, NumPy arrays, or anything with ``__dlpack__``; others (functions, numbers, PRNG keys, weakly typed
        arrays) are left as they are, and the report says so.
    device_budget
        Bytes on the device for residents and ring together, or such as ``"20GiB"``. Activations do not count.
    device
        Where it runs; the first CUDA device by default, or the CPU where there is none.
    units
        What is staged together: patterns on paths (``"params.layers_*"``). Left out, the repeated containers are found.
        See `planning.choose_units`.
    stacked
        Paths below which every leaf is a stack of layers along its first axis, as `jax.lax.scan` takes them. Each layer
        is a unit. A stack is one array, so it is resident or staged as a whole.
    slots
        Units that the ring holds: 2 when left out, which overlaps copies with compute.
    policy, cost
        Where what lives, and what the link costs; see `planning`.
    leaves
        Gives the values of an abstract tree (of `jax.eval_shape`, `nnx.eval_shape`), in the order of its leaves and
        one at a time: then host memory holds the weights once, and one unit more.
    donate
        Consume the input: a JAX array is deleted as soon as its bytes are in place. Resident leaves that are the same
        arrays are not.

    Returns
    -------
    tree, handle

    Raises
    ------
    PlanError
        No arrays; the budget cannot hold the ring (the message names the smallest that can); a pattern or a stack
        that matches nothing; an argument that has no effect.
    SpecError
        A leaf that JAX would narrow (64 bits with x64 off), that packs elements into bytes (int4), is sharded over
        several devices, traced, deleted, or abstract without `leaves`.
    DriverNotFoundError
        No such device, or JAX does not see it.
    HostMemoryError, DeviceMemoryError
        Memory was refused.

    After any error the input is as it was, except for leaves that `donate` or `leaves` has consumed.
    """
    offloading = Offloading(open_driver(device), device_budget, units, stacked, slots, policy, cost)
    found, structure = collect(tree, leaves)
    plan, homes = offloading.plan(found)
    placed = Placed(offloading.driver, homes)
    driver = offloading.driver
    in_place = frozenset(
        leaf.name
        for leaf in found
        if leaf.name in homes
        and homes[leaf.name].placement is not Placement.DEVICE
        and usable_in_place(leaf.value, driver)
    )
    source = found if leaves is None else _with_values(found, leaves)
    for leaf in placed.fill(source, in_place=in_place):
        if leaf.spec is not None:
            value, leaf.value = leaf.value, None
            if donate and isinstance(value, jax.Array) and leaf.tied_to == leaf.name:
                _consume(value, placed.arrays[leaf.name])
            del value
    handle = OffloadHandle(found, structure, plan, placed, slots=plan.slots or 1)
    return handle.tree, handle


def _consume(value: jax.Array, placed: jax.Array) -> None:
    if value.unsafe_buffer_pointer() != placed.unsafe_buffer_pointer():
        value.delete()


def _with_values(leaves: Sequence[Leaf], values: Iterable[Any]) -> Iterator[Leaf]:
    """The leaves of an abstract tree with their values, taken one at a time."""
    given = iter(values)
    for count, leaf in enumerate(leaves):
        try:
            leaf.value = next(given)
        except StopIteration:
            raise SpecError(f'leaves= ends after {count} of {len(leaves)}; the next one is "{leaf.name}"') from None
        yield leaf
    if next(given, leaves) is not leaves:
        raise SpecError(f"leaves= gives more than the {len(leaves)} leaves of the tree")
