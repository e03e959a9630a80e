"""The loss scale as a value with pure transitions. Nothing here knows a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from statistics import NormalDist

from halfstep.recipe import LossScaling, ScalingKind

__all__ = ["LossScale", "Moments", "StepReason", "StepReport"]

# OpenSeq2Seq's: how fast the mean, and the slower mean and square behind the deviation, forget.
_FAST, _SLOW = 0.99, 0.999
# An overflow is to be rarer than one step in a thousand: so many standard deviations.
_DEVIATIONS = NormalDist().inv_cdf(1 - 0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Running means of x = log2 max |gradient|, before the correction for their start at 0.

    ::

        mean = 0.99 mean + 0.01 x;  slow = 0.999 slow + 0.001 x;  square = 0.999 square + 0.001 x^2
        mu = mean / (1 - 0.99^count);  m = slow / (1 - 0.999^count)
        sigma = sqrt(square / (1 - 0.999^count) - m^2)

    >>> seen = Moments().after(-3.0).after(-3.0)
    >>> round(seen.mu, 9), round(seen.sigma, 6)
    (-3.0, 0.0)
    """

    count: int = 0
    mean: float = 0.0
    slow: float = 0.0
    square: float = 0.0

    def after(self, x: float) -> Moments:
        """With one more observation."""
        return Moments(
            count=self.count + 1,
            mean=_FAST * self.mean + (1 - _FAST) * x,
            slow=_SLOW * self.slow + (1 - _SLOW) * x,
            square=_SLOW * self.square + (1 - _SLOW) * x * x,
        )

    @property
    def mu(self) -> float:
        """The mean; of at least one observation."""
        return self.mean / (1 - _FAST**self.count)

    @property
    def sigma(self) -> float:
        """The standard deviation; of at least one observation."""
        slow = 1 - _SLOW**self.count
        return math.sqrt(max(self.square / slow - (self.slow / slow) ** 2, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The scale now, and what the rule remembers of the steps before.

    ``clean``: steps with finite gradients in a row, up to the interval. ``tolerance``: overflows up to and
    with the one that lowers the scale. ``useless``: overflows in a row at the floor. ``moments``: of the
    log-normal rule. ``limit``: the largest number of the format that gradients are rounded to.
    """

    rule: LossScaling
    scale: float
    clean: int = 0
    tolerance: int = 1
    useless: int = 0
    moments: Moments = Moments()
    limit: float = 65504.0

    @classmethod
    def start(cls, rule: LossScaling, limit: float = 65504.0) -> LossScale:
        """The scale before the first step: ``rule.initial``, or 1 where there is no scaling."""
        scale = 1.0 if rule.kind is ScalingKind.NONE else rule.initial
        return cls(rule=rule, scale=scale, tolerance=rule.hysteresis, limit=limit)

    @property
    def moves(self) -> bool:
        """True where the rule changes the scale at all."""
        return self.rule.kind in (ScalingKind.DYNAMIC, ScalingKind.LOG_NORMAL)

    @property
    def at_floor(self) -> bool:
        """True where a lower scale is not allowed."""
        return not self.moves or self.scale <= self.rule.floor

    @property
    def exhausted(self) -> bool:
        """True where an overflow now is an error: at the floor, and patience is at its end."""
        return self.at_floor and self.useless + 1 >= self.rule.patience

    @property
    def weighs(self) -> bool:
        """True where `after` wants to know the largest gradient."""
        return self.rule.kind is ScalingKind.LOG_NORMAL

    def after(self, *, finite: bool, largest: float = 0.0) -> LossScale:
        """The scale after one step; ``largest`` is max |gradient|, unscaled, where `weighs`.

        ::

            after finite gradients:
                clean += 1; useless = 0
                if consecutive_hysteresis: tolerance = hysteresis
                dynamic, clean == interval:
                    scale = min(scale * growth, ceiling); clean = 0; tolerance = hysteresis
                log-normal, largest > 0:
                    mu, sigma += log2 largest
                    scale = clamp(2^floor(log2 limit - mu - 3.09 sigma), floor, ceiling)
            after gradients that are not finite:
                clean = 0
                at the floor: useless += 1
                tolerance > 1: tolerance -= 1
                dynamic:    scale = max(scale * backoff, floor)
                log-normal: mu, sigma += log2 limit - log2 scale     # it was at least that
                            scale = clamp(min(scale * backoff, as above), floor, ceiling)

        ``dynamic`` with the defaults is torch.amp.GradScaler's rule, and a floor, which it has not: without
        one the scale reaches 0 and the next clean batch writes NaN into every weight. Hysteresis is
        DeepSpeed's: tolerated overflows are skipped steps, and once the scale is lowered it stays touchy
        until the count starts anew. ``log-normal`` is OpenSeq2Seq's but for two things: powers of two
        only, so that scaling rounds nothing, and an overflow counts as the least that it can have been, not
        as 2^16 whatever the scale.
        """
        if not finite:
            return self._after_overflow()
        kept = replace(
            self,
            clean=self.clean + 1,
            useless=0,
            tolerance=self.rule.hysteresis if self.rule.consecutive_hysteresis else self.tolerance,
        )
        if self.weighs and 0.0 < largest < math.inf:
            moments = self.moments.after(math.log2(largest))
            return replace(kept, moments=moments, scale=self._clamped(self._likely(moments)))
        if self.rule.kind is not ScalingKind.DYNAMIC or kept.clean < self.rule.interval:
            return kept
        # A scale above the ceiling (of a state that was loaded) does not grow; it does not fall either.
        grown = min(self.scale * self.rule.growth, max(self.scale, self.rule.ceiling))
        return replace(kept, scale=grown, clean=0, tolerance=self.rule.hysteresis)

    def _after_overflow(self) -> LossScale:
        if self.at_floor:
            return replace(self, clean=0, useless=self.useless + 1)
        if self.tolerance > 1:
            return replace(self, clean=0, tolerance=self.tolerance - 1)
        lower = self.scale * self.rule.backoff
        if not self.weighs:
            return replace(self, clean=0, scale=max(lower, self.rule.floor))
        moments = self.moments.after(math.log2(self.limit) - math.log2(self.scale))
        likely = self._likely(moments)
        return replace(self, clean=0, scale=self._clamped(min(lower, likely)), moments=moments)

    def _likely(self, moments: Moments) -> float:
        """The largest power of two at which an overflow is rarer than one step in a thousand."""
        exponent = math.log2(self.limit) - moments.mu - _DEVIATIONS * moments.sigma
        return 2.0 ** math.floor(min(max(exponent, -1000.0), 1000.0))

    def _clamped(self, scale: float) -> float:
        return min(max(scale, self.rule.floor), self.rule.ceiling)


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
    the inf and NaN of each offending parameter's gradient, by name. ``step`` is its number, from 1, and
    ``skipped_steps`` how many up to it were skipped.
    """

    applied: bool
    reason: StepReason
    loss_scale: float
    nonfinite: dict[str, int]
    step: int = 0
    skipped_steps: int = 0
