"""A run ends as its evidence says, and keeps what was seen until then."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from halfstep.errors import NonFiniteError
from halfstep.study.driving import Pace, Trainee, drive
from halfstep.study.runs import Experiment, Outcome, Run, Variant

EXPERIMENT = Experiment(task="toy", recipe="fp32", seed=0, variant=Variant.FP32)


def toy(*, poison_at: int = 0, give_up_at: int = 0) -> tuple[Run, list[tuple[float, float]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(8, 4)
    taken = 0

    def loss() -> torch.Tensor:
        return model(data).square().mean()

    def step() -> float:
        nonlocal taken
        taken += 1
        if taken == give_up_at:
            data[0, 0] = torch.inf
            raise NonFiniteError("the floor of the scale")
        value = loss()
        value.backward()
        if taken == poison_at:
            model[0].weight.grad[0, 0] = torch.inf  # pyright: ignore
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    trainee = Trainee(
        model=model,
        optimizer=optimizer,
        step=step,
        check=lambda: 50.0 + taken,
        score=lambda: (42.0, ()),
        ruler=loss,
    )
    told: list[tuple[float, float]] = []
    pace = Pace(steps=10, points=2, probe_every=3)
    return drive(EXPERIMENT, trainee, pace, lambda *what: told.append(what)), told


def test_a_whole_run():
    run, told = toy()
    assert (run.outcome, run.steps, run.error, run.reason) == (Outcome.FINISHED, 10, 42.0, "")
    assert [(point.step, point.error) for point in run.curve] == [(5, 55.0), (10, 60.0)]
    assert [sample.step for sample in run.evidence.samples] == [1, 4, 7, 10]
    assert told[-1] == (1.0, 60.0)
    assert math.isnan(told[0][1])
    assert run.step_ms > 0
    assert run.footprint is not None


def test_weights_that_are_not_finite_end_it():
    run, _ = toy(poison_at=7)
    assert (run.outcome, run.steps) == (Outcome.NOT_FINITE, 7)
    assert math.isnan(run.error)
    assert run.evidence.breakdown is not None
    assert run.reason == run.evidence.breakdown.reason
    assert "the gradient of 0.weight was not finite at step 7" in run.reason
    assert len(run.curve) == 1


def test_a_switch_that_gives_up_ends_it_and_the_layer_is_named():
    run, _ = toy(give_up_at=3)
    assert (run.outcome, run.steps) == (Outcome.NOT_FINITE, 2)
    assert run.reason == (
        "the floor of the scale; the first output that is not finite is that of 0"
    )


def test_other_errors_are_errors():
    trainee = Trainee(
        model=nn.Linear(1, 1),
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        step=lambda: 1 / 0,
        check=lambda: 0.0,
        score=lambda: (0.0, ()),
        ruler=lambda: torch.zeros(1),
    )
    with pytest.raises(ZeroDivisionError):
        drive(EXPERIMENT, trainee, Pace(steps=1, points=1, probe_every=1), lambda *_: None)
