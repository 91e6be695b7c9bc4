"""`dlpoffload align` and `dlpoffload open`: the same values in an aligned file, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import HostStore
from dlpoffload.cli import main
from dlpoffload.errors import CheckpointError

np = pytest.importorskip("numpy")
safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")


def tensors_of(rng: Any) -> dict[str, Any]:
    return {
        "a": np.frombuffer(rng.bytes(1001), "u1"),
        "b": np.frombuffer(rng.bytes(4096), "f2").reshape(4, 512),
        "c": np.frombuffer(rng.bytes(16 * 17), "f4"),
        "d": np.empty((0, 3), "f8"),
        "e": np.frombuffer(rng.bytes(8), "i8").reshape(()),
        "f": np.frombuffer(rng.bytes(512), "i1").reshape(2, 256),
    }


def raw(tensors: dict[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


def stored(store: HostStore) -> dict[str, bytes]:
    return {name: bytes(store.host_view(name).memoryview()) for name in store}


def same(path: Path, tensors: dict[str, Any]) -> bool:
    found = safetensors_numpy.load_file(path)
    return found.keys() == tensors.keys() and all(
        (found[n].shape, found[n].dtype, found[n].tobytes()) == (a.shape, a.dtype, a.tobytes())
        for n, a in tensors.items()
    )


def test_the_same_tensors_on_aligned_places(tmp_path: Path, rng: Any) -> None:
    tensors = tensors_of(rng)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors_numpy.save_file(tensors, source, {"format": "np"})
    source.chmod(0o640)
    seen: list[tuple[int, int]] = []
    done = dlpo.align(source, target, lambda *of: seen.append(of))
    assert same(target, tensors)
    with safetensors.safe_open(target, "numpy") as file:
        assert file.metadata() == {"format": "np"}
    assert target.stat().st_mode & 0o777 == 0o640
    assert (done.files, done.tensors, done.aligned_after) == ((target,), 6, 5)
    assert seen[-1][0] == seen[-1][1] == sum(a.nbytes for a in tensors.values())
    with HostStore.map_file(target, device="cpu", device_views="bcdef") as store:
        assert store.unaligned == ("a",), "what comes behind 8 bytes: the format has no gaps"
        assert store.host_view("b").pointer % 256 == 0
        assert {n: bytes(store.host_view(n).memoryview()) for n in store} == {
            n: a.tobytes() for n, a in tensors.items()
        }
    again = tmp_path / "again.safetensors"
    assert dlpo.align(target, again).aligned_before == 5
    assert again.read_bytes() == target.read_bytes(), "what is aligned stays as it is"


def test_what_an_unaligned_header_makes_of_it(tmp_path: Path, rng: Any) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    header += b" " * ((8 - (8 + len(header))) % 256)  # data start at 8 modulo 256
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + rng.bytes(256))
    done = dlpo.align(path, tmp_path / "y.safetensors")
    assert (done.aligned_before, done.aligned_after) == (0, 1)
    assert (tmp_path / "y.safetensors").read_bytes()[-256:] == path.read_bytes()[-256:]


def test_a_sharded_checkpoint(tmp_path: Path, rng: Any) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    tensors = tensors_of(rng)
    shards = {"x-1.safetensors": ("a", "b"), "x-2.safetensors": ("c", "d", "e", "f")}
    for shard, names in shards.items():
        safetensors_numpy.save_file({n: tensors[n] for n in names}, source / shard)
    index = {"metadata": {"total": 1}, "weight_map": {n: shard for shard, names in shards.items() for n in names}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    dlpo.align(source, target)
    assert sorted(os.listdir(target)) == ["model.safetensors.index.json", "x-1.safetensors", "x-2.safetensors"]
    with HostStore.map_file(target, device="cpu") as store:
        assert {n: bytes(store.host_view(n).memoryview()) for n in store} == {
            n: a.tobytes() for n, a in tensors.items()
        }


@pytest.mark.parametrize("way", ["itself", "a link to itself"])
def test_the_source_is_never_written(tmp_path: Path, rng: Any, way: str) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file(tensors_of(rng), path)
    before = path.read_bytes()
    target = path
    if way != "itself":
        target = tmp_path / "link.safetensors"
        target.symlink_to(path)
    with pytest.raises(CheckpointError, match="name another file"):
        dlpo.align(path, target)
    assert path.read_bytes() == before


@pytest.mark.parametrize("way", ["fifo", "a link to a device", "a folder", "socket"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, rng: Any, way: str) -> None:
    source, out = tmp_path / "x.safetensors", tmp_path / "out"
    out.mkdir()
    safetensors_numpy.save_file(tensors_of(rng), source)
    index = {"weight_map": dict.fromkeys(tensors_of(rng), source.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for given, name in ((source, "x.safetensors"), (tmp_path, "model.safetensors.index.json")):
        target = out / name
        if way == "fifo":
            os.mkfifo(target)
        elif way == "socket":
            os.mknod(target, stat.S_IFSOCK | 0o600)
        elif way == "a folder":
            (target / name).mkdir(parents=True)
        else:
            target.symlink_to("/dev/null")
        before = target.lstat()
        with pytest.raises(CheckpointError, match=rf"{name}.*no regular file"):
            dlpo.align(given, target if given == source and way != "a folder" else out)
        assert (os.listdir(out), target.lstat()) == ([name], before)
        target.rename(tmp_path / f"moved {name}")


def test_a_disk_that_is_full_or_read_only_leaves_nothing(
    tmp_path: Path, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "out" / "y.safetensors"
    safetensors_numpy.save_file(tensors_of(rng), source)
    target.parent.mkdir()
    target.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"y\.safetensors.*No space left"):
        dlpo.align(source, target)
    assert (os.listdir(target.parent), target.read_bytes()) == (["y.safetensors"], b"before")
    with pytest.raises(CheckpointError, match="cannot be written"):
        dlpo.align(source, "/proc/y.safetensors")


def test_a_source_that_changes_meanwhile_leaves_nothing(tmp_path: Path, rng: Any) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    safetensors_numpy.save_file(tensors_of(rng), source)
    with pytest.raises(CheckpointError, match="changed"):
        dlpo.align(source, target, lambda *_: os.utime(source, ns=(1, 1)))
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_command(tmp_path: Path, rng: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    safetensors_numpy.save_file(tensors_of(rng), source)
    assert main(["align", str(source), str(target)]) == 0
    assert f"{target}\n5 of 6 tensors on 16 bytes" in capsys.readouterr().out
    assert main(["align", str(source), str(source)]) == 2
    assert "dlpoffload align: " in capsys.readouterr().err
    for mode, became in (("auto", "map"), ("map", "map"), ("copy", "copy")):
        assert main(["open", str(target), "--mode", mode, "--device", "cpu", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["mode"], facts["tensors"]) == (became, 6)
        assert facts["file_nbytes"] == (facts["pinned_nbytes"] if became == "map" else 0)
    assert main(["open", str(target), "--device", "cpu"]) == 0
    assert "map on cpu: it can be mapped" in capsys.readouterr().out
    assert main(["open", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert main(["open", str(target), "--device", "cpu", "--host-budget", "1"]) == 1
    assert "host_budget is 1 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_command_that_is_ended_leaves_one_line_and_no_file(
    number: signal.Signals, code: int, word: str, tmp_path: Path, rng: Any
) -> None:
    safetensors_numpy.save_file(tensors_of(rng), tmp_path / "in.safetensors")
    program = """
import signal, sys, time
from dlpoffload.checkpoint.shard import Shard
from dlpoffload.cli import main

def read(*_):
    print("half", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if in the background
Shard.read = read
sys.exit(main(["align", *sys.argv[1:]]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(dlpo.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert len(list(tmp_path.iterdir())) == 2, "the file that is being written"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert errors == f"dlpoffload align: {word}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_command_leaves_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["align", str(tmp_path / "no"), str(tmp_path / "out")]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
