"""What emulated arithmetic costs: a training step of each recipe against the FP32 step of the same run.

Each recipe takes turns with FP32 alone, and its row is given as soon as it is measured: a table that is
cut short has every row up to then. With five rounds the whole takes about 5 minutes of one quiet core.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator

from halfstep.study.benchmarks import layers, tiny
from halfstep.study.benchmarks.harness import Clock, Row, Sense, Target, interleave, ratio
from halfstep.study.benchmarks.models import Workload, cnn, lstm, transformer
from halfstep.study.benchmarks.switch import FP32, Step, fp32_step, switched_step

__all__ = ["BOUNDS", "WORKLOADS", "rows"]

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


_FEW = 3
"""Rounds of the recipes that are allowed more than five times the FP32 step: half of the run's time."""


def _few_sequences() -> Workload:
    """The transformer on 4 sequences: weights are rounded for 512 rows, where 2048 would hide it."""
    whole = transformer()
    return dataclasses.replace(
        whole,
        description=whole.description.replace("B=16", "B=4"),
        inputs=whole.inputs[:4],
        targets=whole.targets[:4],
    )


WORKLOADS: tuple[Callable[[], Workload], ...] = (_few_sequences, cnn, lstm)


def rows(*, device: str = "cpu", rounds: int = 5, clock: Clock = Clock.WALL) -> Iterator[Row]:
    """The rows of the table as they are measured: single operations, models, what others have."""
    yield from tiny.rows(rounds=rounds)
    for build in WORKLOADS:
        workload = build()
        fp32 = fp32_step(workload.to(device))
        for recipe, bounds in BOUNDS.items():
            step = switched_step(workload.to(device), recipe=recipe)
            steps: dict[str, Step] = {FP32: fp32, recipe: step}
            few = {recipe: min(rounds, _FEW)} if bounds[0] > 5 else {}
            seconds = interleave(steps, rounds=rounds, warmup=1, limits=few, clock=clock.read)
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
    if device == "cpu":
        yield from layers.rows(rounds=rounds, clock=clock)
