"""Parameters whose ``.data`` is watched: the one way to write a tensor that leaves its version counter alone.

``weight.data += delta`` (merging a LoRA adapter does it) changes bytes behind torch's back: neither `_version` nor
`data_ptr` tells. So the class of an offloaded tensor is exchanged for a subclass that takes note when ``.data`` is
read. All that it gives out shares one count of writes, which we keep: an alias that is held and written much later is
seen, too. Whoever reads it may also write it in a way that torch does not count, by a kernel of his own; so a read
costs one copy more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import nn

from ..errors import OffloadError

__all__ = [
    "READ_ONLY",
    "attributes_of",
    "exchange_data",
    "forget_given",
    "former_class",
    "is_noted",
    "is_watched",
    "plain_data",
    "rewatch",
    "unwatch",
    "was_read",
    "watch",
    "watched_class",
    "written_as_data",
]

_NEW_PARAMETER = nn.Parameter.__new__.__code__
_DATA = cast(Any, torch._C.TensorBase).data
_READ = "_dlpoffload_read"
_GIVEN = "_dlpoffload_given"
_FORMER = "_dlpoffload_class"
READ_ONLY = "_dlpoffload_read_only"
"""Under which `guarded` keeps a tensor's home."""


@dataclass(slots=True)
class _Given:
    """An alias of what ``.data`` gave out, which shares its count of writes, and that count when we looked last."""

    alias: torch.Tensor
    version: int


class _Watched:
    """Mixed into a tensor class in front of it."""

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl  # results are plain tensors, as before

    @property
    def data(self) -> torch.Tensor:
        """As ever, and noted."""
        notes = self.__dict__
        notes[_READ] = True
        alias = plain_data(cast(torch.Tensor, self))
        given: dict[int, _Given] = notes.setdefault(_GIVEN, {})
        # By address: its home's are kept, those of a slot only until the unit is left.
        return given.setdefault(alias.data_ptr(), _Given(alias, alias._version)).alias.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.__dict__[_READ] = True
        _DATA.__set__(self, value)

    def detach(self) -> torch.Tensor:
        """As ever; but where `nn.Parameter` makes one of this tensor it asks for the tensor's own class."""
        made: torch.Tensor = super().detach()  # type: ignore[misc]
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _NEW_PARAMETER:
            made.__class__ = cast(Any, type(self))
        return made

    def share_memory_(self) -> NoReturn:
        """Refuse: torch would copy the bytes into memory of its own, and this tensor would be offloaded no more."""
        raise OffloadError("an offloaded tensor cannot be moved to shared memory; restore_() the module first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is no offloaded tensor: it is pickled, and deep-copied, as what it was before.
        plain = cast(torch.Tensor, self).detach()
        if isinstance(self, nn.Parameter):
            plain = nn.Parameter(plain, requires_grad=self.requires_grad)
        return plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        tensor = cast(torch.Tensor, self)
        with torch.no_grad():
            plain: torch.Tensor = tensor.detach().clone(memory_format=torch.preserve_format)
        result = nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(self, nn.Parameter) else plain
        memo[id(self)] = result
        return result


class _LikeTensor(type(torch.Tensor)):  # type: ignore[misc]
    """Of a watched class of plain tensors, which equals `torch.Tensor` itself.

    What torch compiles looks a buffer's class up in a tuple of those that it knows, and stops at any other.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is torch.Tensor

    __hash__ = type.__hash__


@cache
def watched_class(kind: type) -> type:
    """The class that is watched in the place of `kind`."""
    space = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    own = next(base.__dict__["__torch_function__"] for base in kind.__mro__ if "__torch_function__" in base.__dict__)
    plain = (torch._C.TensorBase, torch.Tensor, nn.Parameter)
    if not any(own is base.__dict__.get("__torch_function__") for base in plain):
        space["__torch_function__"] = own  # it has a say in what is done with it
    made: type = (_LikeTensor if kind is torch.Tensor else type)(kind.__name__, (_Watched, kind), space)
    return made


def watch(tensor: torch.Tensor) -> None:
    """Exchange a tensor's class. Only plain tensors and Parameters (and subclasses without a layout of their own)."""
    tensor.__dict__[_FORMER] = kind = former_class(tensor)
    tensor.__class__ = watched_class(kind)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of an offloaded module."""
    return _FORMER in tensor.__dict__


def rewatch(tensor: torch.Tensor) -> bool:
    """Watch a tensor again that somebody gave another class (`torch.utils.swap_tensors`): whether that was so.

    What happened to its bytes until now nobody saw, so it counts as read.
    """
    if is_watched(tensor):
        return False
    watch(tensor)
    tensor.__dict__[_READ] = True
    return True


def unwatch(tensor: torch.Tensor) -> None:
    """Give a tensor its class back. Idempotent."""
    kind = tensor.__dict__.pop(_FORMER, None)
    tensor.__dict__.pop(_READ, None)
    tensor.__dict__.pop(_GIVEN, None)
    tensor.__dict__.pop(READ_ONLY, None)
    if kind is not None:
        tensor.__class__ = kind


def former_class(tensor: torch.Tensor) -> type:
    """The class that a tensor had before it was watched, or that what it was made of had (``type(weight)(new)``)."""
    kind = cast(type, tensor.__dict__.get(_FORMER, type(tensor)))
    while issubclass(kind, _Watched):
        kind = kind.__bases__[-1]
    return kind


def attributes_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What others have put on a tensor as attributes."""
    return {name: value for name, value in tensor.__dict__.items() if name not in (_FORMER, _READ, _GIVEN, READ_ONLY)}


def is_noted(tensor: torch.Tensor) -> bool:
    """Whether ``.data`` was read or set, now or before, or the tensor is watched no more: whether to look closer."""
    notes = tensor.__dict__
    return _READ in notes or _GIVEN in notes or _FORMER not in notes


def was_read(tensor: torch.Tensor) -> bool:
    """Whether ``.data`` was read or set since this was last asked."""
    return bool(tensor.__dict__.pop(_READ, False))


def written_as_data(tensor: torch.Tensor) -> bool:
    """Whether torch saw a write through what ``.data`` gave out of the bytes that the tensor has now."""
    given = tensor.__dict__.get(_GIVEN, {}).get(tensor.data_ptr())
    if given is None or given.alias._version == given.version:
        return False
    given.version = given.alias._version
    return True


def plain_data(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.data``, without a note."""
    return cast(torch.Tensor, _DATA.__get__(tensor))


def exchange_data(tensor: torch.Tensor, value: torch.Tensor, *, forget: bool = False) -> None:
    """``tensor.data = value``, without a note. `forget` what ``.data`` gave out of the bytes that it had."""
    if forget:
        forget_given(tensor, tensor.data_ptr())
    _DATA.__set__(tensor, value)


def forget_given(tensor: torch.Tensor, address: int) -> None:
    """Forget what ``.data`` gave out of the bytes at an address."""
    if given := tensor.__dict__.get(_GIVEN):
        given.pop(address, None)
