"""A plain 16-bit program: weights, gradients, buffers and optimizer state truly in torch.float16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["become_half", "become_single"]


def become_half(model: nn.Module, optimizers: list[Optimizer]) -> Callable[[], None]:
    """What ``model.half()`` does, and the same for optimizer state; returns the way back to FP32.

    The way back turns to FP32 what was turned to FP16; what was rounded stays rounded.
    """
    changed = [t for t in [*model.parameters(), *model.buffers()] if t.dtype == torch.float32]
    for tensor in changed:
        _set(tensor, torch.float16)
    for optimizer in optimizers:
        _set_state(optimizer, torch.float32, torch.float16)

    def back() -> None:
        become_single(changed, optimizers)

    return back


def become_single(tensors: list[Tensor], optimizers: list[Optimizer]) -> None:
    """Turn ``tensors`` and the optimizers' state back to FP32."""
    for tensor in tensors:
        _set(tensor, torch.float32)
    for optimizer in optimizers:
        _set_state(optimizer, torch.float16, torch.float32)


def _set(tensor: Tensor, dtype: torch.dtype) -> None:
    grad, tensor.grad = tensor.grad, None
    tensor.data = tensor.data.to(dtype)
    if grad is not None:
        tensor.grad = grad.to(dtype)


def _set_state(optimizer: Optimizer, source: torch.dtype, target: torch.dtype) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            # 0-dim tensors are step counts, which torch keeps in FP32 for half parameters too
            if isinstance(value, Tensor) and value.dtype == source and value.dim():
                state[key] = value.to(target)
