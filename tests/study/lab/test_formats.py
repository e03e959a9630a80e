"""Formats, asked of `round_to`: the limits are those of the literals, the spacing that of eps."""

from __future__ import annotations

import pytest
import torch

from halfstep.format import Format, decode
from halfstep.study.lab.formats import LINES, RANGES, formats, numbers_up_to, reach, spacing


def test_every_finding_is_reproduced():
    result = formats(3)
    assert [f.claim for f in result.findings if not f.reproduced] == []
    assert len(result.findings) == 16


@pytest.mark.parametrize("name", RANGES)
def test_reach_is_the_literals(name: str):
    span, format = reach(name), Format.parse(name)
    assert (span.low, span.middle, span.high) == (
        format.smallest,
        format.smallest_normal,
        format.max,
    )


@pytest.mark.parametrize("name", RANGES)
def test_spacing_just_above_one_is_eps_and_at_the_bottom_the_quantum(name: str):
    format = Format.parse(name)
    points = torch.tensor([1 + 2.0**-40, format.smallest * 0.75], dtype=torch.float64)
    assert spacing(name, points).tolist() == [format.eps, format.smallest]


@pytest.mark.parametrize("name", LINES)
def test_number_line_has_every_number_and_no_other(name: str):
    format = Format.parse(name)
    values = {float(decode(code, format)) for code in format.codes()}
    assert numbers_up_to(name, 8.0) == tuple(sorted({abs(v) for v in values if 0 <= v <= 8}))


def test_seed_moves_the_points_and_not_the_limits():
    first, second = formats(0), formats(1)
    assert first.findings == second.findings
    assert first.panels[1] != second.panels[1]
