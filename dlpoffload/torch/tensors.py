"""Between torch tensors and specs, bytes and views."""

from __future__ import annotations

import torch
from torch.utils.dlpack import from_dlpack

from ..driver import Driver
from ..errors import SpecError
from ..spec import TensorSpec, dtype_names
from ..view import View

__all__ = ["bytes_of", "current_stream", "spec_of", "tensor_in", "tensor_over", "torch_device", "torch_dtype"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in dtype_names() if isinstance(getattr(torch, name, None), torch.dtype)}
_NAMES = {value: name for name, value in _DTYPES.items()}


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a spec."""
    found = _DTYPES.get(spec.dtype.name)
    if found is None:
        raise SpecError(f"torch {torch.__version__} has no dtype {spec.dtype}")
    return found


def spec_of(tensor: torch.Tensor, name: str = "tensor") -> TensorSpec:
    """Shape, dtype and strides of a tensor.

    Raises
    ------
    SpecError
        The tensor is sparse, quantised the old way, on meta, or of a dtype that DLPack does not know.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise SpecError(f'"{name}" is {tensor.layout} and quantized={tensor.is_quantized}; only strided memory is moved')
    if tensor.is_meta:
        raise SpecError(f'"{name}" is on the meta device and has no bytes; load the weights before offloading')
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None:
        raise SpecError(f'"{name}" has dtype {tensor.dtype}, which has no DLPack code; view it as uint8 first')
    return TensorSpec(tuple(tensor.shape), dtype, tuple(tensor.stride()))


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
