"""What the lanes of a soak share: each is a thread with models of its own, a resident twin beside each, and a seed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dlpoffload.driver import Driver
from dlpoffload.errors import CudaError, DeviceMemoryError, OffloadError, RegistrationError
from dlpoffload.torch import placed as placed_module

__all__ = ["Lane", "Refusals"]

Action = Callable[[], None]


# ------------------------------------------------------------------------------------------------ refusals


class Refusals:
    """Refuses the n-th call of a kind on one thread, when it was asked for there: other threads are left alone."""

    CALLS = ("host_register", "device_alloc", "event_create", "stream_create", "empty_bytes")

    def __init__(self, driver: Driver) -> None:
        self._mine = threading.local()
        for call in self.CALLS[:-1]:
            setattr(driver, call, self._guarded(call, getattr(driver, call)))
        # Residents and slots come from torch's own allocator.
        placed_module.empty_bytes = self._guarded("empty_bytes", placed_module.empty_bytes)

    def _guarded(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if getattr(self._mine, "call", None) == call:
                self._mine.left -= 1
                if self._mine.left == 0:
                    self._mine.call = None
                    raise self._error(call)
            return function(*arguments, **options)

        return guarded

    @staticmethod
    def _error(call: str) -> OffloadError:
        if call == "host_register":
            return RegistrationError("refused by the soak")
        if call in ("device_alloc", "empty_bytes"):
            return DeviceMemoryError("refused by the soak", nbytes=1)
        return CudaError(call, 2, "CUDA_ERROR_OUT_OF_MEMORY", "refused by the soak")

    @contextmanager
    def nth(self, call: str, n: int) -> Iterator[None]:
        """Refuse the n-th call inside the block; fewer calls end in no error."""
        self._mine.call, self._mine.left = call, n
        try:
            yield
        finally:
            self._mine.call = None


# -------------------------------------------------------------------------------------------------- lanes


class Lane:
    """One thread's work: actions drawn by its seed, each of which ends with a comparison.

    Attributes
    ----------
    counts : Counter
        How often each action was done.
    compared : int
        Bytes that were compared with the twin's.
    refused : Counter
        Injected errors by call, or by "layer".
    log : list of str
        The last actions, for whoever has to find out.
    """

    def __init__(self, name: str, device: str, seed: int, refusals: Refusals, width: int) -> None:
        self.name, self.device, self.width = name, device, width
        self.refusals = refusals
        self.rng = random.Random(f"{seed}/{name}")
        self.generator = torch.Generator().manual_seed(self.rng.randrange(1 << 31))
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.compared = 0
        self.log: list[str] = []
        self.actions: dict[str, tuple[int, Action]] = {}

    def run(self, going: Callable[[], bool]) -> None:
        """Do one action after the other; a difference is an error that names them."""
        names = list(self.actions)
        weights = [self.actions[name][0] for name in names]
        with ExitStack() as stack:
            if self.device != "cpu" and self.name.endswith("b"):
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self.device)))
            while going():
                (action,) = self.rng.choices(names, weights)
                self.log = [*self.log[-19:], action]
                self.actions[action][1]()
                self.counts[action] += 1
            self.close()

    def close(self) -> None:
        """Let go of everything."""

    def same(self, found: Tensor, wanted: Tensor, what: str) -> None:
        """Compare bit by bit."""
        wanted = wanted.to(found.device)
        one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted))
        if found.shape != wanted.shape or found.dtype != wanted.dtype or not torch.equal(one, other):
            raise AssertionError(f"{self.name}: {what} differs from the resident twin's, after {', '.join(self.log)}")
        self.compared += other.numel()

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)
