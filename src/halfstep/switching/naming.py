"""Names for tensors in error messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["describe", "parameter_names", "place_of"]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id -> name of each parameter of ``model``; a shared one has its first name."""
    return {id(p): name for name, p in model.named_parameters()}


def describe(
    leaf: Tensor, model: nn.Module, names: dict[int, str], optimizers: list[Optimizer]
) -> str:
    """What a leaf tensor is, as far as can be found out: parameter, attribute, optimizer slot, shape."""
    shape = tuple(leaf.shape)
    if id(leaf) in names:
        return f"parameter {names[id(leaf)]} {shape} itself instead of its working copy"
    for path, found in _hidden(model):
        if found is leaf:
            return f"{path} {shape}, which is no parameter of a module in the model's tree"
    for optimizer in optimizers:
        for g, group in enumerate(optimizer.param_groups):
            for k, p in enumerate(group["params"]):
                if p is leaf:
                    kind = type(optimizer).__name__
                    return f"parameter {k} {shape} of group {g} of {kind}, which is not in the model's tree"
    return f"a leaf tensor of shape {shape} that requires grad and is not in the model's tree"


def _hidden(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the plain attributes of the model's modules: lists, dicts, objects, modules in them."""
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_"):
                yield from _inside(f"{prefix}.{key}" if prefix else key, value, 2)


def _inside(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, p in value.named_parameters():
            yield f"{path}.{name}", p
    elif depth and isinstance(value, (list, tuple)):
        for k, v in enumerate(value):
            yield from _inside(f"{path}[{k}]", v, depth - 1)
    elif depth and isinstance(value, dict):
        for k, v in value.items():
            yield from _inside(f"{path}[{k!r}]", v, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, type):
        for k, v in vars(value).items():
            yield from _inside(f"{path}.{k}", v, depth - 1)


def place_of(optimizer: Optimizer, group: int, index: int) -> str:
    """Where the optimizer keeps a parameter, for one that has no name in a model."""
    return f"parameter {index} of group {group} of {type(optimizer).__name__}"
