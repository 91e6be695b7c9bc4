"""What is on this machine, what works, and what to do about the rest: a table of small checks.

`examine` runs the table on one device and gives plain values back; printing is `cli`'s.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from . import __version__
from .driver import open_driver
from .errors import CudaError, DriverNotFoundError, OffloadError
from .findings import Finding, Machine, readable
from .host_checks import check_memory, check_pages, check_pinned
from .limits import host_limits
from .probe import wrong_bytes
from .transfer import measure_link

__all__ = ["CHECKS", "Check", "Finding", "Machine", "examine"]

LINK_NBYTES: Final = {"cuda": 256 << 20, "cpu": 32 << 20}
LINK_REPEATS: Final = 9
PROBE_NBYTES: Final = 1 << 20
FRAMEWORKS: Final = {
    "torch": ("torch",),
    "jax": ("jax",),
    "numpy": ("numpy",),
    "cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x"),
    "safetensors": ("safetensors",),
}
PROBES: Final = {
    "host_writes_device_reads": "the host writes after the view was made, the device reads",
    "device_writes_host_reads": "the device writes through the view, the host reads",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table: a stable key, a title, and what to run."""

    key: str
    title: str
    run: Callable[[Machine], Finding]


def examine(device: str | int | None = None) -> dict[str, Any]:
    """Run every check on one device.

    Parameters
    ----------
    device : str or int, optional
        As `open_driver` takes it.

    Returns
    -------
    dict
        Strings, ints, bools, None, lists and dicts only. ``healthy`` is False when a check failed; what is
        merely missing is no failure.

    Raises
    ------
    SpecError, DriverNotFoundError
        There is no such device.
    CudaError
        There is, and it cannot be opened.
    """
    machine = _machine(device)
    findings = {check.key: (check, _run(check, machine)) for check in CHECKS}
    return {
        "dlpoffload": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": machine.driver.device,
        "healthy": all(finding.status != "failed" for _, finding in findings.values()),
        "checks": {
            key: {"title": check.title, **asdict(finding), "says": list(finding.says)}
            for key, (check, finding) in findings.items()
        },
    }


def _machine(device: str | int | None) -> Machine:
    from .driver import cuda

    count, version, problem = 0, None, None
    try:
        count = cuda.device_count()
        version = cuda.driver_version()
    except CudaError as error:
        problem = error
    if device is None:
        device = "cuda:0" if count else "cpu"
    names = [*(f"cuda:{ordinal}" for ordinal in range(count)), "cpu"]
    return Machine(open_driver(device), names, host_limits(), problem, version)


def _run(check: Check, machine: Machine) -> Finding:
    try:
        return check.run(machine)
    except OffloadError as error:
        return Finding("failed", (f"{type(error).__name__}: {error}",))


# ------------------------------------------------------------------------------------------------- checks


def check_driver(machine: Machine) -> Finding:
    """The CUDA driver: whether there is one, and which."""
    bindings, problem = _version("cuda-bindings"), machine.cuda_problem
    count = sum(name != "cpu" for name in machine.device_names)
    module = _kernel_module_version()
    version = ".".join(map(str, machine.cuda_version)) if machine.cuda_version else None
    facts = {
        "cuda_found": count > 0,
        "cuda_device_count": count,
        "cuda_version": version,
        "kernel_module_version": module,
        "cuda_bindings_version": bindings,
        "problem": None if problem is None else str(problem),
    }
    if problem is not None and not isinstance(problem, DriverNotFoundError):
        return Finding("failed", ("there is a CUDA driver, but it does not work", str(problem)), facts)
    if count:
        says = f"CUDA {version}, kernel module {module or 'not known'}, cuda-bindings {bindings}"
        return Finding("ok", (says,), facts)
    if bindings is None:
        why, remedy = "cuda-bindings is not installed", "python -m pip install cuda-bindings"
    else:
        why = f"{problem.call}: {problem.name}" if problem else "no device"
        remedy = "for a GPU: install the NVIDIA driver; in a container, run it with --gpus all"
        if problem is None or problem.name == "CUDA_ERROR_NO_DEVICE":
            remedy = "for a GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    says = f"no CUDA driver or device found ({why})"
    return Finding("missing", (says, "the CPU driver serves: same calls, same checks"), facts, remedy)


