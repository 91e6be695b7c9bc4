"""The leaves of a pytree by name: what each is as a spec, and which are left as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..errors import AliasError, SpecError
from ..producers import view_of
from ..spec import TensorSpec, dtype, dtype_names
from .arrays import checked_dtype

__all__ = ["Leaf", "check_usable", "collect", "names_of"]

_WEAK_LIMIT = 1 << 20


@dataclass(slots=True)
class Leaf:
    """One leaf of a tree.

    Attributes
    ----------
    name : str
        Its path, keys joined by dots: ``"params.layers_3.kernel"``. Not the ``value`` of an nnx variable.
    spec : TensorSpec or None
        Row-major; None for a leaf that is left as it is.
    kept : str
        Why it is left.
    tied_to : str
        The first leaf that is the same object; its own name for all others.
    value : Any
        The leaf; dropped once its bytes are in place.
    """

    name: str
    spec: TensorSpec | None
    kept: str
    tied_to: str
    value: Any


def names_of(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Names of the leaves, the leaves, and the tree's structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_joined(path) for path, _ in pairs]
    if len(set(names)) < len(names):  # {"a.b": …, "a": {"b": …}}
        names = [jax.tree_util.keystr(path) for path, _ in pairs]
    return names, [leaf for _, leaf in pairs], structure


def _joined(path: Sequence[Any]) -> str:
    keys = list(path)
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def collect(tree: Any, values: Iterable[Any] | None = None) -> tuple[list[Leaf], Any]:
    """The leaves of a tree, and its structure. Reads no bytes.

    Parameters
    ----------
    values
        Left out, the leaves are arrays. Else they may be abstract (`jax.ShapeDtypeStruct`), and only specs are made.

    Raises
    ------
    SpecError
        A leaf that JAX would narrow, cannot import, or that lies on several devices; the message names it.
    """
    names, found, structure = names_of(tree)
    leaves: list[Leaf] = []
    first: dict[int, str] = {}
    for name, value in zip(names, found, strict=True):
        spec, kept = _described(name, value, abstract=values is not None)
        tied_to = name if spec is None or values is not None else first.setdefault(id(value), name)
        leaves.append(Leaf(name, spec, kept, tied_to, value))
    return leaves, structure


def check_usable(name: str, value: Any) -> None:
    """Refuse a JAX array whose bytes cannot be read here.

    Raises
    ------
    SpecError
        It is traced, deleted, or lies on several devices.
    """
    if isinstance(value, jax.core.Tracer):
        raise SpecError(f'"{name}" is traced; do this outside of jit, grad and vmap, and pass the tree in')
    if not isinstance(value, jax.Array):
        return
    if value.is_deleted():
        raise SpecError(f'"{name}" was deleted or donated and has no bytes any more')
    devices = value.sharding.device_set
    if len(devices) > 1:
        raise SpecError(
            f'"{name}" is sharded over {len(devices)} devices; offload what each device has: a tree of '
            "[shard.data for shard in array.addressable_shards] for each of them"
        )


def _described(name: str, value: Any, *, abstract: bool) -> tuple[TensorSpec | None, str]:
    if isinstance(value, jax.ShapeDtypeStruct):
        if not abstract:
            raise SpecError(f'"{name}" is abstract and has no bytes; pass its values as leaves=')
        return _typed(name, value)
    if isinstance(value, jax.Array):
        return _described_array(name, value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OUSmM":
            return None, f"no numbers ({value.dtype})"
        return _spec(name, value.shape, value.dtype)
    if hasattr(value, "__dlpack__"):
        try:
            spec = view_of(value).spec
        except (AliasError, SpecError) as error:
            raise SpecError(f'"{name}": {error}') from error
        checked_dtype(spec.dtype, name)
        return (TensorSpec(spec.shape, spec.dtype), "") if spec.numel else (None, "empty")
    return None, f"no array ({type(value).__name__})"


def _described_array(name: str, value: jax.Array) -> tuple[TensorSpec | None, str]:
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) and not isinstance(value, jax.core.Tracer):
        return None, "a PRNG key"
    check_usable(name, value)
    return _typed(name, value)


def _typed(name: str, value: jax.Array | jax.ShapeDtypeStruct) -> tuple[TensorSpec | None, str]:
    if value.weak_type:
        if value.size * value.dtype.itemsize > _WEAK_LIMIT:
            raise SpecError(
                f'"{name}" is weakly typed, which bytes cannot say; give it its dtype: '
                f'jax.numpy.asarray(x, "{value.dtype}")'
            )
        return None, "weakly typed"
    return _spec(name, value.shape, value.dtype)


def _spec(name: str, shape: Sequence[int], element: Any) -> tuple[TensorSpec | None, str]:
    if jax.dtypes.issubdtype(element, jax.dtypes.prng_key):
        return None, "a PRNG key"
    if str(element) not in dtype_names():
        raise SpecError(f'"{name}" has dtype {element}, which DLPack has no code for; keep its bytes as uint8')
    spec = TensorSpec(tuple(shape), dtype(str(element)))
    checked_dtype(spec.dtype, name)
    return (spec, "") if spec.numel else (None, "empty")
