"""Between torch tensors and specs, bytes and views."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.parameter import is_lazy
from torch.utils.dlpack import from_dlpack

from ..driver import Driver
from ..errors import DeviceMemoryError, HostMemoryError, SpecError
from ..spec import TensorSpec, dtype, dtype_names, format_nbytes
from ..view import View

__all__ = [
    "Place",
    "bytes_of",
    "check_update",
    "copy_elements",
    "current_stream",
    "empty_bytes",
    "host_copy_of",
    "overwrite",
    "place_of",
    "spec_of",
    "tensor_in",
    "tensor_over",
    "torch_device",
    "torch_dtype",
    "version_of",
]


def _dtypes() -> Iterator[tuple[str, torch.dtype]]:
    for name in dtype_names():
        found = getattr(torch, name, None)
        # torch.uint4 and its like are shells that take a byte an element; DLPack packs two into one.
        if isinstance(found, torch.dtype) and found.itemsize * 8 == dtype(name).itembits:
            yield name, found


_DTYPES = dict(_dtypes())
_NAMES = {value: name for name, value in _DTYPES.items()}


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a spec."""
    found = _DTYPES.get(spec.dtype.name)
    if found is None:
        raise SpecError(f"torch {torch.__version__} has no dtype {spec.dtype}")
    return found


def spec_of(tensor: torch.Tensor, name: str = "tensor", *, meta: bool = False, only_read: bool = False) -> TensorSpec:
    """Shape, dtype and strides of a tensor; of one on meta only where that is allowed.

    Raises
    ------
    SpecError
        The tensor has no strided memory of its own (sparse, on meta, uninitialised, a subclass that hides it), a dtype
        that DLPack does not know, bytes that do not say what its elements are (lazily conjugated, quantised), or no
        count of the writes to it (made in inference mode), unless it is `only_read`.
    """
    if is_lazy(tensor):
        raise SpecError(f'"{name}" is not initialised yet; run a forward of the lazy module before offloading')
    if tensor.layout is not torch.strided or tensor.is_quantized:
        what = "quantised" if tensor.is_quantized else str(tensor.layout)
        raise SpecError(f'"{name}" is {what}; only tensors of plain strided memory are moved')
    if tensor.is_meta and not meta:
        raise SpecError(
            f'"{name}" is on the meta device and has no bytes; pass checkpoint= to offload_, which reads it, or load '
            "the weights before offloading"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise SpecError(
            f'"{name}" is a {type(tensor).__name__}, which dispatches by itself and does not say of which tensors it '
            "is made; give the class __tensor_flatten__ and __tensor_unflatten__"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise SpecError(f'"{name}" is a lazy conjugate or negative; put x.resolve_conj().resolve_neg() in its place')
    if tensor.is_inference() and not only_read:
        raise SpecError(
            f'"{name}" was made under torch.inference_mode(), where torch counts no writes, so a write to it could be '
            "missed; build the module under torch.no_grad() instead"
        )
    found = _NAMES.get(tensor.dtype)
    if found is None:
        raise SpecError(f'"{name}" has dtype {tensor.dtype}, which DLPack has no code for; view it as uint8 first')
    return TensorSpec(tuple(tensor.shape), found, tuple(tensor.stride()))


def empty_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes from torch's own allocator, so that its accounting stays true.

    Raises
    ------
    DeviceMemoryError, HostMemoryError
        It has not that much to give.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"torch would not allocate {format_nbytes(nbytes)} on {device}: {error}", nbytes=nbytes
        ) from error
    except RuntimeError as error:  # what its allocator for the CPU raises
        if device.type != "cpu":
            raise
        raise HostMemoryError(f"torch would not allocate {format_nbytes(nbytes)}: {error}", nbytes=nbytes) from error


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """View the span of memory that a tensor lives in as unsigned bytes, whatever its dtype and strides."""
    spec = spec_of(tensor)
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    offset = tensor.storage_offset() * tensor.element_size()
    return flat.set_(tensor.untyped_storage(), offset, (spec.nbytes,), (1,))


def tensor_in(flat: torch.Tensor, byte_offset: int, spec: TensorSpec) -> torch.Tensor:
    """View a tensor that lies in a flat tensor of bytes."""
    if spec.numel == 0:
        return torch.empty_strided(spec.shape, spec.strides, dtype=torch_dtype(spec), device=flat.device)
    span = flat[byte_offset : byte_offset + spec.nbytes].view(torch_dtype(spec))
    return span.as_strided(spec.shape, spec.strides)


def tensor_over(view: View, spec: TensorSpec) -> torch.Tensor:
    """View the bytes of a one-dimensional uint8 view as a tensor that keeps them alive.

    Bytes cross DLPack, not elements: so every dtype of torch passes, also those newer than its DLPack tables.
    """
    return tensor_in(from_dlpack(view), 0, spec)


def torch_device(driver: Driver) -> torch.device:
    """The torch device of a driver."""
    return torch.device("cpu") if driver.platform == "cpu" else torch.device("cuda", driver.device_id)


def current_stream(device: torch.device) -> int:
    """Handle of torch's current stream on `device`; 0, the calling thread, on the CPU."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)


def version_of(tensor: torch.Tensor) -> int:
    """The counter that torch raises at every in-place write; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
"""Which bytes a tensor has, and how it sees them."""


def place_of(tensor: torch.Tensor) -> Place:
    """Address, shape, strides and dtype of a tensor: two that are equal have the very same elements."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def host_copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU: never the tensor itself, which may share bytes with what it is written to."""
    return tensor.detach().to("cpu", copy=True)


def check_update(name: str, current: torch.Tensor, tensor: object) -> None:
    """Raise the SpecError of values that cannot be written over a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise SpecError(f'the update of "{name}" is a {type(tensor).__name__}; give a torch.Tensor')
    if tensor.is_meta or tensor.layout is not torch.strided:
        what = "on meta, and has no bytes" if tensor.is_meta else str(tensor.layout)
        raise SpecError(f'the update of "{name}" is {what}; give a dense tensor')
    if tensor.shape != current.shape or tensor.dtype != current.dtype:
        raise SpecError(
            f'"{name}" is {current.dtype}{list(current.shape)}, but the update is '
            f"{tensor.dtype}{list(tensor.shape)}; shape and dtype must be equal"
        )
    if any(stride == 0 and length > 1 for length, stride in zip(current.shape, current.stride(), strict=True)):
        raise SpecError(f'"{name}" has strides {current.stride()}, so that elements share bytes; replace it instead')


def copy_elements(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)``, also where elements share bytes as those of an expanded tensor do: both alike."""
    for dim, (length, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and length > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)


def overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy elements in place, as any in-place write: torch's count of writes goes up."""
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(source)
