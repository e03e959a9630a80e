"""What the runs of a study say, in sentences: computed from the evidence, whichever way
it points.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from halfstep.diagnosis.plots import percent, power
from halfstep.diagnosis.statistics import Reach, total
from halfstep.study.runs import Outcome, Run
from halfstep.study.switched import sixteen_bit_weights

__all__ = [
    "Comparison",
    "Parity",
    "compare",
    "cost_sentence",
    "finished_errors",
    "gradient_sentence",
    "loss_scale_exponent",
    "mixed_sentence",
    "why",
]


class Parity(Enum):
    """Whether a variant trains as well as the baseline."""

    SAME = "as good"
    WORSE = "worse"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A variant beside the baseline: mean errors in percent, and what seeds alone make of them.

    ``spread`` is the larger of the two ranges (highest minus lowest) over seeds: a difference
    within it is no more than another seed would have given.
    """

    baseline: float
    variant: float
    spread: float
    parity: Parity

    @property
    def difference(self) -> float:
        """Variant minus baseline, in points."""
        return self.variant - self.baseline


def finished_errors(runs: Sequence[Run]) -> list[float]:
    """Test errors of the runs that came to their end."""
    return [
        run.error for run in runs if run.outcome is Outcome.FINISHED and math.isfinite(run.error)
    ]


def compare(baseline: Sequence[Run], variant: Sequence[Run]) -> Comparison:
    """The :class:`Comparison` of two sets of runs.

    Worse, if a run of the variant stopped on something not finite, or if its mean error is higher
    by more than the spread over seeds. Undecided with fewer than two runs on a
    side: one run has no spread.
    """
    first, second = finished_errors(baseline), finished_errors(variant)
    mean_first = statistics.fmean(first) if first else math.nan
    mean_second = statistics.fmean(second) if second else math.nan
    spread = max((max(errors) - min(errors) for errors in (first, second) if errors), default=0.0)
    if any(run.outcome is Outcome.NOT_FINITE for run in variant):
        parity = Parity.WORSE
    elif min(len(first), len(second)) < 2:
        parity = Parity.UNDECIDED
    else:
        parity = Parity.WORSE if mean_second - mean_first > spread else Parity.SAME
    return Comparison(baseline=mean_first, variant=mean_second, spread=spread, parity=parity)


def why(name: str, baseline: Sequence[Run], variant: Sequence[Run], *, score: str) -> str:
    """One or two sentences: how ``variant`` did beside the baseline, and what its evidence says of
    why.

    ``score`` names the error ("CER", "error"); nothing is said that the runs did not show.
    """
    if not variant:
        return f"{name}: not run."
    stopped = [run for run in variant if run.outcome is Outcome.NOT_FINITE]
    broken = [run for run in variant if run.outcome is Outcome.FAILED]
    if broken:
        return f"{name} could not be run: {broken[0].reason}."
    if stopped:
        first = stopped[0]
        lost = first.evidence.breakdown
        share = ""
        if lost is not None and lost.where == "update":
            gone = sum(lost.names.values())
            share = f" {100 * gone / lost.elements:.0f}% of the weights were not finite after it."
        return (
            f"{name} failed in {len(stopped)} of {len(variant)} runs, at step {first.steps}: "
            f"{first.reason}.{share}"
        )
    result = compare(baseline, variant)
    figures = f"{result.variant:.1f}% {score} against {result.baseline:.1f}%"
    swallowed = _swallowed(variant)
    if math.isnan(result.baseline):
        return (
            f"{name} ended at {result.variant:.1f}% {score}; there is no FP32 run to compare with."
        )
    if result.parity is Parity.WORSE:
        return (
            f"{name} did worse: {figures}, {result.difference:.1f} points, where seeds alone "
            f"make {result.spread:.1f}. {swallowed}"
        )
    if result.parity is Parity.SAME:
        return (
            f"{name} did not fail: {figures}, a difference of {result.difference:+.1f} points, "
            f"where seeds alone make {result.spread:.1f}. {swallowed}"
        )
    return (
        f"{name} came to its end: {figures}; with one seed a side a difference of "
        f"{result.difference:+.1f} points decides nothing. {swallowed}"
    )


