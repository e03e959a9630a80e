"""How the loss is scaled while gradients are in 16 bits: plain numbers, no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from halfstep.errors import RecipeError

__all__ = ["LossScaling", "ScalingKind"]


class ScalingKind(Enum):
    """Whether the loss scale moves."""

    NONE = "none"
    """Scale 1 for ever: gradients that are not finite raise."""
    DYNAMIC = "dynamic"
    """Down by ``backoff`` at each overflow, up by ``growth`` after ``interval`` clean steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaling:
    """The rule that moves the loss scale; the defaults are those of ``torch.amp.GradScaler``.

    ::

        scale = initial; clean = 0
        each step:
            if gradients are finite:
                clean += 1
                if clean == interval: scale *= growth; clean = 0
            else:                     # the step is skipped
                scale = max(floor, scale * backoff); clean = 0

    GradScaler has no floor: after 166 overflows in a row its scale is exactly 0 and the next clean
    step writes NaN into every weight. Here an overflow at the floor is an error.

    Raises `RecipeError` for numbers with which the rule would not work.

    >>> LossScaling(kind=ScalingKind.DYNAMIC).initial
    65536.0
    """

    kind: ScalingKind
    initial: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 1.0

    def __post_init__(self) -> None:
        _check("floor", self.floor, self.floor > 0, "above 0")
        _check("initial", self.initial, self.initial >= self.floor, f"at least floor={self.floor}")
        _check("growth", self.growth, self.growth >= 1, "at least 1")
        _check("backoff", self.backoff, 0 < self.backoff < 1, "between 0 and 1, both excluded")
        _check("interval", self.interval, self.interval >= 1, "at least 1 step")


def _check(key: str, value: float, holds: bool, allowed: str) -> None:
    if not (holds and math.isfinite(value)):
        raise RecipeError(f"loss scaling: {key}={value} must be finite and {allowed}")
