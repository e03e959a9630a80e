"""What a switch takes: optimizers, and models on one kind of device, FP32, with all shapes known."""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from halfstep.errors import OperandError, SwitchError
from halfstep.recipe import Recipe

__all__ = ["device_of", "optimizers_in", "uncompiled"]

_NARROW = (torch.float16, torch.bfloat16)


def device_of(model: nn.Module, recipe: Recipe) -> str:
    """The kind of device that the model is on.

    Raises:
        SwitchError: on several, or a parameter has no shape yet, or is in 16 bits.
    """
    kinds = set()
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise SwitchError(
                f"parameter {name} has no shape yet: run the model once on a batch before the switch"
            )
        kinds.add(p.device.type)
        if p.dtype in _NARROW and not recipe.is_identity:
            raise SwitchError(
                f"parameter {name} is {p.dtype}: the masters are FP32. Call model.float() before the switch"
            )
    if len(kinds) > 1:
        raise SwitchError(
            f"the model's parameters are on {', '.join(sorted(kinds))}; one device kind is needed"
        )
    return kinds.pop() if kinds else "cpu"


def optimizers_in(optimizer: object) -> list[Optimizer]:
    """The optimizers in what the user gave: none, one, or several."""
    if optimizer is None:
        return []
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(given, (list, tuple)) or not all(isinstance(o, Optimizer) for o in given):
        raise OperandError(
            f"optimizer is a {type(optimizer).__name__}; "
            "give a torch.optim.Optimizer, a list of them, or None"
        )
    return list(given)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` was given, where ``model`` is its result; else ``model``."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # not imported: nothing was compiled
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        return cast(nn.Module, model._orig_mod)
    return model
