"""Damaged checkpoints: headers, indexes, files and folders, in every way that reads one.

What is right is read by a dozen lines here, `_truth`, straight from the header: whatever a file says after it was
damaged, the store has those bytes, or the error is a typed one.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))

from harness import COUNTS, main

import dlpoffload as dlpo
from dlpoffload import HostStore, lifetime, live_buffers
from dlpoffload.checkpoint import align, open_checkpoint
from dlpoffload.cli import main as command_line
from dlpoffload.errors import AliasError, CheckpointError, HostMemoryError

BITS: Final = {
    "U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32, "I64": 64, "C64": 64, "F4": 4
}  # fmt: skip
_MEMORY: Final = "/dev/shm"
# `align` flushes what it writes to the disk, which here is all waiting and no test.
FOLDER: Final = Path(tempfile.mkdtemp(prefix="dlpoffload-fuzz-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))

# ---------------------------------------------------------------------------------------------------- what is written

NUMBERS: Final = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([s * (1 << n) + more for n in (31, 32, 40, 62, 63, 64, 100) for s in (1, -1) for more in (-1, 0)]),
)
JUNK: Final = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
NAMES: Final = st.sampled_from(["a", "b.weight", "", "ü", "\x00", "__metadata", "x" * 300, "../up"])


@st.composite
def true_headers(draw: Any) -> tuple[dict[str, Any], int]:
    """A header, and the bytes of data that it describes."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    end = 0
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        kind = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        if kind == "F4":
            shape = [*shape, 2]
        nbytes = math.prod(shape) * BITS[kind] // 8
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return header, end


def _entry_damage(draw: Any, header: dict[str, Any]) -> None:
    """Something about one tensor is not so."""
    name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    entry = header[name]
    what = draw(
        st.sampled_from(["dtype", "shape", "begin", "end", "both", "key", "junk", "more", "entry", "twin", "meta"])
    )
    if what == "dtype":
        entry["dtype"] = draw(st.sampled_from([*sorted(BITS), "F6_E2M3", "F128", "u8", ""]) | JUNK)
    elif what == "shape" and isinstance(entry, dict) and entry.get("shape"):
        entry["shape"] = draw(st.lists(NUMBERS, max_size=70) | JUNK)
    elif what in ("begin", "end", "both") and isinstance(entry.get("data_offsets"), list):
        for side in {"begin": [0], "end": [1], "both": [0, 1]}[what]:
            entry["data_offsets"][side] = draw(NUMBERS)
    elif what == "key":
        entry.pop(draw(st.sampled_from(sorted(entry))), None)
    elif what == "junk":
        entry[draw(st.sampled_from(sorted(entry)))] = draw(JUNK)
    elif what == "more":
        entry["more"] = draw(JUNK)
    elif what == "entry":
        header[name] = draw(JUNK)
    elif what == "twin":
        header[name + "'"] = dict(entry)  # two tensors of the same bytes
    else:
        header["__metadata__"] = draw(st.sampled_from([None, {}, {"a": None}, {"a": 1}, []]) | JUNK)


@st.composite
def damaged_files(draw: Any) -> bytes:
    """A file of which up to three things are wrong."""
    header, nbytes = draw(true_headers())
    data = bytes((13 * i + 5) % 256 for i in range(nbytes))
    faults = draw(
        st.lists(st.sampled_from(["entry", "entry", "text", "length", "cut", "longer", "flip", "pad"]), max_size=3)
    )
    for _ in range(faults.count("entry")):
        with contextlib.suppress(AttributeError, TypeError, LookupError):  # it was damaged beyond that already
            _entry_damage(draw, header)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    length = None
    for fault in faults:
        if fault == "text":
            text = draw(
                st.sampled_from(
                    [
                        b"", b"{", b"[]", b"null", b"{}", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe" + text, text * 2,
                        b"\xef\xbb\xbf" + text, text[:-1] + b',"a":1}', text[:-1] + b"," + text[1:],
                        text.replace(b"1", b"1.0"), text.replace(b"1", b"1e0"), text.replace(b"0", b"-0"),
                        text.replace(b"1", b"9" * 5000), text.replace(b":", b":NaN,"), b"\x00" * 40,
                        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
                    ]
                )
                | st.binary(max_size=40)
                | JUNK.map(lambda junk: json.dumps(junk).encode("utf-8", "surrogatepass"))
            )  # fmt: skip
        elif fault == "pad":
            text += draw(st.sampled_from([b" ", b"\n", b"\x00", b"x"])) * draw(st.integers(1, 20))
    if "length" in faults:
        length = draw(st.integers(0, 3 * len(text)) | st.sampled_from([1 << 31, 1 << 63, (1 << 64) - 1, 100_000_001]))
    whole = struct.pack("<Q", len(text) if length is None else length) + text + data
    for fault in faults:
        if fault == "cut":
            whole = whole[: draw(st.integers(0, len(whole)))]
        elif fault == "longer":
            whole += bytes(draw(st.integers(1, 40)))
        elif fault == "flip" and whole:
            at = draw(st.integers(0, min(len(whole), 8 + len(text)) - 1))
            whole = whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :]
    return whole


