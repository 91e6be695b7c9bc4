"""Pages mapped, advised, populated and unmapped; copies; addresses of buffers."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import platform
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
SMAPS = Path("/proc/self/smaps")

needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc/self/smaps")


@contextmanager
def mapped(native: ModuleType, nbytes: int, alignment: int = PAGE, huge_pages: bool = False) -> Iterator[int]:
    address = native.map_anonymous(nbytes, alignment, huge_pages)
    try:
        yield address
    finally:
        native.unmap(address, nbytes)


def bytes_at(address: int, nbytes: int) -> Any:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=np.uint8)


def mapping_at(address: int) -> dict[str, str] | None:
    """What the kernel says of the mapping that holds `address`; None when there is none."""
    found: dict[str, str] | None = None
    for line in SMAPS.read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            if found is not None:
                return found
            start, end = int(match.group(1), 16), int(match.group(2), 16)
            if start <= address < end:
                found = {"start": str(start), "end": str(end), "mode": match.group(3)}
        elif found is not None:
            key, _, value = line.partition(":")
            found[key] = value.strip()
    return found


def resident_pages(address: int, nbytes: int) -> int:
    pages = -(-nbytes // PAGE)
    vector = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), vector) == 0
    return sum(byte & 1 for byte in vector)


# -------------------------------------------------------------------------------------------------- mappings


@pytest.mark.parametrize("alignment", [1, 256, PAGE, HUGE, 64 << 20])
@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, HUGE + 17])
def test_mapping_is_aligned_zero_and_writable(native: ModuleType, nbytes: int, alignment: int) -> None:
    with mapped(native, nbytes, alignment) as address:
        assert address % max(alignment, PAGE) == 0
        content = bytes_at(address, nbytes)
        assert not content.any()
        content[:] = 0xAB
        assert content[-1] == 0xAB


def mapped_nbytes() -> int:
    match = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) << 10


@needs_smaps
def test_alignment_leaves_nothing_mapped_around(native: ModuleType) -> None:
    before = mapped_nbytes()
    addresses = [native.map_anonymous(PAGE, 1 << 30, False) for _ in range(8)]
    assert all(address % (1 << 30) == 0 for address in addresses)
    assert mapped_nbytes() - before < 64 << 20  # of the 8 GiB that were looked through
    for address in addresses:
        native.unmap(address, PAGE)


@needs_smaps
def test_unmap_takes_the_whole_of_the_last_page(native: ModuleType) -> None:
    before = mapped_nbytes()
    for _ in range(4000):
        native.unmap(native.map_anonymous(PAGE + 1, PAGE, False), PAGE + 1)
    assert mapped_nbytes() - before < 2000 * PAGE


@needs_smaps
def test_advice_reaches_the_kernel(native: ModuleType) -> None:
    with mapped(native, 4 * HUGE, HUGE, huge_pages=True) as address:
        before = mapping_at(address)
        assert before is not None
        if Path("/sys/kernel/mm/transparent_hugepage").exists():
            assert "hg" in before["VmFlags"].split()
        assert "dc" not in before["VmFlags"].split()
        native.dont_fork(address, HUGE)
        after, rest = mapping_at(address), mapping_at(address + HUGE)
        assert after is not None
        assert rest is not None
        assert "dc" in after["VmFlags"].split()
        assert "dc" not in rest["VmFlags"].split()
    with mapped(native, 4 * HUGE, HUGE) as address:
        plain = mapping_at(address)
        assert plain is not None
        assert "hg" not in plain["VmFlags"].split()


@pytest.mark.parametrize("nbytes", [0, (1 << 64) - 1, 1 << 62, (1 << 47) + PAGE])
def test_mapping_that_cannot_be(native: ModuleType, nbytes: int) -> None:
    with pytest.raises(OSError, match=r"Errno") as caught:
        native.map_anonymous(nbytes, PAGE, False)
    assert caught.value.errno == (errno.EINVAL if nbytes == 0 else errno.ENOMEM)


@pytest.mark.parametrize(
    ("nbytes", "alignment", "error"),
    [
        (-1, PAGE, OverflowError),
        (1 << 64, PAGE, OverflowError),
        ("1", PAGE, TypeError),
        (PAGE, 0, ValueError),
        (PAGE, 3, ValueError),
        (PAGE, -4096, OverflowError),
    ],
)
def test_mapping_arguments(native: ModuleType, nbytes: Any, alignment: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        native.map_anonymous(nbytes, alignment, False)


def test_errors_of_the_kernel_are_raised(native: ModuleType) -> None:
    address = native.map_anonymous(2 * PAGE, PAGE, False)
    for call in (native.unmap, native.dont_fork):
        with pytest.raises(OSError, match="Errno") as caught:
            call(address + 1, PAGE)
        assert caught.value.errno == errno.EINVAL
    native.unmap(address, 2 * PAGE)
    with pytest.raises(OSError, match="Errno") as caught:
        native.dont_fork(address, 2 * PAGE)
    assert caught.value.errno == errno.ENOMEM


# -------------------------------------------------------------------------------------------------- populate


@pytest.mark.parametrize("threads", [1, 2, 5, 10_000])
@pytest.mark.parametrize("nbytes", [1, 3 * PAGE - 1, (96 << 20) + 5])
def test_populate_faults_every_page_in(native: ModuleType, nbytes: int, threads: int) -> None:
    with mapped(native, nbytes) as address:
        assert resident_pages(address, nbytes) == 0
        native.populate(address, nbytes, threads)
        assert resident_pages(address, nbytes) == -(-nbytes // PAGE)


def test_populate_only_what_was_asked_and_keeps_contents(native: ModuleType) -> None:
    with mapped(native, 8 * PAGE) as address:
        content = bytes_at(address, 8 * PAGE)
        content[3 * PAGE] = 7
        native.populate(address + 2 * PAGE + 5, PAGE, 1)  # lies on two pages
        assert resident_pages(address, 8 * PAGE) == 2
        native.populate(address, 0, 1)
        assert resident_pages(address, 8 * PAGE) == 2
        native.populate(address, 8 * PAGE, 2)
        assert content.sum() == content[3 * PAGE] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only MADV_POPULATE_WRITE reports errors")
@pytest.mark.parametrize("threads", [1, 4])
def test_populate_reports_the_error_of_any_thread(native: ModuleType, threads: int) -> None:
    nbytes = 160 << 20
    address = native.map_anonymous(nbytes, HUGE, False)
    native.unmap(address + (100 << 20), PAGE)  # in the midst of a piece that is not the first
    with pytest.raises(OSError, match="Errno") as caught:
        native.populate(address, nbytes, threads)
    assert caught.value.errno == errno.ENOMEM
    native.unmap(address, nbytes)

    with mmap.mmap(-1, PAGE, prot=mmap.PROT_READ) as read_only:
        pointer = native.buffer_pointer(read_only)
        with pytest.raises(OSError, match="Errno") as caught:
            native.populate(pointer, PAGE, threads)
        assert caught.value.errno in (errno.EINVAL, errno.EFAULT)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A file of 40 pages, mapped shared and read-only, and where."""
    path = tmp_path / "file"
    path.write_bytes(bytes(40 * PAGE))
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        yield np.frombuffer(mapping, np.uint8).ctypes.data, path


