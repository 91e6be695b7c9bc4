"""Mapped checkpoints, background pinning and budgets on a real device."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dlpoffload
from dlpoffload import HostBuffer, HostStore, SlotRing, lifetime, pinned_nbytes
from dlpoffload.driver import Driver
from dlpoffload.errors import AliasError, CheckpointError

pytestmark = pytest.mark.gpu

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

MIB = 1 << 20
PACKAGE = Path(dlpoffload.__file__).parents[1]


def child(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {f"{layer}.{part}": rng.standard_normal((1024, 1024), np.float32) for layer in range(4) for part in "ab"}


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, Any], cuda_driver: Driver) -> Iterator[Path]:
    if not cuda_driver.capabilities().read_only_host_register:
        pytest.skip("this device cannot pin read-only memory: map_file is refused there, by name")
    raw, made = tmp_path / "raw.safetensors", tmp_path / "model.safetensors"
    safetensors_numpy.save_file(tensors, raw)
    dlpoffload.align(raw, made)
    yield made
    lifetime.drain()


UNITS = {str(layer): (f"{layer}.a", f"{layer}.b") for layer in range(4)}


def test_a_mapped_checkpoint_is_read_by_kernels_in_place(
    path: Path, tensors: dict[str, Any], torch: ModuleType
) -> None:
    with HostStore.map_file(path, device="cuda:0") as store:
        assert store.mode == "map"
        with pytest.raises(AliasError, match="read_only=True"):
            store.device_view("0.a")
        for name, array in tensors.items():
            there = torch.from_dlpack(store.device_view(name, read_only=True))
            assert there.is_cuda
            assert torch.equal((there + 0).cpu(), torch.from_numpy(array))
            del there
        torch.cuda.synchronize()


def test_units_of_a_mapped_checkpoint_are_staged(path: Path, tensors: dict[str, Any], torch: ModuleType) -> None:
    with HostStore.map_file(path, units=UNITS, device="cuda:0") as store:
        slabs = {unit: store.slab(unit) for unit in UNITS}
        with SlotRing(slabs, slots=2, device="cuda:0") as ring:
            stream = torch.cuda.current_stream().cuda_stream
            for unit in [*UNITS, *reversed(UNITS)]:
                with ring.prefetch(unit, stream=stream) as views:
                    found = {name: torch.from_dlpack(view).clone() for name, view in views.items()}
                    del views
                for name, tensor in found.items():
                    assert torch.equal(tensor.cpu(), torch.from_numpy(tensors[name]))
            torch.cuda.synchronize()
            assert ring.stats.copies >= 6
            assert ring.stats.mapped_runs == 0


def test_an_updated_tensor_is_the_devices_too(path: Path, tensors: dict[str, Any], torch: ModuleType) -> None:
    before = path.read_bytes()
    with HostStore.map_file(path, units=UNITS, device="cuda:0") as store:
        new = tensors["0.a"] * 2
        assert store.update("0.a", new)
        there = torch.from_dlpack(store.device_view("0.a"))
        there += 1  # a kernel writes through the view: it is memory of its own
        torch.cuda.synchronize()
        assert torch.equal(torch.from_dlpack(store.host_view("0.a")), torch.from_numpy(new) + 1)
        with SlotRing({"0": store.slab("0")}, device="cuda:0") as ring:
            stream = torch.cuda.current_stream().cuda_stream
            with ring.prefetch("0", stream=stream) as views:
                staged = torch.from_dlpack(views["0.a"]).clone()
                other = torch.from_dlpack(views["0.b"]).clone()
                del views
        assert torch.equal(staged.cpu(), torch.from_numpy(new) + 1)
        assert torch.equal(other.cpu(), torch.from_numpy(tensors["0.b"]))
        del there
    assert path.read_bytes() == before


def test_a_kernel_that_writes_past_all_warnings_ends_the_context_and_not_the_file(
    path: Path, torch: ModuleType
) -> None:
    before = path.read_bytes()
    run = child(
        """
        import sys, torch
        from dlpoffload import HostStore
        store = HostStore.map_file(sys.argv[1], device="cuda:0")
        tensor = torch.from_dlpack(store.device_view("0.a", read_only=True))
        print("read", float(tensor.sum()) == float(tensor.sum()), flush=True)
        try:
            tensor.zero_()
            torch.cuda.synchronize()
            print("wrote")
        except RuntimeError as error:
            print("lost", "illegal memory access" in str(error), flush=True)
        import os
        os._exit(0)  # nothing of a lost context can be freed
        """,
        str(path),
    )
    assert run.stdout.splitlines()[:1] == ["read True"], run.stderr
    assert run.stdout.splitlines()[1:] == ["lost True"], run.stdout + run.stderr
    assert path.read_bytes() == before


def test_several_processes_map_one_copy(path: Path, torch: ModuleType) -> None:
    code = """
        import sys, torch
        from dlpoffload import HostStore
        with HostStore.map_file(sys.argv[1], device="cuda:0") as store:
            print(float(torch.from_dlpack(store.device_view("1.b", read_only=True)).double().sum()))
    """
    with HostStore.map_file(path, device="cuda:0") as store:
        mine = float(torch.from_dlpack(store.device_view("1.b", read_only=True)).double().sum())
        others = [child(code, str(path)) for _ in range(2)]
    assert [float(run.stdout) for run in others] == [mine, mine], [run.stderr for run in others]


def test_a_file_that_is_cut_off_is_seen_before_a_copy(path: Path) -> None:
    with (
        HostStore.map_file(path, units=UNITS, device="cuda:0") as store,
        SlotRing({"0": store.slab("0")}, device="cuda:0") as ring,
    ):
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match="changed"):
            ring.prefetch("0")


@pytest.mark.parametrize("kind", ["tmpfs"])
def test_other_file_systems(tensors: dict[str, Any], torch: ModuleType, cuda_driver: Driver, kind: str) -> None:
    if not os.path.isdir("/dev/shm") or not cuda_driver.capabilities().read_only_host_register:
        pytest.skip("needs /dev/shm, and a device that pins read-only memory")
    made = Path(f"/dev/shm/dlpoffload-{os.getpid()}.safetensors")
    try:
        safetensors_numpy.save_file({"a": tensors["0.a"]}, made)
        with HostStore.open(made, device="cuda:0") as store:
            assert torch.equal(torch.from_dlpack(store.host_view("a")), torch.from_numpy(tensors["0.a"]))
            assert store.mode in ("map", "copy")
            assert store.because
    finally:
        made.unlink()


def test_the_front_is_used_while_the_end_is_pinned(torch: ModuleType) -> None:
    before = pinned_nbytes()
    buffer = HostBuffer.allocate(256 * MIB, device="cuda:0", background=True, chunk_nbytes=32 * MIB)
    assert buffer.pinning is not None
    front = torch.from_dlpack(buffer.device_view((MIB,), "float32"))
    front.fill_(3)
    torch.cuda.synchronize()
    assert buffer.memoryview(0, 4).cast("f")[0] == 3
    assert buffer.pinning.wait(timeout_s=60)
    with pytest.raises(AliasError, match="two chunks"):
        buffer.device_view((2 * MIB,), "uint8", byte_offset=31 * MIB)
    last = torch.from_dlpack(buffer.device_view((32 * MIB,), "uint8", byte_offset=224 * MIB))
    there = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    there.copy_(last)
    torch.cuda.synchronize()
    assert not there.any()
    assert pinned_nbytes() - before == 256 * MIB
    del front, last
    buffer.close()
    assert pinned_nbytes() == before


def test_the_devices_numa_node_is_one_of_the_machines(cuda_driver: Driver) -> None:
    node = cuda_driver.numa_node
    assert node is None or Path(f"/sys/devices/system/node/node{node}").exists()
    with HostBuffer.allocate(4 * MIB, device="cuda:0") as buffer:
        assert not [note for note in buffer.notes if "hugetlb" in note]
