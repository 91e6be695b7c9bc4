"""What the tests of several devices share: maps of the zoo, and the resident model over the same devices."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from models import distinct_nbytes
from torch import Tensor, nn

from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import PlanError
from dlpoffload.planning import Placement
from dlpoffload.torch import SplitHandle, offload_

__all__ = ["MAPS", "SecondCpu", "assert_streamed", "offload_split", "resident", "torch_device_of"]


class SecondCpu(CpuDriver):
    """A second device of the CPU driver. To torch it is the CPU as well."""

    device = "cpu:1"


MAPS: dict[str, dict[str, int]] = {
    "decoder": {"": 0, "layers.4": 1, "layers.5": 1, "layers.6": 1},
    "decoder_tied": {"": 0, "layers.0": 1, "layers.3": 1, "layers.5": 1},
    "encoder_decoder": {"": 0, "decoder.block": 1},
    "unet": {"": 0, "mid": 1, "up": 1},
    "unet_channels_last": {"": 1, "down.*": 0},
    "vision_language": {"": 0, "language.layers": 1},
    "mixture": {"": 0, "layers.2": 1},
    "recurring": {"": 0, "group": 1, "layers.1": 1, "layers.3": 1},
    "recurrent": {"": 0, "gru": 1},
    "packed": {"": 0, "layers.3": 1, "layers.4": 1},
    "nested_sequential": {"": 0, "1.2": 1, "1.3": 1},
    "keyworded": {"": 0, "blocks.block_3": 1, "blocks.block_5": 1},
    "rotated": {"": 0, "layers.1": 1, "layers.4": 1},
    "odd_tensors": {"": 0, "layers.2": 1, "layers.3": 1},
    "tied_everywhere": {"": 0, "layers.0": 1, "layers.2": 1},
    "parametrized": {"": 0, "3": 1, "4": 1},
}
"""For cases of the zoo, which module is on the first and which on the second of two devices. What adds a module's
input to its output is on one."""


def torch_device_of(device: str) -> torch.device:
    """What torch calls a device."""
    return torch.device("cpu" if device.startswith("cpu") else device)


def _device_at(path: str, device_map: Mapping[str, str]) -> torch.device:
    """As `offload_` has it, said otherwise: the pattern of most segments that matches the beginning of a path."""

    def begins(pattern: str) -> bool:
        return re.match(re.escape(pattern).replace(r"\*", "[^.]*") + r"(\.|$)", path) is not None

    nearest = max((p for p in device_map if not p or begins(p)), key=lambda p: len(p.split(".")) if p else 0)
    return torch_device_of(device_map[nearest])


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return {key: _to(item, device) for key, item in value.items()} if type(value) is dict else value


def resident(module: nn.Module, device_map: Mapping[str, str]) -> nn.Module:
    """A copy of a module that is all on its devices, by `Module.to` and torch's own hooks."""
    made = copy.deepcopy(module)
    for path, inside in made.named_modules():
        device = _device_at(path, device_map)
        inside._apply(lambda tensor, device=device: tensor.to(device), recurse=False)
        inside.register_forward_pre_hook(
            lambda _, args, kwargs, device=device: (_to(args, device), _to(kwargs, device)), with_kwargs=True
        )
    return made


def offload_split(
    module: nn.Module, device_map: Mapping[str, str], budgets: Mapping[str, int] | None = None, **options: Any
) -> SplitHandle:
    """Offload with budgets of a quarter of the weights each, or the smallest that the errors name."""
    budgets = dict(budgets or dict.fromkeys(device_map.values(), distinct_nbytes(module) // 4))
    for _ in range(len(budgets)):
        try:
            return offload_(module, budgets, device_map=device_map, **options)
        except PlanError as error:
            refused = error
        device = re.match(r'on "(.*?)": ', str(refused))
        assert device is not None, str(refused)
        assert refused.smallest_budget is not None
        assert refused.smallest_budget > budgets[device.group(1)]
        budgets[device.group(1)] = refused.smallest_budget
    return offload_(module, budgets, device_map=device_map, **options)


def assert_streamed(handle: SplitHandle) -> None:
    """Every device did its part: within its budget, with copies, and without a fallback or a wait of the host."""
    reports = handle.report(link=False)
    assert any(report.plan.nbytes(Placement.DEVICE) < report.plan.total_nbytes for report in reports.values())
    for device, report in reports.items():
        assert report.device == device
        assert report.device_nbytes <= report.plan.device_budget
        assert (report.stats.copies > 0) == bool(report.plan.streamed_units)
        assert (report.stats.mapped_runs, report.stats.host_waits) == (0, 0)
