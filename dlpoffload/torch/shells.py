"""Shells: what stands for a module whose parts are on several devices, in the tree of one of them.

A device's tree has the model's own modules where these are wholly on the device, and shells above them, so that every
name in it is the name in the model, and what looks at the tree still sees the containers that repeat.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["Shell", "real_of", "shell_tree"]


class Shell(nn.Module):
    """Stands for a module of which this device has a part. It is looked at, and never called.

    Attributes
    ----------
    real : torch.nn.Module
        The module that it stands for.
    """

    real: nn.Module

    def __init__(self, real: nn.Module, *, with_tensors: bool) -> None:
        super().__init__()
        self.__dict__["real"] = real  # not a child
        if with_tensors:
            # The module's own tables: what somebody puts there is seen here.
            self.__dict__["_parameters"] = real._parameters
            self.__dict__["_buffers"] = real._buffers


def real_of(module: nn.Module) -> nn.Module:
    """The module itself, or the one that a shell stands for."""
    return module.real if isinstance(module, Shell) else module


def shell_tree(
    root: nn.Module,
    is_whole: Callable[[nn.Module], bool],
    has_part: Callable[[nn.Module], bool],
    has_tensors: Callable[[nn.Module], bool],
) -> nn.Module:
    """The tree of what one device has of a module.

    Parameters
    ----------
    is_whole, has_part
        Whether a module, with all that is below it, lies on the device; whether some of it does.
    has_tensors
        Whether a module's own tensors do.
    """
    made: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if is_whole(module):
            return module
        shell = made.get(id(module))
        if shell is None:
            shell = made[id(module)] = Shell(module, with_tensors=has_tensors(module))
            for name, child in module._modules.items():
                if child is not None and has_part(child):
                    shell._modules[name] = visit(child)
        return shell

    return visit(root)
