"""What the switch costs and gains: training steps against hand-written autocast and FP32.

A step is forward, loss, backward, AdamW(fused=True) and zero_grad(set_to_none=True). All
contestants start from the same weights, see the same batch and take turns in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import halfstep
from halfstep.study.benchmarks.harness import Clock, Ratio, Row, Sense, Target, interleave, ratio
from halfstep.study.benchmarks.models import WORKLOADS, Workload, small_layers, three_layers

__all__ = ["FP32", "Comparison", "Step", "fp32_step", "rows", "switched_step"]

FP32 = "fp32"
AUTOCAST_BF16 = "autocast bf16"
AUTOCAST_FP16 = "autocast fp16"
SWITCH_BF16 = "halfstep bf16"
SWITCH_FP16 = "halfstep fp16"
WITHOUT_REPLAY = "halfstep bf16 that keeps nothing to run again"

Step = Callable[[], None]

# torch's half-precision kernels on a CPU are 20-80 times slower than its FP32 ones.
_SLOW_ROUNDS = 2
_EQUAL = Target(sense=Sense.AT_MOST, bound=1.0)
_NEARLY_EQUAL = Target(sense=Sense.AT_MOST, bound=1.05)
_BF16_OVER_FP32 = {"transformer": 1.9, "CNN": 1.85, "LSTM": 1.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two contestants and the bound on the ratio of their step times."""

    case: str
    against: str
    target: Target

    def row(self, workload: Workload, seconds: Mapping[str, Sequence[float]]) -> Row:
        """The measured line: time over the other's time, or how many times faster."""
        ours, theirs = seconds[self.case], seconds[self.against]
        faster = self.target.sense is Sense.AT_LEAST
        return Row(
            case=f"{self.case} step, {workload.name}",
            against=f"{self.against}, {'times faster' if faster else 'time ratio'}",
            figure=ratio(theirs, ours) if faster else ratio(ours, theirs),
            target=self.target,
            details={
                "workload": workload.description,
                "seconds": {name: statistics.median(seconds[name]) for name in seconds},
            },
        )


def rows(*, device: str = "cpu", rounds: int = 15, clock: Clock = Clock.WALL) -> Iterator[Row]:
    """The rows of the table, each as soon as it is measured."""
    cuda = torch.device(device).type == "cuda"
    ratios: dict[str, list[Ratio]] = {}
    for build in WORKLOADS:
        workload = build()
        comparisons = _on_cuda() if cuda else _on_cpu(workload.name)
        seconds = _race(workload, comparisons, device=device, rounds=rounds, clock=clock)
        for comparison in comparisons:
            row = comparison.row(workload, seconds)
            if comparison.target is _NEARLY_EQUAL:
                ratios.setdefault(comparison.case, []).append(row.figure)
            yield row
    for case, figures in ratios.items():
        medians = sorted(figure.median for figure in figures)
        yield Row(
            case=f"{case} step, median of the three",
            against="autocast, time ratio",
            figure=Ratio(
                median=statistics.median(medians), low=medians[0], high=medians[-1], rounds=rounds
            ),
            target=_EQUAL,
        )
    workload = small_layers()
    target = Target(sense=Sense.AT_MOST, bound=1.2)
    comparison = Comparison(case=SWITCH_BF16, against=AUTOCAST_BF16, target=target)
    # Steps of milliseconds: many rounds cost nothing.
    seconds = _race(workload, (comparison,), device=device, rounds=10 * rounds, clock=clock)
    yield comparison.row(workload, seconds)
    workload = three_layers()
    target = Target(sense=Sense.AT_MOST, bound=1.02)
    comparison = Comparison(case=SWITCH_BF16, against=WITHOUT_REPLAY, target=target)
    seconds = _race(workload, (comparison,), device=device, rounds=40 * rounds, clock=clock)
    yield comparison.row(workload, seconds)


def _on_cpu(workload: str) -> tuple[Comparison, ...]:
    """bf16 is native, fp16 is emulated by exact products in FP32 kernels."""
    faster = Target(sense=Sense.AT_LEAST, bound=_BF16_OVER_FP32[workload])
    comparisons = (
        Comparison(case=SWITCH_BF16, against=AUTOCAST_BF16, target=_NEARLY_EQUAL),
        Comparison(case=SWITCH_BF16, against=FP32, target=faster),
        Comparison(case=SWITCH_FP16, against=FP32, target=Target(sense=Sense.AT_MOST, bound=1.3)),
    )
    if workload != "transformer":
        return comparisons
    half = Target(sense=Sense.AT_LEAST, bound=15.0)
    return (*comparisons, Comparison(case=SWITCH_FP16, against=AUTOCAST_FP16, target=half))


def _on_cuda() -> tuple[Comparison, ...]:
    """Both 16-bit formats are native."""
    return (
        Comparison(case=SWITCH_BF16, against=AUTOCAST_BF16, target=_NEARLY_EQUAL),
        Comparison(case=SWITCH_FP16, against=AUTOCAST_FP16, target=_NEARLY_EQUAL),
        Comparison(case=SWITCH_FP16, against=FP32, target=_EQUAL),
    )


def _race(
    workload: Workload,
    comparisons: Sequence[Comparison],
    *,
    device: str,
    rounds: int,
    clock: Clock,
) -> dict[str, list[float]]:
    cuda = torch.device(device).type == "cuda"
    names = dict.fromkeys(name for it in comparisons for name in (it.case, it.against))
    return interleave(
        {name: _CONTESTANTS[name](workload.to(device)) for name in names},
        rounds=rounds,
        limits={} if cuda else {AUTOCAST_FP16: _SLOW_ROUNDS},
        synchronize=torch.cuda.synchronize if cuda else _nothing,
        clock=clock.read,
    )


def _nothing() -> None:
    """A CPU has done its work when the call returns."""


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _plain(workload: Workload, optimizer: torch.optim.Optimizer) -> Step:
    """The step as written for FP32, which is also the step of a switched model."""

    def step() -> None:
        workload.loss(workload.model(workload.inputs)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def fp32_step(workload: Workload) -> Step:
    """A training step in FP32."""
    return _plain(workload, _optimizer(workload.model))


def switched_step(workload: Workload, *, recipe: str) -> Step:
    """A training step of the switched model."""
    optimizer = _optimizer(workload.model)
    halfstep.switch(workload.model, optimizer, recipe=recipe)
    return _plain(workload, optimizer)


def _without_replay(workload: Workload) -> Step:
    """A step whose forward could not be run again to find what was not finite."""
    optimizer = _optimizer(workload.model)
    switch = halfstep.switch(workload.model, optimizer, recipe="bf16")
    switch.recorder.note = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    return _plain(workload, optimizer)


def _autocast(workload: Workload, *, dtype: torch.dtype) -> Step:
    """The step as users write it by hand, with torch's scaler where the format needs one."""
    optimizer = _optimizer(workload.model)
    device = workload.inputs.device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    def step() -> None:
        with torch.autocast(device, dtype):
            loss = workload.loss(workload.model(workload.inputs))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


_CONTESTANTS: dict[str, Callable[[Workload], Step]] = {
    FP32: fp32_step,
    AUTOCAST_BF16: partial(_autocast, dtype=torch.bfloat16),
    AUTOCAST_FP16: partial(_autocast, dtype=torch.float16),
    SWITCH_BF16: partial(switched_step, recipe="bf16"),
    SWITCH_FP16: partial(switched_step, recipe="fp16"),
    WITHOUT_REPLAY: _without_replay,
}
