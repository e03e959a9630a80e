"""A recipe put on a model for the length of a run; FP32 is plain PyTorch, with no switch at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

import halfstep

__all__ = ["Report", "Switched", "sixteen_bit_weights", "switched"]


class Report(Protocol):
    """What became of an optimizer step."""

    @property
    def applied(self) -> bool:
        """Whether the weights were updated."""
        ...

    @property
    def loss_scale(self) -> float:
        """What the gradients inside the region are multiplied by."""
        ...


class Switched(Protocol):
    """What a run needs to know of the switch it is under."""

    @property
    def last_step(self) -> Report:
        """The last optimizer step."""
        ...


class _PlainStep:
    applied = True
    loss_scale = 1.0


class _Plain:
    last_step = _PlainStep()


@contextmanager
def switched(model: nn.Module, optimizer: Optimizer, recipe: str) -> Iterator[Switched]:
    """``model`` and ``optimizer`` under ``recipe`` inside the block, as they were after it."""
    if recipe == "fp32":
        yield _Plain()
        return
    switch = halfstep.switch(model, optimizer, recipe=recipe)
    try:
        yield switch
    finally:
        switch.off()


def sixteen_bit_weights(recipe: str) -> bool:
    """Whether the weights the optimizer updates are themselves 16-bit under ``recipe``."""
    return halfstep.recipes()[recipe].master.bits <= 16
