"""Which mappings may be pinned in place, read from a memory map written here."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from dlpoffload import _native
from dlpoffload.errors import RegistrationError
from dlpoffload.maps import Access, check_registrable, mappings

MAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/a program
00651000-00652000 r--p 00051000 08:02 173521      /usr/bin/a program
00e03000-00e24000 rw-p 00000000 00:00 0           [heap]
7f0000000000-7f0000001000 r--s 00000000 08:02 77  /data/model.safetensors (deleted)
7f0000001000-7f0000002000 rw-s 00000000 08:02 78  /data/shared rw
7f0000002000-7f0000003000 rw-s 00000000 00:01 9   /dev/zero (deleted)
7f0000003000-7f0000004000 rw-p 00000000 08:02 79  /data/private rw
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
7f0000005000-7f0000006000 r--p 00000000 00:00 0
7f0000006000-7f0000007000 ---p 00000000 00:00 0
7f0000007000-7f0000008000 r--p 00000000 08:02 80  /data/private \\012 read-only
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
"""


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    path = tmp_path / "maps"
    path.write_text(MAPS)
    return path


def page(number: int) -> int:
    return 0x7F0000000000 + number * 0x1000


def test_mappings_are_those_that_share_a_byte_with_the_range(maps: Path) -> None:
    def paths(start: int, end: int) -> list[str]:
        return [m.path for m in mappings(start, end, maps)]

    assert paths(page(0), page(2)) == ["/data/model.safetensors (deleted)", "/data/shared rw"]
    assert paths(page(1) - 1, page(1) + 1) == ["/data/model.safetensors (deleted)", "/data/shared rw"]
    assert paths(page(1), page(1) + 1) == ["/data/shared rw"]
    assert paths(0x1000, 0x2000) == []
    assert paths(0, 1 << 64) == [
        line.split(maxsplit=5)[5] if len(line.split()) > 5 else "" for line in MAPS.splitlines()
    ]


def test_a_line_is_read_field_by_field(maps: Path) -> None:
    (found,) = mappings(page(7), page(8), maps)
    assert (found.start, found.end, found.permissions, found.inode) == (page(7), page(8), "r--p", 80)
    assert found.path == "/data/private \\012 read-only"
    assert found.is_private
    assert not found.is_writable


@pytest.mark.parametrize(
    ("first", "pages", "access"),
    [
        (0, 1, Access.READ_ONLY),
        (1, 1, Access.SHARED_FILE),
        (2, 1, Access.SHARED_FILE),
        (1, 2, Access.SHARED_FILE),
        (0, 2, Access.READ_ONLY),  # shared through and through, in part read-only
        (3, 1, Access.WRITABLE),
        (4, 1, Access.WRITABLE),
        (2, 3, Access.WRITABLE),  # a private part must never be registered read-only
    ],
)
def test_access_is_that_of_the_weakest_mapping(maps: Path, first: int, pages: int, access: Access) -> None:
    assert check_registrable(page(first), pages * 0x1000, maps) is access


@pytest.mark.parametrize(
    ("first", "pages", "named"),
    [
        (7, 1, '"/data/private \\\\012 read-only"'),
        (5, 1, '"anonymous memory"'),
        (6, 1, '"anonymous memory"'),
        (4, 2, '"anonymous memory"'),
        (3, 3, '"/data/private rw"'),
    ],
)
def test_what_is_private_and_read_only_is_refused(maps: Path, first: int, pages: int, named: str) -> None:
    with pytest.raises(RegistrationError, match=f"private, read-only mapping of {named}.*HostBuffer.copy_of"):
        check_registrable(page(first), pages * 0x1000, maps)


def test_the_range_ends_before_its_last_byte(maps: Path) -> None:
    assert check_registrable(page(4), 0x1000, maps) is Access.WRITABLE
    with pytest.raises(RegistrationError):
        check_registrable(page(4), 0x1001, maps)


def test_without_a_memory_map_nothing_is_known_and_nothing_refused(tmp_path: Path) -> None:
    assert check_registrable(page(7), 0x1000, tmp_path / "none") is Access.WRITABLE


def test_the_process_has_a_memory_map_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file with spaces"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pointer = _native.buffer_pointer(mapped)
        (found,) = mappings(pointer, pointer + 8192)
        assert (found.path, found.permissions) == (str(path), "r--s")
        assert check_registrable(pointer, 8192) is Access.READ_ONLY
