"""The doctor's checks one by one, on drivers and machines made up for them, and the command as a whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dlpoffload
from dlpoffload import cli, doctor
from dlpoffload.doctor import Check, Finding, Machine, examine
from dlpoffload.driver import Driver, open_driver
from dlpoffload.errors import CudaError, DriverNotFoundError, RegistrationError, SpecError
from dlpoffload.limits import CgroupLimit, HostLimits
from dlpoffload.probe import wrong_bytes

GIB = 1 << 30
KEYS = ["driver", "devices", "pages", "memory", "pinned", "frameworks", "link", "probe"]
LIMITS = HostLimits(
    mem_total_nbytes=64 * GIB,
    mem_available_nbytes=32 * GIB,
    cgroups=(),
    memlock_nbytes=65536,
    is_wsl=False,
    page_nbytes=4096,
    huge_page_nbytes=2 << 20,
    huge_pages_total=0,
    huge_pages_free=0,
    transparent_huge_pages="madvise",
)


class Altered:
    """A driver that answers as another one does, but for what it is told to do otherwise."""

    def __init__(self, driver: Driver, **otherwise: Any) -> None:
        self._driver = driver
        self.__dict__.update(otherwise)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


def altered(**otherwise: Any) -> Any:
    return Altered(open_driver("cpu"), **otherwise)


def machine(driver: Any = None, **otherwise: Any) -> Machine:
    return replace(Machine(driver or open_driver("cpu"), ["cpu"], LIMITS), **otherwise)


def with_capabilities(**otherwise: bool) -> Callable[[], Any]:
    return lambda: replace(open_driver("cpu").capabilities(), **otherwise)


# ----------------------------------------------------------------------------------------------- examine


def test_everything_works_on_every_device(device: str) -> None:
    report = examine(device)
    assert report["device"] == device
    assert report["healthy"] is True
    assert list(report["checks"]) == KEYS
    assert json.loads(json.dumps(report)) == report
    for check in report["checks"].values():
        assert set(check) == {"title", "status", "says", "facts", "remedy"}
        assert check["status"] in ("ok", "note", "missing")
        assert check["says"]
        assert check["remedy"] or check["status"] != "missing"
    link = report["checks"]["link"]["facts"]
    assert link["device"] == device
    assert link["to_device_bytes_per_s"] > 0
    assert link["to_host_bytes_per_s"] > 0
    probe = report["checks"]["probe"]["facts"]
    assert probe["host_writes_device_reads"] is True
    assert probe["device_writes_host_reads"] is True
    assert device in [row["device"] for row in report["checks"]["devices"]["facts"]["devices"]]


def test_an_error_of_ours_fails_its_check_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(machine: Machine) -> Finding:
        raise RegistrationError("the driver refuses")

    fine = Check("fine", "fine", lambda machine: Finding("ok", ("works",)))
    monkeypatch.setattr(doctor, "CHECKS", (Check("bad", "bad", refuse), fine))
    report = examine("cpu")
    assert report["healthy"] is False
    assert report["checks"]["bad"]["status"] == "failed"
    assert report["checks"]["bad"]["says"] == ["RegistrationError: the driver refuses"]
    assert report["checks"]["fine"]["status"] == "ok"


def test_a_bug_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(machine: Machine) -> Finding:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "CHECKS", (Check("bad", "bad", break_down),))
    with pytest.raises(ZeroDivisionError):
        examine("cpu")


@pytest.mark.parametrize(("device", "error"), [("cuba", SpecError), ("cuda:4096", DriverNotFoundError)])
def test_a_device_that_does_not_exist_is_an_error(device: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=device.partition(":")[0]):
        examine(device)


# ------------------------------------------------------------------------------------------ check by check


def no_driver(name: str) -> DriverNotFoundError:
    return DriverNotFoundError("cuInit", 100, name, "libcuda.so.1 was not found")


@pytest.mark.parametrize(
    ("name", "bindings", "remedy"),
    [
        ("CUDA_ERROR_NOT_INITIALIZED", "13.5.0", "install the NVIDIA driver"),
        ("CUDA_ERROR_NO_DEVICE", "13.5.0", "CUDA_VISIBLE_DEVICES"),
        ("CUDA_ERROR_NOT_INITIALIZED", None, "pip install cuda-bindings"),
    ],
)
def test_a_missing_driver_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, bindings: str | None, remedy: str
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda distribution: bindings)
    finding = doctor.check_driver(machine(cuda_problem=no_driver(name)))
    assert finding.status == "missing"
    assert "the CPU driver serves" in " ".join(finding.says)
    assert remedy in finding.remedy
    assert finding.facts["cuda_found"] is False
    assert "libcuda.so.1 was not found" in finding.facts["problem"]


def test_a_driver_that_does_not_work_is_a_failure() -> None:
    problem = CudaError("cuInit", 803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
    finding = doctor.check_driver(machine(cuda_problem=problem))
    assert finding.status == "failed"
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in finding.says[-1]


def test_a_broken_driver_is_found_by_the_whole_and_the_cpu_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlpoffload.driver import cuda

    def broken() -> int:
        raise CudaError("cuInit", 803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")

    monkeypatch.setattr(cuda, "device_count", broken)
    report = examine()
    assert report["device"] == "cpu"
    assert report["healthy"] is False
    assert report["checks"]["driver"]["status"] == "failed"
    assert report["checks"]["probe"]["status"] == "ok"


def test_a_driver_that_is_there_is_named() -> None:
    finding = doctor.check_driver(machine(device_names=["cuda:0", "cuda:1", "cpu"], cuda_version=(13, 0)))
    assert finding.status == "ok"
    assert "CUDA 13.0" in finding.says[0]
    assert (finding.facts["cuda_device_count"], finding.facts["cuda_version"]) == (2, "13.0")


def test_the_kernel_modules_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    assert doctor._kernel_module_version(file) == "580.65.06"
    assert doctor._kernel_module_version(tmp_path / "nothing") is None


def test_devices_are_listed_with_every_capability_by_name() -> None:
    finding = doctor.check_devices(machine(altered(device_memory_info=lambda: (GIB, 2 * GIB))))
    (row,) = finding.facts["devices"]
    assert (row["device"], row["free_nbytes"], row["total_nbytes"]) == ("cpu", GIB, 2 * GIB)
    assert finding.status == "ok"
    for capability in row["capabilities"]:
        assert capability in "".join(finding.says)
    assert "1.00 GiB of 2.00 GiB free" in finding.says[0]


@pytest.mark.parametrize("capability", ["integrated", "host_page_tables"])
def test_memory_shared_with_the_host_is_said(capability: str) -> None:
    driver = altered(platform="cuda", device="cuda:0", capabilities=with_capabilities(**{capability: True}))
    finding = doctor.check_devices(machine(driver, device_names=["cuda:0", "cpu"]))
    assert finding.status == "note"
    assert "share memory" in " ".join(finding.says)


def test_a_device_that_cannot_be_opened_fails_beside_those_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Driver:
        raise CudaError("cuDevicePrimaryCtxRetain", 46, "CUDA_ERROR_DEVICE_UNAVAILABLE")

    monkeypatch.setattr(doctor, "open_driver", refuse)
    finding = doctor.check_devices(machine(device_names=["cuda:7", "cpu"]))
    assert finding.status == "failed"
    broken, cpu = finding.facts["devices"]
    assert broken["device"] == "cuda:7"
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in broken["problem"]
    assert cpu["capabilities"]["map_host_memory"] is True


@pytest.mark.parametrize(
    ("setting", "status", "remedy"),
    [("always", "ok", ""), ("madvise", "ok", ""), ("never", "note", "echo madvise"), (None, "note", "")],
)
def test_huge_pages_that_are_off_are_noted(setting: str | None, status: str, remedy: str) -> None:
    finding = doctor.check_pages(machine(limits=replace(LIMITS, transparent_huge_pages=setting)))
    assert finding.status == status
    assert finding.remedy.startswith(remedy)
    assert bool(finding.remedy) == bool(remedy)
    assert finding.facts["page_nbytes"] == 4096
    assert finding.facts["huge_page_nbytes"] == 2 << 20


def test_memory_names_the_limit_that_binds() -> None:
    group = CgroupLimit("/box", "memory.max", 8 * GIB, 7 * GIB, GIB)
    finding = doctor.check_memory(machine(limits=replace(LIMITS, cgroups=(group,))))
    assert finding.status == "ok"
    assert finding.says[0] == '2.00 GiB can be allocated now, bound by memory.max of cgroup "/box"'
    assert finding.facts["available_nbytes"] == 2 * GIB
    assert finding.facts["total_nbytes"] == 8 * GIB
    assert finding.facts["cgroup"]["limit_nbytes"] == 8 * GIB
    assert finding.facts["memlock_nbytes"] == 65536


def test_wsl_is_noted_with_its_remedy() -> None:
    finding = doctor.check_memory(machine(limits=replace(LIMITS, is_wsl=True)))
    assert finding.status == "note"
    assert ".wslconfig" in finding.remedy


def test_memory_that_nobody_tells_is_not_made_up() -> None:
    silent = replace(LIMITS, mem_total_nbytes=None, mem_available_nbytes=None)
    finding = doctor.check_memory(machine(limits=silent))
    assert finding.status == "note"
    assert finding.facts["available_nbytes"] is None


def test_pinned_counts_what_is_pinned_now() -> None:
    before = doctor.check_pinned(machine()).facts["pinned_nbytes"]
    with dlpoffload.HostBuffer.allocate(1 << 20, device="cpu"):
        assert doctor.check_pinned(machine()).facts["pinned_nbytes"] == before + (1 << 20)
    assert doctor.check_pinned(machine()).facts["pinned_nbytes"] == before


def test_frameworks_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"cupy-cuda12x": "14.2", "jax": "0.10.2"}.get)
    finding = doctor.check_frameworks(machine())
    assert finding.status == "ok"
    assert finding.says[0] == "jax 0.10.2, cupy 14.2"
    assert finding.facts["versions"]["torch"] is None
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    finding = doctor.check_frameworks(machine())
    assert finding.status == "missing"
    assert "dlpoffload[torch]" in finding.remedy


def test_the_link_is_measured_with_no_more_than_there_is_room_for() -> None:
    cramped = machine(altered(device_memory_info=lambda: (16 << 20, 64 << 20)))
    assert doctor.check_link(cramped).facts["nbytes"] == 4 << 20
    cramped = machine(limits=replace(LIMITS, mem_available_nbytes=32 << 20))
    assert doctor.check_link(cramped).facts["nbytes"] == 8 << 20


# ------------------------------------------------------------------------------------------------- probe


def test_the_probe_finds_nothing_wrong_where_nothing_is(device: str) -> None:
    wrong = wrong_bytes(open_driver(device), 4096)
    assert wrong == {"host_writes_device_reads": 0, "device_writes_host_reads": 0}


@pytest.mark.parametrize(
    ("lost", "direction"),
    [
        (0, "host_writes_device_reads"),
        (1, "host_writes_device_reads"),
        (2, "device_writes_host_reads"),
        (3, "device_writes_host_reads"),
    ],
)
def test_each_copy_that_is_lost_fails_its_direction(lost: int, direction: str) -> None:
    copies = []

    def copy_async(destination: int, source: int, nbytes: int, stream: int) -> None:
        copies.append(nbytes)
        if len(copies) - 1 != lost:
            open_driver("cpu").copy_async(destination, source, nbytes, stream)

    wrong = wrong_bytes(altered(copy_async=copy_async), 4096)
    assert len(copies) == 4
    assert {key for key, count in wrong.items() if count} == {direction}


def test_one_wrong_byte_is_enough_and_is_counted() -> None:
    def copy_async(destination: int, source: int, nbytes: int, stream: int) -> None:
        open_driver("cpu").copy_async(destination, source, nbytes - 1, stream)

    finding = doctor.check_probe(machine(altered(copy_async=copy_async)))
    assert finding.status == "failed"
    assert finding.facts["host_writes_device_reads"] is False
    assert "1 of 1048576 bytes are wrong" in finding.says[0]
    assert finding.remedy


def test_a_device_that_cannot_map_is_told_apart_from_one_that_fails() -> None:
    finding = doctor.check_probe(machine(altered(capabilities=with_capabilities(map_host_memory=False))))
    assert finding.status == "missing"
    assert "cannot map host memory" in finding.says[0]


# ----------------------------------------------------------------------------------------------- command


def test_the_table_says_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for check in doctor.CHECKS:
        assert check.title in out
    assert "GB/s" in out
    assert "What is here works." in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_is_one_object_with_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["dlpoffload", "python", "system", "device", "healthy", "checks"]
    assert list(report["checks"]) == KEYS
    assert isinstance(report["checks"]["memory"]["facts"]["available_nbytes"], int)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_failed_probe_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(
        doctor,
        "wrong_bytes",
        lambda driver, nbytes: {"host_writes_device_reads": 7, "device_writes_host_reads": 0},
    )
    assert cli.main(["doctor", "--device", "cpu", *arguments]) == 1
    assert "7 of 1048576 bytes are wrong" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("device", ["cuba", "cuda:4096", ""])
def test_no_such_device_is_exit_code_2_and_one_line(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", device]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dlpoffload doctor: ")
    assert "Traceback" not in err


def test_a_device_that_is_there_and_cannot_be_opened_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: object) -> Driver:
        raise CudaError("cuDevicePrimaryCtxRetain", 46, "CUDA_ERROR_DEVICE_UNAVAILABLE")

    monkeypatch.setattr(doctor, "open_driver", refuse)
    assert cli.main(["doctor"]) == 1
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in capsys.readouterr().err


def test_the_command_imports_no_framework() -> None:
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom dlpoffload.cli import main\n"
        "assert main(['doctor', '--json', '--device', 'cpu']) == 0\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(str(loaded & {'torch', 'jax', 'jaxlib', 'numpy', 'cupy', 'rich', 'safetensors'} or ''))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr.strip() == ""
    assert json.loads(run.stdout)["healthy"] is True


def command(*arguments: str, stdout: int, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "import sys\nfrom dlpoffload.cli import main\nsys.exit(main())", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(dlpoffload.__file__).parents[1]), **environ},
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["doctor"], ["doctor", "--json"], ["open", "--json"], ["open"], ["align"]], ids=str
)
def test_output_that_nobody_reads_ends_it_quietly_as_sigpipe_does(
    arguments: list[str], unbuffered: str, tmp_path: Path
) -> None:
    name, *options = arguments
    if name == "doctor":
        options += ["--device", "cpu"]
    else:
        path = tmp_path / "x.safetensors"
        header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
        options += [str(path), *([str(tmp_path / "y.safetensors")] if name == "align" else ["--device", "cpu"])]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = command(name, *options, stdout=writer, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_stream_of_ascii_gets_the_table_all_the_same() -> None:
    run = command("doctor", "--device", "cpu", stdout=subprocess.PIPE, PYTHONIOENCODING="ascii", COLUMNS="100")
    assert (run.returncode, run.stderr) == (0, b"")
    out = run.stdout.decode("ascii")
    assert "What is here works." in out
    assert any(re.match(r"\W*\+\W+live probe ", line) for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 100


def test_version_and_a_missing_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"dlpoffload {dlpoffload.__version__}"
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
