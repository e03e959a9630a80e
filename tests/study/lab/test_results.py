"""Findings judge themselves; results become plain JSON; figures are written once."""

from __future__ import annotations

import json
import math

import pytest

from halfstep.study.lab.results import (
    Axis,
    Curve,
    Curves,
    Finding,
    Result,
    Span,
    Spans,
    Ticks,
    as_plain,
)
from halfstep.study.lab.writing import interval, number


def finding(ours: float, *, low: float = 0.9, high: float = 1.1) -> Finding:
    return Finding(
        claim="share kept",
        published="1",
        ours=ours,
        low=low,
        high=high,
        derivation="five sigma",
        source="a paper, figure 1",
    )


def result(*findings: Finding) -> Result:
    axis = Axis(title="x", log=True)
    curve = Curve(name="a", x=(1.0, 2.0), y=(3.0, 4.0))
    return Result(
        name="test",
        title="A <test>",
        setting="what was done",
        lesson="what was learnt",
        seed=0,
        findings=findings,
        panels=(
            Curves(name="lines", title="A < B", x=axis, y=axis, curves=(curve,)),
            Spans(
                name="spans",
                title="bars",
                x=axis,
                below="low",
                above="high",
                spans=(Span(name="a", low=0.5, middle=1.0, high=8.0),),
            ),
            Ticks(name="ticks", title="lines", x=Axis(title="x"), rows={"a": (0.0, 1.0)}),
        ),
    )


@pytest.mark.parametrize(
    ("ours", "reproduced"), [(0.9, True), (1.1, True), (0.89, False), (1.11, False)]
)
def test_a_finding_is_reproduced_inside_its_interval(ours: float, reproduced: bool):
    assert finding(ours).reproduced is reproduced
    assert result(finding(1.0), finding(ours)).reproduced is reproduced


def test_nan_reproduces_nothing():
    assert not finding(math.nan).reproduced


def test_plain_is_json_and_says_what_was_reproduced():
    plain = as_plain(result(finding(1.0), finding(2.0)))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["reproduced"] is False
    assert [f["reproduced"] for f in plain["findings"]] == [True, False]
    assert plain["panels"][0]["curves"][0]["y"] == [3.0, 4.0]
    assert plain["panels"][2]["rows"] == {"a": [0.0, 1.0]}


def test_numbers_and_intervals_as_text():
    assert [number(v) for v in (0.5, 1.0, 57344.0, 0.12497, 1.5e-9)] == [
        "2^-1",
        "1",
        "57344",
        "0.125",
        "1.5e-09",
    ]
    assert interval(finding(1.0)) == "0.9 to 1.1"
    assert interval(finding(0.0, low=0.0, high=0.0)) == "0"
