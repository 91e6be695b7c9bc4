"""What the tests of the JAX adapter share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from dlpoffload import driver as drivers
from dlpoffload.errors import DriverNotFoundError


@pytest.fixture(autouse=True, scope="session")
def full_precision() -> Iterator[None]:
    """On every thread: what is compared within rounding must not be rounded to TF32 in one of two programs."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def at(device: str, require: Callable[[str, str], NoReturn]) -> Iterator[Any]:
    """The JAX device of `device`, where arrays are made meanwhile; caches that hold arrays are cleared afterwards."""
    jax = pytest.importorskip("jax")
    from dlpoffload.jax.arrays import jax_device

    try:
        found = jax_device(drivers.open_driver(device))
    except DriverNotFoundError as error:
        require("gpu", str(error))
    with jax.default_device(found):
        yield found
    jax.clear_caches()
    gc.collect()
