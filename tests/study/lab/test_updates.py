"""Updates: what must arrive is exact for nearest, and within sampling error for stochastic."""

from __future__ import annotations

import math

import pytest
import torch

from halfstep.format import Format, Rounding, round_number
from halfstep.study.lab.updates import RATIOS, arrived, significands, updates

SEED = 7  # not the command's default: the finding is no matter of one seed


@pytest.fixture(scope="module")
def result():
    return updates(SEED)


def curve(result, name: str) -> dict[int, float]:
    (found,) = (c for c in result.panels[0].curves if c.name == name)
    return {round(-math.log2(x)): y for x, y in zip(found.x, found.y, strict=True)}


def test_every_finding_is_reproduced(result):
    assert [f.claim for f in result.findings if not f.reproduced] == []
    assert len(result.findings) == 6


@pytest.mark.parametrize(("name", "cliff"), [("fp16", 12), ("e6m9", 11), ("bf16", 9)])
def test_nearest_ignores_all_below_the_cliff_and_nothing_above(result, name: str, cliff: int):
    shares = curve(result, f"{name}, nearest")
    assert {shares[r] for r in RATIOS if r >= cliff} == {0.0}
    # Half a spacing becomes a whole one: the mean over significands m of 2 / m is 2 ln 2.
    assert shares[cliff - 1] == pytest.approx(2 * math.log(2), rel=2 / 2**7)
    assert all(0.97 < shares[r] < 1.03 for r in RATIOS if r < cliff - 1)


def test_share_is_that_of_the_exact_codec():
    format = Format.parse("bf16")
    weights = significands(format)
    share = arrived(weights, "bf16", Rounding.NEAREST, 7, torch.Generator())
    for weight, found in zip(weights.tolist(), share.tolist(), strict=True):
        after = float(round_number(weight * (1 + 2**-7), format))
        assert found == (after - weight) / (weight * 2**-7)


def test_significands_are_all_there_are():
    assert significands(Format.parse("fp16")).half().unique().numel() == 1024


def test_another_seed_gives_other_draws_and_the_same_nearest(result):
    other = updates(SEED + 1)
    assert curve(other, "fp16, stochastic") != curve(result, "fp16, stochastic")
    assert curve(other, "fp16, nearest") == curve(result, "fp16, nearest")


def test_the_same_seed_gives_the_same_result(result):
    assert updates(SEED) == result
