"""What torch.compile makes of the switch: eager and compiled steps, in FP32 and switched, in one run.

Steps, models and batches are those of ``halfstep bench switch``. torch compiles no LSTM: around it little is
left, and the rows of that model say what the compiler's looking on costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from halfstep.study.benchmarks.harness import Clock, Row, Sense, Target, interleave
from halfstep.study.benchmarks.models import WORKLOADS, Workload
from halfstep.study.benchmarks.switch import FP32, Comparison, Step, fp32_step, switched_step

__all__ = ["rows"]

COMPILED_FP32 = "compiled fp32"
EAGER_BF16 = "halfstep bf16"
COMPILED_BF16 = "compiled halfstep bf16"
EAGER_FP16 = "halfstep fp16"
COMPILED_FP16 = "compiled halfstep fp16"
EAGER_FP8 = "halfstep fp8"
COMPILED_FP8 = "compiled halfstep fp8"

# Compiled, it is to be no slower; without an LSTM in graphs there is nothing to gain.
_GAIN = {"transformer": 1.0, "CNN": 1.0, "LSTM": 0.95}
_BF16_OVER_FP32 = {"transformer": 1.5, "CNN": 1.5, "LSTM": 1.5}


def rows(
    *, device: str = "cpu", rounds: int = 15, clock: Clock = Clock.WALL, backend: str = "inductor"
) -> Iterator[Row]:
    """The rows of the table, each model's when it is measured; compiling is not in the figures."""
    cuda = torch.device(device).type == "cuda"
    for build in WORKLOADS:
        workload = build()
        seconds = interleave(
            {name: make(workload.to(device), backend) for name, make in _CONTESTANTS.items()},
            rounds=rounds,
            warmup=3,
            synchronize=torch.cuda.synchronize if cuda else _nothing,
            clock=clock.read,
        )
        for comparison in _comparisons(workload.name):
            yield comparison.row(workload, seconds)
        torch.compiler.reset()


def _comparisons(workload: str) -> tuple[Comparison, ...]:
    gain = Target(sense=Sense.AT_LEAST, bound=_GAIN[workload])
    faster = Target(sense=Sense.AT_LEAST, bound=_BF16_OVER_FP32[workload])
    return (
        Comparison(case=COMPILED_FP32, against=FP32, target=gain),
        Comparison(case=COMPILED_BF16, against=EAGER_BF16, target=gain),
        Comparison(case=COMPILED_BF16, against=COMPILED_FP32, target=faster),
        Comparison(case=COMPILED_FP16, against=EAGER_FP16, target=gain),
        Comparison(
            case=COMPILED_FP16, against=COMPILED_FP32, target=Target(sense=Sense.AT_MOST, bound=1.3)
        ),
        Comparison(case=COMPILED_FP8, against=EAGER_FP8, target=gain),
    )


def _nothing() -> None:
    """A CPU has done its work when the call returns."""


def _eager(step: Callable[[Workload], Step], workload: Workload, backend: str) -> Step:
    return step(workload)


def _compiled(step: Callable[[Workload], Step], workload: Workload, backend: str) -> Step:
    """The step of the model after ``model = torch.compile(model)``."""
    model = torch.compile(workload.model, backend=backend)
    return step(dataclasses.replace(workload, model=model))


_bf16 = partial(switched_step, recipe="bf16")
_fp16 = partial(switched_step, recipe="fp16")
_fp8 = partial(switched_step, recipe="fp8")
_CONTESTANTS: dict[str, Callable[[Workload, str], Step]] = {
    FP32: partial(_eager, fp32_step),
    COMPILED_FP32: partial(_compiled, fp32_step),
    EAGER_BF16: partial(_eager, _bf16),
    COMPILED_BF16: partial(_compiled, _bf16),
    EAGER_FP16: partial(_eager, _fp16),
    COMPILED_FP16: partial(_compiled, _fp16),
    EAGER_FP8: partial(_eager, _fp8),
    COMPILED_FP8: partial(_compiled, _fp8),
}
