"""`HostStore.map_file`: the page cache itself, registered in place; what cannot be mapped or has changed; writes."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transfer_graphs import GraphDriver

from dlpoffload import (
    HostBuffer,
    HostStore,
    SlotRing,
    TensorSpec,
    View,
    _native,
    filemap,
    lifetime,
    live_buffers,
    pinned_nbytes,
    registrations,
)
from dlpoffload.driver import installed, open_driver
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import (
    AliasError,
    CheckpointError,
    ClosedError,
    HostMemoryError,
    RegistrationError,
    SlotError,
    SpecError,
)
from dlpoffload.spec import ALIGNMENT
from dlpoffload.store import files

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

PAGE = os.sysconf("SC_PAGESIZE")


def write_at(path: Path, tensors: Mapping[str, Any], start: int | None = None) -> Path:
    """A safetensors file whose data starts at `start` modulo 256, tensors side by side in the given order."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        begin = len(data)
        data += array.tobytes()
        kind = {"f": "F", "u": "U", "i": "I"}[array.dtype.kind]
        header[name] = {
            "dtype": f"{kind}{8 * array.dtype.itemsize}",
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    while start is not None and (8 + len(text)) % 256 != start % 256:
        text += b" "
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def random_tensors(rng: Any, shapes: Mapping[str, tuple[int, ...]], dtype: str = "f4") -> dict[str, Any]:
    return {
        name: np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        for name, shape in shapes.items()
    }


def stored(store: HostStore) -> dict[str, bytes]:
    return {name: bytes(store.host_view(name).memoryview()) for name in store}


def raw(tensors: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


def staged(store: HostStore, device: str, when_full: Any = "map") -> tuple[dict[str, dict[str, bytes]], int]:
    """Every unit through a ring: the bytes of its tensors in a slot, and how many copies the last unit took."""
    slabs = {unit: store.slab(unit) for unit in store.units}
    with SlotRing(slabs, slots=2, device=device, when_full=when_full) as ring:
        found = {unit: read(ring, unit) for unit in slabs}
        return found, ring.stats.copied_nbytes


def read(ring: SlotRing, unit: str) -> dict[str, bytes]:
    with ring.prefetch(unit) as views:
        ring.driver.synchronize()
        return {name: copied(ring, view) for name, view in views.items()}


def copied(ring: SlotRing, view: View) -> bytes:
    if not view.nbytes:
        return b""
    assert view.pointer % 16 == 0
    return bytes(HostBuffer.copy_of(view, device=ring.driver.device).memoryview())


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    def descriptors() -> set[str]:
        found = set()
        for entry in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{entry}")
            except FileNotFoundError:
                continue
            if "safetensors" in target:
                found.add(f"{entry} {target}")
        return found

    before = descriptors()
    yield
    gc.collect()
    lifetime.drain()
    assert not descriptors() - before


@pytest.fixture
def file(tmp_path: Path, rng: Any) -> tuple[Path, dict[str, Any]]:
    tensors = random_tensors(rng, {"embed": (50, 16), "0.w": (64, 64), "0.b": (64,), "1.w": (64, 64), "1.b": (64,)})
    return write_at(tmp_path / "model.safetensors", tensors, 64), tensors


UNITS = {"0": ("0.w", "0.b"), "1": ("1.w", "1.b")}


# ------------------------------------------------------------------------------------------------- mapping


def test_a_file_is_mapped_in_place(file: tuple[Path, dict[str, Any]], device: str) -> None:
    path, tensors = file
    with HostStore.map_file(path, units=UNITS, device=device) as store:
        assert (store.mode, store.nbytes) == ("map", sum(a.nbytes for a in tensors.values()))
        assert stored(store) == raw(tensors)
        assert store.host_nbytes == store.file_nbytes
        maps = Path("/proc/self/maps").read_text()
        (line,) = [line for line in maps.splitlines() if line.endswith("model.safetensors")]
        low, high = (int(word, 16) for word in line.split()[0].split("-"))
        assert line.split()[1] == "r--s"
        assert low <= store.host_view("0.w").host_pointer < high
        assert all(store.is_read_only(name) for name in store)
        assert [kind for kind, _ in live_buffers()].count("mapped file") == 1
        assert open_driver(device).pointer_info(store.host_view("0.w").pointer).kind == "pinned"
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()


def test_units_are_staged_bit_for_bit(file: tuple[Path, dict[str, Any]], device: str) -> None:
    path, tensors = file
    with HostStore.map_file(path, units=UNITS, device=device) as store:
        found, nbytes = staged(store, device)
        assert found == {unit: {n: tensors[n].tobytes() for n in names} for unit, names in UNITS.items()}
        assert nbytes == sum(tensors[n].nbytes for names in UNITS.values() for n in names), "one copy, nothing beside"
        assert [len(store.slab(unit).copies()) for unit in UNITS] == [1, 1]


@pytest.mark.parametrize("start", [8, 16, 64, 0, 248])
def test_whatever_the_data_start_slots_are_aligned(tmp_path: Path, rng: Any, device: str, start: int) -> None:
    tensors = random_tensors(rng, {"a": (64,), "b": (128,), "c": (64, 64)})
    path = write_at(tmp_path / "x.safetensors", tensors, start)
    with HostStore.map_file(path, units={"u": tensors}, device=device) as store:
        slab = store.slab("u")
        assert all(offset % ALIGNMENT == 0 for offset in slab.byte_offsets.values())
        assert len(slab.copies()) == 1
        assert staged(store, device, "error")[0]["u"] == raw(tensors)
        assert stored(store) == raw(tensors)
        if start % 16:
            assert set(store.unaligned) == set(tensors)
            with pytest.raises(AliasError, match=r"HostStore\.copy_of.*dlpoffload align"):
                store.device_view("a", read_only=True)
        else:
            assert store.unaligned == ()
            assert store.device_view("a", read_only=True).pointer % 16 == 0


def test_tensors_that_would_be_left_unaligned_are_copies_of_their_own(tmp_path: Path, rng: Any, device: str) -> None:
    tensors = random_tensors(rng, {"a": (4096,), "odd": (1001,), "b": (4096,), "c": (4099,), "d": (64,)}, "u1")
    path = write_at(tmp_path / "x.safetensors", tensors, 8)
    with HostStore.map_file(path, units={"u": list(tensors)}, device=device) as store:
        slab = store.slab("u")
        assert all(offset % 16 == 0 for offset in slab.byte_offsets.values())
        assert slab.alignment == 256
        assert len(slab.copies()) == 3  # a and odd; b and c, which are 9 bytes off; d
        assert staged(store, device, "error")[0]["u"] == raw(tensors)


def test_what_has_most_bytes_is_aligned_best(tmp_path: Path, rng: Any) -> None:
    tensors = random_tensors(rng, {"bias": (48,), "weight": (4096,), "other": (16,)}, "u1")
    path = write_at(tmp_path / "x.safetensors", tensors, 8)
    with HostStore.map_file(path, units={"u": list(tensors)}, device="cpu") as store:
        slab = store.slab("u")
        assert slab.byte_offsets == {"bias": 256 - 48, "weight": 256, "other": 256 + 4096}
        assert (slab.alignment, len(slab.copies())) == (16, 1)
        assert staged(store, "cpu", "error")[0]["u"] == raw(tensors)


def test_units_whose_tensors_are_not_adjacent(tmp_path: Path, rng: Any, device: str) -> None:
    shapes = {f"{layer}.{part}": (128, 512) for part in "abc" for layer in range(3)}
    tensors = random_tensors(rng, shapes)
    units = {str(layer): [f"{layer}.{part}" for part in "cab"] for layer in range(3)}
    path = write_at(tmp_path / "x.safetensors", tensors, 16)
    with HostStore.map_file(path, units=units, device=device) as store:
        found, nbytes = staged(store, device)
        assert found == {unit: {n: tensors[n].tobytes() for n in names} for unit, names in units.items()}
        assert nbytes == store.nbytes, "what lies between is not copied"
        assert [len(store.slab(unit).copies()) for unit in units] == [3, 3, 3]


def test_small_gaps_are_copied_along(tmp_path: Path, rng: Any) -> None:
    tensors = random_tensors(rng, {"a": (64,), "gap": (64,), "b": (64,)})
    path = write_at(tmp_path / "x.safetensors", tensors)
    with HostStore.map_file(path, units={"u": ("a", "b")}, device="cpu") as store:
        slab = store.slab("u")
        assert [(c.byte_offset, c.nbytes) for c in slab.copies()] == [(0, 3 * 256)]
        assert [(c.byte_offset, c.nbytes) for c in slab.copies(512, 256)] == [(512, 256)]
        assert staged(store, "cpu")[0]["u"] == {n: tensors[n].tobytes() for n in "ab"}


def test_a_sharded_checkpoint(tmp_path: Path, rng: Any, device: str) -> None:
    tensors = random_tensors(rng, {f"{layer}.{part}": (33, 7) for layer in range(3) for part in "ab"})
    shards = {"a.safetensors": ("0.a", "1.a", "2.a"), "b.safetensors": ("0.b", "1.b", "2.b")}
    for shard, names in shards.items():
        safetensors_numpy.save_file({n: tensors[n] for n in names}, tmp_path / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    units = {str(layer): (f"{layer}.a", f"{layer}.b") for layer in range(3)}
    with HostStore.map_file(tmp_path, units=units, device=device) as store:
        assert stored(store) == raw(tensors)
        assert staged(store, device, "error")[0] == {
            u: {n: tensors[n].tobytes() for n in ns} for u, ns in units.items()
        }


def test_chunks_are_cut_between_tensors_and_no_copy_crosses_two(
    tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_NBYTES", 2 * PAGE)
    monkeypatch.setattr(files, "MAX_REGISTRATION", 8 * PAGE)
    monkeypatch.setattr("dlpoffload.registrations.MAX_REGISTRATION", 8 * PAGE)
    shapes = {f"{n}": (PAGE // 8 + 5 * n,) for n in range(16)} | {"large": (5 * PAGE,)}
    tensors = random_tensors(rng, shapes)
    path = write_at(tmp_path / "x.safetensors", tensors)
    units = {"u": [str(n) for n in range(4, 10)], "large": ["large"]}
    driver = CpuDriver()
    with installed(driver), HostStore.map_file(path, units=units, device="cpu") as store:
        assert stored(store) == raw(tensors)
        expected = {unit: {n: tensors[n].tobytes() for n in names} for unit, names in units.items()}
        assert staged(store, "cpu", "error")[0] == expected
        chunks = [home.buffer.nbytes for home in store._homes if home.buffer]
        assert len(chunks) > 4
        assert len(store.slab("large").copies()) == 3  # 20 pages and a rest, in registrations of 8
        for name in store:
            store.device_view(name, read_only=True) if name not in store.unaligned else None


@pytest.mark.parametrize(
    ("units", "chunks"),
    [
        ({}, [["a", "b"], ["c", "d"], ["e"]]),
        ({"u": "bcd"}, [["a"], ["b", "c", "d"], ["e"]]),  # in one piece, though larger than a chunk
        ({"u": "bc"}, [["a"], ["b", "c"], ["d", "e"]]),  # not begun where it does not end
        ({"u": "abcde"}, [["a", "b", "c", "d"], ["e"]]),  # larger than a registration may be
        ({"u": "ac"}, [["a", "b"], ["c", "d"], ["e"]]),
    ],
)
def test_where_chunks_are_cut(
    tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch, units: dict[str, str], chunks: list[list[str]]
) -> None:
    monkeypatch.setattr(files, "_CHUNK_NBYTES", 2 * PAGE)
    monkeypatch.setattr(files, "MAX_REGISTRATION", 4 * PAGE)
    tensors = random_tensors(rng, dict.fromkeys("abcde", (PAGE,)), "u1")
    path = write_at(tmp_path / "x.safetensors", tensors, 16)
    with HostStore.map_file(path, units={u: list(n) for u, n in units.items()}, device="cpu") as store:
        found: dict[int, list[str]] = {}
        for name in store:
            found.setdefault(id(store._of_name[name][0]), []).append(name)
        assert list(found.values()) == chunks
        assert stored(store) == raw(tensors)
        if units:
            (staged_unit,) = staged(store, "cpu", "error")[0].values()
            assert staged_unit == {name: tensors[name].tobytes() for name in units["u"]}


def test_zero_byte_tensors_scalars_and_many(tmp_path: Path) -> None:
    tensors = {f"t{n}": np.full((n % 3,), n, "f4") for n in range(2000)} | {"s": np.float32(3).reshape(())}
    path = write_at(tmp_path / "x.safetensors", tensors, 8)
    with HostStore.map_file(path, units={"u": ["t0", "t1", "s"], "none": ["t3"]}, device="cpu") as store:
        assert stored(store) == raw(tensors)
        assert staged(store, "cpu")[0] == {
            "u": {n: tensors[n].tobytes() for n in ("t0", "t1", "s")},
            "none": {"t3": b""},
        }


def test_a_file_of_empty_tensors_alone(tmp_path: Path) -> None:
    path = write_at(tmp_path / "x.safetensors", {"a": np.empty((0, 3), "f4")})
    with HostStore.map_file(path, units={"u": ["a"]}, device="cpu") as store:
        assert stored(store) == {"a": b""}
        assert store.update("a", np.empty((0, 3), "f4"))
        assert staged(store, "cpu")[0] == {"u": {"a": b""}}


def test_through_a_symlink_and_read_only_permissions(file: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, tensors = file
    path.chmod(0o444)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    with HostStore.map_file(link, device="cpu") as store:
        assert stored(store) == raw(tensors)


def test_progress_and_accounting(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    seen: list[tuple[int, int]] = []
    before = pinned_nbytes()
    with HostStore.map_file(path, device="cpu", progress=lambda done, total: seen.append((done, total))) as store:
        assert pinned_nbytes() - before == -(-store.host_nbytes // PAGE) * PAGE
    assert pinned_nbytes() == before
    assert seen
    assert seen[-1][0] == seen[-1][1] >= sum(a.nbytes for a in tensors.values())


# ---------------------------------------------------------------------------------------- what cannot be mapped


@pytest.mark.parametrize("lacking", ["read_only_host_register", "host_register"])
def test_a_device_without_the_attribute(file: tuple[Path, dict[str, Any]], lacking: str) -> None:
    path, tensors = file
    with installed(CpuDriver(**{lacking: False})):
        with pytest.raises(RegistrationError, match=r"HostStore\.copy_of"):
            HostStore.map_file(path, device="cpu")
        if lacking == "host_register":
            return
        with HostStore.open(path, device="cpu") as store:
            assert store.mode == "copy"
            assert "READ_ONLY_HOST_REGISTER_SUPPORTED" in store.because
            assert stored(store) == raw(tensors)


class Refusing(CpuDriver):
    """Pins no read-only pages from the `at`-th on, and may not take the others back either."""

    def __init__(self, at: int = 0, *, keep: bool = False) -> None:
        super().__init__()
        self.at, self.keep, self.calls = at, keep, 0

    def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
        self.calls += read_only
        if read_only and self.calls > self.at:
            raise RegistrationError("this file system's pages cannot be pinned")
        super().host_register(pointer, nbytes, read_only=read_only)

    def host_unregister(self, pointer: int) -> None:
        if self.keep:
            raise RegistrationError("not now")
        super().host_unregister(pointer)


def test_a_file_system_that_refuses(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    before = live_buffers()
    with installed(Refusing()):
        with pytest.raises(RegistrationError, match=r"model\.safetensors.*HostStore\.copy_of"):
            HostStore.map_file(path, device="cpu")
        lifetime.drain()
        assert live_buffers() == before
        assert "model.safetensors" not in Path("/proc/self/maps").read_text()
        for background in (False, True):
            with HostStore.open(path, device="cpu", background=background) as store:
                assert store.mode == "copy"
                assert "cannot be pinned" in store.because
                assert stored(store) == raw(tensors)


def test_what_stays_registered_is_not_unmapped(
    file: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = file
    monkeypatch.setattr("dlpoffload.registrations.MAX_REGISTRATION", 4 * PAGE)
    driver = Refusing(1, keep=True)
    with installed(driver), pytest.raises(RegistrationError):
        HostStore.map_file(path, device="cpu")
    assert "model.safetensors" in Path("/proc/self/maps").read_text(), "registered memory was unmapped"
    # What a process would keep for good; the tests that follow start without it.
    driver.keep = False
    with lifetime.lock:
        for registration in [r for r in registrations.registrations.ranges if r.driver is driver]:
            registration.count = 1
            registrations.registrations.release([registration])
    lifetime._kept.pop().release()


def test_what_the_consumer_wants_otherwise(file: tuple[Path, dict[str, Any]]) -> None:
    path, _ = file
    for wanted in (TensorSpec((64,), "bfloat16"), TensorSpec((8, 8), "float32")):
        with pytest.raises(AliasError, match=r'"0\.b".*cannot be cast.*HostStore\.copy_of'):
            HostStore.map_file(path, device="cpu", specs={"0.b": wanted})
        with HostStore.open(path, device="cpu", specs={"0.b": wanted}) as store:
            assert store.mode == "copy"
    with pytest.raises(SpecError, match=r'"0\.x".*near to it'):
        HostStore.map_file(path, device="cpu", specs={"0.x": TensorSpec((64,), "float32")})
    with HostStore.map_file(path, device="cpu", specs={"0.b": TensorSpec((64,), "float32")}) as store:
        assert store.mode == "map"


def test_device_views_that_are_known_beforehand(tmp_path: Path, rng: Any) -> None:
    tensors = random_tensors(rng, {"a": (64,)})
    path = write_at(tmp_path / "x.safetensors", tensors, 8)
    with pytest.raises(AliasError, match=r"starts at byte \d+ .*HostStore\.copy_of"):
        HostStore.map_file(path, device="cpu", device_views=["a"])
    with HostStore.open(path, device="cpu", device_views=["a"]) as store:
        assert (store.mode, stored(store)) == ("copy", raw(tensors))


def test_modes_by_name(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    for mode, became, why in (("map", "map", "asked for"), ("copy", "copy", "asked for"), ("auto", "map", "no second")):
        with HostStore.open(path, mode=mode, device="cpu") as store:  # type: ignore[arg-type]
            assert (store.mode, stored(store)) == (became, raw(tensors))
            assert why in store.because
    with pytest.raises(SpecError, match="mode="):
        HostStore.open(path, mode="maybe", device="cpu")  # type: ignore[arg-type]
    with installed(Refusing()), pytest.raises(RegistrationError):
        HostStore.open(path, mode="map", device="cpu")
    with pytest.raises(SpecError, match="no effect"):
        HostStore.open(path, mode="map", device="cpu", pageable="if_refused")


def test_what_cannot_be_pinned_for_want_of_memory(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    budget = pinned_nbytes() + PAGE
    with pytest.raises(HostMemoryError):
        HostStore.open(path, device="cpu", host_budget=budget)
    with HostStore.open(path, device="cpu", host_budget=budget, pageable="if_refused") as store:
        assert (store.mode, stored(store)) == ("copy", raw(tensors))
        assert "host_budget" in store.because
        assert "host_budget" in store.pageable_because


def test_more_than_the_budget_is_refused_before_anything_is_mapped(file: tuple[Path, dict[str, Any]]) -> None:
    path, _ = file
    with pytest.raises(HostMemoryError) as caught:
        HostStore.map_file(path, device="cpu", host_budget=pinned_nbytes() + PAGE)
    assert caught.value.limit == "host_budget"
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    HostStore.map_file(path, device="cpu", host_budget=pinned_nbytes() + 64 * PAGE).close()


def test_too_many_open_files(tmp_path: Path) -> None:
    shards = {f"w{at}": f"{at}.safetensors" for at in range(20)}
    for name, shard in shards.items():
        safetensors_numpy.save_file({name: np.zeros(PAGE, np.uint8)}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    HostStore.map_file(index, device="cpu").close()  # whatever is opened once and for all
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    taken = set(map(int, before))
    free = [at for at in range(1000) if at not in taken]
    try:
        for more in (8, 15, 22, 28, 35, 70):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))
            refused = pytest.raises((CheckpointError, RegistrationError), match=r"open files|ulimit -n")
            with nullcontext() if more > 40 else refused, HostStore.open(index, mode="map", device="cpu"):
                pass
            del refused  # whose traceback holds what was open
            lifetime.drain()
            gc.collect()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(os.listdir("/proc/self/fd")) == len(before)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_is_mapped_twice_is_charged_twice(file: tuple[Path, dict[str, Any]]) -> None:
    path, _ = file
    before = registrations.pinned_file_nbytes()
    with HostStore.map_file(path, device="cpu"):
        once = registrations.pinned_file_nbytes() - before
        with HostStore.map_file(path, device="cpu"):
            assert registrations.pinned_file_nbytes() - before == 2 * once > 0
    assert registrations.pinned_file_nbytes() == before


def test_chunks_need_no_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_NBYTES", PAGE)
    tensors = {f"w{at}": np.full(PAGE, at, np.uint8) for at in range(64)}
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file(tensors, path)
    HostStore.map_file(path, device="cpu").close()  # whatever is opened once and for all
    before = len(os.listdir("/proc/self/fd"))
    with HostStore.map_file(path, device="cpu") as store:
        assert len(store._homes) == 64
        assert len(os.listdir("/proc/self/fd")) == before + 1, "the file's own, and none for its mappings"
        assert stored(store) == raw(tensors)
        for name in tensors:
            store.copy_out(name)
    assert "x.safetensors" not in Path("/proc/self/maps").read_text()


def test_what_is_not_populated_is_not_left_mapped(
    file: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = file

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_native, "populate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        HostStore.map_file(path, device="cpu")
    assert "model.safetensors" not in Path("/proc/self/maps").read_text(), "and the error holds its frames still"


def test_no_permission(file: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = file
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    path.chmod(0)
    code = """
        import os, sys
        from dlpoffload import HostStore
        if os.geteuid() == 0:
            import safetensors.numpy, dlpoffload.store.host_store  # before the right to read is given up
            os.setegid(65534)
            os.seteuid(65534)
        try:
            HostStore.map_file(sys.argv[1], device="cpu")
        except dlpoffload.errors.CheckpointError as error:
            print(error)
    """
    run = child(code.replace("import os, sys", "import os, sys, dlpoffload.errors"), str(path))
    assert "cannot be opened: Permission denied" in run.stdout, run.stderr


def resident(path: Path) -> float:
    """The share of a file's pages that is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        vector = (ctypes.c_ubyte * (-(-len(mapping) // PAGE)))()
        pointer = _native.buffer_pointer(mapping)
        assert libc.mincore(ctypes.c_void_p(pointer), ctypes.c_size_t(len(mapping)), vector) == 0
        return sum(page & 1 for page in vector) / len(vector)


@pytest.mark.parametrize("kernel", ["of today", "before 5.14"])
def test_a_cold_file_is_read_first(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    tensors = random_tensors(rng, {"a": (9 << 20,)}, "u1")
    path = write_at(tmp_path / "x.safetensors", tensors)
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0.5:
        pytest.skip("this file system does not drop its pages")
    if kernel != "of today":

        def unknown(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(_native, "populate", unknown)
    monkeypatch.setattr(filemap, "_PIECE_NBYTES", 4 << 20)
    seen: list[tuple[int, int, float]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total, resident(path)))

    class Checking(CpuDriver):
        def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
            assert resident(path) == 1.0, "the driver would read the file page by page"
            super().host_register(pointer, nbytes, read_only=read_only)

    with installed(Checking()), HostStore.map_file(path, device="cpu", progress=progress) as store:
        assert stored(store) == raw(tensors)
    assert len(seen) == 3
    assert seen[-1][0] == seen[-1][1]
    assert seen[0][2] >= 0.4


def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    count = 100_000
    header = {f"t{n}": {"dtype": "U8", "shape": [8], "data_offsets": [8 * n, 8 * n + 8]} for n in range(count)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + np.arange(count, dtype="u8").tobytes())
    with HostStore.map_file(path, units={"u": [f"t{n}" for n in range(0, count, 2)]}, device="cpu") as store:
        assert len(store) == count
        for n in (0, 1, 77_777, count - 1):
            assert int.from_bytes(bytes(store.host_view(f"t{n}").memoryview()), "little") == n
        assert len(store.slab("u").copies()) == 1
        assert store.pinned_nbytes < 8 * count + len(text) + PAGE


def test_jax_takes_mapped_weights_that_it_is_trusted_with(tmp_path: Path, rng: Any, jax: ModuleType) -> None:
    tensors = random_tensors(rng, {"a": (64, 64)})
    path = write_at(tmp_path / "x.safetensors", tensors, 64)
    with HostStore.map_file(path, device="cpu") as store:
        view = store.host_view("a")
        with pytest.raises(Exception, match=r"unguarded|read-only"):
            jax.dlpack.from_dlpack(view, device=jax.devices("cpu")[0])
        array = jax.dlpack.from_dlpack(view.unguarded(), device=jax.devices("cpu")[0])
        assert array.unsafe_buffer_pointer() == view.host_pointer
        assert np.asarray(array).tobytes() == tensors["a"].tobytes()
        del array, view
        gc.collect()


# ---------------------------------------------------------------------------------- a file that changes


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: os.truncate(path, 200), id="cut off"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size + 8), id="grown"),
        pytest.param(rewrite, id="written"),
    ],
)
def test_a_file_that_changes_while_it_is_mapped(
    file: tuple[Path, dict[str, Any]], change: Callable[[Path], None]
) -> None:
    path, tensors = file
    with HostStore.map_file(path, units=UNITS, device="cpu") as store:
        slab = store.slab("0")
        ring = SlotRing({"0": slab}, device="cpu")
        store.update("1.b", tensors["0.b"])
        change(path)
        for call in (
            lambda: store.host_view("0.w"),
            lambda: store.device_view("0.w", read_only=True),
            lambda: store.slab("0"),
            lambda: slab.copies(),
            lambda: slab.host_view("0.w"),
            lambda: store.copy_out("0.w"),
            lambda: ring.prefetch("0"),
        ):
            with pytest.raises(CheckpointError, match=r'model\.safetensors" changed'):
                call()
        assert bytes(store.host_view("1.b").memoryview()) == tensors["0.b"].tobytes(), "it lies elsewhere"
        assert store.update("0.w", tensors["1.w"]), "new bytes do not need the file"
        ring.close()


def test_a_file_that_is_replaced_stays_as_it_was(file: tuple[Path, dict[str, Any]], tmp_path: Path, rng: Any) -> None:
    path, tensors = file
    with HostStore.map_file(path, device="cpu") as store:
        other = write_at(tmp_path / "new.safetensors", random_tensors(rng, {"0.w": (3,)}))
        other.replace(path)
        assert stored(store) == raw(tensors)
        path.unlink()
        assert stored(store) == raw(tensors)


def test_a_file_that_is_cut_off_before_it_is_mapped(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_at(tmp_path / "x.safetensors", random_tensors(rng, {"a": (4 * PAGE,)}))
    monkeypatch.setattr("dlpoffload.checkpoint.shard.Watch.check_unchanged", lambda self: os.truncate(path, PAGE))
    with pytest.raises(RegistrationError, match=rf'x\.safetensors" ends at byte {PAGE}.*fetch it again'):
        HostStore.map_file(path, device="cpu")


@pytest.fixture
def full_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of eight pages."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={8 * PAGE}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    yield folder
    gc.collect()
    subprocess.run(["umount", str(folder)], check=True)


def test_holes_of_a_file_on_a_full_disk_are_read(full_tmpfs: Path) -> None:
    path = write_at(full_tmpfs / "x.safetensors", {"w": np.zeros(4 * PAGE, np.uint8)})
    whole = path.read_bytes()
    with path.open("wb") as opened:
        opened.write(whole[:PAGE])
        opened.truncate(len(whole))
    with suppress(OSError):
        (full_tmpfs / "more").write_bytes(bytes(8 * PAGE))
    check_copied(path, 4 * PAGE)


def test_pages_that_cannot_be_had_where_they_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_at(tmp_path / "x.safetensors", {"w": np.zeros(4 * PAGE, np.uint8)})

    def refused(*_: Any, write: bool = True) -> None:
        if not write:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    monkeypatch.setattr(_native, "populate", refused)
    check_copied(path, 4 * PAGE)


def check_copied(path: Path, nbytes: int) -> None:
    """It cannot be mapped, and what the error says to do works."""
    with pytest.raises(RegistrationError, match=r"x\.safetensors.*HostStore\.copy_of") as caught:
        HostStore.map_file(path, device="cpu")
    assert "fetch it again" not in str(caught.value)
    with HostStore.copy_of(path, device="cpu") as store:
        assert stored(store) == {"w": bytes(nbytes)}
    with HostStore.open(path, device="cpu") as store:
        assert store.mode == "copy"
        assert "holes" in store.because


# ------------------------------------------------------------------------------------------------- writes


def test_update_moves_a_tensor_and_leaves_the_file(file: tuple[Path, dict[str, Any]], device: str, rng: Any) -> None:
    path, tensors = file
    before = path.read_bytes()
    new = random_tensors(rng, {"0.b": (64,), "embed": (50, 16)})
    with HostStore.map_file(path, units=UNITS, device=device) as store:
        slab, old = store.slab("0"), store.host_view("0.b")
        assert len(slab.copies()) == 1
        with pytest.raises(AliasError, match=r"update\(\)"):
            store.copy_into("0.b", new["0.b"])
        assert store.update("0.b", new["0.b"])
        assert store.update("embed", new["embed"])
        assert dict(store.moved) == {"0.b": 256, "embed": 3200}
        assert bytes(store.host_view("0.b").memoryview()) == new["0.b"].tobytes()
        assert bytes(old.memoryview()) == tensors["0.b"].tobytes()
        assert not store.host_view("0.b").read_only
        assert not store.is_read_only("0.b")
        assert bytes(slab.host_view("0.b").memoryview()) == new["0.b"].tobytes(), "a slab made before knows it"
        assert len(slab.copies()) == 2
        assert staged(store, device, "error")[0] == {
            "0": {"0.w": tensors["0.w"].tobytes(), "0.b": new["0.b"].tobytes()},
            "1": {name: tensors[name].tobytes() for name in UNITS["1"]},
        }
        assert not store.update("0.b", tensors["0.b"]), "moved once only"
        assert bytes(slab.host_view("0.b").memoryview()) == tensors["0.b"].tobytes()
        store.device_view("0.b")
        assert store.host_nbytes - store.file_nbytes == 256 + 3200
        del old
    assert path.read_bytes() == before


def test_copy_out_keeps_the_bytes(file: tuple[Path, dict[str, Any]], device: str) -> None:
    path, tensors = file
    with HostStore.map_file(path, units=UNITS, device=device) as store:
        assert store.copy_out("0.w")
        assert not store.copy_out("0.w")
        assert stored(store) == raw(tensors)
        store.host_view("0.w").memoryview()[:4] = b"\1\2\3\4"
        assert staged(store, device, "error")[0]["0"]["0.w"] == b"\1\2\3\4" + tensors["0.w"].tobytes()[4:]
    with HostStore.copy_of(path, device=device) as store:
        assert not store.copy_out("0.w")
        assert not store.update("0.w", tensors["1.w"])
        assert not store.moved


def test_what_a_graph_copies_is_not_moved_while_it_can_be_replayed(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    driver = GraphDriver()
    with installed(driver), HostStore.map_file(path, units=UNITS, device="cpu") as store:
        ring = SlotRing({unit: store.slab(unit) for unit in UNITS}, device="cpu")
        assert store.update("1.b", tensors["0.b"])
        stream = driver.stream_create()
        driver.begin_capture(stream)
        with ring.prefetch("0", stream=stream):
            pass
        graph = driver.end_capture(stream)
        with pytest.raises(SlotError, match=r'"0\.b" cannot be moved.*1 captured graphs'):
            store.update("0.b", tensors["1.b"])
        assert "0.b" not in store.moved
        assert not store.update("1.b", tensors["1.b"]), "its own memory is written in place, and replays see it"
        assert store.update("embed", tensors["embed"]), "no unit of the ring"
        driver.destroy(graph)
        driver.synchronize()
        lifetime.drain()
        assert store.update("0.b", tensors["1.b"])
        ring.close()
        driver.stream_destroy(stream)


def test_an_update_that_is_refused_moves_nothing(
    file: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = file
    with HostStore.map_file(path, units=UNITS, device="cpu") as store:
        with pytest.raises(SpecError, match="shape and dtype"):
            store.update("0.b", np.zeros(3, "f4"))
        with pytest.raises(SpecError, match="no tensor"):
            store.update("0.x", np.zeros(3, "f4"))

        def refuse(*_: Any, **__: Any) -> Any:
            raise HostMemoryError("no more", nbytes=1)

        monkeypatch.setattr(HostBuffer, "allocate", refuse)
        with pytest.raises(HostMemoryError):
            store.update("0.b", tensors["1.b"])
        assert not store.moved
        assert stored(store) == raw(tensors)


def test_views_that_could_write_are_given_by_name_only(file: tuple[Path, dict[str, Any]], device: str) -> None:
    path, _ = file
    with HostStore.map_file(path, units=UNITS, device=device) as store:
        for view in (store.device_view, store.slab("0").device_view):
            with pytest.raises(AliasError, match="read_only=True"):
                view("0.w")
            assert view("0.w", read_only=True).read_only
        host = store.host_view("0.w")
        assert host.read_only
        assert not np.from_dlpack(host).flags.writeable
        with pytest.raises(TypeError):
            host.memoryview()[0] = 1
        with pytest.raises(AliasError, match="legacy"):
            host.__dlpack__()
        if device != "cpu":
            with pytest.raises(AliasError):
                host.__dlpack__(dl_device=(2, 0), max_version=(1, 0), copy=False)
        del host, view
        with pytest.raises(AliasError, match="read-only"):
            store._homes[0].buffer.copy_into(np.zeros(3))  # type: ignore[union-attr]
        driver = open_driver(device)
        if device == "cpu":
            with pytest.raises(Exception, match="read-only"):
                driver.copy(store.host_view("0.w").pointer, store.host_view("0.b").pointer, 4)


def test_a_unit_without_a_slot_is_mapped_by_name_only(file: tuple[Path, dict[str, Any]], device: str) -> None:
    path, tensors = file
    with HostStore.map_file(path, units=UNITS, device=device) as store:
        slabs = {unit: store.slab(unit) for unit in UNITS}
        with SlotRing(slabs, slots=1, device=device) as ring:
            lease = ring.prefetch("0")
            with pytest.raises(SlotError, match="map_read_only"):
                ring.prefetch("1")
            lease.release()
        with (
            SlotRing(slabs, slots=1, device=device, when_full="map_read_only") as ring,
            ring.prefetch("0"),
            ring.prefetch("1") as views,
        ):
            assert all(view.read_only for view in views.values())
            assert bytes(HostBuffer.copy_of(views["1.w"], device=device).memoryview()) == tensors["1.w"].tobytes()
            assert ring.stats.mapped_runs == 1


def test_a_store_that_is_left_under_views_is_freed_with_them(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    before = live_buffers()
    views: list[View] = []
    store = HostStore.map_file(path, units=UNITS, device="cpu")

    def leave() -> None:
        with store:
            store.slab("0").copies()
            store.update("0.b", tensors["1.b"])
            views.extend([store.host_view("0.w"), store.host_view("0.b")])
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert bytes(views[0].memoryview()) == tensors["0.w"].tobytes()
    assert len(live_buffers()) == len(before) + 2
    views.clear()
    gc.collect()
    lifetime.drain()
    assert live_buffers() == before, "the closed store holds what it should not"
    with pytest.raises(ClosedError):
        store.host_view("0.b")
    with pytest.raises(ClosedError):
        store.slab("0")


def test_a_store_dropped_under_views_lives_on(file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = file
    store = HostStore.map_file(path, units=UNITS, device="cpu")
    view, slab = store.host_view("0.w"), store.slab("1")
    with pytest.raises(ClosedError, match="live view"):
        store.close()
    del store
    gc.collect()
    assert bytes(view.memoryview()) == tensors["0.w"].tobytes()
    assert bytes(slab.host_view("1.w").memoryview()) == tensors["1.w"].tobytes()


# ------------------------------------------------------------------------------------------ other processes


def child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_write_past_all_warnings_ends_the_process_and_not_the_file(
    file: tuple[Path, dict[str, Any]], torch: ModuleType
) -> None:
    # What the documentation says of torch, which ignores read-only; and what it is told to do instead.
    path, _ = file
    before = path.read_bytes()
    raw_write = """
        import sys, torch
        from dlpoffload import HostStore
        store = HostStore.map_file(sys.argv[1], device="cpu")
        if sys.argv[2] == "moved":
            assert store.copy_out("0.w")
        tensor = torch.from_dlpack(store.host_view("0.w"))
        print("reads", flush=True)
        tensor.zero_()
        print("wrote", float(tensor.sum()))
    """
    ended = child(raw_write, str(path), "in place")
    assert (ended.returncode, ended.stdout) == (-11, "reads\n"), ended.stderr
    moved = child(raw_write, str(path), "moved")
    assert (moved.returncode, moved.stdout) == (0, "reads\nwrote 0.0\n"), moved.stderr
    assert path.read_bytes() == before


def test_two_processes_share_the_pages(tmp_path: Path, rng: Any) -> None:
    nbytes = 64 << 20
    path = write_at(tmp_path / "x.safetensors", {"a": np.zeros(nbytes, "u1")})
    measured = """
        import re, sys
        from pathlib import Path
        from dlpoffload import HostStore
        store = HostStore.map_file(sys.argv[1], device="cpu")
        assert sum(bytes(store.host_view("a").memoryview()[::4096])) == 0
        text = Path("/proc/self/smaps").read_text()
        part = text[text.index("x.safetensors"):]
        print(*(re.search(rf"{key}:\\s+(\\d+)", part)[1] for key in ("Rss", "Pss", "Private_Dirty", "Anonymous")))
    """
    with HostStore.map_file(path, device="cpu"):
        run = child(measured, str(path))
    assert run.returncode == 0, run.stderr
    resident, proportional, dirty, anonymous = map(int, run.stdout.split())
    assert resident >= nbytes >> 10
    assert proportional <= 0.51 * resident, "each page belongs to both"
    assert dirty == anonymous == 0
