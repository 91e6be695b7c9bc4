"""Where on the machine a device is, by what the kernel says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["numa_node_of"]

_PCI_DEVICES: Final = Path("/sys/bus/pci/devices")


def numa_node_of(pci_bus_id: bytes, devices: Path = _PCI_DEVICES) -> int | None:
    """The NUMA node of a PCI device, named as ``cuDeviceGetPCIBusId`` does; None where the kernel does not say."""
    name = pci_bus_id.partition(b"\0")[0].decode().lower()
    try:
        node = int((devices / name / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware does not say
