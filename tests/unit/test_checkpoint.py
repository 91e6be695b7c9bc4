"""Checkpoints in safetensors: every dtype bitwise, every kind of damage a typed error, nothing left behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dlpoffload import HostStore, lifetime, live_buffers
from dlpoffload.checkpoint import open_checkpoint, reading, shard
from dlpoffload.errors import CheckpointError, MissingFrameworkError
from dlpoffload.spec import TensorSpec

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")


def descriptors() -> set[str]:
    """Files that this process has open."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    before = descriptors()
    yield
    if descriptors() - before:
        gc.collect()
    assert not descriptors() - before


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file by hand: whatever header, whatever it says of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_sharded(folder: Path, shards: dict[str, dict[str, Any]], **weight_map: str) -> Path:
    """A sharded checkpoint; `weight_map` adds to or overrides what its index says truly."""
    folder.mkdir(exist_ok=True)
    true = {name: shard for shard, tensors in shards.items() for name in tensors}
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        safetensors_numpy.save_file(tensors, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": {**true, **weight_map}}))
    return index


def refused(source: Path) -> str:
    """The message that reading `source` is refused with, and that nothing of the attempt is left."""
    before, files = live_buffers(), descriptors()
    message = ""
    try:
        HostStore.copy_of(source, device="cpu").close()
    except CheckpointError as error:
        message = str(error)
    assert message, "it was read"
    lifetime.drain()
    assert live_buffers() == before
    assert descriptors() == files
    return message


def stored(store: HostStore) -> dict[str, bytes]:
    return {name: bytes(store.host_view(name).memoryview()) for name in store}


# ----------------------------------------------------------------------------------------------- reading


def test_every_dtype_that_torch_saves(tmp_path: Path, torch: ModuleType) -> None:
    import safetensors.torch as reference

    tensors = {}
    for torch_dtype in sorted(reference._SIZE, key=str):
        if torch_dtype is None:  # a dtype that this torch has not
            continue
        itemsize = reference._SIZE[torch_dtype]
        values = torch.randint(0, 2 if torch_dtype is torch.bool else 256, (3, 5 * itemsize), dtype=torch.uint8)
        tensors[f"{torch_dtype}"] = values.view(torch_dtype)
        tensors[f"{torch_dtype} scalar"] = values.view(torch_dtype)[1, 2].clone()
        tensors[f"{torch_dtype} empty"] = torch.empty((0, 4), dtype=torch_dtype)
    tensors = {name: t for name, t in tensors.items() if "float4" not in name or name.endswith("x2")}
    assert len(tensors) > 50
    reference.save_file(tensors, tmp_path / "model.safetensors")
    expected = reference.load_file(tmp_path / "model.safetensors")

    with HostStore.copy_of(tmp_path / "model.safetensors", device="cpu") as store:
        assert set(store) == set(expected)
        for name, want in expected.items():
            got = torch.from_dlpack(store.host_view(name))
            assert got.dtype == want.dtype == tensors[name].dtype
            assert got.shape == want.shape
            assert want.numel() == 0 or bytes(got.reshape(-1).view(torch.uint8)) == bytes(
                want.reshape(-1).view(torch.uint8)
            ), name
            del got


def test_dtypes_that_only_the_format_has(tmp_path: Path) -> None:
    header = {
        "six": entry("F6_E2M3", [2, 4], 0, 6),
        "other six": entry("F6_E3M2", [4], 6, 9),
        "four": entry("F4", [2, 6], 9, 15),
    }
    data = bytes(range(15))
    with HostStore.copy_of(write(tmp_path / "x.safetensors", header, data), device="cpu") as store:
        assert dict(store.specs) == {
            "six": TensorSpec((2, 4), "float6_e2m3fn"),
            "other six": TensorSpec((4,), "float6_e3m2fn"),
            "four": TensorSpec((2, 3), "float4_e2m1fn_x2"),
        }
        assert stored(store) == {"six": data[:6], "other six": data[6:9], "four": data[9:]}


def test_order_and_metadata(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "np", "made by": "hand"},
        "late": entry("U8", [2], 3, 5),
        "empty": entry("F32", [7, 0], 3, 3),
        "early": entry("U8", [3], 0, 3),
    }
    path = write(tmp_path / "x.safetensors", header, b"abcde")
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.specs) == ["early", "empty", "late"]
        assert checkpoint.metadata == {"format": "np", "made by": "hand"}
        assert checkpoint.nbytes == 5
        assert checkpoint.path == checkpoint.shard_of("late") == path


