"""How the loss is scaled while gradients are in 16 bits: plain numbers, no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from halfstep.errors import RecipeError

__all__ = ["LARGEST_SCALE", "LossScaling", "ScalingKind"]

LARGEST_SCALE = 2.0**127
"""The largest power of two that FP32 holds: a scale beyond it would be infinite."""


class ScalingKind(Enum):
    """What moves the loss scale."""

    NONE = "none"
    """Scale 1 for ever: gradients that are not finite raise."""
    STATIC = "static"
    """Scale ``initial`` for ever: gradients that are not finite raise, after ``patience`` of them."""
    DYNAMIC = "dynamic"
    """Down by ``backoff`` at an overflow, up by ``growth`` after ``interval`` clean steps."""
    LOG_NORMAL = "log-normal"
    """As high as the running mean and deviation of log2 max |gradient| allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaling:
    """The rule that moves the loss scale; the defaults are those of ``torch.amp.GradScaler``.

    ``halfstep.switching.LossScale.after`` is the rule as it runs, with its pseudo-code. In numbers:

    - ``initial``: the scale of the first step; of every step where the kind is ``static``.
    - ``growth``, ``interval``: ``dynamic`` multiplies by the first after that many clean steps in a row.
    - ``backoff``: an overflow multiplies by it (``dynamic``; at the least, ``log-normal``).
    - ``floor``, ``ceiling``: the scale stays between them. GradScaler has no floor: after 166
      overflows in a row its scale is exactly 0 and the next clean step writes NaN into every weight.
    - ``patience``: the overflow of that number in a row at the floor, where no lower scale is allowed,
      is an error; those before it are skipped steps. 1: the first is.
    - ``hysteresis``: so many overflows lower the scale once; the count starts anew when the scale
      grows, or at each clean step with ``consecutive_hysteresis``. 1: every overflow lowers it.

    Raises `RecipeError` for numbers with which the rule would not work.

    >>> LossScaling(kind=ScalingKind.DYNAMIC).initial
    65536.0

    Sources: torch 2.13, ``torch.amp.GradScaler``; DeepSpeed's configuration, "fp16" (``hysteresis``,
    ``consecutive_hysteresis``, ``min_loss_scale``); Kuchaiev et al., "Mixed-Precision Training for NLP and
    Speech Recognition with OpenSeq2Seq", arXiv 1805.10387, section 3 (``log-normal``).
    """

    kind: ScalingKind
    initial: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 1.0
    ceiling: float = LARGEST_SCALE
    patience: int = 1
    hysteresis: int = 1
    consecutive_hysteresis: bool = False

    def __post_init__(self) -> None:
        _check("floor", self.floor, self.floor > 0, "above 0")
        ceiling = self.floor <= self.ceiling <= LARGEST_SCALE
        _check("ceiling", self.ceiling, ceiling, f"from floor={self.floor} to 2^127")
        _check("initial", self.initial, self.initial >= self.floor, f"at least floor={self.floor}")
        most = f"at most ceiling={self.ceiling}"
        _check("initial", self.initial, self.initial <= self.ceiling, most)
        _check("growth", self.growth, self.growth >= 1, "at least 1")
        _check("backoff", self.backoff, 0 < self.backoff < 1, "between 0 and 1, both excluded")
        _check("interval", self.interval, self.interval >= 1, "at least 1 step")
        _check("patience", self.patience, self.patience >= 1, "at least 1 step")
        _check("hysteresis", self.hysteresis, self.hysteresis >= 1, "at least 1 overflow")


def _check(key: str, value: float, holds: bool, allowed: str) -> None:
    if not (holds and math.isfinite(value)):
        raise RecipeError(f"loss scaling: {key}={value} must be finite and {allowed}")
