"""Code of their own for units that Dynamo tells apart.

Dynamo keeps what it compiled with the code object, at most `torch._dynamo.config.recompile_limit` times for one, and
all layers of a class share one. That is as it should be while they are alike. Where what is guarded differs from layer
to layer, such as the ``layer_idx`` by which those of transformers find their cache, the ninth would run uncompiled. So
as soon as several makes of units had the same code compiled, each make gets a copy of it. A forward that is no plain
bound method of its module is left as it is.
"""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Final, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as compiled_of

from .compiling import uncompiled
from .wrapped import WrappedForward

__all__ = ["SharedCode", "SharedCodes", "compiled_of"]

_TOGETHER: Final = 3
"""Makes that have compiled one code when they are parted. The second may differ in its inputs alone: that they require
grad, which those of the first layer need not."""

_PARTED: WeakKeyDictionary[types.CodeType, dict[Hashable, types.CodeType | None]] = WeakKeyDictionary()
"""Code that was parted, for as long as it lives, and the copy of each make; None for the one that goes on with it."""

_numbers = count(1)


class SharedCode:
    """The code of the forwards of several units.

    Attributes
    ----------
    compiled : int
        How often Dynamo had compiled it when we looked last.
    """

    def __init__(self, code: types.CodeType) -> None:
        self.code = code
        self.compiled = len(compiled_of(code))
        self._forwards: WeakSet[WrappedForward] = WeakSet()  # each holds this one
        self._makes: list[Hashable] = []

    def add(self, forward: WrappedForward) -> bool:
        """Take in a forward that has this code; False if it was parted already, and this one got a copy."""
        self._forwards.add(forward)
        if self.code in _PARTED:
            self._part(forward)
        return self.code not in _PARTED

    @uncompiled
    def look(self, forward: WrappedForward) -> bool:
        """Take note of what was compiled in a call of `forward`, and part the makes if need be; False if so."""
        before, self.compiled = self.compiled, len(compiled_of(self.code))
        if self.compiled < before:  # somebody reset Dynamo
            self._makes.clear()
        if self.compiled > before and self.code not in _PARTED:
            make = _make_of(forward.module)
            self._makes += [make] if make not in self._makes else []
            if len(self._makes) == _TOGETHER:
                _PARTED[self.code] = {self._makes[0]: None}
        if self.code not in _PARTED:
            return True
        for each in list(self._forwards):
            self._part(each)
        self._forwards.clear()
        return False

    def _part(self, forward: WrappedForward) -> None:
        function = _function_of(forward)
        if function is None or function.__code__ is not self.code:
            return
        copies, make = _PARTED[self.code], _make_of(forward.module)
        if make not in copies:
            # Under a name of its own: by name and line Dynamo remembers which sizes have changed.
            copies[make] = self.code.replace(co_name=f"{self.code.co_name}_{next(_numbers)}")
        if (code := copies[make]) is not None:
            forward.inner = types.MethodType(_with_code(function, code), forward.module)


class SharedCodes:
    """Those of one offloaded module."""

    def __init__(self) -> None:
        self._codes: dict[int, SharedCode] = {}

    def add(self, forward: WrappedForward) -> SharedCode | None:
        """Take in a forward; None where nothing is to be looked at: its code cannot be copied, or was already."""
        function = _function_of(forward)
        if function is None:
            return None
        shared = self._codes.setdefault(id(function.__code__), SharedCode(function.__code__))
        return shared if shared.add(forward) else None


def _function_of(forward: WrappedForward) -> types.FunctionType | None:
    """The function whose bound method a forward calls; None for anything else that somebody put there."""
    inner = forward.inner
    if isinstance(inner, types.MethodType) and inner.__self__ is forward.module:
        return inner.__func__ if isinstance(inner.__func__, types.FunctionType) else None
    return None


def _with_code(function: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    name, defaults, closure = function.__name__, function.__defaults__, function.__closure__
    made = types.FunctionType(code, function.__globals__, name, defaults, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _make_of(module: nn.Module) -> Hashable:
    """Whatever of a module may be compiled into code: classes, plain values, all that tensors are but their bytes."""
    return tuple((path, type(inside), *_values(inside), *_tensors(inside)) for path, inside in module.named_modules())


def _values(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in module.__dict__.items():
        parts = cast("tuple[object, ...]", value if isinstance(value, tuple | list) else (value,))
        if all(part is None or isinstance(part, bool | int | float | str) for part in parts):
            yield name, repr(value)


def _tensors(module: nn.Module) -> Iterator[tuple[object, ...]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if isinstance(tensor, torch.Tensor):
            yield name, type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad
