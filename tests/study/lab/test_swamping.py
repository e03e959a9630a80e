"""Long sums: where they stop is exact; what mends them is within its bound; a bad sum is seen."""

from __future__ import annotations

import pytest
import torch

from halfstep.study.lab import swamping as module
from halfstep.study.lab.swamping import CASES, Kept, running_sums, swamping

SHORT = (256, 2**13)  # long enough for sums in e6m9 and bf16 to stop
STOPS = {"e6m9": 2.0**12, "bf16": 2.0**10}


@pytest.fixture(scope="module")
def result():
    cases = [case for case in CASES if case.name != "fp16"]  # it would stop later
    return swamping(5, lengths=SHORT, cases=cases)


def test_every_finding_is_reproduced(result):
    assert [f.claim for f in result.findings if not f.reproduced] == []
    assert len(result.findings) == len(CASES) - 1


@pytest.mark.parametrize("name", STOPS)
def test_every_sum_stops_at_the_same_power_of_two(name: str):
    x = module._numbers(5, SHORT[-1])
    sums = running_sums(x, name, 5, SHORT)
    assert sums[-1].unique().tolist() == [STOPS[name]]


def test_a_sum_that_is_not_mended_is_no_reproduction():
    wrong = Kept(name="e6m9, chunks of 64", accumulate="e6m9/chunk8192", published="1", source="")
    (finding,) = swamping(5, lengths=SHORT, cases=[wrong]).findings
    assert not finding.reproduced


def test_stochastic_sums_depend_on_the_seed_and_nothing_else():
    x = module._numbers(0, 256)
    first, again, other = (running_sums(x, "e6m9/stochastic", seed, (256,)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_numbers_have_mean_and_deviation_one():
    x = module._numbers(0, 2**12).double()
    count = x.numel()
    assert abs(float(x.mean()) - 1) < 5 / count**0.5
    # the variance of a uniform one's square deviation is 4/5
    assert abs(float(x.var()) - 1) < 5 * (0.8 / count) ** 0.5
