"""What emulated arithmetic costs: a training step of each recipe against the FP32 step of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from halfstep.study.benchmarks.harness import Clock, Row, Sense, Target, interleave, ratio
from halfstep.study.benchmarks.models import WORKLOADS
from halfstep.study.benchmarks.switch import FP32, Step, fp32_step, switched_step

__all__ = ["BOUNDS", "rows"]

# recipe -> most times the FP32 step; for the transformer and the CNN, and for the LSTM
BOUNDS = {
    "fp16": (1.3, 2.2),
    "bf16": (1.3, 2.2),
    "fp16-naive": (5.0, 8.0),
    "fp16-acc16": (6.0, 10.0),
    "fp8-chunk64": (6.0, 10.0),
    "fp8": (2.5, 6.0),
    "mxfp8": (2.5, 6.0),
    "nvfp4": (2.5, 6.0),
    "int8": (2.5, 6.0),
}


def rows(*, device: str = "cpu", rounds: int = 5, clock: Clock = Clock.WALL) -> Iterator[Row]:
    """The rows of the table, a model at a time; all recipes of a model take turns in one process."""
    for build in WORKLOADS:
        workload = build()
        steps: dict[str, Step] = {FP32: fp32_step(workload.to(device))}
        for recipe in BOUNDS:
            steps[recipe] = switched_step(workload.to(device), recipe=recipe)
        seconds = interleave(steps, rounds=rounds, warmup=1, clock=clock.read)
        for recipe, bounds in BOUNDS.items():
            bound = bounds[1] if workload.name == "LSTM" else bounds[0]
            yield Row(
                case=f"{recipe} step, {workload.name}",
                against=f"{FP32}, time ratio",
                figure=ratio(seconds[recipe], seconds[FP32]),
                target=Target(sense=Sense.AT_MOST, bound=bound),
                details={
                    "workload": workload.description,
                    "seconds": {n: statistics.median(seconds[n]) for n in (FP32, recipe)},
                },
            )
