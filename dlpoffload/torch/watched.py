"""Parameters whose ``.data`` is watched: the one way to write a tensor that leaves its version counter alone.

``weight.data += delta`` (merging a LoRA adapter does it) changes bytes behind torch's back: neither `_version` nor
`data_ptr` tells. So the class of an offloaded tensor is exchanged for a subclass that takes note when ``.data`` is
read. Whoever reads it may write it; the price of a wrong guess is one copy.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import nn

__all__ = ["exchange_data", "plain_data", "unwatch", "was_touched", "watch"]

_DATA = cast(Any, torch._C.TensorBase).data
_TOUCHED = "_dlpoffload_touched"
_FORMER = "_dlpoffload_class"


class _Watched:
    """Mixed into a tensor class in front of it."""

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl  # results are plain tensors, as before

    @property
    def data(self) -> torch.Tensor:
        """As ever, and noted."""
        self.__dict__[_TOUCHED] = True
        return cast(torch.Tensor, _DATA.__get__(self))

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.__dict__[_TOUCHED] = True
        _DATA.__set__(self, value)

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


@cache
def _watched_class(kind: type) -> type:
    return type(kind.__name__, (_Watched, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def watch(tensor: torch.Tensor) -> None:
    """Exchange a tensor's class. Only plain tensors and Parameters (and subclasses without a layout of their own)."""
    kind = type(tensor)
    tensor.__dict__[_FORMER] = kind
    tensor.__dict__[_TOUCHED] = False
    tensor.__class__ = _watched_class(kind)


def unwatch(tensor: torch.Tensor) -> None:
    """Give a tensor its class back. Idempotent."""
    kind = tensor.__dict__.pop(_FORMER, None)
    tensor.__dict__.pop(_TOUCHED, None)
    if kind is not None:
        tensor.__class__ = kind


def was_touched(tensor: torch.Tensor) -> bool:
    """Whether ``.data`` was read or set since this was last asked."""
    touched = tensor.__dict__.get(_TOUCHED, False)
    if touched:
        tensor.__dict__[_TOUCHED] = False
    return bool(touched)


def plain_data(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.data``, without a note."""
    return cast(torch.Tensor, _DATA.__get__(tensor))


def exchange_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value``, without a note."""
    _DATA.__set__(tensor, value)
