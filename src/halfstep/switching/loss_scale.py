"""The loss scale as a value with pure transitions. Nothing here knows a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from halfstep.recipe import LossScaling, ScalingKind

__all__ = ["LossScale", "StepReason", "StepReport"]

# The largest power of two that FP32 holds: a scale beyond it would be infinite.
_CEILING = 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The scale now, and how many clean steps it has had in a row.

    ::

        after a step with finite gradients:
            clean += 1
            if clean == interval: scale, clean = min(scale * growth, 2**127), 0
        after a step with gradients that are not finite:
            scale, clean = max(scale * backoff, floor), 0

    torch.amp.GradScaler's rule and constants, and a floor, which it has not: without one the scale
    reaches 0 and the next clean batch writes NaN into every weight.
    """

    rule: LossScaling
    scale: float
    clean: int = 0

    @classmethod
    def start(cls, rule: LossScaling) -> LossScale:
        """The scale before the first step: ``rule.initial``, or 1 where there is no scaling."""
        return cls(rule=rule, scale=rule.initial if rule.kind is ScalingKind.DYNAMIC else 1.0)

    @property
    def moves(self) -> bool:
        """True where the rule changes the scale at all."""
        return self.rule.kind is ScalingKind.DYNAMIC

    @property
    def at_floor(self) -> bool:
        """True where a lower scale is not allowed: overflow here is not the scale's doing."""
        return not self.moves or self.scale <= self.rule.floor

    def after(self, *, finite: bool) -> LossScale:
        """The scale after one step."""
        if not self.moves:
            return self
        if not finite:
            return replace(
                self, scale=max(self.scale * self.rule.backoff, self.rule.floor), clean=0
            )
        if self.clean + 1 < self.rule.interval:
            return replace(self, clean=self.clean + 1)
        return replace(self, scale=min(self.scale * self.rule.growth, _CEILING), clean=0)


class StepReason(Enum):
    """Why the last optimizer step was applied, or was not."""

    NONE_YET = "no step yet"
    FINITE = "finite gradients"
    OVERFLOW = "gradients overflowed at this loss scale"
    UNGUARDED = "the recipe guards nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What became of an ``optimizer.step()``.

    ``loss_scale`` is the scale that the gradients of this step were computed with; ``nonfinite`` counts
    the inf and NaN of each offending parameter's gradient, by name.
    """

    applied: bool
    reason: StepReason
    loss_scale: float
    nonfinite: dict[str, int]
