"""Blocks that are streamed without a handle: a list of them, or a stack under a scan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from ..errors import SpecError
from ..planning import Placement
from ..planning.request import checked_slots
from ..spec import TensorSpec, dtype
from .placing import Home
from .streaming import Weights, run_streamed

__all__ = ["scan_blocks", "stream_blocks"]


def stream_blocks(step: Callable[[Any, Any], Any], blocks: Sequence[Any], carry: Any, *, slots: int = 2) -> Any:
    """Run ``carry = step(block, carry)`` over blocks whose leaves in host memory are copied to the device ahead.

    Inside a `jit`, copies are ordered by barriers as `OffloadHandle.streamed` does. Outside, this is an eager loop:
    make `step` a jitted function, and the copy of the next block runs while this one computes; the host waits for each
    block's result before it lets another block in, so that never more than `slots` are on the device.

    *Aliasing*: leaves that are on the device are passed on as they are.

    Parameters
    ----------
    step
        From a block and a carry to the next carry.
    blocks
        Pytrees, in the order in which they run.
    slots
        How many blocks are on the device at once. Without overlap: 1.

    Raises
    ------
    PlanError
        No such number of slots.
    GradientError
        A gradient is asked for a leaf in host memory.
    """
    checked_slots(slots)

    def staged() -> Any:
        def loop(blocks: Sequence[Any], carry: Any) -> Any:
            for block in blocks:
                carry = step(block, carry)
            return carry

        units = [f"block {i}" for i, block in enumerate(blocks) for _ in jax.tree.leaves(block)]
        return _run(loop, list(blocks), carry, units, stacked=False, slots=slots, name="stream_blocks")

    return staged() if _traced((blocks, carry)) else _eager(step, blocks, carry, slots, staged)


def scan_blocks(
    body: Callable[[Any, Any], tuple[Any, Any]], init: Any, stacked: Any, *, reverse: bool = False, slots: int = 2
) -> tuple[Any, Any]:
    """Scan over stacked layers as `jax.lax.scan` does, with each layer of a stack in host memory staged ahead.

    *Aliasing*: none. See `OffloadHandle.streamed` for what bounds the memory.

    Parameters
    ----------
    body
        From a carry and one layer to the next carry and an output.
    stacked
        A pytree whose leaves have the layers along their first axis; those on the device are sliced as ever.
    slots
        How many layers are on the device at once.

    Raises
    ------
    PlanError
        No such number of slots.
    GradientError
        A gradient is asked for a stack in host memory.
    """
    checked_slots(slots)

    def scan(stacked: Any, init: Any) -> Any:
        return jax.lax.scan(body, init, stacked, reverse=reverse)

    units = [""] * len(jax.tree.leaves(stacked))
    result: tuple[Any, Any] = _run(scan, stacked, init, units, stacked=True, slots=slots, name="scan_blocks")
    return result


def _run(
    fun: Callable[[Any, Any], Any], tree: Any, carry: Any, units: Sequence[str], *, stacked: bool, slots: int, name: str
) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    others, other_structure = jax.tree.flatten(carry)

    def flat(*values: Any) -> Any:
        weights = jax.tree.unflatten(structure, values[: len(leaves)])
        return fun(weights, jax.tree.unflatten(other_structure, values[len(leaves) :]))

    homes = {
        i: _home(leaf, unit, stacked)
        for i, (leaf, unit) in enumerate(zip(leaves, units, strict=True))
        if _on_host(leaf)
    }
    weights = Weights(homes, {i: f"leaf {i}" for i in homes}, {i: i for i in homes}, slots)
    return run_streamed(flat, [*leaves, *others], weights, name, lambda _: None)


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _on_host(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.typeof(leaf).memory_space == jax.memory.Space.Host


def _home(leaf: Any, unit: str, stacked: bool) -> Home:
    if stacked and not leaf.shape:
        raise SpecError("a leaf of a stack has no axis; every leaf has the layers along its first axis")
    spec = TensorSpec(leaf.shape, dtype(str(leaf.dtype)))
    return Home(spec, Placement.HOST_STAGED, unit, leaf.shape[0] if stacked else 0)


def _eager(
    step: Callable[[Any, Any], Any], blocks: Sequence[Any], carry: Any, slots: int, staged: Callable[[], Any]
) -> Any:
    ring: deque[Any] = deque()
    coming = iter(blocks)
    for _ in blocks:
        # Only behind the result of the block whose place the next one takes: XLA's allocator would give a copy that is
        # enqueued before more memory, and so as much as all blocks together.
        jax.block_until_ready(carry)
        while len(ring) < slots and (block := next(coming, None)) is not None:
            ring.append(_put_block(block))
        carry = step(ring.popleft(), carry)
        if _traced(carry):  # by what the step closes over: a derivative would keep the copies of all blocks
            return staged()
    return carry


def _put_block(block: Any) -> Any:
    """Copy a block to the device, its smallest leaves first.

    XLA's allocator (BFC) gives a request a whole hole where less than the request and less than 128 MiB would be left
    over, and counts all of it. The hole that a former block left is cut without a rest from its smallest piece up.
    """
    leaves, structure = jax.tree.flatten(block)
    for i in sorted(range(len(leaves)), key=lambda i: getattr(leaves[i], "nbytes", 0)):
        leaves[i] = _put(leaves[i])
    return jax.tree.unflatten(structure, leaves)


def _put(leaf: Any) -> Any:
    if not _on_host(leaf):
        return leaf
    (device,) = leaf.devices()
    return jax.device_put(leaf, SingleDeviceSharding(device, memory_kind="device"))
