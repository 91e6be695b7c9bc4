"""Stream weights through a ring of two device slots, without any framework."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy

import dlpoffload as dlpo

UNITS, WIDTH = 8, 512


def choose() -> tuple[str, Any]:
    """A GPU with CuPy to read the slots, else the CPU driver with NumPy."""
    if dlpo.default_device() == "cpu" or importlib.util.find_spec("cupy") is None:
        return "cpu", numpy
    import cupy

    return "cuda:0", cupy


def main() -> None:
    device, xp = choose()
    rng = numpy.random.default_rng(0)
    weights = {f"block{i}.w": rng.standard_normal((WIDTH, WIDTH), "float32") / WIDTH**0.5 for i in range(UNITS)}
    units = {f"block{i}": (f"block{i}.w",) for i in range(UNITS)}
    store = dlpo.HostStore.copy_of(weights, units=units, device=device)  # exact, pinned

    stream = 0  # the calling thread on the CPU driver, the legacy default stream on a GPU
    x = xp.ones((1, WIDTH), "float32")
    with dlpo.SlotRing({unit: store.slab(unit) for unit in units}, slots=2, device=device) as ring:
        for unit, following in zip(units, [*list(units)[1:], "block0"], strict=True):
            lease = ring.prefetch(unit, stream=stream)  # enqueues the copy, unless a slot holds the unit
            ring.look_ahead([following], stream=stream)  # a copy beside the product below
            with lease as views:  # the stream waits for the copy; leaving marks the slot's last reader
                x = xp.tanh(x @ xp.from_dlpack(views[f"{unit}.w"]))

        prefetcher = dlpo.Prefetcher(ring)  # learns the order, and looks ahead by itself
        for unit in units:
            lease = prefetcher.enter(unit, stream=stream)
            x = xp.tanh(x @ xp.from_dlpack(lease.views[f"{unit}.w"]))
            prefetcher.leave(lease)
        stats = ring.read_stats()

    expected = numpy.ones((1, WIDTH), "float32")
    for weight in [*weights.values()] * 2:
        expected = numpy.tanh(expected @ weight)
    numpy.testing.assert_allclose(x if xp is numpy else x.get(), expected, rtol=1e-3, atol=1e-4)
    print(f"{device}: {stats.copies} copies, {stats.copied_nbytes} bytes, {stats.late_copies} late, {stats.hits} hits")


if __name__ == "__main__":
    main()
