"""Names for tensors in error messages."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

__all__ = ["parameter_names", "place_of"]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id -> name of each parameter of ``model``; a shared one has its first name."""
    return {id(p): name for name, p in model.named_parameters()}


def place_of(optimizer: Optimizer, group: int, index: int) -> str:
    """Where the optimizer keeps a parameter, for one that has no name in a model."""
    return f"parameter {index} of group {group} of {type(optimizer).__name__}"