@pytest.mark.parametrize("threads", [1, 3])
def test_populate_for_reading(native: ModuleType, file: tuple[int, Path], threads: int) -> None:
    address, path = file
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 14):
        with pytest.raises(OSError, match="Errno") as caught:
            native.populate(address, PAGE, threads, write=False)
        assert caught.value.errno == errno.ENOSYS
        return
    native.populate(address, 40 * PAGE, threads, write=False)
    smaps = mapping_at(address)
    assert smaps is not None
    assert smaps["Rss"] == f"{40 * PAGE >> 10} kB"
    with pytest.raises(OSError, match="Errno") as caught:
        native.populate(address, PAGE, threads)  # for writing, which the mapping is not
    assert caught.value.errno in (errno.EINVAL, errno.EFAULT)
    os.truncate(path, 10 * PAGE)
    native.populate(address, 10 * PAGE, threads, write=False)
    with pytest.raises(OSError, match="Errno") as caught:
        native.populate(address, 40 * PAGE, threads, write=False)
    assert caught.value.errno == errno.EFAULT, "and no SIGBUS"


def test_a_mapped_file_is_shared_and_read_only_and_keeps_no_descriptor(native: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE) + bytes(range(256)) * (2 * PAGE // 256))
    with path.open("r+b") as opened:
        before = len(os.listdir("/proc/self/fd"))
        address = native.map_file(opened.fileno(), PAGE, PAGE + 5)
        assert len(os.listdir("/proc/self/fd")) == before
        assert bytes(bytes_at(address, PAGE + 5)) == path.read_bytes()[PAGE : 2 * PAGE + 5]
        os.pwrite(opened.fileno(), b"new", PAGE)
    assert bytes(bytes_at(address, 3)) == b"new", "the file's own pages, also when it is closed"
    smaps = mapping_at(address)
    assert smaps is not None
    assert smaps["mode"] == "r--s"
    native.unmap(address, PAGE + 5)
    assert mapping_at(address) is None


@pytest.mark.parametrize(
    ("descriptor", "byte_offset", "nbytes", "error"),
    [
        (1 << 20, 0, PAGE, errno.EBADF),
        (None, 1, PAGE, errno.EINVAL),
        (None, 0, 0, errno.EINVAL),
        (None, 0, 1 << 62, errno.ENOMEM),
        (-1, 0, PAGE, OverflowError),
        (1 << 31, 0, PAGE, OverflowError),
        (None, -1, PAGE, OverflowError),
        (None, 1 << 63, PAGE, OverflowError),
        (None, 0, -1, OverflowError),
        ("0", 0, PAGE, TypeError),
        (None, 0.0, PAGE, TypeError),
    ],
)
def test_a_file_that_cannot_be_mapped(
    native: ModuleType, tmp_path: Path, descriptor: Any, byte_offset: Any, nbytes: Any, error: Any
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as opened:
        at = opened.fileno() if descriptor is None else descriptor
        with pytest.raises(OSError if isinstance(error, int) else error) as caught:
            native.map_file(at, byte_offset, nbytes)
    if isinstance(error, int):
        assert caught.value.errno == error


@pytest.mark.skipif(not Path("/sys/devices/system/node/node0").exists(), reason="needs NUMA nodes")
def test_pages_are_preferred_from_a_node(native: ModuleType) -> None:
    with mapped(native, 3 * PAGE + 1) as address:
        native.prefer_node(address, 3 * PAGE + 1, 0)
        native.populate(address, 3 * PAGE + 1, 1)
        for node, error in ((1023, OSError), (1024, OverflowError), (-1, OverflowError)):
            with pytest.raises(error):
                native.prefer_node(address, PAGE, node)
    with pytest.raises(OSError, match="Errno"):
        native.prefer_node(address + 1, PAGE, 0)


def test_hugetlb_pages_that_are_not_there(native: ModuleType) -> None:
    with pytest.raises(OSError, match="Errno") as caught:
        native.map_hugetlb(1 << 62, HUGE)
    assert caught.value.errno in (errno.ENOMEM, errno.EINVAL, errno.ENOSYS)
    for page_nbytes in (0, 3, HUGE + 1, 1 << 41):
        with pytest.raises((ValueError, OSError)):
            native.map_hugetlb(HUGE, page_nbytes)
    with pytest.raises((OverflowError, TypeError)):
        native.map_hugetlb(-1, HUGE)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, PAGE, 1), OverflowError),
        ((PAGE, -1, 1), OverflowError),
        ((PAGE, PAGE, 0), ValueError),
        ((PAGE, PAGE, -1), OverflowError),
        ((PAGE, PAGE, 1.5), TypeError),
    ],
)
def test_populate_arguments(native: ModuleType, arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        native.populate(*arguments)


# ---------------------------------------------------------------------------------------------------- buffers


def test_buffer_pointer(native: ModuleType) -> None:
    data = bytearray(b"0123456789")
    pointer = native.buffer_pointer(data)
    assert ctypes.string_at(pointer, 10) == data
    assert native.buffer_pointer(memoryview(data)[3:]) == pointer + 3
    data.append(1)  # the buffer was released, so it can grow

    matrix = np.arange(12.0).reshape(3, 4)
    assert native.buffer_pointer(matrix) == matrix.ctypes.data
    assert native.buffer_pointer(matrix.T) == matrix.ctypes.data
    matrix.flags.writeable = False
    assert native.buffer_pointer(matrix) == matrix.ctypes.data
    numbers = array.array("d", [1, 2])
    assert native.buffer_pointer(memoryview(numbers)) == numbers.buffer_info()[0]
    constant = b"read-only"
    assert ctypes.string_at(native.buffer_pointer(constant), 9) == constant
    assert native.buffer_pointer(b"") == 0
    assert native.buffer_pointer(matrix[:0]) == 0


def test_buffer_pointer_refuses(native: ModuleType) -> None:
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        native.buffer_pointer(np.arange(12)[::2])
    with pytest.raises(BufferError, match="contiguous"):
        native.buffer_pointer(memoryview(b"abcdef")[::2])
    with pytest.raises(TypeError, match="bytes-like"):
        native.buffer_pointer(3)
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(ValueError, match="released"):
        native.buffer_pointer(view)


# ----------------------------------------------------------------------------------------------------- copies


def test_copy_moves_overlapping_bytes(native: ModuleType) -> None:
    data = bytearray(range(64))
    pointer = native.buffer_pointer(data)
    native.copy(pointer + 8, pointer, 48)
    assert data == bytes([*range(8), *range(48), *range(56, 64)])
    native.copy(pointer, pointer + 8, 48)
    assert data[:48] == bytes(range(48))


@pytest.mark.parametrize("threads", [1, 3, 10_000])
@pytest.mark.parametrize("nbytes", [1, (4 << 20) - 1, (4 << 20), (96 << 20) + 7])
def test_copy_on_several_threads(native: ModuleType, threads: int, nbytes: int) -> None:
    source = bytearray(random.Random(nbytes).randbytes(min(nbytes, 1 << 16))) * (nbytes // (1 << 16) + 1)
    target = bytearray(len(source))
    native.copy(native.buffer_pointer(target), native.buffer_pointer(source), nbytes, threads=threads)
    assert target[:nbytes] == source[:nbytes]
    assert not any(target[nbytes:])


def test_copy_of_overlapping_bytes_on_several_threads(native: ModuleType) -> None:
    piece = random.Random(0).randbytes(1 << 16)
    data = bytearray(piece * (3 << 9))
    pointer = native.buffer_pointer(data)
    shift = 12_345
    wanted = data[:shift] + data[:-shift]
    native.copy(pointer + shift, pointer, len(data) - shift, threads=4)
    assert data == wanted


def test_copy_arguments(native: ModuleType) -> None:
    pointer = native.buffer_pointer(bytearray(8))
    native.copy(0, 0, 0)
    with pytest.raises(ValueError, match="threads=0"):
        native.copy(pointer, pointer, 8, threads=0)
    for arguments in ((pointer, pointer, -1), (-1, pointer, 1), (pointer, 1 << 64, 1), (pointer, pointer, 1 << 63)):
        with pytest.raises(OverflowError):
            native.copy(*arguments)
    for arguments in ((0, pointer, 1), (pointer, 0, 1)):
        with pytest.raises(OSError, match="Errno") as caught:
            native.copy(*arguments)
        assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16, 24])
