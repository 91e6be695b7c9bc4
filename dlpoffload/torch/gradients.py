"""Gradients pass through offloaded weights, to inputs and adapters; they never reach an offloaded weight itself.

A gradient of the size of the weights would land on the device. So a backward that would accumulate one is refused at
the outputs of the module, before anything accumulates anywhere inside of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch.autograd.graph import get_gradient_edge

from ..errors import GradientError
from .compiling import uncompiled
from .subclasses import wraps_others

__all__ = ["guard_outputs", "refuse_gradients", "tensors_in"]


def refuse_gradients(named: Iterable[tuple[str, torch.Tensor]]) -> list[torch.utils.hooks.RemovableHandle]:
    """The last line: a hook on each offloaded tensor that requires a gradient, now or later."""
    hooks = []
    for name, tensor in _once(named):
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            required = tensor.requires_grad
            tensor.requires_grad_(True)  # torch takes no hook otherwise
            try:
                hooks.append(tensor.register_hook(_Refusal(name)))  # type: ignore[no-untyped-call]
            finally:
                tensor.requires_grad_(required)
    return hooks


@uncompiled
def guard_outputs(output: Any, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Let a backward through `output` look first whether it will reach one of these parameters."""
    trainable = [(name, _node_of(tensor)) for name, tensor in _once(named) if tensor.requires_grad]
    trainable = [(name, node) for name, node in trainable if node is not None]
    if trainable:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:  # a leaf that passed through would keep its hook for ever
                tensor.register_hook(_Check(trainable, tensor.grad_fn))  # type: ignore[no-untyped-call]


def _once(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for name, tensor in named:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _node_of(tensor: torch.Tensor) -> Any:
    """The node that accumulates a leaf's gradient; None of a subclass that has no view, by which torch finds it."""
    try:
        return get_gradient_edge(tensor).node
    except (NotImplementedError, RuntimeError, TypeError):
        if not wraps_others(tensor):
            raise
        return None


class _Check:
    """Looks, when a gradient arrives at an output, at what it will reach.

    What a reentrant checkpoint recomputes is in no graph yet: there it may be any of the parameters.
    """

    def __init__(self, trainable: list[tuple[str, Any]], node: Any) -> None:
        self.trainable = trainable
        self.recomputes = _recomputes(node)
        self.below = [below for below, _ in node.next_functions if below is not None]  # not the node, that holds us

    def __call__(self, gradient: torch.Tensor) -> None:
        for name, node in self.trainable:
            try:
                reached = torch._C._will_engine_execute_node(node)
            except RuntimeError:  # torch.autograd.grad was asked for this very parameter
                reached = True
            if reached:
                _refuse(name)
        if self.recomputes or any(map(torch._C._will_engine_execute_node, _checkpoints(self.below))):
            _refuse(self.trainable[0][0], ", in what a reentrant checkpoint recomputes")


class _Refusal:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, gradient: torch.Tensor) -> NoReturn:
        _refuse(self.name)


def _recomputes(node: Any) -> bool:
    return bool(node.name().endswith("CheckpointFunctionBackward"))


def _checkpoints(nodes: list[Any]) -> Iterator[Any]:
    """The nodes of reentrant checkpoints among `nodes` and below."""
    ahead, seen = list(nodes), set(nodes)
    while ahead:
        node = ahead.pop()
        if _recomputes(node):
            yield node
        following = {below for below, _ in node.next_functions if below is not None} - seen
        seen |= following
        ahead.extend(following)


def _refuse(name: str, where: str = "") -> NoReturn:
    raise GradientError(
        f'backward would accumulate a gradient for "{name}", which is offloaded{where}; freeze it with '
        "requires_grad_(False) (gradients pass through it all the same), or keep it on the device by a pattern_policy"
    )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in tensors, tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