def _written(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _one_tensor(nbytes: int) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}


# --------------------------------------------------------------------------------------------------- what must hold


def _truth(path: Path) -> dict[str, bytes]:
    """What lies in a file by its own header; any error when that means nothing."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    data = whole[8 + length :]
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert 0 <= begin <= end <= len(data), "bytes that are not there"
        assert end - begin == math.prod(entry["shape"]) * BITS[entry["dtype"]] // 8 or entry["dtype"] not in BITS
        found[name] = data[begin:end]
    return found


def _bytes_of(store: HostStore) -> dict[str, bytes]:
    found = {}
    for name in store:
        try:
            view = store.host_view(name)
        except AliasError:  # it lies in its mapped file between elements
            assert store.mode == "map"
            store.copy_out(name)
            view = store.host_view(name)
        found[name] = bytes(view.memoryview())
    return found


def _copied(path: Path) -> dict[str, bytes]:
    with HostStore.copy_of(path, device="cpu") as store:
        return _bytes_of(store)


def _mapped(path: Path) -> dict[str, bytes]:
    with HostStore.map_file(path, device="cpu") as store:
        return _bytes_of(store)


def _background(path: Path) -> dict[str, bytes]:
    with HostStore.copy_of(path, device="cpu", background=True) as store:
        return _bytes_of(store)


def _aligned(path: Path) -> dict[str, bytes]:
    done = align(path, FOLDER / "out" / "aligned.safetensors" if path.suffix != ".json" else FOLDER / "out")
    found: dict[str, bytes] = {}
    for file in done.files:
        if file.suffix != ".json":
            found |= _truth(file)
    return found


WAYS: Final[dict[str, Callable[[Path], dict[str, bytes]]]] = {
    "copied": _copied,
    "mapped": _mapped,
    "background": _background,
    "aligned": _aligned,
}


def _descriptors() -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
    return {path for path in found if str(FOLDER) in path}


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    before = live_buffers()
    yield
    if _descriptors() or live_buffers() != before:
        gc.collect()
        lifetime.drain()
    assert live_buffers() == before
    assert not _descriptors(), _descriptors()


def _commanded(*arguments: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as complaints:
        code = command_line(list(arguments))
    assert bool(code) == bool(complaints.getvalue().strip()), "an exit code without a word, or the other way round"
    return code


def _read_all_ways(path: Path, truth: Callable[[], dict[str, bytes]]) -> str:
    """Read a checkpoint in every way: all give what is true, or all refuse it. Says which."""
    outcomes = set()
    for way, read in WAYS.items():
        shutil.rmtree(FOLDER / "out", ignore_errors=True)
        (FOLDER / "out").mkdir()
        with _nothing_left():
            try:
                found = read(path)
            except CheckpointError:
                outcomes.add("refused")
                assert not list((FOLDER / "out").iterdir()) or path.suffix == ".json", "half of a file is left"
            else:
                outcomes.add("read")
                assert found == truth(), f"{way} has other bytes"
    assert len(outcomes) == 1, outcomes
    ending = outcomes.pop()
    with _nothing_left():
        assert _commanded("open", str(path), "--device", "cpu") == (0 if ending == "read" else 2)
    COUNTS[ending] += 1
    return ending


@given(damaged_files())
def files(whole: bytes) -> None:
    """One file."""
    path = FOLDER / "x.safetensors"
    path.write_bytes(whole)
    _read_all_ways(path, lambda: _truth(path))


@given(st.data())
def indexes(data: Any) -> None:
    """An index and its shards; nothing outside of the folder is ever opened."""
    folder = FOLDER / "sharded"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "inner").mkdir()
    (folder / "dir.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    weight_map: dict[str, Any] = {}
    shards = data.draw(
        st.lists(st.sampled_from(["1.safetensors", "2.safetensors", "inner/3.safetensors"]), min_size=1, unique=True)
    )
    for i, shard in enumerate(shards):
        header, nbytes = data.draw(true_headers())
        header = {name if name == "__metadata__" else f"{name}{i}": entry for name, entry in header.items()}
        _written(folder / shard, header, bytes((17 * j + i) % 256 for j in range(nbytes)))
        weight_map |= {name: shard for name in header if name != "__metadata__"}
    outside = FOLDER / "outside.safetensors"
    if not outside.exists():
        _written(outside, {"stolen": _one_tensor(1)["a"]}, b"s")
    index: Any = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    outsiders = ["../outside.safetensors", str(outside), "inner/../../outside.safetensors"]
    elsewhere = st.sampled_from(
        [
            *outsiders, "./1.safetensors", "", ".", "..",
            "inner//3.safetensors", "dir.safetensors", "pipe.safetensors", "loop.safetensors", "no.safetensors", "\x00",
            "\ud800.safetensors", "x" * 300, "/dev/zero", "model.safetensors.index.json", "inner/", "~/x", "C:\\x",
        ]
    )  # fmt: skip
    for fault in data.draw(
        st.lists(st.sampled_from(["elsewhere", "stolen", "other", "value", "less", "junk"]), max_size=2)
    ):
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            break
        names = sorted(index["weight_map"]) or ["a"]
        if fault == "elsewhere":
            index["weight_map"][data.draw(st.sampled_from([*names, "more"]))] = data.draw(elsewhere)
        elif fault == "stolen":
            index["weight_map"]["stolen"] = data.draw(st.sampled_from(outsiders))
        elif fault == "other":
            index["weight_map"][data.draw(st.sampled_from(names))] = data.draw(st.sampled_from(shards))
        elif fault == "value":
            index["weight_map"][data.draw(st.sampled_from(names))] = data.draw(JUNK)
        elif fault == "less":
            index["weight_map"].pop(data.draw(st.sampled_from(names)), None)
        else:
            index = data.draw(st.sampled_from([{"weight_map": data.draw(JUNK)}, data.draw(JUNK)]))
    text = json.dumps(index).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 5)) == 0:
        text = data.draw(
            st.binary(max_size=20)
            | st.sampled_from([b"[" * 100_000, text[:-1], text + text, text[:-1] + b',"weight_map":{}}', b"9" * 5000])
        )
    path = folder / "model.safetensors.index.json"
    path.write_bytes(text)

    def truth() -> dict[str, bytes]:
        named = json.loads(path.read_bytes())["weight_map"]
        found: dict[str, bytes] = {}
        for shard in set(named.values()):
            assert (folder / shard).resolve().is_relative_to(folder.resolve()), "outside of the folder"
            found |= _truth(folder / shard)
        return found

    _read_all_ways(path, truth)


@given(st.data())
def changed_while_open(data: Any) -> None:
    """A file that is cut off, grown or written between opening and reading: a typed error, never other bytes."""
    header, nbytes = data.draw(true_headers())
    path = _written(FOLDER / "x.safetensors", header, bytes(nbytes))
    with _nothing_left(), open_checkpoint(path) as checkpoint:
        nanoseconds = path.stat().st_mtime_ns
        size = path.stat().st_size
        how = data.draw(st.sampled_from(["cut", "grown", "written"]))
        with path.open("r+b") as file:
            if how == "cut":
                file.truncate(data.draw(st.integers(0, size - 1)))
            elif how == "grown":
                file.truncate(size + data.draw(st.integers(1, 10_000)))
            else:
                file.seek(data.draw(st.integers(0, size - 1)))
                file.write(b"x")
        os.utime(path, ns=(0, nanoseconds + (1 if how == "written" else 0)))
        layout = dlpo.spec.lay_out(checkpoint.specs)
        try:
            checkpoint.read_into([(memoryview(bytearray(max(layout.nbytes, 1))), layout.byte_offsets)])
        except CheckpointError:
            COUNTS[f"{how}: seen"] += 1
        else:
            raise AssertionError(f"the file was {how}, and read")


@given(bits=st.integers(36, 43), sharded=st.booleans())
def more_than_the_machine_has(bits: int, sharded: bool) -> None:
    """A sparse file of terabytes is true to its header; it is refused before anything is allocated or read."""
    path = _written(FOLDER / "x.safetensors", _one_tensor(1 << bits))
    os.truncate(path, path.stat().st_size + (1 << bits))
    source = path
    if sharded:
        source = FOLDER / "model.safetensors.index.json"
        source.write_text(json.dumps({"weight_map": {"a": path.name}}))
    for way in (HostStore.copy_of, HostStore.map_file, HostStore.open):
        with _nothing_left():
            try:
                way(source, device="cpu").close()
            except HostMemoryError:
                COUNTS["refused for memory"] += 1
            else:
                raise AssertionError("it was opened")
    assert _commanded("open", str(source), "--device", "cpu") == 1


@given(kind=st.sampled_from(["/dev/zero", "/dev/null", "pipe", "folder", "sparse", "loop"]), index=st.booleans())
def what_is_no_file(kind: str, index: bool) -> None:
    """Pipes that nobody writes to, devices that never end, and files of a terabyte where a small index is meant."""
    path = FOLDER / ("no.json" if index else "no.safetensors")
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40 if index else 1 << 28)  # the library maps what it reads
    else:
        path.symlink_to(path if kind == "loop" else kind)
    assert _read_all_ways(path, lambda: {}) == "refused"


def _warm_up() -> None:
    path = _written(FOLDER / "x.safetensors", _one_tensor(4), b"abcd")
    assert _read_all_ways(path, lambda: _truth(path)) == "read"


if __name__ == "__main__":
    try:
        main(_warm_up, files, indexes, changed_while_open, more_than_the_machine_has, what_is_no_file)
    finally:
        shutil.rmtree(FOLDER)
