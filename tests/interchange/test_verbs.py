"""Five verbs, one meaning each: who shares bytes with whom, proved by writing to both sides.

Whatever is public and handles memory is in the table `ALIASING`, which says what docs/design.md says; a new name fails
until it is in both.
"""

from __future__ import annotations

import inspect
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import TensorSpec
from dlpoffload.producers import view_of
from dlpoffload.view import Label, View

DESIGN = Path(__file__).parents[2] / "docs" / "design.md"
NBYTES = 64
ALWAYS, NEVER, NO_BYTES, BY_MODE = "always", "never", "–", "by its mode"

ALIASING = {
    # whether the result shares bytes with the argument or, where it is given none, with what it is called on
    "HostBuffer.allocate": NO_BYTES,
    "HostBuffer.register": ALWAYS,
    "HostBuffer.copy_of": NEVER,
    "HostBuffer.copy_into": NEVER,
    "HostBuffer.host_view": ALWAYS,
    "HostBuffer.device_view": ALWAYS,
    "HostBuffer.memoryview": ALWAYS,
    "HostBuffer.carve": ALWAYS,
    "HostBuffer.pieces": NO_BYTES,
    "HostBuffer.close": NO_BYTES,
    "DeviceBuffer.allocate": NO_BYTES,
    "DeviceBuffer.register": ALWAYS,
    "DeviceBuffer.device_view": ALWAYS,
    "DeviceBuffer.close": NO_BYTES,
    "HostStore.allocate": NO_BYTES,
    "HostStore.copy_of": NEVER,
    "HostStore.copy_into": NEVER,
    "HostStore.copy_out": NEVER,
    "HostStore.is_read_only": NO_BYTES,
    "HostStore.map_file": ALWAYS,
    "HostStore.open": BY_MODE,
    "HostStore.update": NEVER,
    "HostStore.host_view": ALWAYS,
    "HostStore.device_view": ALWAYS,
    "HostStore.slab": ALWAYS,
    "HostStore.slot_nbytes": NO_BYTES,
    "HostStore.take_over": ALWAYS,
    "HostStore.memoryviews": ALWAYS,
    "HostStore.adopt": ALWAYS,
    "HostStore.close": NO_BYTES,
    "View.view": ALWAYS,
    "View.memoryview": ALWAYS,
    "View.unguarded": ALWAYS,
    "view_of": ALWAYS,
    "plan": NO_BYTES,
    "share": NEVER,
    "open_shared": NO_BYTES,
}

MAKERS = [dlpo.HostBuffer, dlpo.DeviceBuffer, dlpo.HostStore, View]
NO_MEMORY = {  # public functions that see no tensor's bytes
    "__version__", "align", "default_device", "dtype", "format_nbytes", "lay_out", "live_buffers", "live_memory",
    "open_driver", "owned_by", "parse_nbytes", "pinned_nbytes", "trace_allocations",
}  # fmt: skip

Pair = tuple[memoryview, memoryview]


def raw(what: Any) -> memoryview:
    """The bytes behind a view; on the CPU driver the host may look into "device memory"."""
    view = view_of(what)
    if view.host_pointer is None:
        pointer = view.device_pointer
        view = View(view._reference, view.spec, label=Label.CPU, driver=None, host_pointer=pointer, device_pointer=None)
    return view.memoryview()


