"""The native core: DLPack capsules, owners counted without Python, mappings without the GIL."""

from typing import Any, Final, final

DLPACK_VERSION: Final[tuple[int, int]]
FLAG_READ_ONLY: Final[int]
FLAG_IS_COPIED: Final[int]
FLAG_IS_SUBBYTE_TYPE_PADDED: Final[int]

# ---------------------------------------------------------------------------------------------- owners

@final
class Owner:
    """A count of everything that uses one piece of memory, and a token that names the memory.

    The count starts at one, held by the owner object itself until `release` or its deallocation; each `Reference`
    and each capsule holds one more. Whoever takes the count to zero, on whatever thread, pushes the token on the
    reclaim list, once, without Python and without CUDA. In a forked child the owners of the parent push nothing.
    """

    def __new__(cls, token: int) -> Owner: ...
    @property
    def token(self) -> int: ...
    @property
    def users(self) -> int:
        """References and capsules alive now (the owner's own count is not among them)."""
    def reference(self) -> Reference: ...
    def lend(self) -> tuple[int, int]:
        """Count one more user, in C: an argument, and the address of ``void (*)(void *)`` that gives the count up.

        Whoever takes them calls the function once, with the argument, on whatever thread. RuntimeError after `release`.
        """
    def take_back(self) -> None:
        """Give up a lent count on behalf of C code that did not take it."""
    def release(self) -> None:
        """Give up the owner's own count. Idempotent.

        `reference` and capsules of this owner are then refused (RuntimeError); a `Reference` is a user itself and
        still gives capsules.
        """

@final
class Reference:
    """Holds one count of an `Owner` until it is deallocated, natively. Can be the owner argument of a capsule."""

    @property
    def token(self) -> int: ...
    @property
    def users(self) -> int: ...

def reclaim_drain() -> list[int]:
    """Take every token off the reclaim list, oldest first. Never blocks."""

def reclaim_wait(timeout_s: float) -> bool:
    """Wait without the GIL until a token is on the list or `reclaim_wake` is called; False when the time ran out."""

def reclaim_wake() -> None:
    """End the waits that are under way, or the next one when there is none."""

# -------------------------------------------------------------------------------------------- capsules

def dlpack_capsule(
    owner: Owner | Reference,
    pointer: int,
    device: tuple[int, int],
    dtype: tuple[int, int, int],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    flags: int,
    versioned: bool,
) -> Any:
    """Make a capsule, ``dltensor`` or ``dltensor_versioned``; struct, shape and strides are one allocation.

    It holds one count of `owner` until the consumer calls the deleter or the unconsumed capsule is destroyed.
    ValueError for a layout that no memory can have and for flags of a legacy capsule, which cannot say them.
    """

@final
class Import:
    """A consumed capsule, as it was when it was taken; what the producer does to it afterwards is not seen.

    Its deallocation calls the producer's deleter once, keeping a pending exception intact.
    """

    @property
    def pointer(self) -> int:
        """Address of the first element: ``data`` plus ``byte_offset``."""
    @property
    def device(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> tuple[int, int, int]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...] | None:
        """In elements; None when the producer left them out (row-major)."""
    @property
    def flags(self) -> int: ...
    @property
    def version(self) -> tuple[int, int] | None:
        """None for a legacy capsule."""

def consume(capsule: Any, /) -> Import:
    """Take a capsule over: read it, check it, rename it to ``used_…``.

    Raises ValueError, with the capsule left as it was, when the capsule was consumed before, is no DLPack capsule,
    has a major version other than 1, a negative length, more than 64 dimensions, or sizes that overflow.
    """

# ---------------------------------------------------------------------------------------------- memory
# All of these run without the GIL and raise OSError with errno.

def map_anonymous(nbytes: int, alignment: int, huge_pages: bool) -> int:
    """Map private anonymous memory of `nbytes` (rounded up to pages by the kernel), aligned, zero, not yet populated.

    `huge_pages` advises transparent huge pages (MADV_HUGEPAGE); where the kernel has none, the advice is left out.
    """

def map_hugetlb(nbytes: int, page_nbytes: int) -> int:
    """Map private memory from the pool of reserved huge pages of one size, rounded up to whole ones (MAP_HUGETLB)."""

def map_file(descriptor: int, byte_offset: int, nbytes: int) -> int:
    """Map a range of a file from a page's start, shared and read-only; the mapping keeps no descriptor open.

    It may reach behind the end of the file, whose pages end the process when they are read: see `populate`.
    """

def prefer_node(address: int, nbytes: int, node: int) -> None:
    """Take pages that are not there yet from a NUMA node, from others only when it is full (mbind, MPOL_PREFERRED)."""

def populate(address: int, nbytes: int, threads: int, write: bool = True) -> None:
    """Fault every page in, split over `threads` threads.

    For writing by MADV_POPULATE_WRITE, else a touch a page. Not for writing, for mappings of files, by
    MADV_POPULATE_READ: ENOSYS where the kernel has none, EFAULT behind the end of the file.
    """

def unmap(address: int, nbytes: int) -> None: ...
def dont_fork(address: int, nbytes: int) -> None:
    """Leave these pages out of forked children (MADV_DONTFORK)."""

def buffer_pointer(buffer: Any, /) -> int:
    """Address of the memory behind a contiguous object with the buffer protocol, read-only ones too (0 when empty)."""

def copy(destination: int, source: int, nbytes: int, threads: int = 1) -> None:
    """memmove without the GIL, on up to `threads` threads where nothing overlaps."""

def copy_strided(
    destination: int, source: int, itemsize: int, shape: tuple[int, ...], source_strides: tuple[int, ...]
) -> None:
    """Gather a strided tensor into row-major order, without the GIL; strides in elements, may be negative."""

def fork_generation() -> int:
    """How many forks lie between this process and the one that loaded the module."""
