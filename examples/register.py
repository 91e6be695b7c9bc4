"""Pin memory that exists already: an array, a file in the page cache. Nothing is copied, or it is an error."""

from __future__ import annotations

import mmap
import tempfile

import numpy as np

import dlpoffload as dlpo

# An array that somebody else allocated.
array = np.arange(100_000, dtype=np.float32)
with dlpo.HostBuffer.register(array) as buffer:
    print(f"array at {array.ctypes.data:#x}, buffer at {buffer.host_pointer:#x}: {buffer}")
    print(f"pinned, in whole pages: {dlpo.format_nbytes(dlpo.pinned_nbytes())}")
    array[7] = -1.0
    print(f"a write to the array is seen through the buffer: {np.from_dlpack(buffer.host_view((8,), 'float32'))}")

    # Ranges that share pages share one registration.
    with dlpo.HostBuffer.register(array[500:600]):
        print(f"a part of it registered too, still pinned: {dlpo.format_nbytes(dlpo.pinned_nbytes())}")

with tempfile.TemporaryFile() as file:
    file.write(np.linspace(0, 1, 50_000, dtype=np.float32).tobytes())
    file.flush()

    # A file, mapped shared: the page cache itself, which every process that maps it shares.
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with dlpo.HostBuffer.register(mapped) as buffer:
        weights = np.from_dlpack(buffer.host_view((50_000,), "float32"))
        print(f"file: {buffer}, read-only: {buffer.read_only}, last weight {weights[-1]}")
        del weights

    # A private, read-only mapping cannot be pinned: the driver would hang, so it is never asked.
    private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    try:
        dlpo.HostBuffer.register(private)
    except dlpo.RegistrationError as refused:
        print(f"refused: {refused}")

    # What the message advises.
    with dlpo.HostBuffer.copy_of(private) as buffer:
        print(f"copied instead: {buffer}, read-only: {buffer.read_only}")

print(f"pinned at the end: {dlpo.format_nbytes(dlpo.pinned_nbytes())}")
