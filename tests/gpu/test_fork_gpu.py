"""A fork beside 4 GiB of memory that a real driver pinned: what is pinned is not copied, and not there in the child."""

from __future__ import annotations

import pytest
from test_fork import ENDS, GIB, check, forked

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

NBYTES = {"sys.exit": 4 * GIB, "close": 4 * GIB}


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_leaves_memory_flat_and_the_parent_streaming(end: str) -> None:
    nbytes = NBYTES.get(end, GIB // 2)
    found, errors = forked("cuda:0", nbytes, end)
    check(found, errors, nbytes, end)
    assert found["during"] - found["before"] < GIB // 4
    if nbytes >= GIB:
        assert found["taken"] < nbytes // 4, "of MemAvailable"
