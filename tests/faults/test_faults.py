"""The CUDA driver's whole path over a fake libcuda: what it does when nothing fails, and when any call does.

Everything runs in processes of its own, in which the fake stands in the driver's place (`fake`, `sweep`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import dlpoffload

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs" / "reliability.md"
GROUPS = 12
LOADING = """
import os
from pathlib import Path
from fake import FakeCuda
fake = FakeCuda(Path(os.environ["FAKE_CUDA"]))
"""
NAMES = [
    name
    for path in sorted(HERE.glob("operations_*.py"))
    for name in re.findall(r'^@operation\("([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run Python with the fake library loaded; skips where it cannot be built or there are no bindings."""
    pytest.importorskip("cuda.bindings.driver", reason="requires cuda-bindings")
    if not sys.platform.startswith("linux"):
        pytest.skip("the fake library is Linux's libcuda.so.1")
    paths = [str(HERE), str(Path(dlpoffload.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    sys.path.insert(0, str(HERE))
    try:
        from fake import build, compiler
    finally:
        sys.path.remove(str(HERE))
    if compiler() is None:
        pytest.skip("there is no C compiler to build the fake library with")
    library = build(tmp_path_factory.mktemp("fake"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        environment["FAKE_CUDA"] = str(library)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)

    return run


@pytest.fixture
def script(run: Run) -> Callable[[str], str]:
    """Run code with `fake` made; what it printed, or a failure with what it said."""

    def script(code: str) -> str:
        done = run("-c", LOADING + textwrap.dedent(code))
        assert done.returncode == 0, done.stderr
        return done.stdout

    return script


# ---------------------------------------------------------------------------------------------- the fake
def test_the_doctor_finds_nothing_wrong(script: Callable[[str], str]) -> None:
    found = script(
        """
        import json
        from dlpoffload.doctor import examine
        report = examine()
        assert fake.violations() == [], fake.violations()
        print(json.dumps({"device": report["device"], "healthy": report["healthy"], "live": fake.live()}))
        """
    )
    report = json.loads(found)
    assert (report["device"], report["healthy"]) == ("cuda:0", True)
    assert set(report["live"].values()) == {0}


def test_the_fake_runs_work_as_late_as_it_may(script: Callable[[str], str]) -> None:
    script(
        """
        import dlpoffload as dlpo
        driver = dlpo.open_driver("cuda:0")
        with dlpo.HostBuffer.allocate(4096) as host, dlpo.DeviceBuffer.allocate(4096) as device:
            stream, other, event = driver.stream_create(), driver.stream_create(), driver.event_create()
            host.memoryview()[:] = b"1" * 4096
            driver.copy_async(device.device_pointer, host.host_pointer, 4096, stream)
            host.memoryview()[:] = b"2" * 4096  # too early: nobody waited for the copy
            driver.event_record(event, stream)
            driver.stream_wait_event(other, event)
            driver.copy_async(host.host_pointer, device.device_pointer, 2048, other)
            assert fake.read(device.device_pointer, 1, 0) == b"\\xa5"  # another stream has not waited
            driver.stream_synchronize(other)
            assert fake.read(device.device_pointer, 4096, 0) == b"2" * 4096
            host.memoryview()[:] = b"3" * 4096
            driver.copy_async(device.device_pointer, host.host_pointer, 4096, stream)
            driver.event_record(event, stream)
            assert [driver.event_query(event) for _ in range(3)][-1]
            assert fake.read(device.device_pointer, 4096, 0) == b"3" * 4096
            driver.event_destroy(event)
            driver.stream_destroy(other)
            driver.stream_destroy(stream)
        assert fake.violations() == []
        """
    )


def test_the_fake_refuses_what_cuda_refuses(script: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    script(
        f"""
        import mmap
        import dlpoffload as dlpo
        from dlpoffload import _native
        driver = dlpo.open_driver("cuda:0")

        def refused(call, *arguments, **options):
            try:
                call(*arguments, **options)
            except dlpo.OffloadError as error:
                return str(error)
            raise AssertionError("it was not refused")

        memory = mmap.mmap(-1, 8192)
        pointer = _native.buffer_pointer(memory)
        driver.host_register(pointer, 8192)
        assert "ALREADY_REGISTERED" in refused(driver.host_register, pointer + 4096, 4096)
        assert "NOT_REGISTERED" in refused(driver.host_unregister, pointer + 4096)
        driver.host_unregister(pointer)
        assert "NOT_REGISTERED" in refused(driver.host_unregister, pointer)
        assert "INVALID_VALUE" in refused(driver.host_device_pointer, pointer)
        with open({str(path)!r}, "rb") as file:
            shared = mmap.mmap(file.fileno(), 8192, mmap.MAP_SHARED, mmap.PROT_READ)
        pointer = _native.buffer_pointer(shared)
        assert "INVALID_VALUE" in refused(driver.host_register, pointer, 8192)
        driver.host_register(pointer, 8192, read_only=True)
        assert "INVALID_VALUE" in refused(driver.copy, pointer, pointer + 4096, 64)
        driver.host_unregister(pointer)
        assert fake.violations() == []
        fake.fail("cuMemAlloc", 2, 700, sticky=True)
        driver.device_free(driver.device_alloc(64))
        assert "restart the process" in refused(driver.device_alloc, 64)
        assert "restart the process" in refused(driver.stream_create)
        assert fake.fired()
        """
    )


def test_a_producer_exports_with_its_device_current(script: Callable[[str], str]) -> None:
    # torch refuses to export what is on another device than the current one.
    script(
        """
        import ctypes
        import threading
        import dlpoffload as dlpo

        def current():
            context = ctypes.c_void_p()
            assert fake._library.cuCtxGetCurrent(ctypes.byref(context)) == 0
            return context.value

        class Producer:
            def __init__(self, view):
                self.view = view
                self.__dlpack_device__ = view.__dlpack_device__

            def __dlpack__(self, **arguments):
                found.append(current())
                return self.view.__dlpack__(**arguments)

        found = []

        def export():
            found.append(current())
            dlpo.view_of(Producer(view))
            found.append(current())

        with dlpo.DeviceBuffer.allocate(64) as device:
            view = device.device_view((64,), "uint8")
            thread = threading.Thread(target=export)
            thread.start()
            thread.join()
            del view
        assert [bool(context) for context in found] == [False, True, False], found
        """
    )


def test_registered_memory_that_is_unmapped_is_seen(script: Callable[[str], str]) -> None:
    script(
        """
        from dlpoffload import _native, open_driver
        pointer = _native.map_anonymous(8192, 4096, False)
        open_driver("cuda:0").host_register(pointer, 8192)
        assert fake.violations() == []
        _native.unmap(pointer, 8192)
        assert fake.violations() == ["1 registered ranges are not mapped"]
        """
    )


# ---------------------------------------------------------------------------------------------- the sweep
@pytest.mark.parametrize("group", range(GROUPS))
def test_every_call_of_every_operation_may_fail(run: Run, group: int) -> None:
    names = NAMES[group::GROUPS]
    done = run(str(HERE / "sweep.py"), "--json", "--library", _library(run), *names)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["operation"] for row in rows] == names, done.stderr
    assert all(row["faults"] >= row["positions"] > 0 for row in rows)
    found = [f"{row['operation']}: {words}" for row in rows for words in row["found"]]
    assert not found, "\n".join([f"{len(found)} found", *found[:40]])
    assert done.returncode == 0, done.stderr


def _library(run: Run) -> str:
    return run("-c", "import os; print(os.environ['FAKE_CUDA'])").stdout.strip()


@pytest.mark.parametrize(
    ("planted", "operation", "fault"),
    [
        ("dlpoffload.lifetime.undo = lambda *_: None", "HostBuffer.register, memory", '"cuDeviceGetAttribute", 1, 999'),
        ("dlpoffload.lifetime.keep = lambda *_: None", "HostBuffer.allocate", '"cuDeviceGetAttribute", 1, 700, True'),
        ("dlpoffload.lifetime._release = lambda token: None", "DeviceBuffer.close", '"cuMemFree", 1, 999'),
        (
            "dlpoffload.registrations._Registrations.stuck = lambda *_: ''",
            "HostBuffer.register, pages that are shared",
            '"cuMemHostRegister", 2, 700, True',
        ),
        ("dlpoffload.driver.refusals.HINTS.clear()", "DeviceBuffer.allocate", '"cuMemAlloc", 1, 700, True'),
        ("dlpoffload.driver.cuda.CudaDriver._pop = lambda _: None", "DeviceBuffer.allocate", '"cuMemAlloc", 1, 999'),
        ("dlpoffload.transfer.lease.Lease.abandon = lambda _: None", "Prefetcher, one step", '"cuEventRecord", 4, 999'),
        (
            "dlpoffload.transfer.ring.close_slots = held.append",
            "SlotRing",
            '"cuStreamCreate", 1, 999',
        ),
    ],
)
def test_the_sweep_finds_what_is_planted(
    script: Callable[[str], str], tmp_path: Path, planted: str, operation: str, fault: str
) -> None:
    found = script(
        f"""
        import json
        import dlpoffload.driver.cuda, dlpoffload.registrations, dlpoffload.transfer.ring
        from operations import OPERATIONS
        from sweep import Fault, attempt, in_child, write_checkpoint
        folder, fault, held = Path({str(tmp_path)!r}), Fault({fault}), []
        write_checkpoint(folder / "weights.safetensors")
        before = in_child(lambda: attempt(OPERATIONS[{operation!r}], fake, folder, fault))
        {planted}
        after = in_child(lambda: attempt(OPERATIONS[{operation!r}], fake, folder, fault))
        print(json.dumps([before, after]))
        """
    )
    before, after = json.loads(found)
    assert before == []
    assert after != []


def test_a_process_that_lost_its_context_ends_in_peace(script: Callable[[str], str]) -> None:
    said = script(
        """
        import dlpoffload as dlpo
        from dlpoffload.doctor import examine
        buffers = [dlpo.HostBuffer.allocate(8192, device="cuda:0") for _ in range(2)]
        dropped = dlpo.DeviceBuffer.allocate(8192, device="cuda:0")
        fake.fail("cuMemHostUnregister", 1, 700, sticky=True)
        try:
            buffers[0].close()
        except dlpo.CudaError as error:
            print(error)
        report = examine("cuda:0")
        assert not report["healthy"]
        print(*report["checks"]["pinned"]["says"], *report["checks"]["link"]["says"], sep="\\n")
        assert report["checks"]["pinned"]["facts"]["pinned_nbytes"] == 16384 == dlpo.pinned_nbytes()
        assert fake.violations() == []
        """
    )
    assert said.count("restart the process") == 2
    assert "16384 bytes" in said


# ------------------------------------------------------------------------------------------ the documents
def test_the_table_in_the_docs_is_what_is_swept(run: Run) -> None:
    done = run(str(HERE / "sweep.py"), "--count", "--library", _library(run))
    assert done.returncode == 0, done.stderr
    if not DOCS.exists():
        pytest.skip("the documents are not here")
    table = re.search(r"^\| operation \|.*?(?=\n\n|\Z)", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert table is not None
    assert table.group(0).strip() == done.stdout.strip(), "paste the output of tests/faults/sweep.py --count"
