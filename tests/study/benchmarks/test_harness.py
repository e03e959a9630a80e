"""The harness: taking turns, ratios, targets, the record that is written."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from halfstep.study.benchmarks.harness import (
    Ratio,
    Row,
    Sense,
    Target,
    interleave,
    ratio,
    save,
    this_machine,
)


def row(median: float, *, sense: Sense = Sense.AT_MOST, bound: float = 1.0) -> Row:
    return Row(
        case="ours",
        against="theirs",
        figure=Ratio(median=median, low=median, high=median, rounds=3),
        target=Target(sense=sense, bound=bound),
    )


def test_contestants_take_turns_in_a_rotating_order():
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleave(contestants, rounds=3, warmup=1, clock=itertools.count().__next__)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1]}


def test_a_slow_contestant_runs_fewer_rounds_and_does_not_warm_up():
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in ("fast", "slow")}
    seconds = interleave(contestants, rounds=5, warmup=2, limits={"slow": 1})
    assert calls.count("slow") == 1
    assert calls.count("fast") == 2 + 5
    assert len(seconds["slow"]) == 1


def test_the_device_is_waited_for_before_each_reading_of_the_clock():
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return 0.0

    interleave(
        {"a": lambda: events.append("run")},
        rounds=1,
        warmup=0,
        synchronize=lambda: events.append("wait"),
        clock=clock,
    )
    assert events == ["wait", "clock", "run", "wait", "clock"]


def test_ratio_is_taken_round_by_round():
    # The machine is ten times slower in round 2, for both: no round's ratio changes.
    figure = ratio([2.0, 20.0, 2.0, 4.0], [1.0, 10.0, 1.0, 1.0])
    assert (figure.median, figure.low, figure.rounds) == (2.0, 2.0, 4)
    assert figure.high == 2.5
    assert ratio([3.0, 1.0], [1.0]).rounds == 1


def test_ratio_of_nothing_meets_no_target():
    figure = ratio([], [])
    assert math.isnan(figure.median)
    assert not Target(sense=Sense.AT_MOST, bound=1.0).met_by(figure.median)
    assert not Target(sense=Sense.AT_LEAST, bound=1.0).met_by(figure.median)


@pytest.mark.parametrize(
    ("median", "sense", "met"),
    [
        (1.0, Sense.AT_MOST, True),
        (1.01, Sense.AT_MOST, False),
        (1.0, Sense.AT_LEAST, True),
        (0.99, Sense.AT_LEAST, False),
    ],
)
def test_targets(median: float, sense: Sense, met: bool):
    assert row(median, sense=sense).met is met


def test_record_has_machine_versions_command_and_date(tmp_path: Path):
    machine = this_machine("cpu")
    data, page = save(
        [row(0.97), row(1.25)],
        machine,
        theme="switch",
        command="halfstep bench switch",
        directory=tmp_path / "results",
    )
    record = json.loads(data.read_text())
    assert data.name.startswith("switch_") and data.stem.endswith(record["date"])
    assert record["command"] == "halfstep bench switch"
    assert record["machine"]["torch"] and record["machine"]["halfstep"]
    assert [r["met"] for r in record["rows"]] == [True, False]
    text = page.read_text()
    assert "Command: `halfstep bench switch`" in text
    assert "| ours | theirs | 1.25 | 1.25-1.25 | <= 1.00 | no |" in text
