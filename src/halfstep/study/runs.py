"""What is trained and what came of it: plain data, written as JSON, one line a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from halfstep.diagnosis.footprint import Footprint
from halfstep.diagnosis.probe import Evidence

__all__ = ["Example", "Experiment", "Outcome", "Point", "Run", "Variant", "append_line", "as_plain"]


class Outcome(Enum):
    """How a run ended."""

    FINISHED = "finished"
    NOT_FINITE = "not finite"
    FAILED = "failed"


class Variant(Enum):
    """What is compared with FP32, by the name a reader sees; in the order they are shown."""

    FP32 = "FP32"
    MIXED = "mixed precision"
    NO_MASTER = "no FP32 master copy"
    NAIVE = "naive 16-bit"
    NAIVE_RAISED = "naive 16-bit, larger eps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One run to make: what is trained, under which recipe, with which seed.

    ``options`` are the hyper-parameters that differ from the task's own, for this variant only.
    """

    task: str
    recipe: str
    seed: int
    variant: Variant
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a learning curve. ``loss`` is a mean since the last point; ``error``
    in percent.
    """

    step: int
    seconds: float
    loss: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A held-out sentence and what was read."""

    reference: str
    recognised: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of an experiment.

    ``error`` is the score on the test part in percent (characters wrong, or digits wrong), NaN
    where the run did not get there. ``step_ms`` is the median over steps that were not probed.
    ``loss_scale`` is the last one, 1 where there is none; ``skipped`` counts steps not applied.
    """

    experiment: Experiment
    outcome: Outcome
    reason: str = ""
    steps: int = 0
    seconds: float = 0.0
    step_ms: float = 0.0
    error: float = float("nan")
    loss_scale: float = 1.0
    skipped: int = 0
    curve: tuple[Point, ...] = ()
    examples: tuple[Example, ...] = ()
    evidence: Evidence = dataclasses.field(default_factory=Evidence)
    footprint: Footprint | None = None


def as_plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses as objects, enums by value, NaN and
    inf as null.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): as_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def append_line(file: Path, run: Run) -> None:
    """Append ``run`` to ``file`` as one line of JSON, flushed: a run finished is never lost."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(as_plain(run)) + "\n")