def _swallowed(runs: Sequence[Run]) -> str:
    """How many updates 16-bit weights swallowed, or would have where there is a master copy."""
    seen = [run.evidence for run in runs if run.evidence.samples]
    if not seen:
        return ""
    early = statistics.fmean(one.samples[0].updates.swallowed_share for one in seen)
    late = statistics.fmean(one.updates(last=0.25).swallowed_share for one in seen)
    if sixteen_bit_weights(runs[0].experiment.recipe):
        return f"Swallowed updates: {early:.0f}% at first, {late:.0f}% in the last quarter."
    return (
        "Its FP32 master copy kept updates that 16-bit weights would have swallowed: "
        f"{early:.0f}% at first, {late:.0f}% in the last quarter."
    )


def gradient_sentence(runs: Sequence[Run], to: Reach, *, scale: int) -> str:
    """What FP16 would round to zero of the gradients these runs computed, zeros of
    their own apart.
    """
    weights = total(run.evidence.weight_gradients for run in runs)
    inner = total(run.evidence.activation_gradients for run in runs)
    if not weights.values:
        return "No gradients were sampled."
    return (
        f"Without a loss scale FP16 would turn {percent(weights.lost_share(to))} of the non-zero "
        f"weight gradients and {percent(inner.lost_share(to))} of the non-zero activation gradients "
        f"into zeros; with a scale of {power(scale)}, {percent(weights.lost_share(to, scale=scale))} and "
        f"{percent(inner.lost_share(to, scale=scale))}. (Already zero in FP32, and no loss of FP16: "
        f"{percent(weights.zero_share)} and {percent(inner.zero_share)}.)"
    )


def mixed_sentence(baseline: Sequence[Run], variant: Sequence[Run]) -> str:
    """The answer to the demo's question, with its figures."""
    result = compare(baseline, variant)
    if not finished_errors(variant) or not finished_errors(baseline):
        return "FP32 and mixed precision cannot be compared: at least one has no finished run."
    figures = (
        f"mixed precision {result.variant:.1f}% CER, FP32 {result.baseline:.1f}%: "
        f"{result.difference:+.1f} points, where seeds alone make {result.spread:.1f}"
    )
    match result.parity:
        case Parity.SAME:
            return f"Mixed precision trains as well as FP32: {figures}."
        case Parity.WORSE:
            return f"Mixed precision did worse than FP32: {figures}."
        case Parity.UNDECIDED:
            return f"One seed a side decides nothing: {figures}."


def loss_scale_exponent(runs: Sequence[Run]) -> int:
    """The exponent of the loss scale the runs ended with (the lowest, rounded down); 16 if none
    ran.
    """
    scales = [run.loss_scale for run in runs if run.loss_scale > 1]
    return math.floor(math.log2(min(scales))) if scales else 16


def cost_sentence(baseline: Sequence[Run], variant: Sequence[Run]) -> str:
    """What a step of ``variant`` holds and takes beside the baseline's, as measured here."""
    first = next((run.footprint for run in baseline if run.footprint), None)
    second = next((run.footprint for run in variant if run.footprint), None)
    times = [[run.step_ms for run in runs if run.step_ms > 0] for runs in (baseline, variant)]
    if first is None or second is None or not all(times):
        return "Bytes and times were not measured."
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    return (
        f"A mixed-precision step keeps {second.activations / 2**20:.1f} MiB of activations where FP32 "
        f"keeps {first.activations / 2**20:.1f}, and {second.total / 2**20:.1f} MiB in all instead of "
        f"{first.total / 2**20:.1f}; its 16-bit arithmetic is emulated on this machine, at "
        f"{ratio:.2f} of FP32's time a step."
    )