def test_copy_strided_gathers_like_numpy(native: ModuleType, itemsize: int, seed: int) -> None:
    rng = random.Random(seed)
    base = np.frombuffer(random.Random(itemsize).randbytes(7 * 6 * 5 * 4 * itemsize), dtype=np.uint8)
    whole = base.reshape(7, 6, 5, 4, itemsize).view(f"V{itemsize}")[..., 0]
    for _ in range(60):
        view = whole.transpose(rng.sample(range(4), 4))
        cut = tuple(
            rng.choice([slice(None), slice(None, None, -1), slice(1, None, 2), slice(0, 1), slice(0, 0), 2, None])
            for _ in range(4)
        )
        view = view[cut]
        if rng.random() < 0.2:
            view = np.broadcast_to(view, (3, *view.shape))
        strides = tuple(step // itemsize for step in view.strides)
        result = np.full(view.size * itemsize + 8, 0xEE, dtype=np.uint8)
        pointer = view.__array_interface__["data"][0]
        native.copy_strided(result.ctypes.data, pointer, itemsize, view.shape, strides)
        assert result[: view.size * itemsize].tobytes() == view.tobytes(), (view.shape, strides)
        assert (result[view.size * itemsize :] == 0xEE).all()


def test_copy_strided_scalar_and_contiguous(native: ModuleType) -> None:
    source = np.arange(24, dtype=np.int32)
    result = np.zeros(24, dtype=np.int32)
    native.copy_strided(result.ctypes.data, source.ctypes.data + 12, 4, (), ())
    assert result.tolist() == [3] + [0] * 23
    native.copy_strided(result.ctypes.data, source.ctypes.data, 4, (2, 3, 4), (12, 4, 1))
    assert result.tolist() == source.tolist()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"itemsize": 0}, ValueError),
        ({"itemsize": -1}, OverflowError),
        ({"shape": (-1,)}, ValueError),
        ({"shape": (2, 2)}, ValueError),
        ({"shape": [4]}, TypeError),
        ({"source_strides": (1 << 61,)}, ValueError),
        ({"source_strides": (1 << 63,)}, OverflowError),
        ({"source": 0}, ValueError),
        ({"destination": 0}, ValueError),
    ],
)
def test_copy_strided_arguments(native: ModuleType, change: dict[str, Any], error: type[Exception]) -> None:
    source, result = bytearray(b"abcd"), bytearray(4)
    arguments: dict[str, Any] = {
        "destination": native.buffer_pointer(result),
        "source": native.buffer_pointer(source),
        "itemsize": 1,
        "shape": (4,),
        "source_strides": (1,),
    }
    with pytest.raises(error):
        native.copy_strided(**(arguments | change))
    assert result == bytes(4)
    native.copy_strided(**arguments)
    assert result == source


def test_long_calls_leave_the_gil_alone(native: ModuleType) -> None:
    # A second thread counts while this one copies: were the GIL held, it would stand still until the end.
    nbytes = 64 << 20
    with mapped(native, 2 * nbytes, HUGE, huge_pages=True) as address:
        native.populate(address, 2 * nbytes, 2)
        ticks = [0]
        stop = threading.Event()

        def count() -> None:
            while not stop.is_set():
                ticks[0] += 1
                time.sleep(0)  # gives the GIL up

        thread = threading.Thread(target=count)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # nobody is made to give the GIL up, so a tick seen was let in by the copy
        try:
            thread.start()
            seen = []
            for _ in range(10):
                before = ticks[0]
                native.copy(address, address + nbytes, nbytes)
                seen.append(ticks[0] > before)
                if any(seen):
                    break
        finally:
            stop.set()
            sys.setswitchinterval(interval)
            thread.join()
        assert any(seen)
