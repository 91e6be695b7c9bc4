"""`share` and `open_shared`: one process fills, others map; who dies when, who may not, and what is left behind."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import gc
import hashlib
import json
import mmap
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from spawned import answer_with_w

from dlpoffload import (
    DeviceBuffer,
    HostBuffer,
    HostStore,
    SlotRing,
    TensorSpec,
    memfile,
    open_shared,
    pinned_nbytes,
    share,
)
from dlpoffload.checkpoint import narrow
from dlpoffload.driver import open_driver
from dlpoffload.errors import AliasError, CheckpointError, HostMemoryError, OffloadError, SpecError
from dlpoffload.limits import host_limits
from dlpoffload.store import handover

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sharing needs Linux")

MIB = 1 << 20


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test, and no other run of this one, uses."""
    return f"{os.getpid()} {request.node.name}"[:60].replace("/", " ")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test: no descriptor, no address, no file more than before, and no thread that hands out."""
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before
    assert not [file for file in os.listdir("/dev/shm") if f"{os.getpid()} test" in file]
    assert not [thread for thread in threading.enumerate() if thread.name == "dlpoffload-share"]


def descriptors() -> dict[str, str]:
    """What memory and sockets of ours are open here."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if target.startswith(("socket:", "/memfd:dlpoffload")):
                found[number] = target
    return found


def is_named(name: str) -> bool:
    """Whether some process has the address."""
    return f"@dlpoffload/{os.geteuid()}/{name}" in Path("/proc/net/unix").read_text()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline, f"waited 20 s for {what}"
        time.sleep(0.005)


def tensors(rng: Any) -> dict[str, Any]:
    return {
        "layers.0.w": rng.standard_normal((64, 48), dtype=np.float32),
        "layers.0.b": rng.standard_normal(48).astype(np.float16),
        "odd": rng.integers(0, 255, 13, dtype=np.uint8),
        "layers.1.w": rng.standard_normal((48, 64)),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.int32),
        "flags": rng.integers(0, 2, (5, 7)).astype(bool),
    }


def contents(store: HostStore) -> dict[str, bytes]:
    return {name: bytes(store.host_view(name).memoryview()) for name in store}


