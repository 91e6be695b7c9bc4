"""Between views and JAX arrays: imports that alias our bytes, and keep them safe from donation."""

from __future__ import annotations

import weakref
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..driver import Driver, open_driver
from ..errors import AliasError, DriverNotFoundError, SpecError
from ..memory import HostBuffer
from ..producers import view_of
from ..spec import DType
from ..view import Label, View

__all__ = ["array_view", "checked_dtype", "device_array", "host_label", "jax_device"]

_WIDE: Final = {"int64", "uint64", "float64", "complex128"}


def jax_device(driver: Driver) -> Any:
    """The JAX device of a driver.

    Raises
    ------
    DriverNotFoundError
        JAX has no such device: its CUDA plugin is not installed, or CUDA_VISIBLE_DEVICES hides it.
    """
    platform = "cpu" if driver.platform == "cpu" else "cuda"
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError as error:
        raise DriverNotFoundError(
            "jax.local_devices", -1, platform, f"{error}; pip install 'jax[cuda13]', or use device=\"cpu\""
        ) from error
    for device in devices:
        if platform == "cpu" or device.local_hardware_id == driver.device_id:
            return device
    raise DriverNotFoundError(
        "jax.local_devices", -1, driver.device, f"JAX sees {', '.join(map(str, devices))}; name one of these"
    )


def host_label(driver: Driver) -> Label:
    """The label under which JAX takes host memory without a copy on the driver's platform."""
    return Label.CPU if driver.platform == "cpu" else Label.PINNED


def checked_dtype(dtype: DType, name: str) -> None:
    """Refuse what JAX would narrow or cannot import.

    Raises
    ------
    SpecError
        A 64-bit type while x64 is off, or elements narrower than a byte.
    """
    if dtype.name in _WIDE and not jax.config.jax_enable_x64:
        raise SpecError(
            f'"{name}" is {dtype} and x64 is off, so JAX would narrow it; cast it to 32 bits yourself, or say '
            'jax.config.update("jax_enable_x64", True) first'
        )
    if dtype.itembits % 8:
        raise SpecError(
            f'"{name}" is {dtype}, of which DLPack packs several into a byte and JAX imports none; keep its bytes as '
            "uint8 and unpack them in the model (jax.lax.bitcast_convert_type), or leave it out of the tree"
        )


def array_view(view: View, *, accept_read_only: bool = False) -> jax.Array:
    """View bytes as a JAX array: on the GPU ``pinned_host`` for a pinned label, ``device`` for a device view.

    *Aliasing*: these bytes, always; a write of the host is seen by computations dispatched afterwards. *Lifetime*: the
    array keeps the bytes; deleting it, or clearing JAX's caches, leaves them to their other users. As long as the
    array object lives, XLA refuses to donate its buffer, so that no computation overwrites the bytes.

    Parameters
    ----------
    accept_read_only
        Take a view of read-only memory. JAX has no word for that and asks for capsules that cannot say it; since the
        buffer cannot be donated, nothing writes to it through this array. What exports it again (``torch.from_dlpack``
        of the array) does not know: do not write there.

    Raises
    ------
    AliasError
        JAX would have to copy: strides with gaps, an address off the alignment that XLA wants (64 bytes on the CPU,
        16 on the GPU), or read-only memory without `accept_read_only`.
    SpecError
        A dtype that JAX would narrow or cannot import; see the message.
    DriverNotFoundError
        JAX does not see the view's device.
    """
    checked_dtype(view.dtype, repr(view))
    if view.read_only:
        if not accept_read_only:
            raise AliasError(
                f"{view!r} is read-only, which JAX cannot be told; pass accept_read_only=True if nothing that gets the "
                "array writes through it, or copy the bytes (HostBuffer.copy_of)"
            )
        view = _writable(view)
    pinned = view.label in (Label.PINNED, Label.PINNED_AS_CPU)
    alignment = 64 if view.__dlpack_device__()[0] == 1 else 16
    if view.nbytes and view.pointer % alignment:
        raise AliasError(
            f"{view!r} does not start at a multiple of {alignment} bytes, where XLA wants its buffers; carve() and "
            "HostStore.copy_of lay tensors out aligned to 256, HostBuffer.copy_of copies one"
        )
    try:
        array = jax.numpy.from_dlpack(view)
    except BufferError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        where = " (it is pinned memory, which JAX takes with its CUDA plugin only)" if pinned else ""
        raise AliasError(f"JAX takes no view of {view!r}{where}: {error}; HostBuffer.copy_of packs it") from error
    if view.nbytes and array.unsafe_buffer_pointer() != view.pointer:
        raise AliasError(f"JAX copied {view!r} instead of viewing it; use HostBuffer.copy_of(view)")
    array = _typed(array)
    _refuse_donation(array)
    return array


def _typed(array: jax.Array) -> jax.Array:
    """The same array with its memory in its type, as JAX's own arrays in host memory have it.

    `jax.dlpack.from_dlpack` leaves it out, and so does every sharding but a named one (jax 0.10, 0.11); a program
    that is traced with such an argument would believe it to be on the device, and compute on it there.
    """
    kind, (device,) = array.sharding.memory_kind, array.devices()
    if kind != "pinned_host":
        return array
    mesh = Mesh(np.array([device]), ("device",))
    named = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
    return jax.make_array_from_single_device_arrays(array.shape, named, [array])


def _writable(view: View) -> View:
    return View(
        view._reference,
        view.spec,
        label=view.label,
        driver=view._block_driver,
        host_pointer=view.host_pointer,
        device_pointer=view.device_pointer,
        ready=view._ready,
    )


def _refuse_donation(array: jax.Array) -> None:
    # XLA does not donate a buffer that something outside holds, and a capsule is such a hold
    # (PjRtBuffer::AcquireExternalReference). Not on the array itself: that would be a cycle through C++.
    capsule = [array.__dlpack__()]
    weakref.finalize(array, capsule.clear).atexit = False


def device_array(value: Any, device: Any) -> jax.Array:
    """An array in the device's own memory with these elements, strongly typed; `value` itself where it is one."""
    sharding = SingleDeviceSharding(device, memory_kind="device")
    driver = open_driver("cpu" if device.platform == "cpu" else f"cuda:{device.local_hardware_id}")
    if isinstance(value, jax.Array):
        array = jax.device_put(value, sharding)
        if array.weak_type:  # which is a part of the type: results would have another dtype than before
            array = jax.lax.convert_element_type(array, array.dtype)
        # JAX takes mapped host memory for the device's own, and all memory on the CPU: a resident leaf over such bytes
        # would be read over the link, and changed by whoever writes to them.
        pinned = driver.pointer_info(array.unsafe_buffer_pointer()).kind == "pinned"
        return jax.numpy.copy(array).block_until_ready() if pinned else array
    # JAX may keep a NumPy array's memory as it is, and so would see later writes to it: give it bytes of its own.
    spec = view_of(value).spec
    buffer = HostBuffer.copy_of(value, device=driver.device)
    copied = array_view(buffer.host_view(spec.shape, spec.dtype, label=host_label(driver)))
    # On the CPU all memory is the device's, and device_put would give back the same bytes.
    array = jax.numpy.copy(copied) if driver.platform == "cpu" else jax.device_put(copied, sharding)
    return array.block_until_ready()
