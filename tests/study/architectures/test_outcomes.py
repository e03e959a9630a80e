"""When a row is good, and that what crashes is a row."""

import dataclasses
import math
import random
from pathlib import Path

import pytest
from scipy import stats

from halfstep.study.architectures import runner
from halfstep.study.architectures.outcomes import Outcome, deviation, least_cosine, widest
from halfstep.study.architectures.runner import Resumed, outcomes

GOOD = Outcome(
    architecture="bert",
    kind="encoder",
    model="transformers.BertForMaskedLM",
    recipe="fp16",
    parameters=3,
    cosine=0.9999,
    after=1.1,
    fp32=(1.0, 1.1, 1.2, 1.3, 1.4),
    launched=1.1,
    same=True,
    skipped=0,
    seconds=1.0,
    error="",
)


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, True),
        ({"cosine": 0.9989}, False),
        ({"cosine": 0.9989, "recipe": "bf16"}, True),
        ({"cosine": 0.94, "recipe": "fp8"}, False),
        ({"cosine": math.nan}, False),
        ({"after": 1.9}, True),  # 0.7 from the mean is 4.04 of 0.158 * sqrt(1.2)
        ({"after": 2.1}, False),  # and 0.9 is 5.20
        ({"after": 0.3}, False),  # better than FP32 is not FP32 either
        ({"after": math.nan}, False),
        ({"after": math.inf}, False),
        ({"same": False}, False),
        ({"error": "RuntimeError: no"}, False),
        ({"fp32": ()}, False),
    ],
)
def test_what_is_good(change, met):
    assert dataclasses.replace(GOOD, **change).met is met


def test_one_more_run_of_the_same_is_outside_as_often_as_said():
    """20,000 draws, seed 0: the share outside is binomial around 1%, five sigma are 0.35%."""
    draw = random.Random(0)
    outside, bound = 0, widest(5)
    for _ in range(20000):
        *seeds, more = (draw.gauss(3.0, 0.2) for _ in range(6))
        outside += abs(deviation(more, seeds)) > bound
    assert outside / 20000 == pytest.approx(0.01, abs=5 * math.sqrt(0.01 * 0.99 / 20000))


def test_the_interval_is_that_of_scipy():
    values = (1.0, 1.2, 0.7, 1.1)
    low, high = stats.t.interval(
        0.99, 3, loc=sum(values) / 4, scale=stats.tstd(values) * math.sqrt(1.25)
    )
    assert deviation(float(low), values) == pytest.approx(-widest(4))
    assert deviation(float(high), values) == pytest.approx(widest(4))


def test_seeds_that_do_not_differ():
    assert deviation(1.0, (1.0, 1.0)) == 0.0
    assert deviation(0.9, (1.0, 1.0)) == -math.inf
    assert math.isnan(deviation(math.inf, (1.0, 1.1)))


def test_targets():
    assert [least_cosine(name) for name in ("fp16", "bf16", "fp8", "mxfp8")] == [
        0.999,
        0.99,
        0.95,
        0.95,
    ]


@pytest.mark.parametrize("change", [{}, {"cosine": math.nan, "after": math.nan, "fp32": ()}])
def test_a_row_comes_back_from_its_record(change):
    row = dataclasses.replace(GOOD, **change)
    record = row.as_dict()
    assert record["met"] is row.met
    assert Outcome.from_dict(record).as_dict() == record


def test_a_crash_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The recipes before and after the one whose process dies have their rows, and none is measured twice."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(runner, "_MODULES", "crashing")
    monkeypatch.setattr(runner, "versions", lambda: {"halfstep": "0"})
    file = tmp_path / "rows.jsonl"
    recipes = ["fp16", "bf16", "fp32"]
    rows = list(outcomes(["bert"], recipes, jobs=1, resumed=Resumed(file)))
    assert [row.recipe for row in rows] == recipes
    assert rows[1].error == "the process died of SIGSEGV"
    assert not any(row.met for row in rows)
    for row in (rows[0], rows[2]):
        assert (row.cosine, row.after, row.fp32) == (1.0, 1.0, (1.0, 1.5, 2.0))
        assert row.error == "halfstep run: the process left with status 1"
    monkeypatch.setattr(runner, "_MODULES", "nowhere")
    again = list(outcomes(["bert"], recipes, jobs=1, resumed=Resumed(file)))
    assert [row.as_dict() for row in again] == [row.as_dict() for row in rows]
    monkeypatch.setattr(runner, "versions", lambda: {"halfstep": "1"})
    assert Resumed(file).get("bert", "fp16") is None