def raw(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


class Process:
    """Another interpreter: it says ``ready`` lines, and goes on when it is told to."""

    def __init__(self, source: str, *arguments: str, **options: Any) -> None:
        source = "import os, sys, time\nimport dlpoffload as dlpo\n" + textwrap.dedent(source)
        self.process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", source, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.process.communicate()[1]
        return line

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ended(self, code: int = 0) -> str:
        """Let it end, silently and with this code; gives what it printed last."""
        out, err = self.process.communicate(timeout=60)
        assert (self.process.returncode, err) == (code, "")
        return out.strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


OPENER = """
    checkpoint = dlpo.open_shared(sys.argv[1], timeout_s=20)
    store = dlpo.HostStore.map_file(checkpoint.path, device="cpu")
    checkpoint.close()
    print("ready", flush=True); sys.stdin.readline()
    import hashlib
    print(hashlib.sha256(b"".join(bytes(store.host_view(n).memoryview()) for n in sorted(store))).hexdigest())
    store.close()
"""
FILLER = """
    import numpy as np
    tensors = {f"t{n}": np.full(1 << 20, n, np.uint8) for n in range(int(sys.argv[2]))}
    checkpoint = dlpo.share(tensors, sys.argv[1])
    print(checkpoint.path, flush=True); sys.stdin.readline()
"""


# ------------------------------------------------------------------------------------------- what is shared


def test_what_one_process_shares_another_maps_bit_for_bit(name: str, rng: Any) -> None:
    given = tensors(rng)
    with share(given, name) as checkpoint:
        assert set(checkpoint.specs) == set(given)
        opener = Process(
            """
            checkpoint = dlpo.open_shared(sys.argv[1], timeout_s=20)
            with dlpo.HostStore.map_file(checkpoint.path, device="cpu") as store:
                print(store.mode, store.file_nbytes, dlpo.live_memory()[0].kind, list(store.unaligned))
                for name in sorted(store):
                    view = store.host_view(name)
                    print(name, view.shape, view.dtype, view.read_only, bytes(view.memoryview()).hex())
                del view
            checkpoint.close()
            """,
            name,
        )
        first, *lines = opener.ended().splitlines()
    assert re.fullmatch(r"map \d+ mapped file \['odd', 'flags'\]", first)
    assert [line.rstrip() for line in lines] == [
        f"{n} {a.shape} {a.dtype} True {a.tobytes().hex()}".rstrip() for n, a in sorted(given.items())
    ]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_is_shared_with_its_metadata_whatever_its_alignment(
    kind: str, name: str, rng: Any, tmp_path: Path
) -> None:
    given = tensors(rng)
    path = tmp_path / "model.safetensors"
    safetensors_numpy.save_file(given, path, metadata={"made": "here"})
    if kind == "folder":
        path.unlink()
        parts = [dict(list(given.items())[:3]), dict(list(given.items())[3:])]
        index = {}
        for number, part in enumerate(parts):
            safetensors_numpy.save_file(part, tmp_path / f"{number}.safetensors", metadata={"made": "here"})
            index |= dict.fromkeys(part, f"{number}.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    seen: list[tuple[int, int]] = []
    with share(tmp_path, name, progress=lambda *of: seen.append(of)) as checkpoint:
        assert checkpoint.metadata == {"made": "here"}
        assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes) == (sum(a.nbytes for a in given.values()),) * 2
        with open_shared(name) as other, HostStore.map_file(other.path, device="cpu") as store:
            assert contents(store) == raw(given)
            assert store.unaligned == ("odd", "flags")  # the format has no gaps, so odd sizes come last


def test_a_recipe_is_shared_as_it_is_wanted(name: str, rng: Any, tmp_path: Path) -> None:
    whole = rng.standard_normal((8, 6), dtype=np.float32)
    safetensors_numpy.save_file({"w": whole}, tmp_path / "x.safetensors")
    specs = {"half": TensorSpec((4, 6), "float32")}
    recipe = {"half": narrow("w", dim=0, start=4, length=4)}
    with (
        share(tmp_path, name, specs=specs, recipe=recipe) as shared,
        HostStore.map_file(shared.path, device="cpu") as store,
    ):
        assert contents(store) == {"half": whole[4:].tobytes()}


def test_strided_tensors_and_every_dtype_of_the_format(name: str) -> None:
    grid = np.arange(48, dtype=np.int16).reshape(6, 8)
    packed = HostStore.copy_of({"x": np.arange(12, dtype=np.uint8)}, device="cpu")
    view = packed.host_view("x")
    given = {
        "turned": grid.T,
        "stepped": grid[::2, 1::3],
        "fp4": view.view((3, 4), "float4_e2m1fn_x2"),
        "fp8": view.view((12,), "float8_e4m3fn"),
        "bf16": view.view((2, 3), "bfloat16"),
    }
    with share(given, name) as shared, HostStore.map_file(shared.path, device="cpu") as store:
        found = contents(store)
        assert found["turned"] == grid.T.tobytes()
        assert found["stepped"] == grid[::2, 1::3].tobytes()
        assert found["fp4"] == found["fp8"] == found["bf16"] == bytes(range(12))
        assert store.specs["fp4"] == TensorSpec((3, 4), "float4_e2m1fn_x2")
        assert store.specs["bf16"] == TensorSpec((2, 3), "bfloat16")
    del view, given
    packed.close()


def test_units_of_a_shared_store_are_streamed_from_it(name: str, rng: Any, device: str) -> None:
    if not open_driver(device).capabilities().read_only_host_register:
        pytest.skip(f"{device} pins no read-only memory")
    given = {f"layers.{n}.w": rng.standard_normal((64, 64), dtype=np.float32) for n in range(6)}
    units = {f"layers.{n}": (f"layers.{n}.w",) for n in range(6)}
    with share(given, name) as shared, HostStore.map_file(shared.path, device=device, units=units) as store:
        driver = open_driver(device)
        with SlotRing({unit: store.slab(unit) for unit in units}, slots=2, device=device) as ring:
            for unit in [*units, *units]:
                back = bytearray(64 * 64 * 4)
                with ring.prefetch(unit) as views:
                    driver.synchronize()
                    target = (memoryview(back), np.frombuffer(back, np.uint8).ctypes.data)
                    driver.copy(target[1], views[f"{unit}.w"].device_pointer, len(back))
                assert bytes(back) == given[f"{unit}.w"].tobytes()
                del views
            assert ring.stats.copies >= 6


def test_the_bytes_can_be_written_by_nobody_and_an_update_is_of_one_process(name: str, rng: Any) -> None:
    given = {"w": rng.standard_normal(1000, dtype=np.float32)}
    with share(given, name) as shared:
        opener = Process(OPENER, name)
        assert opener.line() == "ready"
        writable = os.open(shared.path, os.O_RDWR)  # it is this user's, after all
        for write in (
            lambda: os.pwrite(writable, b"x", 300),
            lambda: os.ftruncate(writable, 10),
            lambda: os.ftruncate(writable, 1 << 20),
            lambda: mmap.mmap(writable, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                write()
        assert os.fstat(writable).st_mode & 0o777 == 0o600
        os.close(writable)
        with HostStore.map_file(shared.path, device="cpu") as store:
            assert store.is_read_only("w")
            with pytest.raises(ValueError, match="read-only"):
                np.from_dlpack(store.host_view("w"))[0] = 1
            with pytest.raises(AliasError, match="update"):
                store.copy_into("w", given["w"])
            assert store.update("w", given["w"] + 1)
            assert store.moved == {"w": 4000}
            assert contents(store)["w"] == (given["w"] + 1).tobytes()
        opener.go_on()
        assert opener.ended() == hashlib.sha256(given["w"].tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------ counted once


def pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps").read_text()
    parts = re.findall(r"memfd:dlpoffload.*?\nPss: +(\d+) kB", text, re.DOTALL)
    return 1024 * sum(map(int, parts))


def shared_nbytes_of_the_machine() -> int:
    return 1024 * int(re.findall(r"Shmem: +(\d+) kB", Path("/proc/meminfo").read_text())[0])


def test_host_memory_holds_it_once_for_all_processes_and_not_at_all_afterwards(name: str) -> None:
    count, nbytes = 128, 128 * MIB
    before = shared_nbytes_of_the_machine()
    filler = Process(FILLER, name, str(count))
    filler.line()
    openers = [Process(OPENER, name) for _ in range(3)]
    for opener in openers:
        assert opener.line() == "ready"
    each = [pss(opener.pid) for opener in openers]  # the filler maps nothing: it has only the descriptor
    assert 0.95 * nbytes < sum(each) < 1.05 * nbytes, each
    assert all(0.25 * nbytes < part < 0.42 * nbytes for part in each), each
    assert shared_nbytes_of_the_machine() - before < 2.5 * nbytes  # other tests share, too
    filler.kill()
    for opener in openers[1:]:
        opener.kill()
    openers[0].go_on()
    digest = hashlib.sha256()
    for n in sorted(f"t{n}" for n in range(count)):
        digest.update(bytes([int(n[1:])]) * MIB)
    assert openers[0].ended() == digest.hexdigest()  # right to the end, though all the others were killed
    wait_until(lambda: shared_nbytes_of_the_machine() - before < 0.5 * nbytes, "the memory to be given back")
    assert not is_named(name)


def test_what_is_memory_already_needs_no_free_memory_to_be_pinned(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"w": np.zeros(64 * MIB, np.uint8)}
    safetensors_numpy.save_file(given, tmp_path / "x.safetensors")
    with share(given, name) as shared:
        limits = host_limits()
        room = limits.__class__(
            **{field: getattr(limits, field) for field in limits.__slots__}
            | {"mem_available_nbytes": 16 * MIB, "mem_total_nbytes": 32 * MIB, "cgroups": ()}
        )
        monkeypatch.setattr("dlpoffload.blocks.host_limits", lambda: room)
        before = pinned_nbytes()
        with HostStore.map_file(shared.path, device="cpu"):
            assert pinned_nbytes() - before >= 64 * MIB
            with pytest.raises(HostMemoryError):  # page cache could be dropped, and no longer can
                HostStore.map_file(tmp_path / "x.safetensors", device="cpu")
            # and the pinned memory is not taken off what is free a second time
            HostStore.copy_of({"w": bytes(4 * MIB)}, device="cpu").close()
        with pytest.raises(HostMemoryError, match="host_budget"):
            HostStore.map_file(shared.path, device="cpu", host_budget=32 * MIB)


def test_only_memory_that_is_all_there_counts_as_used_already() -> None:
    def is_in_memory(folder: str | Path, *, whole: bool) -> bool:
        path = Path(folder) / f"a test {os.getpid()}"
        with path.open("w+b") as file:
            path.unlink()
            os.truncate(file.fileno(), MIB)
            if whole:
                file.write(bytes(MIB))
                file.flush()
            return memfile.is_in_memory(file.fileno())

    assert is_in_memory("/dev/shm", whole=True)
    assert not is_in_memory("/dev/shm", whole=False)
    with open(sys.executable, "rb") as file:
        assert not memfile.is_in_memory(file.fileno())


def test_more_than_the_machine_has_is_refused_before_anything_is_there(name: str) -> None:
    array = np.broadcast_to(np.zeros(1, np.uint8), (1 << 40,))
    before = shared_nbytes_of_the_machine()
    with pytest.raises(HostMemoryError) as caught:
        share({"w": array}, name)
    assert caught.value.nbytes > 1 << 40
    assert shared_nbytes_of_the_machine() - before < 1024 * MIB
    assert not is_named(name)


# ------------------------------------------------------------------------------------------ waiting, dying


def test_openers_wait_for_who_fills_and_many_at_once(name: str) -> None:
    found: list[bool] = []

    def opened() -> None:
        with open_shared(name, timeout_s=20) as checkpoint:
            found.append("w" in checkpoint.specs)

    threads = [threading.Thread(target=opened) for _ in range(24)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)  # nobody has the name yet

    def progress(done: int, total: int) -> None:
        assert not found  # half-filled, and nobody has it
        time.sleep(0.05)

    with share({n: np.zeros(MIB, np.uint8) for n in "uvw"}, name, progress=progress):
        for thread in threads:
            thread.join()
    assert found == [True] * 24


def test_who_waits_when_the_name_is_given_up_is_served_first(name: str) -> None:
    sockets = []
    checkpoint = share({"w": np.zeros(8, np.uint8)}, name)
    for _ in range(8):
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        asking.connect(f"\0dlpoffload/{os.geteuid()}/{name}")
        sockets.append(asking)
    checkpoint.close()
    for asking in sockets:
        message, passed, _, _ = socket.recv_fds(asking, 64, 1)
        assert message == b"dlpoffload 1"
        for descriptor in passed:
            with open_shared(descriptor) as opened:
                assert list(opened.specs) == ["w"]
            os.close(descriptor)
        asking.close()


DYING = """
    import numpy as np
    def progress(done, total):
        print("half", flush=True)
        sys.stdin.readline()
        raise RuntimeError("no more")
    try:
        dlpo.share({"a": np.ones(1 << 20, np.uint8), "b": np.ones(1 << 20, np.uint8)}, sys.argv[1], progress=progress)
    except RuntimeError as error:
        print("failed", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["killed", "fails"])
def test_who_waits_is_told_when_the_filler_does_not_finish(how: str, name: str) -> None:
    filler = Process(DYING, name)
    assert filler.line() == "half"
    opener = Process("dlpo.open_shared(sys.argv[1], timeout_s=60)", name)
    wait_until(lambda: Path("/proc/net/unix").read_text().count(f"/{name}") >= 2, "the opener to ask")
    start = time.monotonic()
    if how == "killed":
        os.kill(filler.pid, signal.SIGKILL)
    else:
        filler.go_on()
        assert filler.line() == "failed"
    _, err = opener.process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert re.search(rf'CheckpointError: "{re.escape(name)}" was never filled: process {filler.pid} ended', err)
    assert not is_named(name)
    filler.kill()


def test_a_filler_that_hangs_and_a_name_that_nobody_has_end_in_time(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no process of this user .* within 0.05 s"):
        open_shared(name, timeout_s=0.05)
    filler = Process(DYING, name)
    assert filler.line() == "half"
    with pytest.raises(CheckpointError, match=rf"not filled within 0.2 s by process {filler.pid}"):
        open_shared(name, timeout_s=0.2)
    filler.kill()


def test_a_name_ends_with_the_process_that_has_it_and_what_was_opened_lives_on(name: str) -> None:
    filler = Process(FILLER, name, "3")
    path = filler.line()
    by_name, by_path = open_shared(name), open_shared(path)
    filler.kill()
    with pytest.raises(CheckpointError, match="no process of this user"):
        open_shared(name, timeout_s=0.05)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_shared(path)
    for checkpoint in (by_name, by_path):
        with HostStore.map_file(checkpoint.path, device="cpu") as store:
            checkpoint.close()
            assert contents(store) == {f"t{n}": bytes([n]) * MIB for n in range(3)}
    with share({"w": b"new"}, name), open_shared(name) as checkpoint:  # the name is free again
        assert list(checkpoint.specs) == ["w"]


def test_a_checkpoint_that_is_dropped_gives_its_name_up(name: str) -> None:
    checkpoint = share({"w": b"1234"}, name)
    assert is_named(name)
    del checkpoint
    gc.collect()
    wait_until(lambda: not is_named(name), "the name to be given up")


def test_the_interpreter_ends_in_silence_while_it_shares(name: str) -> None:
    process = Process("kept = dlpo.share({'w': b'1234'}, sys.argv[1])\nprint('shared', flush=True)", name)
    assert process.ended() == "shared"
    assert not is_named(name)


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "checkpoint.close()", "raise KeyError"])
def test_a_forked_child_neither_ends_what_its_parent_shares_nor_keeps_the_name(end: str, name: str) -> None:
    filler = Process(
        f"""
        import threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads is the point here
        checkpoint = dlpo.share({{"w": b"1234"}}, sys.argv[1])
        child = os.fork()
        if child == 0:
            sys.stderr = open(os.devnull, "w")
            {end}
            sys.exit(0)
        os.waitpid(child, 0)
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        print(child, flush=True)
        time.sleep(30)
        """,
        name,
    )
    child = int(filler.line())
    with open_shared(name, timeout_s=5) as checkpoint:
        assert list(checkpoint.specs) == ["w"]
    os.kill(filler.pid, signal.SIGKILL)
    filler.process.wait()
    wait_until(lambda: not is_named(name), "the name to be given up, though a child of the dead process lives")
    os.kill(child, signal.SIGKILL)
    filler.kill()


# ------------------------------------------------------------------------------------- other ways to hand over


def test_a_descriptor_that_was_inherited(name: str, rng: Any) -> None:
    with share({"w": b"1234"}, name) as shared:
        descriptor = os.open(shared.path, os.O_RDONLY)
        opener = Process(
            """
            with dlpo.open_shared(int(sys.argv[1])) as checkpoint:
                with dlpo.HostStore.map_file(checkpoint.path, device="cpu") as store:
                    print(bytes(store.host_view("w").memoryview()).decode())
            """,
            str(descriptor),
            pass_fds=[descriptor],
        )
        os.close(descriptor)
        assert opener.ended() == "1234"


def test_processes_of_multiprocessing_that_know_the_name(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with share({"w": b"1234"}, name):
        process = context.Process(target=answer_with_w, args=(name, answers))
        process.start()
        process.join(60)
    assert process.exitcode == 0
    assert answers.get() == b"1234"
    answers.close()


# ------------------------------------------------------------------------------------------------ refusals


@contextlib.contextmanager
def memory_file(data: bytes, seals: int) -> Iterator[int]:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    yield descriptor
    os.close(descriptor)


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if sys.platform == "linux" else 0


def header(end: int) -> bytes:
    text = json.dumps({"w": {"dtype": "U8", "shape": [16], "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("how", [pickle.dumps, ForkingPickler.dumps, copy.copy, copy.deepcopy])
def test_what_cannot_be_pickled_says_how_it_is_shared(how: Callable[[Any], Any], name: str, device: str) -> None:
    tensors = {"w": b"1234"}
    with (
        share(tensors, name) as checkpoint,
        HostStore.map_file(checkpoint.path, device=device) as mapped,
        HostStore.copy_of(tensors, device=device) as copied,
        HostBuffer.allocate(64, device=device) as host,
        DeviceBuffer.allocate(64, device=device) as on_device,
    ):
        for thing in (checkpoint, mapped, copied, host, on_device):
            with pytest.raises(OffloadError, match=r"share.*open_shared\(name\)") as caught:
                how(thing)
            assert type(caught.value) is OffloadError


@pytest.mark.parametrize("lacking", ["F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE"])
def test_bytes_that_are_not_sealed_in_every_way_are_refused(lacking: str) -> None:
    some = SEALS & ~getattr(fcntl, lacking)
    with memory_file(header(16) + bytes(16), some) as descriptor, pytest.raises(CheckpointError, match="is not sealed"):
        open_shared(descriptor)
    with memory_file(header(16) + bytes(16), SEALS) as descriptor, open_shared(descriptor) as checkpoint:
        assert checkpoint.specs == {"w": TensorSpec((16,), "uint8")}


@pytest.mark.parametrize(
    "data",
    [header(16) + bytes(15), header(16) + bytes(17), header(15) + bytes(16), b"", bytes(4096), header(16)[:20]],
    ids=["a byte short", "a byte long", "a tensor short", "empty", "zeros", "half a header"],
)
def test_sizes_that_do_not_fit_each_other_are_refused(data: bytes) -> None:
    with memory_file(data, SEALS) as descriptor, pytest.raises(CheckpointError):
        open_shared(descriptor)


def test_what_is_no_shared_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"w": np.zeros(4)}, path)
    with pytest.raises(CheckpointError, match="is not sealed"):
        open_shared(path)
    with pytest.raises(CheckpointError, match="is no file"):
        open_shared("/dev/null")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_shared(tmp_path / "not there")
    with pytest.raises(CheckpointError, match="descriptor 999 cannot be opened"):
        open_shared(999)


def as_nobody(call: Callable[[], None]) -> None:
    """Make a call in a child that is another user."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            call()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_another_user_is_given_nothing_and_is_not_believed(name: str) -> None:
    address = f"\0dlpoffload/0/{name}"

    def ask() -> None:
        with pytest.raises(CheckpointError, match="no process of this user"):
            open_shared(name, timeout_s=0.05)
        with pytest.raises(CheckpointError, match="cannot be opened"):
            open_shared(path)
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(address)
            assert socket.recv_fds(asking, 64, 1)[:2] == (b"", [])
        with pytest.raises(CheckpointError, match="belongs to user 0, and this process is user 65534's"):
            memfile.check_sealed(descriptor, '"it"')

    with share({"w": b"1234"}, name) as shared:
        path = shared.path
        descriptor = os.open(path, os.O_RDONLY)
        as_nobody(ask)
        os.close(descriptor)

    begin, end = os.pipe(), os.pipe()

    def squat() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            os.write(begin[1], b"x")
            os.read(end[0], 1)

    thread = threading.Thread(target=as_nobody, args=(squat,))
    thread.start()
    os.read(begin[0], 1)
    try:
        with pytest.raises(CheckpointError, match=r"is held by process \d+ of user 65534"):
            open_shared(name, timeout_s=5)
        with pytest.raises(CheckpointError, match="Address already in use"):
            share({"w": b"1234"}, name)
    finally:
        os.write(end[1], b"x")
        thread.join()
        for descriptor in (*begin, *end):
            os.close(descriptor)


def test_arguments_that_mean_nothing_are_refused_and_leave_no_name(name: str, tmp_path: Path) -> None:
    safetensors_numpy.save_file({"w": np.zeros(4)}, tmp_path / "x.safetensors")
    spec = {"w": TensorSpec((4,), "float64")}
    wrong: list[tuple[Any, dict[str, Any], type[OffloadError], str]] = [
        ({}, {}, SpecError, "no tensors"),
        ({"w": np.zeros(2, np.complex128)}, {}, SpecError, 'tensor "w" .* safetensors has no such dtype'),
        ({"w": object()}, {}, SpecError, 'tensor "w"'),
        ({"w": b"1"}, {"specs": spec}, SpecError, "say how to read a checkpoint"),
        (7, {}, SpecError, "not a int"),
        ({"\ud800": b"1"}, {}, SpecError, "UTF-8 has not; rename it"),
        ({"__metadata__": b"1"}, {}, SpecError, "another part of the header; rename it"),
        ({5: b"1"}, {}, SpecError, "no tensor can be called 5"),
        (tmp_path, {"recipe": {"w": "w"}}, SpecError, "pass specs="),
        (tmp_path, {"specs": {"v": spec["w"]}}, CheckpointError, '"v" is missing'),
        (tmp_path / "nothing", {}, CheckpointError, "cannot be opened"),
    ]
    for source, options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            share(source, name, **options, progress=lambda *_: pytest.fail("it was filled"))
        assert not is_named(name)
    bad: Any
    for bad in ("", "a/b", "a\0b", "x" * 200, "\ud800", 5, b"x", None):
        with pytest.raises(SpecError, match="no name to share under"):
            share({"w": b"1"}, bad)
    for bad in (float("nan"), float("inf"), -1, 1e10, True, "1", None):
        with pytest.raises(SpecError, match="timeout_s="):
            open_shared(name, timeout_s=bad)
    for bad in (b"x", None, 1.0, True):
        with pytest.raises(SpecError, match="a name, a path or a descriptor"):
            open_shared(bad)
    for bad in ("/a\0b", "/\ud800"):
        with pytest.raises(SpecError, match="is no path"):
            open_shared(bad)
    with share({"w": b"1"}, name), pytest.raises(CheckpointError, match="another process shares that name already"):
        share({"w": b"1"}, name)


def test_memory_that_something_can_still_write_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfile, "_SEAL_WAIT_S", 0.001)
    descriptor = memfile.create_file("test", 4096)
    writable = mmap.mmap(descriptor, 4096)
    with pytest.raises(OffloadError, match="cannot be sealed"):
        memfile.seal(descriptor)
    writable.close()
    os.close(memfile.seal(descriptor))
    os.close(descriptor)


def test_a_server_that_runs_out_of_descriptors_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_RETRY_S", (0.005, 0.01))
    failures = [OSError(24, "Too many open files")]

    class Listener(socket.socket):
        def accept(self) -> Any:
            if failures:
                raise failures.pop()
            return super().accept()

    monkeypatch.setattr(socket, "socket", Listener)
    with share({"w": b"1234"}, name), open_shared(name, timeout_s=5) as checkpoint:
        assert list(checkpoint.specs) == ["w"]
    assert not failures