@pytest.mark.parametrize("limit", [1, 7, 4096])
def test_short_reads_are_continued(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    tensors = {f"{i}": rng.integers(0, 256, size=i * 37, dtype=np.uint8) for i in range(12)}
    safetensors_numpy.save_file(tensors, tmp_path / "x.safetensors")

    def preadv(descriptor: int, targets: list[memoryview], byte_offset: int) -> int:
        data = os.pread(descriptor, min(limit, sum(t.nbytes for t in targets)), byte_offset)
        left = data
        for target in targets:
            target[: len(left)] = left[: target.nbytes]
            left = left[target.nbytes :]
        return len(data)

    monkeypatch.setattr(os, "preadv", preadv)
    with HostStore.copy_of(tmp_path / "x.safetensors", device="cpu") as store:
        assert stored(store) == {name: array.tobytes() for name, array in tensors.items()}


def test_large_tensors_in_pieces_small_ones_together(tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{i:03}": rng.integers(0, 256, size=10, dtype=np.uint8) for i in range(100)}
    tensors["large"] = rng.integers(0, 256, size=1000, dtype=np.uint8)
    safetensors_numpy.save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(reading, "_READ_NBYTES", 300)
    monkeypatch.setattr(reading, "_READ_PARTS", 20)
    calls: list[list[int]] = []
    preadv = os.preadv

    def counted(descriptor: int, targets: list[memoryview], byte_offset: int) -> int:
        calls.append([target.nbytes for target in targets])
        return preadv(descriptor, targets, byte_offset)

    monkeypatch.setattr(os, "preadv", counted)
    with HostStore.copy_of(tmp_path / "x.safetensors", device="cpu") as store:
        assert stored(store) == {name: array.tobytes() for name, array in tensors.items()}
    assert sorted(map(len, calls)) == [1] * 4 + [20] * 5
    assert max(map(sum, calls)) == 300


def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    count = 100_000
    header = {f"layer.{i}.bias": entry("U8", [1], i, i + 1) for i in range(count)}
    data = bytes(i * i % 251 for i in range(count))
    path = write(tmp_path / "x.safetensors", header, data)
    units = {"first": [f"layer.{i}.bias" for i in range(0, count, 2)]}
    with HostStore.copy_of(path, device="cpu", units=units) as store:
        slab = store.slab("first").buffer.memoryview()
        assert bytes(slab[::256]) == data[::2]
        del slab
        assert bytes(store.host_view("layer.99999.bias").memoryview()) == data[-1:]


def test_progress_ends_with_all_of_it(tmp_path: Path, rng: Any) -> None:
    tensors = {f"{i}": rng.integers(0, 256, size=1 << 10, dtype=np.uint8) for i in range(10)}
    safetensors_numpy.save_file(tensors, tmp_path / "x.safetensors")
    units = {name: [name] for name in tensors}
    seen: list[tuple[int, int]] = []
    HostStore.copy_of(
        tmp_path, device="cpu", units=units, progress=lambda done, total: seen.append((done, total))
    ).close()
    assert seen == [((i + 1) << 10, 10 << 10) for i in range(10)]


def test_progress_that_raises_ends_the_reading(tmp_path: Path, rng: Any) -> None:
    safetensors_numpy.save_file({"w": rng.standard_normal(1000)}, tmp_path / "x.safetensors")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before, files = live_buffers(), descriptors()
    try:
        HostStore.copy_of(tmp_path, device="cpu", progress=stop)
    except KeyboardInterrupt:
        assert live_buffers() == before  # freed at once, not when the traceback goes
        assert descriptors() == files
    else:
        pytest.fail("the interrupt was lost")


def test_host_memory_holds_the_weights_once(tmp_path: Path) -> None:
    nbytes = 128 << 20
    parts = {f"{i}": np.full(nbytes // 4, i, dtype=np.uint8) for i in range(4)}
    safetensors_numpy.save_file(parts, tmp_path / "x.safetensors")
    script = """if True:
        import re, sys
        from pathlib import Path
        import numpy, safetensors
        from dlpoffload import HostStore
        from dlpoffload.driver import open_driver
        open_driver("cpu")
        status = Path("/proc/self/status")
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) << 10
        before = peak()
        store = HostStore.copy_of(sys.argv[1], device="cpu")
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert nbytes <= int(done.stdout) + (8 << 20) <= nbytes + (24 << 20)


def test_safetensors_is_loaded_late_and_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, dlpoffload.store, dlpoffload.checkpoint; print('safetensors' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    path = write(tmp_path / "x.safetensors", {"w": entry("U8", [1], 0, 1)}, b"x")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingFrameworkError, match="pip install safetensors"):
        open_checkpoint(path)


# ------------------------------------------------------------------------------------------ damaged files

FLOAT = entry("F32", [1], 0, 4)
DAMAGED: dict[str, tuple[object, bytes, int | None, str]] = {
    "no header": (b"", b"", 0, "damaged, truncated or no safetensors file"),
    "header longer than the file": ({}, b"", 1 << 20, "damaged, truncated"),
    "header longer than anything": ({}, b"", 1 << 62, "damaged, truncated"),
    "header is no JSON": (b"{{{{", b"", None, "damaged, truncated"),
    "header is no text": (b"\xff\xfe{}", b"", None, "damaged, truncated"),
    "header is a list": ([], b"", None, "damaged, truncated"),
    "data truncated": ({"w": entry("F32", [2], 0, 8)}, b"1234567", None, "damaged, truncated"),
    "data left over": ({"w": FLOAT}, b"12345678", None, "damaged, truncated"),
    "overlap": ({"v": FLOAT, "w": FLOAT}, b"1234", None, "damaged, truncated"),
    "gap": ({"v": FLOAT, "w": entry("F32", [1], 8, 12)}, b"0" * 12, None, "damaged, truncated"),
    "shape against offsets": ({"w": entry("F32", [2], 0, 4)}, b"1234", None, "damaged, truncated"),
    "shape that overflows": ({"w": entry("F32", [1 << 40, 1 << 40], 0, 4)}, b"1234", None, "overflow"),
    "negative length": ({"w": entry("F32", [-1], 0, 4)}, b"1234", None, "-1"),
    "unknown dtype": ({"w": entry("F33", [1], 0, 4)}, b"1234", None, "F33"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [1]}}, b"1234", None, "data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "damaged, truncated"),
    "odd fp4": ({"w": entry("F4", [2, 3], 0, 3)}, b"123", None, "two values share a byte"),
    "fp4 scalars": ({"w": entry("F4", [2, 1], 0, 1)}, b"1", None, "two values share a byte"),
    "a name twice": (
        b'{"w":%b,"w":%b}' % ((json.dumps(FLOAT).encode(),) * 2),
        b"1234",
        None,
        '"w" stands in it twice',
    ),
    "no tensors": ({"__metadata__": {"format": "np"}}, b"", None, "no tensors"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file(tmp_path: Path, kind: str) -> None:
    header, data, length, words = DAMAGED[kind]
    path = write(tmp_path / "x.safetensors", header, data, length)
    message = refused(path)
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 50, -1])
def test_truncated_file(tmp_path: Path, rng: Any, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"w": rng.standard_normal((64, 64))}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refused(path)


def test_any_byte_of_a_header_may_be_wrong(tmp_path: Path, rng: Any) -> None:
    """Either the file is refused, or what is read is what the library reads."""
    from safetensors import safe_open

    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"a": np.arange(6, dtype="f4"), "b": np.zeros((2, 3), "i2")}, path)
    whole = path.read_bytes()
    header_nbytes = 8 + struct.unpack("<Q", whole[:8])[0]
    outcomes = {"refused": 0, "read": 0}
    for at in range(header_nbytes):
        for value in rng.choice(256, size=4):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                store = HostStore.copy_of(path, device="cpu")
            except CheckpointError:
                outcomes["refused"] += 1
                continue
            outcomes["read"] += 1
            with store, safe_open(path, framework="numpy") as file:
                assert set(store) == set(file.keys())
                shapes = {name: list(spec.shape) for name, spec in store.specs.items()}
                assert shapes == {name: file.get_slice(name).get_shape() for name in store}
                assert sum(map(len, stored(store).values())) == len(whole) - header_nbytes
    assert all(outcomes.values()), outcomes


def test_dtype_that_the_library_knows_and_we_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.safetensors", {"scale": entry("F8_E8M0", [1], 0, 1)}, b"1")
    monkeypatch.delitem(shard._DTYPES, "F8_E8M0")
    message = refused(path)
    assert '"scale" as F8_E8M0' in message
    assert "BF16" in message


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    changed = path.stat().st_mtime_ns + 1_000_000
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(changed, changed))


@pytest.mark.parametrize("change", [_cut, _grow, _rewrite])
def test_file_that_changes_while_it_is_read(tmp_path: Path, rng: Any, change: Callable[[Path], None]) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"w": rng.standard_normal((64, 64))}, path)
    slab = memoryview(bytearray(64 * 64 * 8))
    with open_checkpoint(path) as checkpoint:
        change(path)
        with pytest.raises(CheckpointError, match="changed while it was read") as raised:
            checkpoint.read_into([(slab, {"w": 0})])
    assert str(path) in str(raised.value)


def test_file_that_is_replaced_after_it_was_opened_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"w": np.arange(4)}, path)
    memory = bytearray(32)
    with open_checkpoint(path) as checkpoint:
        safetensors_numpy.save_file({"w": np.zeros(4, dtype=int)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        checkpoint.read_into([(memoryview(memory), {"w": 0})])
    assert memory == np.arange(4).tobytes()


def test_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.safetensors", {"w": FLOAT}, b"1234")

    def broken(descriptor: int, targets: list[memoryview], byte_offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    message = refused(path)
    assert os.strerror(errno.EIO) in message
    assert str(path) in message


# --------------------------------------------------------------------------------------- files that are none


def test_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.safetensors", {"w": FLOAT}, b"1234")
    opened = os.open

    def denied(what: Any, *arguments: Any, **options: Any) -> int:
        if os.fspath(what) == os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return opened(what, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)  # root may read everything
    assert "Permission denied" in refused(path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    path = index
    assert "cannot be opened" in refused(index)
    assert "is no index" not in refused(index)
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "empty").mkdir()
    assert "no permission" in refused(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["missing", "missing index", "loop", "pipe", "device", "nul"])
def test_path_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x.json" if kind == "missing index" else "x.safetensors")
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nul":
        path = tmp_path / "x\0.safetensors"
    message = refused(path)
    assert ("no regular file" if kind in ("pipe", "device") else "cannot be opened") in message


# ------------------------------------------------------------------------------------- folders and shards


def test_sharded_checkpoint(tmp_path: Path, rng: Any) -> None:
    shards: dict[str, dict[str, Any]] = {
        f"model-{i}.safetensors": {f"{i}.{j}": rng.standard_normal((j, 7)) for j in range(5)} for i in range(3)
    }
    index = write_sharded(tmp_path, shards)
    want = {name: array.tobytes() for tensors in shards.values() for name, array in tensors.items()}
    units = {"across": ["2.4", "0.1", "1.3"]}
    for source in (tmp_path, index, str(index)):
        with HostStore.copy_of(source, units=units, device="cpu") as store:
            assert stored(store) == want
            assert [name.partition(".")[0] for name in store] == sorted("012" * 5)
            slab = store.slab("across")
            memory = slab.buffer.memoryview()
            for name in units["across"]:
                start = slab.byte_offsets[name]
                assert memory[start : start + len(want[name])] == want[name]
            del memory


def test_shards_in_folders_below_and_behind_links(tmp_path: Path) -> None:
    """As the hub's cache lays them out."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot):
        folder.mkdir()
    safetensors_numpy.save_file({"a": np.arange(3)}, blobs / "abc123")
    (snapshot / "one.safetensors").symlink_to("../blobs/abc123")
    write_sharded(snapshot, {"below/two.safetensors": {"b": np.arange(5)}}, a="one.safetensors")
    with HostStore.copy_of(snapshot, device="cpu") as store:
        assert stored(store) == {"a": np.arange(3).tobytes(), "b": np.arange(5).tobytes()}


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    def names(folder: Path) -> list[str]:
        with open_checkpoint(folder) as checkpoint:
            return list(checkpoint.specs)

    safetensors_numpy.save_file({"only": np.arange(3)}, tmp_path / "adapter.safetensors")
    assert names(tmp_path) == ["only"]
    safetensors_numpy.save_file({"other": np.arange(3)}, tmp_path / "consolidated.safetensors")
    message = refused(tmp_path)
    assert '"adapter.safetensors", "consolidated.safetensors"' in message
    write_sharded(tmp_path, {"model-1.safetensors": {"sharded": np.arange(3)}})
    assert names(tmp_path) == ["sharded"]
    safetensors_numpy.save_file({"single": np.arange(3)}, tmp_path / "model.safetensors")
    assert names(tmp_path) == ["single"]


def test_folder_with_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    message = refused(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "torch.save" in message


def test_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"here.safetensors": {"a": np.arange(3)}}, b="gone", c="gone", d="gone", e="gone")
    message = refused(tmp_path)
    assert '"gone"' in message
    assert '"b", "c", "d" and 1 more' in message


def test_damaged_shard_behind_good_ones(tmp_path: Path) -> None:
    write_sharded(tmp_path, {f"{i}": {f"t{i}": np.arange(3)} for i in range(4)})
    os.truncate(tmp_path / "3", 90)
    assert str(tmp_path / "3") in refused(tmp_path)


def test_tensor_missing_in_its_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"one": {"a": np.arange(3)}, "two": {"b": np.arange(3)}}, lost="two")
    message = refused(tmp_path)
    assert '"lost"' in message
    assert '"two"' in message


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"one": {"a": np.arange(3), "b": np.arange(3)}, "two": {"b": np.zeros(3)}})
    message = refused(tmp_path)
    assert 'tensor "b"' in message
    assert str(tmp_path / "one") in message
    assert str(tmp_path / "two") in message


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "", ".", "..", "a\0b"])
def test_shard_name_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    safetensors_numpy.save_file({"w": np.arange(3)}, tmp_path / "secret")
    write_sharded(tmp_path / "model", {"one": {"a": np.arange(3)}}, w=name)
    assert "no file beside it" in refused(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("\udcff", "codec"),
        ("[" * 100_000, "no index"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {}}', "no tensors"),
        ('{"weight_map": {"a": "one", "a": "two"}}', '"a" stands in it twice'),
    ],
)
def test_index_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode(errors="surrogateescape"))
    message = refused(tmp_path)
    assert words in message
    assert str(index) in message


