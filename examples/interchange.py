"""One piece of host memory, seen by everybody who speaks DLPack, without a copy."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

import dlpoffload as dlpo

buffer = dlpo.HostBuffer.allocate("1MiB")
print(buffer)

# Two tensors in it, laid out without overlap, and the same bytes as NumPy sees them.
views = buffer.carve({"weight": dlpo.TensorSpec((4, 8), "float32"), "bias": dlpo.TensorSpec((8,), "bfloat16")})
for name, view in views.items():
    print(f"{name:8}{view}")

weight = np.from_dlpack(views["weight"])
weight[:] = np.arange(32).reshape(4, 8)

# The device's own view of them: kDLCUDA over host memory where there is a GPU, the CPU's memory where there is none.
mapped = buffer.device_view((4, 8), "float32")
print(
    f'on "{buffer.device}" the first byte is at {mapped.device_pointer:#x}, DLPack device {mapped.__dlpack_device__()}'
)

if find_spec("torch") is not None:
    import torch

    tensor = torch.from_dlpack(mapped)
    tensor += 100  # written by torch, on whichever device
    if tensor.is_cuda:
        torch.cuda.synchronize()
    print(f"torch on {tensor.device} added 100, NumPy reads {weight[0, :4]}")
    bias = torch.from_dlpack(views["bias"]).fill_(1.5)
    print(f"torch wrote a {bias.dtype} bias: {bytes(views['bias'].memoryview()[:4]).hex(' ')}")
    del tensor, bias

# NumPy has no bfloat16; a view of the same bits under a dtype that it has.
bits = np.from_dlpack(views["bias"].view((8,), "uint16"))
print(f"the bias as bits: {bits[0]:#06x}")

# A copy is never a view, and a view is never a copy: the name of the call says which.
copy = dlpo.HostBuffer.copy_of(weight)
weight[:] = 0
print(f"after clearing the original, the copy still holds {copy.memoryview().cast('f')[31]}")
copy.close()

try:
    buffer.close()
except dlpo.ClosedError as refused:
    print(f"closing now: {refused}")
del views, view, weight, mapped, bits
buffer.close()
print(f"closed; pinned by this process: {dlpo.format_nbytes(dlpo.pinned_nbytes())}")
