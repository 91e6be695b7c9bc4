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

_MIXED = re.compile(r"\bsame device\b|is not on the expected device")
_CONVOLVED = re.compile(r"Input type \((\S+)\) and (?:weight|bias) type \((\S+)\)")
"""A convolution names both types, which differ by their dtype otherwise."""


def explained(error: RuntimeError, parts: Parts) -> PlanError | None:
    """What an error of torch inside of a model means for its device map; None where it is about something else."""
    said = str(error)
    types = _CONVOLVED.search(said)
    if not _MIXED.search(said) and (types is None or len({".cuda." in kind for kind in types.groups()}) == 1):
        return None
    running = [module for module in _modules(error.__traceback__) if parts.path_of(module) is not None]
    module = running[-1] if running else parts.root
    path, devices = parts.path_of(module), parts.devices_of(module)
    name = f'"{path}" ({type(module).__name__})' if path else f"this {type(module).__name__}"
    own = devices[0] if devices else parts.home
    borders = {id(border) for border, _ in parts.borders()}
    moved = [each for each in running if id(each) in borders and (each is module or len(parts.devices_of(each)) == 1)]
    if len(devices) > 1:
        found = f"the forward of {name} combines what its parts on {' and '.join(devices)} gave it"
        remedy = "inputs are moved to a part's device, but outputs stay where they were computed; " + (
            f'map the whole of it to one device (device_map={{..., "{path}": "{own}"}}), or move them in its forward'
            if path
            else "map whole blocks, or move them in its forward"
        )
    elif any(module in each.modules() for each in moved):
        found = f"{name} uses a tensor on another device, which is none of its inputs"
        remedy = "attributes, and what lies in an object such as a cache, are not moved; make it where the inputs are"
    else:
        found = f"{name} is given a tensor on another device by code outside of what lies with it on one"
        remedy = f'name it in the map, so that its inputs are moved as well: device_map={{..., "{path}": "{own}"}}'
    return PlanError(f"{found}: {said.splitlines()[0].rstrip('.!')}; {remedy}")


def _modules(trace: TracebackType | None) -> Iterator[nn.Module]:
    """The modules whose methods an exception passed through, from the outermost to where it was raised."""
    for frame, _ in traceback.walk_tb(trace):
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            yield found
