"""One copy of the weights for the ranks of a node: the first fills shared memory, all of them stream from it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import numpy as np

import dlpoffload as dlpo

RANKS, LAYERS, HIDDEN = 3, 6, 512
DEVICE = sys.argv[1] if len(sys.argv) > 1 else None


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {f"layers.{i}.w": rng.standard_normal((HIDDEN, HIDDEN), np.float32) for i in range(LAYERS)}


def rank(number: int, name: str, done: Any) -> None:
    # A name is all that ranks have in common. Whoever comes early waits until the bytes are whole.
    checkpoint = dlpo.share(weights(), name) if number == 0 else dlpo.open_shared(name, timeout_s=60)
    units = {name: [name] for name in checkpoint.specs}
    # Pinned in place where the device can pin read-only memory; offload_(checkpoint=checkpoint) of torch does the same.
    store = dlpo.HostStore.open(checkpoint.path, mode="auto", units=units, device=DEVICE)
    wanted = weights()
    with dlpo.SlotRing({unit: store.slab(unit) for unit in units}, device=DEVICE) as ring:
        for unit in units:
            with ring.prefetch(unit) as views:
                ring.driver.synchronize()
                staged = dlpo.HostBuffer.copy_of(views[unit], device=DEVICE)
                del views
            assert bytes(staged.memoryview()) == wanted[unit].tobytes()
        copies = ring.stats.copies
    # The name is the first rank's until it closes the checkpoint; the bytes live until the last rank has gone.
    done.wait()
    checkpoint.close()
    own = store.host_nbytes - store.file_nbytes
    print(f"rank {number}: {store.mode}, {copies} units bit for bit, {own:,} bytes of its own", flush=True)
    store.close()


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    done = spawn.Barrier(RANKS)
    ranks = [spawn.Process(target=rank, args=(n, f"example {os.getpid()}", done)) for n in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    print(f"exit codes: {[process.exitcode for process in ranks]}")
    sys.exit(any(process.exitcode for process in ranks))