def check_devices(machine: Machine) -> Finding:
    """Every device: name, memory, and what it can do, by name."""
    says: list[str] = []
    rows: list[dict[str, Any]] = []
    status = "ok"
    for name in machine.device_names:
        try:
            driver = machine.driver if name == machine.driver.device else open_driver(name)
            free, total = driver.device_memory_info()
        except OffloadError as error:
            status = "failed"
            rows.append({"device": name, "problem": str(error)})
            says.append(f"{name}: {error}")
            continue
        can = asdict(driver.capabilities())
        rows.append(
            {
                "device": name,
                "description": driver.description,
                "free_nbytes": free,
                "total_nbytes": total,
                "capabilities": can,
            }
        )
        says.append(f"{name}: {driver.description}, {readable(free)} of {readable(total)} free")
        for words, wanted in (("can", True), ("cannot", False)):
            names = [capability for capability, answer in can.items() if answer is wanted]
            says.append(f"  {words}: {', '.join(names) or 'nothing'}")
        if driver.platform == "cuda" and driver.capabilities().memory != "separate":
            status = "note" if status == "ok" else status
            says.append(f"  {name} and the host share memory: copying weights over would be a loss here")
    return Finding(status, tuple(says), {"devices": rows})


def check_frameworks(machine: Machine) -> Finding:
    """Versions of the frameworks, from their metadata: none is imported."""
    versions = {name: _first_version(distributions) for name, distributions in FRAMEWORKS.items()}
    there = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [name for name, version in versions.items() if not version]
    says = [", ".join(there) or "none"]
    if absent:
        says.append(f"not installed: {', '.join(absent)}")
    adapters = [name for name in ("torch", "jax") if versions[name] is None]
    if len(adapters) < 2:
        return Finding("ok", tuple(says), {"versions": versions})
    return Finding(
        "missing", tuple(says), {"versions": versions}, 'python -m pip install "dlpoffload[torch]", or [jax]'
    )


def check_link(machine: Machine) -> Finding:
    """The rate of copies between pinned host memory and device memory, both ways."""
    driver = machine.driver
    free, _ = driver.device_memory_info()
    room = min(free, machine.limits.available_nbytes or free) // 4
    nbytes = min(LINK_NBYTES[driver.platform], max(room, 1 << 20))
    link = measure_link(driver, nbytes=nbytes, repeat=LINK_REPEATS)
    facts = {
        "device": driver.device,
        "nbytes": nbytes,
        "repeats": LINK_REPEATS,
        "to_device_bytes_per_s": round(link.host_to_device * 1e9),
        "to_host_bytes_per_s": round(link.device_to_host * 1e9),
    }
    says = [
        f"to {driver.device} {link.host_to_device:.1f} GB/s, back {link.device_to_host:.1f} GB/s "
        f"(pinned, {readable(nbytes)}, median of {LINK_REPEATS})"
    ]
    if driver.platform == "cpu":
        says.append("no link here: this is the copy rate of host memory, both sides of the CPU driver")
    return Finding("ok", tuple(says), facts)


def check_probe(machine: Machine) -> Finding:
    """A device view is made; the host writes and the device reads; the device writes and the host reads."""
    driver = machine.driver
    facts: dict[str, Any] = {"device": driver.device, "nbytes": PROBE_NBYTES}
    if not driver.capabilities().map_host_memory:
        why = f"{driver.device} cannot map host memory: no device views, weights are staged by copies"
        return Finding("missing", (why,), facts)
    wrong = wrong_bytes(driver, PROBE_NBYTES)
    says = tuple(
        f"{PROBES[key]}: {f'{count} of {PROBE_NBYTES} bytes are wrong' if count else 'equal'}"
        for key, count in wrong.items()
    )
    facts |= {key: count == 0 for key, count in wrong.items()}
    if not any(wrong.values()):
        return Finding("ok", says, facts)
    return Finding("failed", says, facts, "do not offload on this device, and report what you see here")


CHECKS: Final = (
    Check("driver", "driver", check_driver),
    Check("devices", "devices", check_devices),
    Check("pages", "pages", check_pages),
    Check("memory", "host memory", check_memory),
    Check("pinned", "pinned now", check_pinned),
    Check("frameworks", "frameworks", check_frameworks),
    Check("link", "link", check_link),
    Check("probe", "live probe", check_probe),
)


# ------------------------------------------------------------------------------------------------- pieces


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_version(distributions: Sequence[str]) -> str | None:
    return next(filter(None, map(_version, distributions)), None)


def _kernel_module_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """For example ``"580.65.06"``."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", path.read_text())
    except OSError:
        return None
    return match.group(1) if match else None
