"""What `HostBuffer` and `DeviceBuffer` share: a block, an end, and views that know both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from .background import Background
from .blocks import Block
from .closing import Closing
from .driver import Driver
from .errors import AliasError, ClosedError
from .lifetime import drain, release_now
from .spec import DType, TensorSpec, format_nbytes
from .view import Label, View, checked_range

__all__ = ["Buffer"]


class Buffer(Closing):
    """What both buffers share: a block, an end, and views that know both."""

    _called = "the buffer"
    _kind: ClassVar[str]

    def __init__(self, block: Block, pinning: Background | None = None) -> None:
        self._block: Block | None = block
        self._nbytes = block.nbytes
        self._pinning = pinning
        if pinning is not None:
            pinning.cancel_with(self)  # what is viewed lives on
            pinning.start()

    def _open_block(self) -> Block:
        if self._block is None:
            raise ClosedError(f"this {self._kind} of {format_nbytes(self._nbytes)} is closed; make a new one")
        return self._block

    @property
    def nbytes(self) -> int:
        """Bytes, exactly as asked for."""
        return self._nbytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called. Views that live on stay valid."""
        return self._block is None

    @property
    def device(self) -> str:
        """The device that this memory is pinned for or lies on, for example ``"cuda:0"``."""
        return self._driver().device

    @property
    def device_pointer(self) -> int:
        """Address of the first byte for the device.

        Raises
        ------
        AliasError
            The device cannot map host memory.
        """
        block = self._open_block()
        self._wait(1)
        if block.device_pointer is None:
            why = f"{self.device} cannot map host memory" if block.pinned else f"this {self._kind} is not pinned"
            raise AliasError(f"{why}, so these bytes have no device address; copy them instead")
        return block.device_pointer

    @property
    def live_views(self) -> int:
        """Views, capsules and consumers' tensors that are alive over this buffer."""
        return max(self._open_block().owner.users - self._is_pinning(), 0)

    @property
    def pinning(self) -> Background | None:
        """How far pinning in the background is; None where there is none."""
        return self._pinning

    def _is_pinning(self) -> bool:
        """Whether a thread still pins; it counts as a user of the memory."""
        return self._pinning is not None and self._pinning.state == "running"

    def _wait(self, nbytes: int) -> None:
        if self._pinning is not None:
            self._pinning.wait(nbytes)

    def _driver(self) -> Driver:
        driver = self._open_block().driver
        assert driver is not None
        return driver

    def _view(
        self,
        shape: Sequence[int],
        dtype: DType | str,
        strides: Sequence[int] | None,
        byte_offset: int,
        label: Label,
    ) -> View:
        block = self._open_block()
        return self._view_of_spec(block, TensorSpec(shape, dtype, strides), byte_offset, label)

    def _view_of_spec(
        self,
        block: Block,
        spec: TensorSpec,
        byte_offset: int,
        label: Label,
        *,
        whole: bool = True,
        read_only: bool = False,
    ) -> View:
        base = block.device_pointer if block.host_pointer is None else block.host_pointer
        assert base is not None
        offset = checked_range(spec, byte_offset, base, block.nbytes, self._kind)
        if self._pinning is not None:
            if whole and spec.nbytes and len(list(block.pieces(offset, spec.nbytes))) > 1:
                raise AliasError(
                    f"a view of {spec} at byte_offset={offset} lies in two chunks, and no copy may cross them; pin in "
                    "larger chunks (chunk_nbytes), or place the tensor elsewhere"
                )
            self._pinning.wait(offset + max(spec.nbytes, 1))
        if label is Label.DEVICE:
            _ = self.device_pointer  # says why when there is none
        elif label is not Label.CPU and not block.pinned:
            raise AliasError(f'this {self._kind} is not pinned, so its views cannot be labelled "{label.value}"')
        try:
            return View(
                block.owner,
                spec,
                label=label,
                driver=block.driver,
                host_pointer=None if block.host_pointer is None else block.host_pointer + offset,
                device_pointer=None if block.device_pointer is None else block.device_pointer + offset,
                read_only=block.read_only or read_only,
            )
        except RuntimeError as error:  # closed by another thread in between
            raise ClosedError(f"this {self._kind} is closed; make a new one") from error

    def close(self) -> None:
        """Free the memory now. Idempotent.

        *Ordering*: waits for copies enqueued out of it, then unpins, then unmaps.

        Raises
        ------
        ClosedError
            Views are alive; the message says how many. The buffer stays open.
        CudaError, RegistrationError
            The driver would not take the memory back. The buffer is closed, its memory stays allocated.
        """
        block = self._block
        if block is None:
            return
        if self._pinning is not None:
            self._pinning.cancel()
            self._pinning.join()
        drain()
        users = block.owner.users
        if users:
            raise ClosedError(
                f"{users} live view{'s' if users > 1 else ''} (or tensors made from views) still use this "
                f"{self._kind} of {format_nbytes(self._nbytes)}; drop them first, or drop the buffer "
                "instead of closing it: it is freed when the last view is gone"
            )
        self._block = None
        release_now(block.owner)

    def _check_open(self) -> object:
        return self._open_block()

    def _let_go(self) -> None:
        self._block = None

    def __repr__(self) -> str:
        if self._block is None:
            return f"<closed {self._kind} of {self._nbytes} bytes>"
        return f"<{self._kind} of {self._nbytes} bytes on {self.device}, {self.live_views} live views>"
