"""`FilledTensors`: the buffers of a store, filled from outside: by a reader, or by taking a buffer that is full."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from ..errors import SpecError
from ..memory import HostBuffer
from .homes import Home
from .tensors import StoredTensors

__all__ = ["FilledTensors"]


class FilledTensors(StoredTensors):
    """Named tensors, and how their bytes come to them whole."""

    def memoryviews(self, names: Container[str] | None = None) -> Iterator[tuple[memoryview, Mapping[str, int]]]:
        """View the bytes of each buffer, allocated when its turn comes, and where its tensors start.

        *Aliasing*: these bytes, writable. `Checkpoint.read_into` takes this.

        Parameters
        ----------
        names
            Only the buffers of these tensors, and of each buffer only those.
        """
        for home, byte_offsets in self._contents.offsets():
            starts = {name: start for name, start in byte_offsets.items() if names is None or name in names}
            if starts:
                self._check_open()
                buffer, shift = home.open()
                yield buffer.memoryview(), {name: shift + start for name, start in starts.items()}

    def adopt(self, unit: str, buffer: HostBuffer) -> None:
        """Adopt a buffer that holds a unit's tensors already, as `slab` lays them out.

        *Aliasing*: the buffer's own bytes. *Lifetime*: as if the store had allocated it.

        Raises
        ------
        SpecError
            The store has no such unit, or has memory for it; the buffer is of another size or kind, or for another
            device.
        """
        home = self._region(unit).home
        with self._lock:
            there = home is None or home.buffer is not None
            found = (buffer.nbytes, buffer.pinned, buffer.device)
            wanted = (0 if home is None else home.nbytes, self._memory.pageable != "always", self._device)
            if home is None or there or found != wanted:
                raise SpecError(
                    f'unit "{unit}" '
                    + ("has memory already" if there else f"takes a buffer of {wanted}")
                    + f", so it cannot adopt one of {found} (bytes, pinned, device)"
                )
            home.adopt(Home.of(buffer))
