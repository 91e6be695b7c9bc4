"""Where a model's forward goes from one device to another: inputs are moved there, and outputs of the whole back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import OffloadError
from .compiling import border, uncompiled
from .gradients import guard_outputs, tensors_in
from .mixing import explained
from .root import begin_step, end_step
from .tensors import current_stream
from .wrapped import WrappedForward

if TYPE_CHECKING:
    from .device_map import Parts
    from .placed import Placed
    from .staging import Stager

__all__ = ["BorderForward", "SplitForward", "moved"]


@uncompiled
def moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor on `device`, in tuples, lists, dicts and dataclasses; those that change are copied.

    What is on `device` already stays the same object, and one tensor in several places becomes one.
    """
    made: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device == device or value.is_meta:
                return value
            if id(value) not in made:
                made[id(value)] = value.to(device)
            return made[id(value)]
        if isinstance(value, PackedSequence):  # a tuple, of which one part stays on the CPU
            return cast(Any, value).to(device)
        if isinstance(value, dict):
            items = {key: visit(item) for key, item in value.items()}
            changed = {key: item for key, item in items.items() if item is not value[key]}
            if changed:
                value = copy.copy(value)
                for key, item in changed.items():
                    value[key] = item
            return value
        if isinstance(value, list | tuple):
            parts = [visit(item) for item in value]
            if all(new is old for new, old in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            fields = {name: visit(getattr(value, name)) for name in names if hasattr(value, name)}
            if any(item is not getattr(value, name) for name, item in fields.items()):
                value = copy.copy(value)
                for name, item in fields.items():
                    object.__setattr__(value, name, item)
        return value

    return visit(value)


@uncompiled
def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device torch's current one, where what is launched without a tensor goes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@uncompiled
def _device_of(value: Any) -> torch.device | None:
    """The device of the first tensor that has bytes; None where there is none."""
    return next((tensor.device for tensor in tensors_in(value) if not tensor.is_meta), None)


class BorderForward(WrappedForward):
    """The forward of a module whose inputs may be on another device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module)
        self.device = device

    @border
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.gate:
            if not self.installed:
                return self.passed_on(args, kwargs)
            args, kwargs = moved((args, kwargs), self.device)
            with _current(self.device):
                return self.inner(*args, **kwargs)


class SplitForward(BorderForward):
    """The whole's: a step of every device's ring, and outputs on the device of the first input."""

    def __init__(self, parts: Parts, device: torch.device, placed: Sequence[Placed]) -> None:
        super().__init__(parts.root, device)
        self.parts = parts
        self.placed = placed

    @border
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.gate:
            return self._over_devices(*args, **kwargs) if self.installed else self.passed_on(args, kwargs)

    @border
    def _over_devices(self, *args: Any, **kwargs: Any) -> Any:
        self._check_uncaptured()
        back = _device_of((args, kwargs))
        args, kwargs = moved((args, kwargs), self.device)
        with ExitStack() as steps, _current(self.device):
            for placed in self.placed:
                if placed.stager is not None and placed.module is not self.module:
                    begin_step(placed.stager)
                    steps.callback(self._end_step, placed.stager)
            try:
                output = self.inner(*args, **kwargs)
            except RuntimeError as error:
                mixed = explained(error, self.parts)
                if mixed is None:
                    raise
                raise mixed from error
        if self.installed and torch.is_grad_enabled():
            guard_outputs(output, [member.of_module for placed in self.placed for member in placed.offloaded()])
        return output if back is None else moved(output, back)

    @uncompiled
    def _end_step(self, stager: Stager) -> None:
        if self.installed:  # a hook may have restored the module
            end_step(stager)

    @uncompiled
    def _check_uncaptured(self) -> None:
        if len(self.placed) > 1 and any(
            placed.driver.capture_id(current_stream(placed.device)) for placed in self.placed
        ):
            raise OffloadError(
                f"a {type(self.module).__name__} over several devices cannot be captured in a graph, which is of one "
                "stream of one device; capture the modules that lie wholly on it"
            )
