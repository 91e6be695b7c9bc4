"""The fake libcuda of `tests/fake_cuda`: built by the C compiler, loaded in place of the driver, and asked things."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["FakeCuda", "build", "compiler"]

SOURCES: Final = Path(__file__).resolve().parent.parent / "fake_cuda"
SONAME: Final = "libcuda.so.1"
_FLAGS: Final = ("-shared", "-fPIC", "-O1", "-g", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def compiler() -> str | None:
    """The C compiler, by name; None where there is none."""
    names = filter(None, (os.environ.get("CC", "").split(" ")[0], "cc", "gcc", "clang"))
    return next(filter(None, map(shutil.which, names)), None)


def build(folder: Path) -> Path:
    """Build the library into a folder.

    Raises
    ------
    RuntimeError
        The compiler refused; with its words.
    """
    library = folder / SONAME
    found = compiler()
    if found is None:
        raise RuntimeError("there is no C compiler")
    sources: Sequence[str] = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [found, *_FLAGS, f"-Wl,-soname,{SONAME}", "-o", str(library), *sources, "-lpthread"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{made.stdout}{made.stderr}")
    return library


class FakeCuda:
    """The library in this process, in the driver's place: the bindings find it by its name, since it is loaded.

    Parameters
    ----------
    library
        Where `build` put it.
    """

    KINDS: Final = ("device", "allocated", "registered")

    def __init__(self, library: Path) -> None:
        self._library = lib = ctypes.CDLL(str(library))
        for name in ("fake_live", "fake_live_nbytes", "fake_live_streams", "fake_live_events", "fake_calls"):
            getattr(lib, name).restype = ctypes.c_size_t
        for name in ("fake_call_name", "fake_violations"):
            getattr(lib, name).restype = ctypes.c_char_p
        lib.fake_live_user_objects.restype = ctypes.c_size_t
        lib.fake_contexts_retained.restype = ctypes.c_long
        lib.fake_fail.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
        lib.fake_capture_begin.argtypes = (ctypes.c_size_t,)
        lib.fake_capture_end.argtypes = (ctypes.c_size_t, ctypes.POINTER(ctypes.c_int))
        lib.fake_capture_end.restype = ctypes.c_void_p
        lib.fake_run.argtypes = (ctypes.c_size_t,)
        lib.fake_graph_launch.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        lib.fake_graph_destroy.argtypes = (ctypes.c_void_p,)

    # --------------------------------------------------------------------------------------------- faults
    def fail(self, call: str, nth: int, code: int, *, sticky: bool = False) -> None:
        """Let the `nth` use of a call from now on fail with a ``CUresult``; a sticky one is every later call's, too."""
        if self._library.fake_fail(call.encode(), nth, code, sticky):
            raise ValueError(f"the fake has no {call}")

    def fired(self) -> bool:
        """Whether that failure happened. What has not happened will not."""
        return bool(self._library.fake_fired())

    def begin(self) -> None:
        """Forget the calls counted so far."""
        self._library.fake_begin()

    def calls(self) -> list[str]:
        """The calls made since `begin`, on whatever thread, oldest first."""
        log = ctypes.POINTER(ctypes.c_uint8)()
        count = self._library.fake_calls(ctypes.byref(log))
        return [self._library.fake_call_name(log[index]).decode() for index in range(count)]

    # ---------------------------------------------------------------------------------------------- state
    def live(self) -> dict[str, int]:
        """Allocations and registrations by kind, in number and bytes; streams, events, and objects of graphs."""
        lib = self._library
        found = {kind: lib.fake_live(index) for index, kind in enumerate(self.KINDS)}
        found |= {f"{kind}_nbytes": lib.fake_live_nbytes(index) for index, kind in enumerate(self.KINDS)}
        found |= {"streams": lib.fake_live_streams(), "events": lib.fake_live_events()}
        return found | {"user_objects": lib.fake_live_user_objects()}

    def violations(self) -> list[str]:
        """What no correct program does: uses of what is gone, calls without a context, private files pinned."""
        words: str = self._library.fake_violations().decode()
        unmapped = self._library.fake_unmapped_registrations()
        return [*words.splitlines(), *([f"{unmapped} registered ranges are not mapped"] if unmapped else [])]

    def thread(self) -> tuple[int, int]:
        """How many contexts lie on this thread's stack, and its mode of captures."""
        return self._library.fake_context_depth(), self._library.fake_capture_mode()

    def reset_thread(self) -> None:
        """Empty this thread's stack of contexts."""
        self._library.fake_reset_thread(0)

    def run_at_once(self, on: bool) -> None:
        """Run what is enqueued at once, instead of as late as it may."""
        self._library.fake_run_at_once(on)

    def read(self, pointer: int, nbytes: int, stream: int) -> bytes:
        """Bytes of device memory as work enqueued on `stream` now would find them, without a call of the driver."""
        self._library.fake_run(stream)
        return ctypes.string_at(pointer, nbytes)

    # ------------------------------------------------------------------------------------------- captures
    def capture_begin(self, stream: int) -> None:
        """What cuStreamBeginCapture does, in global mode."""
        if code := self._library.fake_capture_begin(stream):
            raise RuntimeError(f"no capture of stream {stream}: {code}")

    def capture_end(self, stream: int) -> tuple[Any, int]:
        """The graph, to be destroyed, and the ``CUresult`` of cuStreamEndCapture."""
        result = ctypes.c_int()
        graph = self._library.fake_capture_end(stream, ctypes.byref(result))
        return graph, result.value

    def graph_launch(self, graph: Any, stream: int) -> None:
        self._library.fake_graph_launch(graph, stream)

    def graph_destroy(self, graph: Any) -> None:
        self._library.fake_graph_destroy(graph)
