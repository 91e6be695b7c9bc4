"""Shared memory registered with a real driver in several processes at once: one copy, and nothing left of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dlpoffload
from dlpoffload import HostStore, SlotRing, share
from dlpoffload.driver import Driver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

np = pytest.importorskip("numpy")

MIB = 1 << 20
UNITS, UNIT_NBYTES = 8, 128 * MIB

RANK = """
import ctypes, sys
import dlpoffload as dlpo
from dlpoffload.driver import open_driver

driver = open_driver("cuda:0")
with dlpo.open_shared(sys.argv[1], timeout_s=120) as checkpoint:
    units = {name: (name,) for name in checkpoint.specs}
    store = dlpo.HostStore.map_file(checkpoint.path, units=units, device="cuda:0")
assert dlpo.pinned_nbytes() >= store.nbytes and store.file_nbytes >= store.nbytes
back = bytearray(store.specs["0"].nbytes)
address = ctypes.addressof(ctypes.c_char.from_buffer(back))

def step():
    for name in units:
        with ring.prefetch(name) as views:
            driver.copy_async(address, views[name].device_pointer, len(back), 0)
            driver.stream_synchronize(0)
            del views
        assert back == bytes([int(name)]) * len(back), name

with dlpo.SlotRing({unit: store.slab(unit) for unit in units}, slots=2, device="cuda:0") as ring:
    step()
    print("ready", flush=True)
    sys.stdin.readline()
    step()
    assert ring.stats.copies >= 2 * len(units) - 2
store.close()
assert dlpo.pinned_nbytes() == 0
print("right", flush=True)
"""


@pytest.fixture(autouse=True)
def mappable(cuda_driver: Driver) -> None:
    """The device pins read-only memory, or there is nothing to test."""
    if not cuda_driver.capabilities().read_only_host_register:
        pytest.skip("this device cannot pin read-only memory: map_file is refused there, by name")


@pytest.fixture
def ranks() -> Iterator[list[Any]]:
    """Processes, ended at the latest with the test."""
    started: list[Any] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(ranks: list[Any], code: str, name: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code, name], env=environment, text=True, **pipes)
    ranks.append(process)
    return process


def line(process: Any) -> str:
    found: str = process.stdout.readline().strip()
    assert found, process.communicate()[1]
    return found


def pss(pid: int) -> int:
    parts = re.findall(r"memfd:dlpoffload.*?\nPss: +(\d+) kB", Path(f"/proc/{pid}/smaps").read_text(), re.DOTALL)
    return 1024 * sum(map(int, parts))


def shmem() -> int:
    return 1024 * int(re.findall(r"Shmem: +(\d+) kB", Path("/proc/meminfo").read_text())[0])


def test_three_processes_stream_from_one_copy_and_the_last_of_them_after_the_others_were_killed(
    ranks: list[Any],
) -> None:
    name, total, before = f"gpu ranks of {os.getpid()}", UNITS * UNIT_NBYTES, shmem()
    filler = start(
        ranks,
        "import sys, numpy as np, dlpoffload as dlpo\n"
        f"kept = dlpo.share({{str(n): np.full({UNIT_NBYTES}, n, np.uint8) for n in range({UNITS})}}, sys.argv[1])\n"
        "print('filled', flush=True)\nsys.stdin.readline()\n",
        name,
    )
    others = [start(ranks, RANK, name) for _ in range(3)]
    assert line(filler) == "filled"
    for rank in others:
        assert line(rank) == "ready"
    each = [pss(rank.pid) for rank in others]
    assert 0.9 * total < sum(each) < 1.1 * total, each
    assert shmem() - before < 1.5 * total
    filler.kill()
    filler.wait()
    for rank in others[:2]:
        rank.kill()  # while it has the pages registered
        rank.wait()
    out, err = others[2].communicate("\n", timeout=120)
    assert (others[2].returncode, out.strip()) == (0, "right"), err
    assert shmem() - before < 0.25 * total
    assert not [file for file in os.listdir("/dev/shm") if "gpu ranks" in file]


def test_the_filler_registers_its_own_pages_after_they_are_sealed(cuda_driver: Driver) -> None:
    weights = np.arange(4 * MIB, dtype=np.uint32)
    with (
        share({"w": weights}, f"gpu filler of {os.getpid()}") as shared,
        HostStore.map_file(shared.path, device="cuda:0", units={"u": ("w",)}, device_views=("w",)) as store,
    ):
        view = store.device_view("w", read_only=True)
        back = np.empty_like(weights)
        cuda_driver.copy(back.ctypes.data, view.device_pointer, back.nbytes)
        assert (back == weights).all()
        with SlotRing({"u": store.slab("u")}, device="cuda:0") as ring, ring.prefetch("u") as views:
            cuda_driver.synchronize()
            back[:] = 0
            cuda_driver.copy(back.ctypes.data, views["w"].device_pointer, back.nbytes)
            assert (back == weights).all()
            del views
        del view