class Maker:
    """Makes, for each name in the table, the bytes of its argument and of its result."""

    def __init__(self, folder: Path) -> None:
        self.open: list[Any] = []
        self.path = folder / "model.safetensors"

    def keep(self, what: Any) -> Any:
        self.open.append(what)
        return what

    def host(self) -> dlpo.HostBuffer:
        return self.keep(dlpo.HostBuffer.allocate(NBYTES, device="cpu"))

    def store(self) -> dlpo.HostStore:
        specs = {"w": TensorSpec((NBYTES,), "uint8")}
        return self.keep(dlpo.HostStore.allocate(specs, units={"unit": ("w",)}, device="cpu"))

    def make(self, name: str) -> Pair:
        return getattr(self, name.replace(".", "_").lower())()

    def hostbuffer_register(self, kind: Any = dlpo.HostBuffer) -> Pair:
        memory = bytearray(NBYTES)
        buffer = self.keep(kind.register(memory, device="cpu"))
        return memoryview(memory), raw(buffer.device_view((NBYTES,), "uint8"))

    def hostbuffer_copy_of(self) -> Pair:
        memory = bytearray(NBYTES)
        return memoryview(memory), self.keep(dlpo.HostBuffer.copy_of(memory, device="cpu")).memoryview()

    def hostbuffer_copy_into(self) -> Pair:
        memory, buffer = bytearray(NBYTES), self.host()
        buffer.copy_into(memory)
        return memoryview(memory), buffer.memoryview()

    def hostbuffer_host_view(self) -> Pair:
        buffer = self.host()
        return buffer.memoryview(), raw(buffer.host_view((4, 4), "float32"))

    def hostbuffer_device_view(self) -> Pair:
        buffer = self.host()
        return buffer.memoryview(), raw(buffer.device_view((4, 4), "float32"))

    def hostbuffer_memoryview(self) -> Pair:
        buffer = self.host()
        return raw(buffer.host_view((NBYTES,), "uint8")), buffer.memoryview()

    def hostbuffer_carve(self) -> Pair:
        buffer = self.host()
        return buffer.memoryview(), raw(buffer.carve({"a": TensorSpec((NBYTES,), "uint8")})["a"])

    def devicebuffer_register(self) -> Pair:
        return self.hostbuffer_register(dlpo.DeviceBuffer)

    def devicebuffer_device_view(self) -> Pair:
        buffer = self.keep(dlpo.DeviceBuffer.allocate(NBYTES, device="cpu"))
        return raw(buffer.device_view((NBYTES,), "uint8")), raw(buffer.device_view((NBYTES,), "uint8"))

    def hoststore_copy_of(self) -> Pair:
        memory = bytearray(NBYTES)
        store = self.keep(dlpo.HostStore.copy_of({"w": memory}, device="cpu"))
        return memoryview(memory), raw(store.host_view("w"))

    def hoststore_copy_into(self) -> Pair:
        memory, store = bytearray(NBYTES), self.store()
        store.copy_into("w", memory)
        return memoryview(memory), raw(store.host_view("w"))

    def mapped(self) -> tuple[memoryview, dlpo.HostStore]:
        """The bytes of a tensor in its file, written to through a mapping of another; and the file as a store."""
        header = json.dumps({"w": {"dtype": "U8", "shape": [NBYTES], "data_offsets": [0, NBYTES]}}).encode()
        start = 8 + len(header)
        self.path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(NBYTES))
        with self.path.open("r+b") as file:
            writable = mmap.mmap(file.fileno(), 0)
        return memoryview(writable)[start:], self.keep(dlpo.HostStore.map_file(self.path, device="cpu"))

    def hoststore_map_file(self) -> Pair:
        memory, store = self.mapped()
        return memory, raw(store.host_view("w"))

    def hoststore_copy_out(self) -> Pair:
        memory, store = self.mapped()
        assert store.copy_out("w")
        return memory, raw(store.host_view("w"))

    def hoststore_update(self) -> Pair:
        memory, (_, store) = bytearray(NBYTES), self.mapped()
        assert store.update("w", memory)
        return memoryview(memory), raw(store.host_view("w"))

    def hoststore_host_view(self) -> Pair:
        store = self.store()
        return raw(store.host_view("w")), raw(store.host_view("w"))

    def hoststore_device_view(self) -> Pair:
        store = self.store()
        return raw(store.host_view("w")), raw(store.device_view("w"))

    def hoststore_slab(self) -> Pair:
        store = self.store()
        return raw(store.host_view("w")), raw(store.slab("unit").host_view("w"))

    def hoststore_take_over(self) -> Pair:
        store, former = self.store(), self.store()
        self.open.remove(former)  # whose buffers are the other's now
        memory = raw(former.host_view("w"))
        store.take_over(former, {"w"})
        return memory, raw(store.host_view("w"))

    def hoststore_memoryviews(self) -> Pair:
        store = self.store()
        (view, starts) = next(store.memoryviews())
        assert starts == {"w": 0}
        return raw(store.host_view("w")), view

    def hoststore_adopt(self) -> Pair:
        buffer, store = self.host(), self.store()
        store.adopt("unit", buffer)
        return buffer.memoryview(), raw(store.host_view("w"))

    def view_view(self) -> Pair:
        view = self.host().host_view((NBYTES,), "uint8")
        return raw(view), raw(view.view((4, 4), "float32"))

    def view_unguarded(self) -> Pair:
        buffer = self.host()
        return buffer.memoryview(), raw(buffer.host_view((NBYTES,), "uint8").unguarded())

    def view_memoryview(self) -> Pair:
        buffer = self.host()
        return raw(buffer.host_view((NBYTES,), "uint8")), buffer.host_view((NBYTES,), "uint8").memoryview()

    def view_of(self) -> Pair:
        memory = bytearray(NBYTES)
        return memoryview(memory), view_of(memory).memoryview()

    def share(self) -> Pair:
        memory = bytearray(NBYTES)
        checkpoint = self.keep(dlpo.share({"w": memory}, f"verbs of {os.getpid()}"))
        return memoryview(memory), raw(self.keep(dlpo.HostStore.map_file(checkpoint.path, device="cpu")).host_view("w"))


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path)
    yield maker
    for resource in reversed(maker.open):
        resource.close()


