"""What `torch.compile` makes of an offloaded module: each unit's own forward compiled, what is around it run as it is.

The graph breaks at a unit's border. One compiled code serves all units of one make: where the weights are is no guard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["border", "uncompiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Let a function and all that it calls run as they are."""
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def border(function: _Function) -> _Function:
    """Let a function run as it is; Dynamo goes on in what it calls, unless that is `uncompiled`."""
    return cast(_Function, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
