"""One training run under one recipe, whatever is trained: steps, curve, probe, bytes, outcome."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.diagnosis.culprit import first_nonfinite_layer
from halfstep.diagnosis.footprint import measure_footprint
from halfstep.diagnosis.probe import Probe
from halfstep.errors import NonFiniteError
from halfstep.study.runs import Example, Experiment, Outcome, Point, Run
from halfstep.study.switched import switched

__all__ = ["Pace", "Tell", "Trainee", "drive"]

Tell = Callable[[float, float], None]
"""Told the share done, 0 to 1, and the last error in percent (NaN before the first)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a run is, at how many points its curve is taken, and how often it is probed."""

    steps: int
    points: int
    probe_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """What is trained, as functions of nothing; each leaves the model in training mode.

    ``step`` makes one update and gives the loss before it. ``check`` gives the error for the curve
    in percent, ``score`` the final one with examples. ``ruler`` gives the loss of one batch, the
    same in every run, for counting bytes.
    """

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[], float]
    check: Callable[[], float]
    score: Callable[[], tuple[float, Sequence[Example]]]
    ruler: Callable[[], Tensor]


def drive(experiment: Experiment, trainee: Trainee, pace: Pace, tell: Tell) -> Run:
    """Train as ``experiment`` says; a run that diverges is a result, not an error.

    It stops after the step at which a weight is no longer finite, or when the switch gives up.
    """
    model, optimizer = trainee.model, trainee.optimizer
    curve: list[Point] = []
    losses: list[float] = []
    times: list[float] = []
    skipped, stopped = 0, ""
    marks = {round(pace.steps * (point + 1) / pace.points) for point in range(pace.points)}
    marked = 0
    started = time.perf_counter()
    with (
        switched(model, optimizer, experiment.recipe) as switch,
        Probe(model, optimizer, every=pace.probe_every) as probe,
    ):
        for step in range(1, pace.steps + 1):
            before = time.perf_counter()
            try:
                losses.append(trainee.step())
            except NonFiniteError as error:
                stopped = f"{error}{_first_layer(trainee)}"
                break
            if (step - 1) % pace.probe_every:
                times.append(time.perf_counter() - before)
            skipped += not switch.last_step.applied
            if probe.breakdown is not None:
                stopped = probe.breakdown.reason
                break
            if step in marks:
                error = trainee.check()
                seconds = time.perf_counter() - started
                loss = statistics.fmean(losses[marked:])
                curve.append(Point(step=step, seconds=seconds, loss=loss, error=error))
                marked = step
            if step % max(1, pace.steps // 200) == 0:
                tell(step / pace.steps, curve[-1].error if curve else math.nan)
        seconds = time.perf_counter() - started
        footprint = measure_footprint(model, optimizer, trainee.ruler)
        error, examples = trainee.score()
        return Run(
            experiment=experiment,
            outcome=Outcome.NOT_FINITE if stopped else Outcome.FINISHED,
            reason=stopped,
            steps=len(losses),
            seconds=seconds,
            step_ms=1000 * statistics.median(times) if times else math.nan,
            error=math.nan if stopped else error,
            loss_scale=switch.last_step.loss_scale,
            skipped=skipped,
            curve=tuple(curve),
            examples=tuple(examples),
            evidence=probe.evidence(),
            footprint=footprint,
        )


def _first_layer(trainee: Trainee) -> str:
    """Where the forward stops being finite, if it does, said as the end of a sentence."""
    layer = first_nonfinite_layer(trainee.model, trainee.ruler)
    return f"; the first output that is not finite is that of {layer}" if layer else ""
