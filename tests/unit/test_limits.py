"""Limits of host memory, read from made-up `/proc` and `/sys` trees."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dlpoffload.errors import HostMemoryError, OffloadError
from dlpoffload.limits import CgroupLimit, HostLimits, check_host_budget, host_limits, reserve_of

GIB = 1 << 30
V1_NO_LIMIT = "9223372036854771712"
MOUNT_V2 = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
)
LINUX: Mapping[str, str] = {
    "proc/meminfo": "MemTotal:       67108864 kB\nMemFree:  1024 kB\nMemAvailable:   33554432 kB\n"
    "Active(file):    512 kB\nHugePages_Total:      12\nHugePages_Free:        7\n"
    "Hugepagesize:       2048 kB\n",
    "proc/version": "Linux version 6.8.0-generic (gcc 13) #1 SMP\n",
    "proc/self/limits": "Limit            Soft Limit   Hard Limit   Units\n"
    "Max locked memory         65536                131072               bytes\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
}

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files below a root of their own, and give the root."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def cgroup_v2(path: str, limit: str, usage: int, *, cached: int = 0, high: str = "max") -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}".rstrip("/")
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 1\nfile {cached}\ninactive_file {cached}\nactive_file 0\n",
    }


def cgroup_v1(path: str, limit: str, usage: int, *, cached: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        # the cgroup's own figures, then those with its descendants, which are what the usage counts
        f"{folder}/memory.stat": "inactive_file 5\nactive_file 5\n"
        f"total_inactive_file {cached // 2}\ntotal_active_file {cached - cached // 2}\n",
    }


def test_without_cgroup_limits_the_kernels_estimate_binds(tree: Tree) -> None:
    limits = host_limits(tree(LINUX))
    assert limits == HostLimits(
        mem_total_nbytes=64 * GIB,
        mem_available_nbytes=32 * GIB,
        cgroups=(),
        memlock_nbytes=65536,
        is_wsl=False,
        page_nbytes=mmap.PAGESIZE,
        huge_page_nbytes=2 << 20,
        huge_pages_total=12,
        huge_pages_free=7,
        transparent_huge_pages="madvise",
    )
    assert (limits.available_nbytes, limits.binding_limit) == (32 * GIB, "free memory (MemAvailable)")
    assert limits.total_nbytes == 64 * GIB
    assert limits.cgroup is None


def test_v2_limit_binds_and_page_cache_counts_as_free(tree: Tree) -> None:
    root = tree(
        {**LINUX, "proc/self/mountinfo": MOUNT_V2, "proc/self/cgroup": "0::/\n"}
        | cgroup_v2("/", str(8 * GIB), 7 * GIB, cached=5 * GIB)
    )
    limits = host_limits(root)
    assert limits.cgroups == (CgroupLimit("/", "memory.max", 8 * GIB, 7 * GIB, 5 * GIB),)
    assert limits.available_nbytes == 6 * GIB
    assert limits.binding_limit == 'memory.max of cgroup "/"'
    assert limits.total_nbytes == 8 * GIB


def test_v2_nested_the_ancestor_with_the_least_room_binds(tree: Tree) -> None:
    root = tree(
        {**LINUX, "proc/self/mountinfo": MOUNT_V2, "proc/self/cgroup": "0::/pod/box\n"}
        | cgroup_v2("/pod/box", str(8 * GIB), 1 * GIB)
        | cgroup_v2("/pod", str(10 * GIB), 9 * GIB)
        | cgroup_v2("/pod/other", "1", 1)
    )
    limits = host_limits(root)
    assert [c.path for c in limits.cgroups] == ["/pod/box", "/pod"]
    assert (limits.available_nbytes, limits.binding_limit) == (1 * GIB, 'memory.max of cgroup "/pod"')
    assert limits.total_nbytes == 8 * GIB


def test_v2_max_is_no_limit_but_high_is_one(tree: Tree) -> None:
    files = {**LINUX, "proc/self/mountinfo": MOUNT_V2, "proc/self/cgroup": "0::/box\n"}
    limits = host_limits(tree(files | cgroup_v2("/box", "max", GIB)))
    assert limits.cgroups == ()
    limits = host_limits(tree(files | cgroup_v2("/box", "max", GIB, high=str(4 * GIB))))
    assert (limits.available_nbytes, limits.binding_limit) == (3 * GIB, 'memory.high of cgroup "/box"')


def test_v1_walks_up_and_knows_its_word_for_no_limit(tree: Tree) -> None:
    root = tree(
        {
            **LINUX,
            "proc/self/mountinfo": MOUNT_V1,
            "proc/self/cgroup": "4:memory:/slurm/job_7\n1:cpu:/\n0::/\n",
        }
        | cgroup_v1("/slurm/job_7", str(2 * GIB), GIB, cached=GIB // 2)
        | cgroup_v1("/slurm", V1_NO_LIMIT, 40 * GIB)
        | cgroup_v1("/", V1_NO_LIMIT, 41 * GIB)
    )
    limits = host_limits(root)
    assert limits.cgroups == (CgroupLimit("/slurm/job_7", "memory.limit_in_bytes", 2 * GIB, GIB, GIB // 2),)
    assert limits.available_nbytes == 3 * GIB // 2


@pytest.mark.parametrize(
    ("own_path", "mount_root"),
    [
        pytest.param("/docker/abc", "/docker/abc", id="the mount shows our own cgroup as its root"),
        pytest.param("/docker/abc", "/elsewhere", id="a path told from outside the mount"),
        pytest.param("/../../abc", "/", id="a path above the cgroup namespace"),
    ],
)
def test_a_container_finds_its_own_limit(tree: Tree, own_path: str, mount_root: str) -> None:
    mount = f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    root = tree(
        {**LINUX, "proc/self/mountinfo": mount, "proc/self/cgroup": f"4:memory:{own_path}\n"}
        | cgroup_v1("/", str(3 * GIB), GIB)
    )
    assert host_limits(root).available_nbytes == 2 * GIB


def test_v1_and_v2_side_by_side_are_both_read(tree: Tree) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    root = tree(
        {
            **LINUX,
            "proc/self/mountinfo": MOUNT_V1 + unified,
            "proc/self/cgroup": "4:memory:/box\n0::/box\n",
            "sys/fs/cgroup/unified/box/memory.max": f"{5 * GIB}",
            "sys/fs/cgroup/unified/box/memory.current": "0",
        }
        | cgroup_v1("/box", str(6 * GIB), 0)
    )
    assert [c.limit_nbytes for c in host_limits(root).cgroups] in ([5 * GIB, 6 * GIB], [6 * GIB, 5 * GIB])


def test_usage_above_the_limit_leaves_nothing_not_less(tree: Tree) -> None:
    files = {**LINUX, "proc/self/mountinfo": MOUNT_V2, "proc/self/cgroup": "0::/\n"}
    assert host_limits(tree(files | cgroup_v2("/", str(GIB), 2 * GIB))).available_nbytes == 0


def test_an_escaped_mount_point_is_found(tree: Tree) -> None:
    root = tree(
        {
            **LINUX,
            "proc/self/mountinfo": MOUNT_V2.replace("/sys/fs/cgroup", "/mnt/my\\040cgroups"),
            "proc/self/cgroup": "0::/\n",
            "mnt/my cgroups/memory.max": str(GIB),
            "mnt/my cgroups/memory.current": "0",
        }
    )
    assert host_limits(root).available_nbytes == GIB


def test_what_is_missing_is_none_and_never_a_guess(tree: Tree) -> None:
    limits = host_limits(tree({"proc/meminfo": "MemTotal: 1048576 kB\n"}))
    assert (limits.mem_total_nbytes, limits.mem_available_nbytes) == (GIB, None)
    assert (limits.available_nbytes, limits.binding_limit) == (GIB, "physical memory")
    assert limits.huge_page_nbytes is limits.transparent_huge_pages is limits.memlock_nbytes is None
    assert limits.cgroups == ()


def test_without_proc_sysconf_answers(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_AVPHYS_PAGES": 10}.__getitem__)
    limits = host_limits(tree({}))
    assert limits.mem_total_nbytes == 1000 * mmap.PAGESIZE
    assert limits.available_nbytes == 10 * mmap.PAGESIZE


def test_a_system_that_says_nothing_refuses_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    limits = host_limits(tree({}))
    assert (limits.available_nbytes, limits.total_nbytes, limits.binding_limit) == (None, None, "")
    check_host_budget(1 << 60, limits)


@pytest.mark.parametrize("version", ["Linux version 5.15.153.1-microsoft-standard-WSL2", "Linux 4.4.0-Microsoft"])
def test_wsl_is_recognised_and_named_in_the_remedy(tree: Tree, version: str) -> None:
    limits = host_limits(tree({**LINUX, "proc/version": version}))
    assert limits.is_wsl
    with pytest.raises(HostMemoryError, match=r"\.wslconfig"):
        check_host_budget(33 * GIB, limits)


def test_an_unlimited_memlock_is_none(tree: Tree) -> None:
    limits_file = "Max locked memory         unlimited            unlimited            bytes\n"
    assert host_limits(tree({**LINUX, "proc/self/limits": limits_file})).memlock_nbytes is None


def test_budget_is_checked_to_the_page_table(tree: Tree) -> None:
    limits = host_limits(tree(LINUX))
    page = limits.page_nbytes
    fits = (32 * GIB - reserve_of(64 * GIB)) // (page + 8) * page
    check_host_budget(fits, limits)
    with pytest.raises(HostMemoryError):
        check_host_budget(fits + page, limits)


def test_memlock_refuses_nothing(tree: Tree) -> None:
    check_host_budget(GIB, host_limits(tree(LINUX)))


def test_the_error_names_what_was_asked_and_found_and_the_remedy(tree: Tree) -> None:
    root = tree(
        {**LINUX, "proc/self/mountinfo": MOUNT_V2, "proc/self/cgroup": "0::/box\n"}
        | cgroup_v2("/box", str(4 * GIB), 3 * GIB, cached=GIB)
    )
    with pytest.raises(HostMemoryError) as caught:
        check_host_budget(3 * GIB, host_limits(root))
    error = caught.value
    assert isinstance(error, MemoryError)
    assert isinstance(error, OffloadError)
    assert (error.nbytes, error.limit, error.limit_nbytes) == (
        3 * GIB,
        'memory.max of cgroup "/box"',
        4 * GIB,
    )
    message = str(error)
    assert message.startswith("asked for 3221225472 bytes (3.00 GiB) of host memory")
    assert "found 2147483648 bytes (2.00 GiB)" in message
    assert "docker run --memory" in message

    with pytest.raises(HostMemoryError) as caught:
        check_host_budget(40 * GIB, host_limits(tree({**LINUX, "proc/self/cgroup": ""})))
    assert (caught.value.limit, caught.value.limit_nbytes) == ("free memory (MemAvailable)", 32 * GIB)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_this_machine_can_be_read() -> None:
    limits = host_limits()
    assert limits.available_nbytes is not None
    assert limits.total_nbytes is not None
    assert 0 < limits.available_nbytes <= limits.total_nbytes
    check_host_budget(1, limits)
    with pytest.raises(HostMemoryError):
        check_host_budget(1 << 60)
