"""What kernels that read memory by its address ask of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = [
    "PLAIN",
    "in_memory_order",
    "is_dense",
    "lie_alike",
    "overlaps",
    "refuses_memory",
    "starts",
]

PLAIN = (Tensor, torch.nn.Parameter)
"""Types whose elements lie in memory as their strides say."""


def refuses_memory(tensors: Sequence[Tensor]) -> str:
    """Why some tensor has no memory of its own; empty if all have."""
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return f"a {type(tensor).__name__} may have no memory of its own"
        if is_functorch_wrapped_tensor(tensor):
            return "a tensor inside a torch.func transform has no memory of its own"
    return ""


def in_memory_order(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both with their axes permuted alike, so that ``x`` is walked as it lies."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return out.permute(order), x.permute(order)


def overlaps(out: Tensor, x: Tensor) -> bool:
    """True if writing ``out`` could change an element of ``x`` other than the one just read."""
    return out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and (
        out.data_ptr() != x.data_ptr() or out.dtype is not x.dtype
    )


def is_dense(tensor: Tensor) -> bool:
    """True where the elements fill their memory without holes, in any order of the axes."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda a: a[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


_FIRST = torch.zeros(1, dtype=torch.int64, device="cpu")


def starts(x: Tensor) -> Tensor:
    """int64 on the device of ``x``: where each matrix of a batch begins, in elements."""
    if x.dim() == 2 and x.device.type == "cpu":
        return _FIRST
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True):
        found = found[..., None] + torch.arange(size, device=x.device) * stride
    return found.flatten()


def lie_alike(group: Sequence[Tensor]) -> bool:
    """Whether element i of each tensor lies at place i of its memory."""
    first = group[0]
    for tensor in group:
        if tensor.layout is not torch.strided or tensor.is_neg():
            return False
        if type(tensor) not in PLAIN or tensor.device != first.device:
            return False
    if all(tensor.is_contiguous() for tensor in group):
        return True
    return is_dense(first) and all(tensor.stride() == first.stride() for tensor in group)