def shared(argument: memoryview, result: memoryview) -> set[bool]:
    """Whether a write to one side is seen on the other, in both directions, at both ends and in the middle."""
    found = set()
    for writer, reader in ((argument, result), (result, argument)):
        if writer.readonly:
            continue
        for at in (0, NBYTES // 2 + 1, NBYTES - 1):
            before = reader[at]
            writer[at] = writer[at] ^ 0xFF
            found.add(reader[at] != before)
    return found


@pytest.mark.parametrize("name", [name for name, aliases in ALIASING.items() if aliases in (ALWAYS, NEVER)])
def test_a_write_tells_whether_they_alias(name: str, maker: Maker) -> None:
    argument, result = maker.make(name)
    assert len(argument) == len(result) == NBYTES
    assert shared(argument, result) == {ALIASING[name] == ALWAYS}


class Legacy:
    """Exports a capsule that cannot say whether it is a copy."""

    def __init__(self, view: View, copy: bool | None) -> None:
        self.view, self.copy = view, copy

    def __dlpack__(self, **asked: Any) -> Any:
        return self.view.__dlpack__(max_version=(0, 8), copy=self.copy)


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("label", [label.value for label in Label])
def test_copy_in_dlpack_is_the_one_place_where_the_argument_says(maker: Maker, label: str, copy: bool | None) -> None:
    buffer = maker.host()
    shape = (NBYTES,)
    view = buffer.device_view(shape, "uint8") if label == "device" else buffer.host_view(shape, "uint8", label=label)
    assert shared(raw(view), raw(Legacy(view, copy))) == {copy is not True}


def test_a_staged_unit_is_a_copy_in_a_slot_and_the_leases_views_share_the_slot() -> None:
    specs = {"w": TensorSpec((NBYTES,), "uint8")}
    with (
        dlpo.HostStore.allocate(specs, units={"unit": ("w",)}, device="cpu") as store,
        dlpo.SlotRing({"unit": store.slab("unit")}, device="cpu") as ring,
    ):
        with ring.prefetch("unit") as views:
            staged = views["w"]
            assert shared(raw(store.host_view("w")), raw(staged)) == {False}
        with ring.prefetch("unit") as again:
            assert shared(raw(staged), raw(again["w"])) == {True}
        del views, again, staged


# ------------------------------------------------------------------------------------------- the tables agree


def test_every_public_method_that_handles_memory_is_in_the_table() -> None:
    methods = {
        f"{kind.__name__}.{name}"
        for kind in MAKERS
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") and callable(member)
    }
    assert methods == {name for name in ALIASING if "." in name}


def test_every_public_function_is_in_the_table_or_sees_no_bytes() -> None:
    functions = {name for name in dlpo.__all__ if not inspect.isclass(getattr(dlpo, name))}
    assert functions == NO_MEMORY | {name for name in ALIASING if "." not in name}


def documented() -> dict[str, str]:
    """What docs/design.md says of each verb in the column "result aliases its argument"."""
    rows = [line.strip("| \n").split("|") for line in DESIGN.read_text().splitlines() if line.startswith("| `")]
    verbs = [row for row in rows if len(row) == 5]
    return {name: row[3].strip() for row in verbs for name in re.findall(r"`(\w+)`", row[0])}


def test_the_design_document_says_the_same() -> None:
    said = documented()
    for name, aliases in ALIASING.items():
        assert said[name.split(".")[-1]].startswith(aliases), name


FIELD = re.compile(r"(to|as|ensure|get)_.*|as\w*|contiguous|pin|numpy|torch|cpu|cuda|tensor|clone")


def test_no_public_name_leaves_open_whether_it_copies() -> None:
    """In this field each of these may alias or not, depending on where the bytes are."""
    assert [name for name in ALIASING if FIELD.fullmatch(name.split(".")[-1])] == []


def test_copy_is_an_option_only_where_the_standard_puts_it() -> None:
    def options(call: Callable[..., Any]) -> set[str]:
        return set(inspect.signature(call).parameters)

    public = {f"{kind.__name__}.{n}": getattr(kind, n) for kind in MAKERS for n in dir(kind) if not n.startswith("_")}
    assert [name for name, member in public.items() if callable(member) and "copy" in options(member)] == []
    assert "copy" in options(View.__dlpack__)
