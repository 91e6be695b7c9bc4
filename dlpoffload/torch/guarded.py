"""Tensors over a file's own pages, which must not be written: torch ignores read-only, and a write ends the process.

So their class is one whose operations torch asks about first (``__torch_function__``). An operation that would write
them, by its schema, is refused; views, ``.data`` and ``.detach()`` are tensors of such a class, too. While a tensor
points into a slot it has its usual class, so that nothing of this costs anything in a unit's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Final, NoReturn, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import AliasError
from .watched import READ_ONLY, former_class, watched_class

__all__ = ["ReadOnlyTensor", "expose", "guard", "home_view", "is_guarded", "release"]

_UNPROTECTED: Final = ("__dlpack__", "share_memory_")
"""They hand the memory to code that knows nothing of this, or exchange it."""
_STATISTICS: Final = ("running_mean", "running_var")
"""Arguments that are written in training, of which schemas do not say so."""
_TRAINING: Final = ("training", "train", "use_input_stats")


@dataclass(frozen=True, eq=False, slots=True)
class _Home:
    """Memory that must not be written.

    Attributes
    ----------
    name : str
        The tensor of the module.
    tensor : torch.Tensor
        Keeps the storage alive, so that `storage` names no other one.
    """

    name: str
    tensor: torch.Tensor
    storage: int

    def refuse(self, what: str) -> NoReturn:
        raise AliasError(
            f'"{self.name}" lies in a mapped checkpoint, which is read-only, so {what} is refused: use '
            f'handle.update("{self.name}", values), or call handle.copy_out("{self.name}") first, which moves it to '
            "memory of its own"
        )


class _Guarded:
    """Mixed into a tensor class in front of it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _call(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return super().__deepcopy__(memo)  # type: ignore[misc]


class ReadOnlyTensor(_Guarded, torch.Tensor):
    """A view of a tensor in a mapped checkpoint: in-place writes are errors. Copies of it are ordinary tensors."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            copied = memo[id(self)] = self.detach().clone(memory_format=torch.preserve_format)
        return copied


@cache
def _guarded_class(kind: type) -> type:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Guarded, watched_class(kind)), named)


# ------------------------------------------------------------------------------------------------ classes


def guard(tensor: torch.Tensor, name: str, home: torch.Tensor) -> None:
    """Refuse writes of a watched tensor as long as it has the bytes of `home`."""
    tensor.__dict__[READ_ONLY] = _Home(name, home, home.untyped_storage()._cdata)
    tensor.__class__ = _guarded_class(former_class(tensor))


def expose(tensors: Iterable[torch.Tensor], *, to_writes: bool) -> None:
    """Give guarded tensors their usual class while they point elsewhere, and take it back."""
    for tensor in tensors:
        kind = former_class(tensor)
        tensor.__class__ = watched_class(kind) if to_writes else _guarded_class(kind)


def release(tensor: torch.Tensor) -> None:
    """Guard a tensor no longer, which stays watched. Idempotent."""
    if tensor.__dict__.pop(READ_ONLY, None) is not None:
        tensor.__class__ = watched_class(former_class(tensor))


def home_view(tensor: torch.Tensor, home: torch.Tensor) -> torch.Tensor:
    """View a tensor's home while it points elsewhere, guarded if the tensor is."""
    note = tensor.__dict__.get(READ_ONLY)
    if note is None:
        return home
    view = home.detach()
    view.__dict__[READ_ONLY] = note
    view.__class__ = ReadOnlyTensor
    return view


def is_guarded(tensor: torch.Tensor) -> bool:
    """Whether a tensor has bytes that must not be written."""
    with torch._C.DisableTorchFunctionSubclass():
        return _home_of(tensor) is not None


def _home_of(tensor: torch.Tensor) -> _Home | None:
    home: _Home | None = tensor.__dict__.get(READ_ONLY)
    return home if home is not None and tensor.untyped_storage()._cdata == home.storage else None


# -------------------------------------------------------------------------------------------------- calls


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        guarded = (tensor for tensor in _tensors((args, kwargs)) if isinstance(tensor, _Guarded))
        homes = {home.storage: home for tensor in guarded if (home := _home_of(tensor)) is not None}
        if not homes:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _UNPROTECTED:
            next(iter(homes.values())).refuse(str(func.__name__))
        if _only_reads(func) and kwargs.get("out") is None:
            result = func(*args, **kwargs)
        else:
            with _RefuseWrites(homes):
                result = func(*args, **kwargs)
        if hasattr(result, "setflags"):  # an array of NumPy, which does know of read-only memory
            result.setflags(write=False)
        for tensor in _tensors(result):
            home = homes.get(tensor.untyped_storage()._cdata) if type(tensor) is torch.Tensor else None
            if home is not None:
                tensor.__dict__[READ_ONLY] = home
                tensor.__class__ = ReadOnlyTensor
        return result


@cache
def _only_reads(func: Any) -> bool:
    """Whether an operation of torch itself writes nothing but what is passed as ``out``."""
    if isinstance(func, FunctionType):
        return False  # it may do anything inside
    name = getattr(func, "__name__", "")
    found = getattr(torch.ops.aten, name, None)
    if name == "__get__":
        return True
    if found is None:
        return False
    schemas = [getattr(found, overload)._schema for overload in found.overloads()]
    return not any(
        (schema.is_mutable and not any(argument.is_out for argument in schema.arguments))
        or any(argument.name in _STATISTICS for argument in schema.arguments)
        for schema in schemas
    )


class _RefuseWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operation below a call."""

    def __init__(self, homes: Mapping[int, _Home]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.homes = homes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            argument.name: (argument, args[index] if index < len(args) else kwargs.get(argument.name))
            for index, argument in enumerate(func._schema.arguments)
        }
        trains = "no_training" not in func._schema.name and all(given[n][1] for n in _TRAINING if n in given)
        for argument, value in given.values():
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or (trains and argument.name in _STATISTICS):
                for tensor in _tensors(value):
                    home = self.homes.get(tensor.untyped_storage()._cdata)
                    if home is not None:
                        home.refuse(func._schema.name)
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in cast(Sequence[Any], value):
            yield from _tensors(part)
