"""What a public operation is that makes driver calls: how it is prepared, made, checked and undone.

An operation is a function that prepares on an `ExitStack` and returns what is to be failed, as `act`. What `act`
returns is given to `undo`. All of it runs on ``cuda:0`` over the fake library.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fake import FakeCuda
from operations import operation

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.driver import open_driver

__all__ = [
    "DEVICE",
    "NBYTES",
    "SPECS",
    "UNITS",
    "Act",
    "Bench",
    "close",
    "dropping",
    "freed",
    "nothing",
    "operation",
    "write_checkpoint",
]

DEVICE: Final = "cuda:0"
NBYTES: Final = 0x15000

SPECS: Final = {f"u{u}.{n}": dlpo.TensorSpec((4096,), "uint8") for u in range(3) for n in "ab"}
UNITS: Final = {f"u{u}": (f"u{u}.a", f"u{u}.b") for u in range(3)}


def nothing(result: object) -> None:
    """There is nothing to undo."""


def close(result: Any) -> None:
    result.close()


def freed(result: object) -> None:
    """Dropping it frees it."""


@dataclass
class Bench:
    """What an operation has to work with."""

    stack: ExitStack
    folder: Path
    fake: FakeCuda

    def bytes_of(self, name: str) -> bytes:
        """What tensor `name` of the checkpoint holds."""
        return bytes([1 + sorted(SPECS).index(name)]) * SPECS[name].nbytes

    @property
    def checkpoint(self) -> Path:
        return self.folder / "weights.safetensors"

    def store(self) -> dlpo.HostStore:
        return self.stack.enter_context(dlpo.HostStore.copy_of(self.checkpoint, units=UNITS, device=DEVICE))

    def mapped(self) -> dlpo.HostStore:
        return self.stack.enter_context(dlpo.HostStore.map_file(self.checkpoint, units=UNITS, device=DEVICE))

    def ring(self, store: dlpo.HostStore, slots: int = 2) -> dlpo.SlotRing:
        ring = dlpo.SlotRing({unit: store.slab(unit) for unit in UNITS}, slots=slots, device=DEVICE)
        return self.stack.enter_context(ring)

    def stream(self) -> int:
        driver = open_driver(DEVICE)
        stream = driver.stream_create()
        self.stack.callback(driver.stream_destroy, stream)
        return stream

    def device_buffer(self, nbytes: int = NBYTES) -> dlpo.DeviceBuffer:
        return self.stack.enter_context(dlpo.DeviceBuffer.allocate(nbytes, device=DEVICE))

    def host_buffer(self, nbytes: int = NBYTES) -> dlpo.HostBuffer:
        return self.stack.enter_context(dlpo.HostBuffer.allocate(nbytes, device=DEVICE))

    def check_slot(self, views: dict[str, dlpo.View], stream: int) -> None:
        """Compare a unit's tensors in a slot, as work on `stream` would read them, with the checkpoint's."""
        for name, view in views.items():
            if self.fake.read(view.pointer, view.nbytes, stream) != self.bytes_of(name):
                raise AssertionError(f'"{name}" has wrong bytes in its slot')


Act = Callable[[], Any]


def write_checkpoint(path: Path) -> None:
    """A safetensors file of `SPECS`, each tensor full of one byte, its data on a page's border."""
    header: dict[str, Any] = {}
    at = 0
    for name, spec in SPECS.items():
        header[name] = {"dtype": "U8", "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (4096 - 8 - len(text))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, name in enumerate(sorted(SPECS)):
            file.write(bytes([1 + index]) * SPECS[name].nbytes)


def dropping(held: list[Any]) -> tuple[Act, Any]:
    """Drop what is held and let our own calls free it; who fails then has no caller, but a hook."""

    def act() -> None:
        held.clear()
        gc.collect()
        lifetime.drain()

    return act, nothing
