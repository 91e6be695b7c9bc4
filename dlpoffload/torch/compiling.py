"""What `torch.compile` makes of an offloaded module: each unit's own forward compiled, what is around it run as it is.

The graph breaks at a unit's border. One compiled code serves all units of one make: where the weights are is no guard.
Units that differ in what Dynamo guards get code of their own, see `codes`. A unit may write what it has in a slot, see
`slots`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import torch

__all__ = ["border", "uncompiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_REASON: Final = (
    "dlpoffload exchanges a unit's weights at its borders, where the graph breaks: leave fullgraph out, or map all "
    "weights (policy=all_mapped), which compiles without breaks"
)
"""What torch says where it was told ``fullgraph=True``."""


def uncompiled(function: _Function) -> _Function:
    """Let a function and all that it calls run as they are."""
    return cast(_Function, torch.compiler.disable(function, reason=_REASON))  # type: ignore[no-untyped-call]


def border(function: _Function) -> _Function:
    """Let a function run as it is; Dynamo goes on in what it calls, unless that is `uncompiled`."""
    return cast(_Function, torch.compiler.disable(function, recursive=False, reason=_REASON))  # type: ignore[no-untyped-call]
