"""What an architecture came to in a recipe, and when that is good."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CONFIDENCE", "Outcome", "deviation", "least_cosine", "widest"]

CONFIDENCE = 0.99
_LEAST_COSINE = {"fp32": 1.0, "fp16": 0.999, "bf16": 0.99}
_LEAST_OF_NARROWER = 0.95


def least_cosine(recipe: str) -> float:
    """The target of the gradient's cosine to FP32's: 0.999 in fp16, 0.99 in bf16, 0.95 in 8 bits."""
    return _LEAST_COSINE.get(recipe, _LEAST_OF_NARROWER)


def deviation(loss: float, seeds: Sequence[float]) -> float:
    """How far ``loss`` lies from FP32's losses with other seeds, in the unit of a prediction interval:
    (loss - mean) / (s * sqrt(1 + 1/n)), which for one more FP32 run is Student's t of n-1 degrees of freedom.

    NaN where the loss is not finite; infinite where the seeds do not differ and the loss does.

    >>> deviation(4.0, (1.0, 2.0, 3.0))
    1.7320508075688774
    """
    if not math.isfinite(loss):
        return math.nan
    off = loss - statistics.fmean(seeds)
    unit = statistics.stdev(seeds) * math.sqrt(1 + 1 / len(seeds))
    return off / unit if unit else math.copysign(math.inf, off) if off else 0.0


def widest(seeds: int) -> float:
    """Between minus and plus this, `deviation` of one more FP32 run lies with probability `CONFIDENCE`:
    the two-sided quantile of Student's t; 4.60 for five seeds.

    A run in a recipe that is outside is told from FP32 by more than the seed. The recipe's run has the
    weights and batches of FP32's first seed: with a recipe that changes little it is far inside.

    Source: any text on prediction intervals of a normal sample, such as G. J. Hahn and W. Q. Meeker,
    Statistical Intervals, 1991, section 4.2.
    """
    from scipy.stats import t  # scipy is in the extra

    return float(t.ppf(0.5 + CONFIDENCE / 2, seeds - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A line of the table.

    Args:
        model: the class, with its library.
        cosine: of the first gradient, dropout off, to FP32's.
        after: the mean loss over the batches after the last step.
        fp32: the same of FP32, one of each seed; where the loss scale cost the recipe steps, of FP32 without
            as many at the beginning.
        launched: the same of ``halfstep run`` on the unmodified program; NaN where that failed.
        same: all its losses are those of ``halfstep.switch``, bit for bit.
        skipped: steps that the loss scale cost.
        error: what went wrong, or nothing.
    """

    architecture: str
    kind: str
    model: str
    recipe: str
    parameters: int
    cosine: float
    after: float
    fp32: tuple[float, ...]
    launched: float
    same: bool
    skipped: int
    seconds: float
    error: str

    @property
    def deviation(self) -> float:
        """See `deviation`."""
        return deviation(self.after, self.fp32) if self.fp32 else math.nan

    @property
    def met(self) -> bool:
        """No error, the cosine reached, the loss within FP32's seeds, both ways the same."""
        return (
            not self.error
            and self.cosine >= least_cosine(self.recipe)
            and abs(self.deviation) <= widest(len(self.fp32))
            and self.same
        )

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON values; None where there is no number."""
        record = asdict(self) | {
            "target": least_cosine(self.recipe),
            "deviation": self.deviation,
            "met": self.met,
        }
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Outcome:
        """The way back from `as_dict`."""
        values = {name: record[name] for name in cls.__slots__}
        for name in ("cosine", "after", "launched"):
            values[name] = math.nan if values[name] is None else values[name]
        values["fp32"] = tuple(values["fp32"])
        return cls(**values)
