"""What the tests of the JAX adapter share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from dlpoffload import driver as drivers
from dlpoffload.errors import DriverNotFoundError


@pytest.fixture
def at(device: str, require: Callable[[str, str], NoReturn]) -> Iterator[Any]:
    """The JAX device of `device`, where arrays are made meanwhile; caches that hold arrays are cleared afterwards."""
    jax = pytest.importorskip("jax")
    from dlpoffload.jax.arrays import jax_device

    try:
        found = jax_device(drivers.open_driver(device))
    except DriverNotFoundError as error:
        require("gpu", str(error))
    with jax.default_device(found), jax.default_matmul_precision("highest"):
        yield found
    jax.clear_caches()
    gc.collect()