def test_metadata_that_is_null_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"__metadata__": None, "a": entry("U8", [1], 0, 1)}, b"x")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {}
        assert list(checkpoint.specs) == ["a"]


def test_more_dimensions_than_a_tensor_has(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry("U8", [1] * 65, 0, 1)}, b"x")
    assert "65 dimensions; a tensor has at most 64" in refused(path)


@pytest.mark.parametrize(
    ("kind", "words"), [("pipe", "no regular file"), ("device", "no regular file"), ("large", "more than")]
)
def test_an_index_that_never_ends_is_not_read(tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    assert words in refused(path)


LIMITED = """
import resource, sys
from dlpoffload import HostStore
from dlpoffload.errors import HostMemoryError
most = 4096 * int(open("/proc/self/statm").read().split()[0]) + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    HostStore.copy_of(sys.argv[1], device="cpu")
except HostMemoryError as error:
    assert (error.nbytes, error.limit) == (int(sys.argv[2]), "address space"), error
    assert "ulimit -v" in str(error)
    print("refused")
"""


def test_a_process_that_may_not_map_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry("U8", [1 << 36], 0, 1 << 36)})
    os.truncate(path, path.stat().st_size + (1 << 36))
    command = [sys.executable, "-c", LIMITED, str(path), str(path.stat().st_size)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"
