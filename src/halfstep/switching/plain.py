"""A plain 16-bit program: weights, gradients, buffers and optimizer state truly in a 16-bit dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.errors import SwitchError
from halfstep.switching.ranks import is_sharded

__all__ = ["become_narrow", "become_single"]


def become_narrow(
    model: nn.Module, optimizers: list[Optimizer], dtype: torch.dtype
) -> Callable[[], None]:
    """What ``model.half()`` or ``.bfloat16()`` does, and for optimizer state too; returns the way back.

    The way back turns to FP32 what was turned to ``dtype``; what was rounded stays rounded.

    Raises:
        SwitchError: parameters are sharded already; whoever sharded them has tensors of his own.
    """
    sharded = [name for name, p in model.named_parameters() if is_sharded(p)]
    if sharded:
        raise SwitchError(
            f"the recipe turns the parameters themselves into {dtype}, and {len(sharded)} of them are "
            f"sharded already ({sharded[0]}, say): switch the model first, then shard it"
        )
    changed = [t for t in [*model.parameters(), *model.buffers()] if t.dtype == torch.float32]
    for tensor in changed:
        _set(tensor, dtype)
    for optimizer in optimizers:
        _set_state(optimizer, torch.float32, dtype)

    def back() -> None:
        become_single(changed, optimizers, dtype)

    return back


def become_single(tensors: list[Tensor], optimizers: list[Optimizer], source: torch.dtype) -> None:
    """Turn ``tensors`` and the optimizers' state back to FP32 from ``source``."""
    for tensor in tensors:
        _set(tensor, torch.float32)
    for optimizer in optimizers:
        _set_state(optimizer, source, torch.float32)


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
