"""The table of the switch: which rows there are, and that a row's ratio points the right way."""

from __future__ import annotations

import pytest
import torch

from halfstep.study.benchmarks import switch
from halfstep.study.benchmarks.harness import Sense
from halfstep.study.benchmarks.models import Workload


def tiny(name: str) -> Workload:
    torch.manual_seed(0)
    return Workload(
        name=name,
        description="8 inputs, 4 classes",
        model=torch.nn.Linear(8, 4),
        inputs=torch.randn(16, 8),
        targets=torch.randint(4, (16,)),
    )


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch):
    names = ("transformer", "CNN", "LSTM")
    builders = tuple(lambda name=name: tiny(name) for name in names)
    monkeypatch.setattr(switch, "WORKLOADS", builders)
    monkeypatch.setattr(switch, "small_layers", lambda: tiny("300 small parameters"))
    monkeypatch.setattr(switch, "three_layers", lambda: tiny("three layers"))


def test_rows_are_the_issues(small_table: None):
    rows = [(row.case, row.against, str(row.target)) for row in switch.rows(rounds=2)]
    assert rows == [
        ("halfstep bf16 step, transformer", "autocast bf16, time ratio", "<= 1.05"),
        ("halfstep bf16 step, transformer", "fp32, times faster", ">= 1.90"),
        ("halfstep fp16 step, transformer", "fp32, time ratio", "<= 1.30"),
        ("halfstep fp16 step, transformer", "autocast fp16, times faster", ">= 15.00"),
        ("halfstep bf16 step, CNN", "autocast bf16, time ratio", "<= 1.05"),
        ("halfstep bf16 step, CNN", "fp32, times faster", ">= 1.85"),
        ("halfstep fp16 step, CNN", "fp32, time ratio", "<= 1.30"),
        ("halfstep bf16 step, LSTM", "autocast bf16, time ratio", "<= 1.05"),
        ("halfstep bf16 step, LSTM", "fp32, times faster", ">= 1.50"),
        ("halfstep fp16 step, LSTM", "fp32, time ratio", "<= 1.30"),
        ("halfstep bf16 step, median of the three", "autocast, time ratio", "<= 1.00"),
        ("halfstep bf16 step, 300 small parameters", "autocast bf16, time ratio", "<= 1.20"),
        (
            "halfstep bf16 step, three layers",
            "halfstep bf16 that keeps nothing to run again, time ratio",
            "<= 1.02",
        ),
    ]


def test_ratio_is_above_one_in_the_direction_it_names():
    seconds = {"ours": [1.0, 1.0], "theirs": [2.0, 2.0]}
    faster = switch.Comparison(
        case="ours", against="theirs", target=switch.Target(sense=Sense.AT_LEAST, bound=1.5)
    )
    slower = switch.Comparison(
        case="ours", against="theirs", target=switch.Target(sense=Sense.AT_MOST, bound=1.0)
    )
    assert faster.row(tiny("A"), seconds).figure.median == 2.0
    assert slower.row(tiny("A"), seconds).figure.median == 0.5


@pytest.mark.parametrize("name", list(switch._CONTESTANTS))
def test_every_contestant_trains_the_same_program(name: str):
    start = tiny("A")
    mine = start.to("cpu")
    step = switch._CONTESTANTS[name](mine)
    before = start.loss(start.model(start.inputs)).item()
    for _ in range(20):
        step()
    after = start.loss(mine.model(mine.inputs)).item()
    # AdamW moves each weight by about lr a step, whatever the arithmetic: all descend alike.
    assert 0 < before - after < 0.1
