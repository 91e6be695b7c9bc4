"""`Offloader`: offload a model while it is built, layer by layer, so that the whole is never on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import nn

from ..driver import open_driver
from ..errors import ClosedError, HostMemoryError, OffloadError, PlanError, RegistrationError, SpecError
from ..planning import CostModel, Policy, balanced
from .handle import OffloadHandle
from .layers import Layer, new_entries
from .offload import refuse_offloaded
from .offloading import Offloading, Pageable
from .takeover import FromLayers

__all__ = ["Offloader"]


class Offloader:
    """Offload a model while it is built.

    ::

        offloader = Offloader("20GiB")
        self.layers = nn.ModuleList(offloader.wrap(Block(config) for _ in range(config.depth)))
        ...
        load_weights(model)  # param.data.copy_(loaded), as ever
        handle = offloader.offload_(model)

    *Lifetime*: dropped without `offload_`, it leaves the wrapped layers in their slabs, which live as long as those;
    `abandon`, or leaving it as a context, gives them ordinary memory.

    Parameters
    ----------
    device_budget, device, units, slots, policy, cost, pageable, stage_unmapped
        See `offload_`. One device: where in the model a layer will stand, which a map goes by, is not known yet.
    """

    def __init__(
        self,
        device_budget: int | str,
        *,
        device: str | int | None = None,
        units: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        slots: int | None = None,
        policy: Policy = balanced,
        cost: CostModel | None = None,
        pageable: Pageable = "never",
        stage_unmapped: bool = False,
    ) -> None:
        if isinstance(device_budget, Mapping):
            raise PlanError(
                "an Offloader is of one device: when a layer is wrapped nobody knows yet where in the model it will "
                "stand, which is what a map of devices goes by; build on meta, and offload_(model, {device: budget}, "
                "device_map=, checkpoint=)"
            )
        self._offloading = Offloading(
            open_driver(device), device_budget, units, slots, policy, cost, pageable, stage_unmapped
        )
        self._layers: list[Layer] = []
        self._closed = ""

    @property
    def host_nbytes(self) -> int:
        """Bytes of the slabs of the wrapped layers."""
        return sum(layer.buffer.nbytes for layer in self._layers if layer.buffer is not None)

    def wrap(self, layers: Iterable[nn.Module]) -> list[nn.Module]:
        """Move each layer, as soon as it is there, to pinned host memory of exactly its size.

        A generator builds the next layer only then, so that at most one is on the device at a time. Parameters stay
        the same objects and can be written as before: they are the device's view of their host bytes. Those on
        ``meta`` become real, and are zero until they are written.

        *Aliasing*: the layers themselves are given back. *Ordering*: the bytes are there on return.

        Parameters
        ----------
        layers
            On the CPU, the device or ``meta``; a layer without tensors of its own passes through.

        Raises
        ------
        HostMemoryError
            Memory was refused for a layer, which is as it was. Those before it are wrapped.
        SpecError
            A tensor that cannot be offloaded, see `offload_`; or no module at all.
        OffloadError
            A layer is offloaded already.
        ClosedError
            The model was offloaded, or abandoned.
        """
        self._check_open()
        wrapped = []
        for layer in layers:
            self._wrap(layer)
            wrapped.append(layer)
        return wrapped

    def _wrap(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise SpecError(f"wrap() takes modules, not a {type(module).__name__}")
        refuse_offloaded(module)
        pageable, driver = self._offloading.pageable, self._offloading.driver
        known = {id(member.tensor) for layer in self._layers for member in layer.members()}
        with torch.inference_mode(False), torch.no_grad():
            entries = new_entries(module, known)
            if not entries:
                return
            try:
                layer = Layer(module, entries, driver, pinned=pageable != "always")
            except (HostMemoryError, RegistrationError):
                if pageable != "if_refused":
                    raise
                layer = Layer(module, entries, driver, pinned=False)
        self._layers.append(layer)

    def offload_(self, model: nn.Module) -> OffloadHandle:
        """Offload the whole model, in place; the plan is made now, of all its tensors.

        A layer that is streamed as one unit keeps its slab. One that becomes resident is moved to the device and its
        slab freed. What else is in the model is offloaded as `offload_` does it.

        *Aliasing*, *Lifetime*, *Ordering*: as of `offload_`.

        Raises
        ------
        OffloadError
            No layer was wrapped, or one of them is not in this model.
        ClosedError
            The model was offloaded already, or abandoned.
        PlanError, SpecError, HostMemoryError, DeviceMemoryError
            As of `offload_`. Every tensor has its values then, in its slab or where it was before it was wrapped.
        """
        self._check_open()
        refuse_offloaded(model)
        inside = {id(module) for module in model.modules()}
        strangers = [
            f"number {index}, a {type(layer.module).__name__}"
            for index, layer in enumerate(self._layers)
            if id(layer.module) not in inside
        ]
        if strangers or not self._layers:
            raise OffloadError(
                f"{len(strangers)} of {len(self._layers)} wrapped layers are not in this {type(model).__name__} "
                f"({'; '.join(strangers[:3])}); offload the model that they are in, or abandon() them"
                if strangers
                else "no layer was wrapped, so there is nothing to take over; call wrap() while the model is built, or "
                "offload_(model, ...) of dlpoffload.torch"
            )
        handle = OffloadHandle(model, self._offloading, FromLayers(self._layers))
        self._close("its model was offloaded")
        return handle

    def abandon(self) -> None:
        """Give every wrapped layer ordinary memory on the device where it was before; the CPU for what was on meta.

        One tensor at a time. Idempotent; does nothing after `offload_`.
        """
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._layers:
                layer.release()
        if not self._closed:
            self._close("it was abandoned")

    def _close(self, because: str) -> None:
        self._layers = []
        self._closed = because

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this Offloader is done: {self._closed}; make a new one for each model")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()

    def __repr__(self) -> str:
        state = self._closed or f"{len(self._layers)} layers wrapped"
        return f"<Offloader for {self._offloading.driver.device}, {state}>"
