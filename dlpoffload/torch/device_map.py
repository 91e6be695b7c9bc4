"""A device map: which module of a model is on which device, as the user says it, and what that makes of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import nn

from ..driver import Driver, open_driver
from ..errors import PlanError
from ..planning import matches_path
from .shells import shell_tree
from .tree import INDIVISIBLE, Entry, collect, is_callable

__all__ = ["Budgets", "Device", "DeviceMap", "Parts", "by_device"]

Device: TypeAlias = str | int | torch.device
Budgets: TypeAlias = Mapping[str, int | str] | Mapping[int, int | str] | Mapping[Device, int | str]

_WILD = frozenset("*?[/")
"""What makes a key of the map a pattern."""


def _driver(device: object) -> Driver:
    return open_driver(str(device) if isinstance(device, torch.device) else device)  # type: ignore[arg-type]


def by_device(device_budget: Budgets) -> dict[str, int | str]:
    """Budgets by the names of their devices.

    Raises
    ------
    PlanError
        No budget; two for one device.
    SpecError, DriverNotFoundError
        No such device.
    """
    budgets: dict[str, int | str] = {}
    for device, budget in device_budget.items():
        name = _driver(device).device
        if name in budgets:
            raise PlanError(f'device_budget names "{name}" twice; give each device one budget')
        budgets[name] = budget
    if not budgets:
        raise PlanError('device_budget names no device; give each one its bytes: {"cuda:0": "20GiB"}')
    return budgets


class DeviceMap:
    """Patterns on module paths, and the devices that they stand for.

    Attributes
    ----------
    drivers : dict of str to Driver
        By device name.
    """

    def __init__(self, device_map: Mapping[str, Device]) -> None:
        if not isinstance(device_map, Mapping):
            raise PlanError(
                f"device_map={device_map!r} is no mapping; say which module is on which device: "
                '{"": "cuda:0", "model.layers.16": "cuda:1"}'
            )
        self.drivers: dict[str, Driver] = {}
        self._devices: dict[str, str] = {}
        for pattern, device in device_map.items():
            if device is None:
                raise PlanError(f'device_map["{pattern}"] is None; name a device')
            driver = _driver(device)
            self.drivers[driver.device] = driver
            self._devices[pattern] = driver.device
        self._patterns = [key for key in self._devices if not _WILD.isdisjoint(key)]

    def check_budgets(self, budgets: Mapping[str, object]) -> None:
        """Raise PlanError unless there are budgets for exactly the devices of the map."""
        lacking = [name for name in self.drivers if name not in budgets]
        unused = [name for name in budgets if name not in self.drivers]
        if lacking or unused:
            said = ", ".join(f'"{name}"' for name in lacking or unused)
            raise PlanError(
                f"device_map puts modules on {said}, for which device_budget has no bytes; give each device a budget"
                if lacking
                else f"device_budget has bytes for {said}, on which device_map puts nothing; leave them out"
            )

    def check_patterns(self, root: nn.Module) -> None:
        """Raise PlanError where a pattern matches no module."""
        paths = [path for path, _ in root.named_modules(remove_duplicate=False)]
        for pattern in self._devices:
            if any(matches_path(pattern, path) for path in paths):
                continue
            tensors = dict(root.named_parameters(remove_duplicate=False)) | dict(
                root.named_buffers(remove_duplicate=False)
            )
            near = ", ".join(f'"{path}"' for path in paths[1:4])
            raise PlanError(
                f'device_map names "{pattern}", which is a tensor; a module\'s tensors stay together, so name the '
                f'module: "{pattern.rpartition(".")[0]}"'
                if pattern in tensors
                else f'device_map names "{pattern}", which matches none of the {len(paths)} modules, such as {near}; '
                '"*" stands for one segment of a path, "**" for any number, and "" for the whole'
            )

    def names(self, path: str) -> bool:
        """Whether a key names a module, rather than all that is around it and below it (``"**"``)."""
        around = path.rpartition(".")[0]
        return bool(path) and (
            path in self._devices
            or any(matches_path(key, path) and not matches_path(key, around) for key in self._patterns)
        )

    def device_of(self, path: str) -> str | None:
        """The device of a module: what the map says of it, else of the nearest module around it."""
        at = path
        while True:
            if at in self._devices:
                return self._devices[at]
            for pattern in self._patterns:
                if matches_path(pattern, at):
                    return self._devices[pattern]
            if not at:
                return None
            at = at.rpartition(".")[0]


class Parts:
    """A model, parted by device. Making it changes nothing.

    Parameters
    ----------
    meta
        Whether tensors may be on meta.

    Attributes
    ----------
    root : torch.nn.Module
    home : str
        The device of the model's own forward.
    names : dict of str to list of str
        The tensors on each device, in the order of the model.
    roots : dict of str to torch.nn.Module
        For each device the tree of what is on it; see `shells`.
    device_of_tensor : dict of int to str
        By id of the tensor object.
    device_of_name : dict of str to str
        By every qualified name; those that wrap others, and what is inside of them.

    Raises
    ------
    PlanError
        A pattern of the map matches nothing; a tensor is on no device, or on two (tied, or a module that stands at two
        paths); a module that must be on one device is not; nothing is on a device.
    SpecError
        As `collect`.
    """

    def __init__(self, root: nn.Module, device_map: DeviceMap, *, meta: bool = False) -> None:
        device_map.check_patterns(root)
        self.root = root
        self.names: dict[str, list[str]] = {device: [] for device in device_map.drivers}
        self.device_of_tensor: dict[int, str] = {}
        self.device_of_name: dict[str, str] = {}
        self._own: dict[int, str] = {}
        nbytes = dict.fromkeys(self.names, 0)
        for entry in collect(root, meta=meta):
            device = _device_of(entry, device_map)
            self.names[device].append(entry.name)
            nbytes[device] += entry.spec.nbytes
            for member in entry.members:
                self.device_of_tensor[id(member.tensor)] = device
                for name, (module, attribute) in member.names.items():
                    self._own[id(module)] = device
                    self.device_of_name[name] = device
                    outside = attribute.split(".")[0]
                    self.device_of_name[name.removesuffix(attribute) + outside] = device
        empty = [device for device in nbytes if not nbytes[device]]
        if empty:
            raise PlanError(
                f'device_map puts no tensor of this {type(root).__name__} on "{empty[0]}"; leave that device out, or '
                "give it a module that has some"
            )
        self._below: dict[int, frozenset[str]] = {}
        self._look_below(root)
        self._paths: dict[int, str] = {}
        for path, module in root.named_modules():
            self._paths[id(module)] = path
            if isinstance(module, INDIVISIBLE) and self.is_split(module):
                raise PlanError(
                    f'device_map parts "{path}", a {type(module).__name__}, which hands the weights of its children to '
                    "kernels instead of calling them; put the whole of it on one device"
                )
        self._map = device_map
        self.home = device_map.device_of("") or next(iter(self.device_of_tensor.values()))
        self.roots = {device: self._tree(device) for device in self.names}

    def _look_below(self, module: nn.Module) -> frozenset[str]:
        found = self._below.get(id(module))
        if found is None:
            own = self._own.get(id(module))
            found = frozenset(() if own is None else (own,))
            for child in module.children():
                found |= self._look_below(child)
            self._below[id(module)] = found
        return found

    def _tree(self, device: str) -> nn.Module:
        return shell_tree(
            self.root,
            is_whole=lambda module: self._below[id(module)] == {device},
            has_part=lambda module: device in self._below[id(module)],
            has_tensors=lambda module: self._own.get(id(module)) == device,
        )

    def is_split(self, module: nn.Module) -> bool:
        """Whether a module has tensors on several devices."""
        return len(self._below[id(module)]) > 1

    def path_of(self, module: nn.Module) -> str | None:
        """The first path of a module; None where it is none of the model's."""
        return self._paths.get(id(module))

    def devices_of(self, module: nn.Module) -> list[str]:
        """The devices that a module has tensors on."""
        return [device for device in self.names if device in self._below[id(module)]]

    def borders(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules, beside the root, whose inputs may come from another device, and theirs.

        Those are the parts of what is split, and what the map names. A list of modules is called by whoever has it, one
        element after the other, so the elements are meant; a `Sequential` is called as often as it is gone through.
        """
        if len(self.names) == 1:
            return
        split = [module for module in self.root.modules() if self.is_split(module)]
        named = {id(m) for path, m in self.root.named_modules(remove_duplicate=False) if self._map.names(path)}
        ends = [child for module in split for child in module.children()]
        ends += [module for module in self.root.modules() if id(module) in named]
        seen: set[int] = set()
        for module in (inside for end in ends for inside in _elements(end)):
            if id(module) in seen:
                continue
            seen.add(id(module))
            below = self._below[id(module)]
            if below or id(module) in named:
                device = next(iter(below)) if len(below) == 1 else self._map.device_of(self._paths[id(module)])
                if device is not None and is_callable(module):
                    yield module, device


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and where it is a container the elements of it."""
    yield module
    if isinstance(module, nn.Sequential) or not is_callable(module):
        for child in module.children():
            yield from _elements(child)


def _device_of(entry: Entry, device_map: DeviceMap) -> str:
    found: dict[str, str] = {}
    for member in entry.members:
        for name, (_, attribute) in member.names.items():
            device = device_map.device_of(name.removesuffix(attribute).removesuffix("."))
            if device is None:
                raise PlanError(f'device_map says no device for "{name}"; add "" for what it does not name')
            found.setdefault(device, name)
    if len(found) > 1:
        (first, name), (second, other) = list(found.items())[:2]
        raise PlanError(
            f'"{name}" and "{other}" are one tensor (tied weights, or a module that stands twice), but device_map puts '
            f'the one on "{first}" and the other on "{second}"; put both on the same device'
        )
    return next(iter(found))
