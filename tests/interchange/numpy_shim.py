"""NumPy with its arrays' own DLPack taken out and `dlpoffload`'s put in: what its suite is run against.

`Ours` is an array like any other, but for the two methods that make it a producer. The rest, above all the consumer
`from_dlpack`, is NumPy's own.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy
import pytest

import dlpoffload as dlpo
from dlpoffload import lifetime
from dlpoffload.producers import view_of

__all__ = ["KINDS", "load", "suite_path"]


class Ours(numpy.ndarray):
    """An array that exports itself through a view of `dlpoffload`."""

    def _view(self) -> dlpo.View:
        raise NotImplementedError

    def __dlpack__(self, **asked: Any) -> Any:
        return self._view().__dlpack__(**asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view().__dlpack_device__()


class Adopted(Ours):
    """Over memory of NumPy's, which `view_of` takes in."""

    def _view(self) -> dlpo.View:
        return view_of(self.view(numpy.ndarray))


class Pinned(Ours):
    """Over memory of a `HostBuffer`, of which it is a view; what NumPy computes anew is put into a buffer, too."""

    buffer: dlpo.HostBuffer | None

    def __new__(cls, shape: Any, dtype: Any = float, buffer: Any = None, *rest: Any, **more: Any) -> Any:
        made = super().__new__(cls, shape, dtype, buffer, *rest, **more)
        made.buffer = getattr(buffer, "buffer", None)
        return made if made.buffer is not None else _pinned(made, cls)

    def __array_finalize__(self, source: Any) -> None:
        self.buffer = getattr(source, "buffer", None)

    def astype(self, *arguments: Any, **more: Any) -> Any:
        return _pinned(super().astype(*arguments, **more), type(self))

    def copy(self, *arguments: Any, **more: Any) -> Any:
        return _pinned(super().copy(*arguments, **more), type(self))

    def _view(self) -> dlpo.View:
        assert self.buffer is not None
        byte_offset = self.ctypes.data - self.buffer.host_pointer if self.size else 0
        strides: list[Any] = [0 if n == 1 else s / self.itemsize for n, s in zip(self.shape, self.strides, strict=True)]
        strides = [int(s) if s == int(s) else s for s in strides]  # what is no whole number is ours to refuse
        view = self.buffer.host_view(self.shape, str(self.dtype), strides=strides, byte_offset=byte_offset)
        view.read_only = not self.flags.writeable
        return view


def _pinned(array: Any, kind: type[Any] = Pinned) -> Any:
    """The same values in a buffer of their own."""
    plain = numpy.ascontiguousarray(array.view(numpy.ndarray)).reshape(array.shape)
    buffer = dlpo.HostBuffer.allocate(max(plain.nbytes, 1), device="cpu")
    home = numpy.frombuffer(buffer.memoryview(), numpy.uint8)[: plain.nbytes].view(plain.dtype).reshape(plain.shape)
    home[...] = plain
    made = home.view(kind)
    made.buffer = buffer
    return made


KINDS: Final[dict[str, type[Any]]] = {"view_of": Adopted, "host_view": Pinned}
"""By how the suite's arrays become views."""


class _Shim(ModuleType):
    """The module that the suite imports as ``numpy``."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__("numpy")
        self._kind = kind
        self.ndarray = kind
        self.__path__ = numpy.__path__
        self.loading = True

    def __getattr__(self, name: str) -> Any:
        found = getattr(numpy, name)
        if name not in ("arange", "zeros", "ones", "array", "asarray", "empty"):
            return found

        def made(*arguments: Any, **more: Any) -> Any:
            plain = found(*arguments, **more)
            if self.loading:  # parameters of the suite, which live as long as the session and are copied in its tests
                return plain.view(self._kind)
            # A copy owns its memory; what views of a view keep alive is its base.
            return _pinned(plain) if self._kind is Pinned else plain.view(self._kind).copy("K")

        return made


class _Counts(ModuleType):
    """The module that the suite imports as ``sys``: who uses an array's memory, once what was dropped is reclaimed."""

    @staticmethod
    def getrefcount(array: Any) -> int:
        lifetime.drain()
        buffer = getattr(array, "buffer", None)
        return sys.getrefcount(array) if buffer is None else int(buffer.live_views)


def suite_path() -> Path | None:
    """Where NumPy ships its tests of DLPack; None where it does not."""
    for package in ("numpy._core", "numpy.core"):
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            path = Path(folder) / "tests" / "test_dlpack.py"
            if path.exists():
                return path
    return None


def load(path: Path, kind: str) -> ModuleType:
    """The suite as a module of its own, over arrays of ours."""
    module = ModuleType(f"numpy_suite_{kind}")
    module.__file__ = str(path)
    shim = _Shim(KINDS[kind])
    shims = {"numpy": shim, "sys": _Counts("sys")}
    code = compile(path.read_text(), str(path), "exec")
    real = {name: sys.modules[name] for name in shims}
    importlib.import_module("numpy.testing")
    sys.modules["numpy"] = shims["numpy"]
    try:
        exec(code, module.__dict__)
    finally:
        sys.modules.update(real)
    module.__dict__["sys"] = shims["sys"]
    for _, suite in inspect.getmembers(module, inspect.isclass):
        for _, function in inspect.getmembers(suite, inspect.isfunction):
            if marks := getattr(function, "pytestmark", None):
                function.pytestmark = [_listed(mark) for mark in marks]
    shim.loading = False
    return module


def _listed(mark: pytest.Mark) -> pytest.Mark:
    """The same mark, whose parameters can be counted before they are used."""
    arguments = [list(a) if inspect.isgenerator(a) else a for a in mark.args]
    made: pytest.MarkDecorator = getattr(pytest.mark, mark.name)
    return made.with_args(*arguments, **mark.kwargs).mark
