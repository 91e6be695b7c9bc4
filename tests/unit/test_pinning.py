"""Pinning: page sizes and NUMA nodes with their notes, in the background, under a budget, and who holds what."""

from __future__ import annotations

import errno
import gc
import inspect
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import (
    HostBuffer,
    HostStore,
    TensorSpec,
    _native,
    blocks,
    lifetime,
    limits,
    pages,
    promises,
    registrations,
    wall,
)
from dlpoffload.driver import installed
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.driver.topology import numa_node_of
from dlpoffload.errors import AliasError, ClosedError, HostMemoryError, RegistrationError, SpecError
from dlpoffload.limits import check_host_budget, host_limits
from dlpoffload.store import files, homes, pinned

np = pytest.importorskip("numpy")
save_file = pytest.importorskip("safetensors.numpy").save_file

MIB = 1 << 20
GIB = 1 << 30
PAGE = os.sysconf("SC_PAGESIZE")


# ------------------------------------------------------------------------------------ page sizes and nodes


def fallback(monkeypatch: pytest.MonkeyPatch, sizes: list[int], given: set[int]) -> list[tuple[int, int]]:
    """A hugetlb pool of some page sizes, of which only some are left; ordinary pages in its place."""
    asked: list[tuple[int, int]] = []

    def map_hugetlb(nbytes: int, page_nbytes: int) -> int:
        asked.append((nbytes, page_nbytes))
        if page_nbytes not in given:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return _native.map_anonymous(-(-nbytes // page_nbytes) * page_nbytes, page_nbytes, False)

    monkeypatch.setattr(pages, "_pool_sizes", lambda: sizes)
    monkeypatch.setattr(_native, "map_hugetlb", map_hugetlb)
    return asked


def test_hugetlb_falls_back_size_by_size_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fallback(monkeypatch, [4 * MIB, 2 * MIB], {2 * MIB})
    with HostBuffer.allocate(5 * MIB, device="cpu", huge_pages="hugetlb") as buffer:
        assert asked == [(5 * MIB, 4 * MIB), (5 * MIB, 2 * MIB)]
        assert buffer.nbytes == 5 * MIB
        first, second = buffer.notes
        assert "4194304 bytes (4.00 MiB) could not be had (Cannot allocate memory)" in first
        assert "round 5242880 bytes (5.00 MiB) up to 6291456 bytes" in second
        assert not any(buffer.memoryview())
        start = buffer.host_pointer
    assert f"{start:x}-" not in Path("/proc/self/maps").read_text(), "the rounded end was left mapped"


def test_an_empty_hugetlb_pool_gives_transparent_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback(monkeypatch, [2 * MIB], set())
    with HostBuffer.allocate(5 * MIB, device="cpu", huge_pages="hugetlb") as buffer:
        assert "transparent ones were taken" in buffer.notes[-1]
    with HostBuffer.allocate(5 * MIB, device="cpu") as buffer:
        assert not [note for note in buffer.notes if "hugetlb" in note]


def test_the_hugetlb_pool_is_no_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise HostMemoryError("too much", nbytes=1)

    monkeypatch.setattr(blocks, "check_pinning", refuse)
    fallback(monkeypatch, [2 * MIB], {2 * MIB})
    HostBuffer.allocate(2 * MIB, device="cpu", huge_pages="hugetlb").close()
    fallback(monkeypatch, [2 * MIB], set())
    with pytest.raises(HostMemoryError):
        HostBuffer.allocate(2 * MIB, device="cpu", huge_pages="hugetlb")


def test_transparent_pages_that_are_off_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "host_limits", lambda: replace(host_limits(), transparent_huge_pages="never"))
    with HostBuffer.allocate(4 * MIB, device="cpu") as buffer:
        assert "small pages pin about half as fast" in buffer.notes[0]
    for small in (
        HostBuffer.allocate(PAGE, device="cpu"),
        HostBuffer.allocate(GIB // 512, device="cpu", huge_pages="never"),
    ):
        with small as buffer:
            assert buffer.notes == ()


class Nodes:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: int, refuse: bool = False) -> None:
        self.preferred: list[tuple[int, int]] = []
        self.refuse = refuse
        monkeypatch.setattr(pages, "_nodes", lambda: list(nodes))
        monkeypatch.setattr(_native, "prefer_node", self)

    def __call__(self, address: int, nbytes: int, node: int) -> None:
        if self.refuse:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self.preferred.append((nbytes, node))


def test_pages_come_from_the_devices_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(monkeypatch, 0, 1)
    with installed(CpuDriver(numa_node=1)):
        HostBuffer.allocate(5000, device="cpu").close()
        HostBuffer.allocate(5000, device="cpu", numa_node=0).close()
    HostBuffer.allocate(5000, device="cpu").close()  # a device that is near to no node
    assert nodes.preferred == [(2 * PAGE, 1), (2 * PAGE, 0)]
    nodes = Nodes(monkeypatch, 0)
    with installed(CpuDriver(numa_node=0)):
        HostBuffer.allocate(5000, device="cpu").close()
    assert nodes.preferred == [], "there is one node only"


def test_the_node_of_a_pci_device(tmp_path: Path) -> None:
    for name, text in (("0000:0a:00.0", "1\n"), ("0000:0b:00.0", "-1\n"), ("0000:0c:00.0", "?\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(text)
    assert numa_node_of(b"0000:0A:00.0\0\0\0\0", tmp_path) == 1
    for unknown in (b"0000:0B:00.0\0", b"0000:0C:00.0\0", b"0000:0D:00.0\0"):
        assert numa_node_of(unknown, tmp_path) is None


def test_a_node_that_cannot_be_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, 0, 1, refuse=True)
    mapped: list[int] = []
    map_anonymous = _native.map_anonymous
    monkeypatch.setattr(_native, "map_anonymous", lambda *of: mapped.append(map_anonymous(*of)) or mapped[-1])
    with installed(CpuDriver(numa_node=1)):
        with HostBuffer.allocate(5000, device="cpu") as buffer:
            assert buffer.notes == ("NUMA node 1 of cpu could not be preferred (Operation not permitted)",)
        with pytest.raises(HostMemoryError, match=r"numa_node=0 was asked for.*Operation not permitted"):
            HostBuffer.allocate(5000, device="cpu", numa_node=0)
    assert len(mapped) == 2
    assert not any(f"{start:x}-" in Path("/proc/self/maps").read_text() for start in mapped)
    with pytest.raises(SpecError, match="has the nodes 0, 1"):
        HostBuffer.allocate(5000, device="cpu", numa_node=2)


@pytest.mark.skipif(not Path("/sys/devices/system/node/node0").exists(), reason="needs NUMA nodes")
def test_the_kernel_takes_the_preference() -> None:
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/numa_maps")
    with HostBuffer.allocate(3 * PAGE, device="cpu", numa_node=0) as buffer:
        policies = dict(line.split()[:2] for line in maps.read_text().splitlines())
        assert policies[f"{buffer.host_pointer:x}"].startswith("prefer")


@pytest.mark.parametrize(
    "options",
    [
        {"huge_pages": "yes"},
        {"numa_node": 4096},
        {"numa_node": True},
        {"host_budget": "lots"},
        {"pinned": False, "huge_pages": "hugetlb"},
        {"pinned": False, "background": True},
        {"progress": print},
        {"background": True, "chunk_nbytes": 0},
        {"background": True, "chunk_nbytes": "1KiB"},
        {"background": True, "chunk_nbytes": "65GiB"},
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    before = dlpo.live_buffers()
    with pytest.raises(SpecError):
        HostBuffer.allocate(10 * MIB, device="cpu", **options)
    gc.collect()
    lifetime.drain()
    assert dlpo.live_buffers() == before


# ------------------------------------------------------------------------------------------- in the background


class Slow(CpuDriver):
    """Pins when it is let, and refuses the `refuse`-th time."""

    def __init__(self, refuse: int = -1) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.count, self.refuse = 0, refuse
        self.started = threading.Event()

    def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
        self.started.set()
        assert self.gate.acquire(timeout=20)
        if self.count == self.refuse:
            raise RegistrationError("no more")
        self.count += 1
        super().host_register(pointer, nbytes, read_only=read_only)

    def let(self, chunks: int) -> None:
        self.gate.release(chunks)


@pytest.fixture
def slow() -> Iterator[Slow]:
    with installed(Slow()) as driver:
        assert isinstance(driver, Slow)
        yield driver


def test_the_front_is_used_while_the_end_is_pinned(slow: Slow) -> None:
    seen: list[tuple[int, int]] = []
    buffer = HostBuffer.allocate(
        9 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB, progress=lambda *of: seen.append(of)
    )
    pinning = buffer.pinning
    assert pinning is not None
    assert (pinning.state, pinning.nbytes) == ("running", 9 * MIB)
    assert not pinning.wait(timeout_s=0.05)
    slow.let(1)
    front = buffer.device_view((MIB,), "float32")
    assert pinning.done_nbytes == 4 * MIB
    assert slow.pointer_info(front.pointer + 4 * MIB - 1).kind == "pinned"
    assert slow.pointer_info(front.pointer + 4 * MIB).kind == "pageable"
    assert buffer.live_views == 1
    slow.let(2)
    assert pinning.wait(timeout_s=20)
    assert (pinning.state, seen) == ("done", [(4 * MIB, 9 * MIB), (8 * MIB, 9 * MIB), (9 * MIB, 9 * MIB)])
    end = buffer.device_view((MIB,), "uint8", byte_offset=8 * MIB)
    assert end.pointer == front.pointer + 8 * MIB
    buffer.memoryview()[4 * MIB - 1 : 4 * MIB + 1] = b"ab"  # the host may cross chunks
    with pytest.raises(AliasError, match="two chunks"):
        buffer.host_view((2,), "uint8", byte_offset=4 * MIB - 1)
    assert list(buffer.pieces(MIB, 8 * MIB)) == [(MIB, 3 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, MIB)]
    with pytest.raises(ClosedError, match="2 live views"):
        buffer.close()
    del front, end
    buffer.close()
    assert dlpo.pinned_nbytes() == 0 or all(r.driver is not slow for r in blocks.registrations.ranges)


def test_cancelled_after_a_chunk(slow: Slow) -> None:
    buffer = HostBuffer.allocate(12 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB)
    pinning = buffer.pinning
    assert pinning is not None
    slow.let(1)
    assert pinning.wait(4 * MIB, timeout_s=20)
    pinning.cancel()
    slow.let(1)  # the one that may be under way
    pinning.join()
    assert pinning.state == "cancelled"
    done = pinning.done_nbytes
    assert 4 * MIB <= done < 12 * MIB
    buffer.device_view((4,), "uint8")
    with pytest.raises(ClosedError, match="cancelled after"):
        buffer.device_view((4,), "uint8", byte_offset=done)
    with pytest.raises(ClosedError, match="cancelled after"):
        pinning.wait()
    buffer.close()


def test_closed_while_it_pins(slow: Slow) -> None:
    with HostBuffer.allocate(12 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB):
        slow.let(3)
    assert not [r for r in blocks.registrations.ranges if r.driver is slow]


def test_dropped_while_it_pins(slow: Slow) -> None:
    before = dlpo.live_buffers()
    buffer = HostBuffer.allocate(40 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB)
    assert slow.started.wait(20)
    del buffer
    gc.collect()
    slow.let(2)
    deadline = time.monotonic() + 20
    while dlpo.live_buffers() != before and time.monotonic() < deadline:
        lifetime.drain()
        time.sleep(0.01)
    assert dlpo.live_buffers() == before
    assert slow.count < 3


def test_refused_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(Slow(refuse=1)) as driver:
        assert isinstance(driver, Slow)
        driver.let(9)
        buffer = HostBuffer.allocate(12 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB)
        assert buffer.pinning is not None
        with pytest.raises(HostMemoryError, match="no more"):
            buffer.pinning.wait()
        assert buffer.pinning.state == "failed"
        buffer.device_view((4,), "uint8")
        with pytest.raises(HostMemoryError, match="no more"):
            buffer.device_view((4,), "uint8", byte_offset=5 * MIB)
        buffer.close()


def test_progress_that_raises_is_raised_by_wait() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyError(done)

    buffer = HostBuffer.allocate(12 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB, progress=stop)
    assert buffer.pinning is not None
    with pytest.raises(KeyError):
        buffer.pinning.wait()
    assert buffer.pinning.done_nbytes == 4 * MIB
    buffer.close()


@pytest.mark.parametrize("way", ["buffer", "map_file", "copy_of"])
def test_an_error_that_was_raised_by_wait_holds_no_memory(tmp_path: Path, rng: Any, way: str) -> None:
    checkpoint(tmp_path / "x.safetensors", rng)
    before = dlpo.pinned_nbytes(), dlpo.live_buffers()
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 1:
            raise KeyError(done)

    def use() -> None:
        if way == "buffer":
            pinned: Any = HostBuffer.allocate(12 * MIB, device="cpu", background=True, progress=stop)
        else:
            pinned = getattr(HostStore, way)(tmp_path, device="cpu", background=True, progress=stop)
        for _ in range(2):
            with pytest.raises(KeyError):
                pinned.pinning.wait(timeout_s=20)
        if way == "map_file":
            pinned.host_view("1.w")
        assert dlpo.pinned_nbytes() > before[0]

    use()
    gc.collect()
    lifetime.drain()
    assert (dlpo.pinned_nbytes(), dlpo.live_buffers()) == before


def test_a_store_is_pinned_in_the_background_and_used_out_of_turn(slow: Slow) -> None:
    specs = {f"{n}.w": TensorSpec((MIB,), "uint8") for n in range(4)}
    store = HostStore.allocate(specs, units={str(n): (f"{n}.w",) for n in range(4)}, device="cpu", background=True)
    assert slow.started.wait(20)
    slow.let(4)
    store.copy_into("3.w", np.full(MIB, 3, "u1"))
    assert bytes(store.slab("3").host_view("3.w").memoryview()[:2]) == b"\3\3"
    assert store.pinning is not None
    assert store.pinning.wait(timeout_s=20)
    assert (store.pinning.state, slow.count) == ("done", 4)
    assert store.pinned_nbytes == store.nbytes
    store.close()


def checkpoint(path: Path, rng: Any) -> dict[str, Any]:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    tensors = {f"{n}.w": np.frombuffer(rng.bytes(MIB), "u1") for n in range(4)}
    safetensors_numpy.save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [4 * MIB, 12 * MIB], ids=["in the middle", "at the end"])
def test_an_interrupt_in_progress_is_raised_by_wait(kind: type[BaseException], at: int) -> None:
    def stop(done: int, total: int) -> None:
        if done == at:
            raise kind

    with HostBuffer.allocate(12 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB, progress=stop) as buffer:
        assert buffer.pinning is not None
        with pytest.raises(kind) as caught:
            buffer.pinning.wait(timeout_s=20)
        assert buffer.pinning.state == "failed"
        assert buffer.pinning.done_nbytes == at
        assert "while pinning in the background" in caught.value.__notes__[0]


@pytest.mark.parametrize("way", ["copy_of", "map_file"])
def test_a_checkpoint_in_the_background(slow: Slow, tmp_path: Path, rng: Any, way: str) -> None:
    tensors = checkpoint(tmp_path / "x.safetensors", rng)
    units = {str(n): (f"{n}.w",) for n in range(4)}
    seen: list[tuple[int, int]] = []
    store = getattr(HostStore, way)(
        tmp_path, units=units, device="cpu", background=True, progress=lambda *of: seen.append(of)
    )
    slow.let(4)
    for name in reversed(tensors):
        assert bytes(store.host_view(name).memoryview()) == tensors[name].tobytes()
    assert store.pinning.wait(timeout_s=20)
    assert seen[-1][0] == seen[-1][1]
    store.close()


@pytest.mark.parametrize("way", ["map_file", "copy_of"])
def test_progress_may_use_the_store(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_NBYTES", PAGE)
    save_file({name: np.full(PAGE, ord(name), np.uint8) for name in "abc"}, tmp_path / "w.safetensors")
    units, ready = {name: [name] for name in "abc"}, threading.Event()
    stores: list[HostStore] = []
    seen: list[int] = []

    def look(*_: int) -> None:
        ready.wait(20)
        with suppress(SpecError):  # of its own memory, when that is being mapped
            seen.append(int(np.from_dlpack(stores[0].host_view("c"))[0]))

    store = getattr(HostStore, way)(
        tmp_path / "w.safetensors", units=units, device="cpu", background=True, progress=look
    )
    stores.append(store)
    ready.set()
    assert store.pinning.wait(timeout_s=20)
    assert set(seen) == {ord("c")}
    stores.clear()
    store.close()


@pytest.mark.parametrize("fails", [False, True])
def test_wait_returns_when_it_has_ended(fails: bool) -> None:
    at_end, go = threading.Event(), threading.Event()
    inside: list[bool] = []

    def last(done: int, total: int) -> None:
        if done == total:
            at_end.set()
            go.wait(20)
            assert buffer.pinning is not None
            inside.append(buffer.pinning.wait())  # which does not wait for itself
            if fails:
                raise KeyError(done)

    buffer = HostBuffer.allocate(8 * MIB, device="cpu", background=True, chunk_nbytes=4 * MIB, progress=last)
    assert buffer.pinning is not None
    assert at_end.wait(20)
    assert buffer.pinning.wait(8 * MIB, timeout_s=20)
    assert not buffer.pinning.wait(timeout_s=0.05)
    go.set()
    with pytest.raises(KeyError) if fails else nullcontext():
        assert buffer.pinning.wait(timeout_s=20)
    assert (buffer.pinning.state, inside) == ("failed" if fails else "done", [True])
    buffer.close()


def test_a_chunk_whose_progress_raised_is_not_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_NBYTES", PAGE)
    save_file({name: np.full(PAGE, ord(name), np.uint8) for name in "abc"}, tmp_path / "w.safetensors")
    seen: list[tuple[int, int]] = []

    def look(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyError(done)

    with HostStore.map_file(tmp_path, device="cpu", background=True, progress=look) as store:
        assert store.pinning is not None
        with pytest.raises(KeyError):
            store.pinning.wait(timeout_s=20)
        for name in store:
            store.host_view(name)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (seen[1], seen[-1][0]) == (seen[2], seen[-1][1])


def test_a_cancelled_copy_reads_the_rest_when_it_is_used(slow: Slow, tmp_path: Path, rng: Any) -> None:
    tensors = checkpoint(tmp_path / "x.safetensors", rng)
    units = {str(n): (f"{n}.w",) for n in range(4)}
    store = HostStore.copy_of(tmp_path, units=units, device="cpu", background=True)
    assert store.pinning is not None
    store.pinning.cancel()
    slow.let(9)
    store.pinning.join()
    assert store.pinning.state == "cancelled"
    for name in tensors:
        assert bytes(store.host_view(name).memoryview()) == tensors[name].tobytes()
    store.close()
    with pytest.raises(SpecError, match="background=True reads a path"):
        HostStore.copy_of(tensors, device="cpu", background=True)


@pytest.mark.parametrize("how", ["done", "cancelled"])
@pytest.mark.parametrize("way", ["copy_of", "map_file"])
def test_closed_by_another_thread_while_a_tensor_is_looked_up(
    tmp_path: Path, rng: Any, way: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "x.safetensors", rng)
    before = dlpo.live_buffers()
    store = getattr(HostStore, way)(tmp_path, device="cpu", background=True)
    if how == "cancelled":
        store.pinning.cancel()
    store.pinning.join()
    place = homes.Home.place

    def late(home: homes.Home, byte_offset: int) -> Any:  # between the look at the store and the one at its home
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join()
        return place(home, byte_offset)

    monkeypatch.setattr(homes.Home, "place", late)
    with pytest.raises(ClosedError, match="closed with its store"):
        store.host_view("0.w")
    assert dlpo.live_buffers() == before


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGINT); time.sleep(20)", "forked()"])
def test_the_process_ends_while_it_pins(end: str) -> None:
    code = f"""
import os, signal, sys, time
import dlpoffload as dlpo

def forked():
    pid = os.fork()
    if pid == 0:
        try:
            buffer.pinning.wait()
        except dlpo.ClosedError:
            os._exit(0)
        os._exit(1)
    sys.exit(3 + os.waitpid(pid, 0)[1])

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if in the background
buffer = dlpo.HostBuffer.allocate("2GiB", device="cpu", background=True, chunk_nbytes="16MiB")
buffer.pinning.wait(1)
{end}
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(pages.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode in (3, -2), run.stderr
    assert "Fatal" not in run.stderr


# ---------------------------------------------------------------------------------------------- the budget


def test_host_budget_counts_everything_that_is_pinned() -> None:
    pinned = dlpo.pinned_nbytes()
    with HostBuffer.allocate(8 * PAGE, device="cpu", host_budget=pinned + 8 * PAGE):
        with pytest.raises(HostMemoryError) as caught:
            HostBuffer.allocate(PAGE, device="cpu", host_budget=pinned + 8 * PAGE)
        assert (caught.value.limit, caught.value.limit_nbytes) == ("host_budget", pinned + 8 * PAGE)
        assert f"{pinned + 8 * PAGE} bytes" in str(caught.value)
        specs = {"w": TensorSpec((PAGE,), "uint8")}
        store = HostStore.allocate(specs, device="cpu", host_budget=pinned + 8 * PAGE)
        with pytest.raises(HostMemoryError):
            store.host_view("w")
        store.close()


def test_host_budget_overrides_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = replace(host_limits(), mem_available_nbytes=0, cgroups=())
    monkeypatch.setattr(blocks, "host_limits", lambda: poor)
    with pytest.raises(HostMemoryError) as caught:
        HostBuffer.allocate(PAGE, device="cpu")
    assert caught.value.limit == "free memory (MemAvailable)"
    HostBuffer.allocate(PAGE, device="cpu", host_budget="1GiB").close()


def test_what_is_being_pinned_in_the_background_is_not_promised_twice() -> None:
    before, go = dlpo.pinned_nbytes(), threading.Event()
    chunked: dict[str, Any] = {"device": "cpu", "background": True, "chunk_nbytes": 2 * MIB}
    first = HostBuffer.allocate(6 * MIB, **chunked, progress=lambda *_: go.wait(20))
    assert first.pinning is not None
    assert first.pinning.wait(2 * MIB, timeout_s=20)
    budget = before + 10 * MIB
    for options in (chunked, {"device": "cpu"}):
        with pytest.raises(HostMemoryError, match=r"4194304 bytes \(4\.00 MiB\) being pinned, and host_budget is"):
            HostBuffer.allocate(6 * MIB, **options, host_budget=budget)
    HostBuffer.allocate(4 * MIB, device="cpu", host_budget=budget).close()
    first.pinning.cancel()
    go.set()
    first.pinning.join()
    HostBuffer.allocate(8 * MIB, device="cpu", host_budget=budget).close()  # what was cancelled is free again
    first.close()
    with HostBuffer.allocate(10 * MIB, **chunked, host_budget=budget) as buffer:
        assert buffer.pinning is not None
        assert buffer.pinning.wait(timeout_s=20)
        assert promises.promised() == (0, 0)


def test_threads_are_not_promised_the_same_bytes() -> None:
    budget, start = dlpo.pinned_nbytes() + 40 * MIB, threading.Barrier(4)

    def allocate(_: int) -> HostBuffer | HostMemoryError:
        start.wait()
        try:
            return HostBuffer.allocate(16 * MIB, device="cpu", host_budget=budget)
        except HostMemoryError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(allocate, range(4)))
    assert dlpo.pinned_nbytes() <= budget
    assert sum(isinstance(one, HostBuffer) for one in made) == 2
    # Errors are still held here, and hold no promise.
    HostBuffer.allocate(8 * MIB, device="cpu", host_budget=budget).close()
    for one in made:
        if isinstance(one, HostBuffer):
            one.close()


def test_host_budget_bounds_the_hugetlb_pool_and_free_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fallback(monkeypatch, [2 * MIB], {2 * MIB})
    with pytest.raises(HostMemoryError, match="host_budget is 1048576 bytes"):
        HostBuffer.allocate(2 * MIB, device="cpu", huge_pages="hugetlb", host_budget=MIB)
    assert not asked, "the pool was asked before the budget"
    poor = replace(host_limits(), mem_total_nbytes=64 * MIB, mem_available_nbytes=3 * MIB, cgroups=())
    monkeypatch.setattr(blocks, "host_limits", lambda: poor)
    tensors = {"w": bytearray(8 * MIB)}
    for free, fits in ((8 * MIB, True), (2 * MIB, False)):
        monkeypatch.setattr(pinned, "pool_nbytes", lambda free=free: free)
        with nullcontext() if fits else pytest.raises(HostMemoryError):
            HostStore.copy_of(tensors, device="cpu", huge_pages="hugetlb").close()


@pytest.mark.parametrize("node", [0.0, True, "0", 1 << 70, -1])
def test_a_node_that_is_none(node: Any) -> None:
    with pytest.raises(SpecError, match="numa_node="):
        HostBuffer.allocate(5000, device="cpu", numa_node=node)


@pytest.mark.parametrize("nbytes", [1 << 66, 1 << 63, (1 << 63) - 1, 1 << 62])
def test_sizes_and_budgets_above_all_memory(nbytes: int) -> None:
    many = TensorSpec(((1 << 63) - 1,), "complex128")
    for options in ({}, {"pinned": False}, {"host_budget": (1 << 63) - 1}):
        with pytest.raises(HostMemoryError):
            HostBuffer.allocate(nbytes, device="cpu", **options)
        with pytest.raises(HostMemoryError):
            HostStore.allocate({"w": many}, device="cpu", **options).host_view("w")
    if nbytes >> 63:
        with pytest.raises(SpecError, match="host_budget="):
            HostBuffer.allocate(nbytes, device="cpu", host_budget=nbytes)
        with pytest.raises(SpecError, match="host_budget="):
            HostStore.allocate({"w": many}, device="cpu", host_budget=nbytes)


def test_pageable_memory_does_not_count_pinned_pages_of_files_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    with path.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    poor = replace(host_limits(), mem_total_nbytes=64 * MIB, mem_available_nbytes=8 * MIB, cgroups=())
    monkeypatch.setattr(limits, "host_limits", lambda: poor)
    HostBuffer.allocate(5 * MIB, device="cpu", pinned=False).close()
    with (
        HostBuffer.register(mapping, device="cpu"),
        pytest.raises(HostMemoryError, match="pages of files that this process has pinned"),
    ):
        HostBuffer.allocate(5 * MIB, device="cpu", pinned=False)


def test_pinned_pages_of_files_are_not_free_though_the_kernel_says_so() -> None:
    limits = replace(host_limits(), mem_total_nbytes=64 * GIB, mem_available_nbytes=10 * GIB, cgroups=())
    check_host_budget(5 * GIB, limits)
    with pytest.raises(HostMemoryError, match=r"5\.00 GiB\) are pages of files that this process has pinned"):
        check_host_budget(5 * GIB, limits, pinned_file_nbytes=5 * GIB)


def test_a_mapped_file_is_charged_in_full_when_it_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    poor = replace(host_limits(), mem_total_nbytes=64 * MIB, mem_available_nbytes=3 * MIB, cgroups=())
    with path.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    file_before = registrations.pinned_file_nbytes()
    with HostBuffer.register(mapping, device="cpu"):
        assert registrations.pinned_file_nbytes() - file_before == 4 * MIB
    with HostBuffer.register(bytearray(4 * MIB), device="cpu"):
        assert registrations.pinned_file_nbytes() == file_before
    monkeypatch.setattr(blocks, "host_limits", lambda: poor)
    with pytest.raises(HostMemoryError):
        HostBuffer.register(mapping, device="cpu")
    HostBuffer.register(bytearray(4 * MIB), device="cpu").close()  # exists already: nothing new is taken


def test_a_reserve_is_left_to_the_system() -> None:
    limits = replace(host_limits(), mem_total_nbytes=64 * GIB, mem_available_nbytes=10 * GIB, cgroups=())
    with pytest.raises(HostMemoryError, match=r"of which 536870912 bytes \(512\.00 MiB\) are left to the system"):
        check_host_budget(10 * GIB - 300 * MIB, limits)


@pytest.fixture
def wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "host_limits", lambda: replace(host_limits(), is_wsl=True))
    monkeypatch.setattr(wall, "_walls", {})
    monkeypatch.setattr(wall, "_proven", {})


@pytest.mark.usefixtures("wsl")
def test_the_wall_of_wsl_is_measured_and_named() -> None:
    with installed(CpuDriver(host_limit_nbytes=300 * MIB)):
        pinned = dlpo.pinned_nbytes()
        with HostBuffer.allocate(100 * MIB, device="cpu"):
            with pytest.raises(HostMemoryError) as caught:
                HostBuffer.allocate(500 * MIB, device="cpu")
            assert caught.value.limit == wall.WALL
            assert caught.value.limit_nbytes is not None
            assert pinned + 228 * MIB <= caught.value.limit_nbytes <= pinned + 300 * MIB
            assert "measured" in str(caught.value)
            HostBuffer.allocate(100 * MIB, device="cpu").close()  # below the wall


@pytest.mark.usefixtures("wsl")
def test_no_wall_is_asked_once() -> None:
    with installed(CpuDriver()) as driver:
        assert isinstance(driver, CpuDriver)
        asked: list[int] = []
        alloc = driver.host_alloc
        driver.host_alloc = lambda nbytes: asked.append(nbytes) or alloc(nbytes)  # type: ignore[method-assign,func-returns-value]
        HostBuffer.allocate(100 * MIB, device="cpu").close()
        assert sum(asked) >= 100 * MIB
        HostBuffer.allocate(100 * MIB, device="cpu").close()
        assert sum(asked) <= 100 * MIB + dlpo.pinned_nbytes() + 100 * MIB
        assert wall.find_wall(0, 0, driver) is None


# ------------------------------------------------------------------------------------ pageable, if allowed


def test_pageable_memory_only_if_allowed_and_reported() -> None:
    specs = {"a": TensorSpec((PAGE,), "uint8"), "b": TensorSpec((64 * PAGE,), "uint8")}
    with installed(CpuDriver(host_limit_nbytes=8 * PAGE)):
        with pytest.raises(HostMemoryError):
            HostStore.allocate(specs, device="cpu", units={"b": ["b"]}).host_view("b")
        with HostStore.allocate(specs, device="cpu", units={"b": ["b"]}, pageable="if_refused") as store:
            store.host_view("a")
            assert store.pageable_because == ""
            store.host_view("b")
            assert "could not be pinned" in store.pageable_because
            assert (store.pinned_nbytes, store.host_nbytes) == (PAGE, 65 * PAGE)
            with pytest.raises(AliasError, match="not pinned"):
                store.device_view("b")
    with HostStore.copy_of({"a": np.zeros(PAGE, "u1")}, device="cpu", pageable="always") as store:
        assert (store.pageable_because, store.pinned_nbytes) == ("asked for", 0)
    for wrong in ({"pageable": "maybe"}, {"pageable": "always", "host_budget": 1}):
        with pytest.raises(SpecError):
            HostStore.allocate(specs, device="cpu", **wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- accounting


def test_live_memory_says_for_whom_and_from_where(tmp_path: Path, rng: Any) -> None:
    checkpoint(tmp_path / "x.safetensors", rng)
    before = len(dlpo.live_memory())
    dlpo.trace_allocations(True)
    try:
        with HostBuffer.allocate(PAGE, device="cpu"), HostStore.map_file(tmp_path, device="cpu") as store:
            with dlpo.owned_by("a test"):
                store.update("0.w", np.zeros(MIB, "u1"))
                other = HostBuffer.allocate(10, device="cpu")
            one, two, three, four = dlpo.live_memory()[before:]
            assert (one.kind, one.nbytes, one.owner) == ("pinned", PAGE, "")
            assert (two.kind, two.owner) == ("mapped file", f'HostStore.map_file "{tmp_path}"')
            assert (three.kind, three.nbytes, three.owner) == ("pinned", MIB, "a test")
            assert (four.owner, four.nbytes) == ("a test", 10)
            lines = Path(__file__).read_text().splitlines()
            for found in (one, two, three, four):
                path, _, number = found.origin.rpartition(":")
                assert path == __file__
                assert any(word in lines[int(number) - 1] for word in ("HostBuffer", "update"))
            other.close()
    finally:
        dlpo.trace_allocations(False)
    with HostBuffer.allocate(PAGE, device="cpu"):
        assert dlpo.live_memory()[-1].origin == ""


@pytest.mark.parametrize("way", ["map_file", "copy_of"])
def test_memory_pinned_in_the_background_is_from_the_line_that_asked(tmp_path: Path, way: str) -> None:
    save_file({"w": np.zeros(PAGE, np.uint8)}, tmp_path / "w.safetensors")
    lifetime.trace_allocations(True)
    try:
        store = getattr(HostStore, way)(tmp_path / "w.safetensors", device="cpu", background=True)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]  # CPython has frames
        assert store.pinning.wait(timeout_s=20)
        assert f"{__file__}:{line}" in [memory.origin for memory in dlpo.live_memory()]
        store.close()
    finally:
        lifetime.trace_allocations(False)


def test_doctor_shows_who_holds_what() -> None:
    from dlpoffload import host_checks
    from dlpoffload.driver import open_driver
    from dlpoffload.findings import Machine

    with dlpo.owned_by("the model"), HostBuffer.allocate(2 * PAGE, device="cpu"):
        finding = host_checks.check_pinned(Machine(open_driver("cpu"), ["cpu"], host_limits()))
    assert any("pinned: 8192 bytes (8.00 KiB) in 1 for the model" in line for line in finding.says)
    assert {"kind": "pinned", "nbytes": 2 * PAGE, "owner": "the model", "origin": ""} in finding.facts["live"]
