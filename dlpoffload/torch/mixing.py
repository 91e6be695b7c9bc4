"""What to say when a module's own code mixes tensors of two devices, of which torch tells neither whose nor why.

Inputs are moved at the borders (see `borders`), outputs stay where they were computed. So what is written between the
calls of a module's children, ``x + self.block(x)``, must find both on one device. That can only be seen when it runs.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from torch import nn

from ..errors import PlanError

if TYPE_CHECKING:
    from .device_map import Parts

__all__ = ["explained"]

_MIXED = re.compile(r"\bsame device\b|is not on the expected device|two different devices")
_CONVOLVED = re.compile(r"Input type \((\S+)\) and (?:weight|bias) type \((\S+)\)")
"""A convolution names both types, which differ by their dtype otherwise."""


def explained(error: RuntimeError, parts: Parts) -> PlanError | None:
    """What an error of torch inside of a model means for its device map; None where it is about something else."""
    said = str(error)
    types = _CONVOLVED.search(said)
    convolved = types is not None and len({".cuda." in kind for kind in types.groups()}) > 1
    if len(parts.names) == 1 or not (convolved or _MIXED.search(said)):
        return None
    running = [parts.root, *(m for m in _modules(error.__traceback__) if parts.path_of(m) is not None)]
    last_split = max(index for index, module in enumerate(running) if module is parts.root or parts.is_split(module))
    around, entered = running[last_split], running[last_split + 1 : last_split + 2]
    if not entered:
        path, devices = parts.path_of(around), parts.devices_of(around)
        found = f"the forward of {_said(around, path)} combines what its parts on {' and '.join(devices)} gave it"
        whole = (
            f'the whole of it to one device (device_map={{..., "{path}": "{devices[0]}"}})' if path else "whole blocks"
        )
        remedy = (
            "inputs are moved to a part's device, but outputs stay where they were computed; "
            f"map {whole}, or move them in its forward"
        )
    elif entered[0] in (border for border, _ in parts.borders()):
        found = f"{_said(running[-1], parts.path_of(running[-1]))} uses a tensor on another device than its inputs"
        remedy = "attributes, and what lies in an object such as a cache, are not moved; make it where the inputs are"
    else:
        path, device = parts.path_of(entered[0]), next(iter(parts.devices_of(entered[0])), parts.home)
        found = f"{_said(entered[0], path)} is called with a tensor on another device, and is no border"
        remedy = (
            "inputs are moved to the parts of what is split, and where the map names a module; name this one as well: "
            f'device_map={{..., "{path}": "{device}"}}'
        )
    line = next(line for line in said.splitlines() if _MIXED.search(line) or _CONVOLVED.search(line))
    return PlanError(f"{found}: {line.strip().rstrip('.!')}; {remedy}")


def _said(module: nn.Module, path: str | None) -> str:
    return f'"{path}" ({type(module).__name__})' if path else f"this {type(module).__name__}"


def _modules(trace: TracebackType | None) -> Iterator[nn.Module]:
    """The modules whose methods an exception passed through, from the outermost to where it was raised."""
    for frame, _ in traceback.walk_tb(trace):
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            yield found
