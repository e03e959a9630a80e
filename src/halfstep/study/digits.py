"""The cause, isolated in seconds: plain SGD at a small step on real digits.

Micikevicius et al. 2017, section 3.1: an update much smaller than its weight is lost when added
to it in FP16. Nothing but SGD and a two-layer network is here, so nothing else can be the reason.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfstep.diagnosis.footprint import measure_footprint
from halfstep.diagnosis.probe import Probe
from halfstep.errors import NonFiniteError
from halfstep.study.datasets import mnist_5k
from halfstep.study.runs import Experiment, Outcome, Point, Run
from halfstep.study.switched import switched

__all__ = ["Digits", "DigitsPlan", "load_digits", "train_digits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsPlan:
    """Hyper-parameters: a small step and many of them, as in the last phase of a long training."""

    steps: int = 5000
    batch: int = 100
    rate: float = 1e-3
    hidden: int = 64
    points: int = 8
    probe_every: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Real digits: images float32 (n, 784), labels int64 (n,); nine tenths train, one
    tenth tests.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """MNIST's 5,000 digits of :func:`mnist_5k`, 4,000 to train and 1,000 to test, shuffled once."""
    images, labels = mnist_5k()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2017))
    flat, classes = torch.from_numpy(images).flatten(1)[order], torch.from_numpy(labels)[order]
    return Digits(
        train_images=flat[1000:],
        train_labels=classes[1000:],
        test_images=flat[:1000],
        test_labels=classes[:1000],
    )


def train_digits(
    experiment: Experiment, digits: Digits, plan: DigitsPlan, tell: Callable[[float, float], None]
) -> Run:
    """Train a two-layer network as ``experiment`` says; ``error`` is the percentage of wrong test
    digits.

    Nothing is chosen by it, so there is no development part: the curve is of the test part.
    """
    torch.manual_seed(experiment.seed)
    model = nn.Sequential(nn.Linear(784, plan.hidden), nn.ReLU(), nn.Linear(plan.hidden, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.rate)
    draw = torch.Generator().manual_seed(experiment.seed)
    curve: list[Point] = []
    losses: list[float] = []
    times: list[float] = []
    skipped, stopped = 0, ""
    mark = max(1, plan.steps // plan.points)

    def loss_of(chosen: Tensor) -> Tensor:
        scores = model(digits.train_images[chosen]).float()
        return nn.functional.cross_entropy(scores, digits.train_labels[chosen])

    started = time.perf_counter()
    with (
        switched(model, optimizer, experiment.recipe) as switch,
        Probe(model, optimizer, every=plan.probe_every) as probe,
    ):
        for step in range(1, plan.steps + 1):
            chosen = torch.randint(len(digits.train_labels), (plan.batch,), generator=draw)
            before = time.perf_counter()
            loss = loss_of(chosen)
            loss.backward()
            try:
                optimizer.step()
            except NonFiniteError as error:
                stopped = str(error)
                break
            optimizer.zero_grad()
            if (step - 1) % plan.probe_every:
                times.append(time.perf_counter() - before)
            losses.append(float(loss.detach()))
            skipped += not switch.last_step.applied
            if probe.breakdown is not None:
                stopped = probe.breakdown.reason
                break
            if step % mark == 0 or step == plan.steps:
                with torch.no_grad():
                    guesses = model(digits.test_images).argmax(dim=1)
                error = 100 * float((guesses != digits.test_labels).float().mean())
                seconds = time.perf_counter() - started
                mean = statistics.fmean(losses[-mark:])
                curve.append(Point(step=step, seconds=seconds, loss=mean, error=error))
                tell(step / plan.steps, error)
        evidence = probe.evidence()
        seconds = time.perf_counter() - started
        footprint = measure_footprint(
            model,
            optimizer,
            lambda: loss_of(torch.arange(plan.batch)),
        )
        return Run(
            experiment=experiment,
            outcome=Outcome.NOT_FINITE if stopped else Outcome.FINISHED,
            reason=stopped,
            steps=len(losses),
            seconds=seconds,
            step_ms=1000 * statistics.median(times) if times else math.nan,
            error=curve[-1].error if curve and not stopped else math.nan,
            loss_scale=switch.last_step.loss_scale,
            skipped=skipped,
            curve=tuple(curve),
            evidence=evidence,
            footprint=footprint,
        )
