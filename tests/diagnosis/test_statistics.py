"""Counts against what torch's own casts do, value by value."""

from __future__ import annotations

import pytest
import torch

from halfstep.diagnosis.statistics import (
    Exponents,
    Reach,
    Updates,
    count_exponents,
    count_updates,
    reach,
    total,
)

FP16 = reach(torch.float16)


def awkward(seed: int) -> torch.Tensor:
    """Values over FP32's range, ties, powers of two, zeros of both signs, non-finite ones."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(4000, generator=generator) * torch.exp2(
        torch.randint(-40, 20, (4000,), generator=generator).float()
    )
    powers = torch.exp2(torch.arange(-45.0, 18.0))
    ulps = [torch.nextafter(powers, torch.tensor(side)) for side in (0.0, torch.inf)]
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 65504.0])
    return torch.cat([spread, powers, -powers, *ulps, odd])


def test_reach_of_float16_is_ieee():
    assert Reach(name="float16", smallest=-24, normal=-14, largest=15) == FP16


def test_reach_of_bfloat16():
    assert reach(torch.bfloat16) == Reach(name="bfloat16", smallest=-133, normal=-126, largest=127)


@pytest.mark.parametrize("scale", [-3, 0, 1, 8, 16, 24])
def test_flushed_is_what_a_cast_makes_zero(scale: int):
    values = awkward(seed=0)
    finite = values[torch.isfinite(values)]
    scaled = finite.double() * 2.0**scale
    lost = int(((scaled.to(torch.float16) == 0) & (finite != 0)).sum())
    assert count_exponents(values).flushed(FP16, scale=scale) == lost
    assert lost > 0


@pytest.mark.parametrize("scale", [0, 8])
def test_subnormal_and_flushed_and_normal_are_all(scale: int):
    values = awkward(seed=1)
    counts = count_exponents(values)
    scaled = values[torch.isfinite(values) & (values != 0)].double().abs() * 2.0**scale
    # bins are open below: a power of two belongs to the bin under it
    below_normal = int(((scaled > 2.0**-25) & (scaled <= 2.0**-14)).sum())
    assert counts.subnormal(FP16, scale=scale) == below_normal
    assert counts.overflown(FP16, scale=scale) == int((scaled > 2.0**16).sum())


def test_zeros_and_nonfinite_are_counted_apart():
    counts = count_exponents(torch.tensor([0.0, -0.0, torch.nan, torch.inf, 3.0, 4.0, 5.0]))
    assert counts == Exponents(bins={1: 2, 2: 1}, zeros=2, nonfinite=2)
    assert (counts.values, counts.nonzero) == (7, 3)
    assert counts.zero_share == pytest.approx(200 / 7)


def test_shares_of_nothing_are_zero():
    empty = count_exponents(torch.empty(0, 3))
    assert empty == Exponents()
    assert empty.lost_share(FP16) == empty.zero_share == Updates().swallowed_share == 0.0


def test_counts_add_up():
    parts = [awkward(seed) for seed in (2, 3)]
    assert total(map(count_exponents, parts)) == count_exponents(torch.cat(parts))
    assert Updates(attempted=3, swallowed=1) + Updates(attempted=5, swallowed=5) == Updates(
        attempted=8, swallowed=6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_as_their_values(dtype: torch.dtype):
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert count_exponents(values.transpose(0, 2)) == count_exponents(values.float())


def test_updates_of_a_master_copy_against_a_loop():
    generator = torch.Generator().manual_seed(5)
    before = torch.randn(500, generator=generator)
    change = torch.randn(500, generator=generator) * 10.0 ** torch.randint(
        -7, 0, (500,), generator=generator
    )
    change[::10] = 0
    after = before + change
    attempted = swallowed = 0
    for old, new in zip(before, after, strict=True):
        if old != new:
            attempted += 1
            rounded = old.half()
            swallowed += bool((rounded.float() + (new - old)).half() == rounded)
    counts = count_updates(before, after, torch.ones(500))
    assert counts == Updates(attempted=attempted, swallowed=swallowed)
    assert 0 < swallowed < attempted < 500


def test_updates_of_sixteen_bit_weights_are_those_that_did_not_move():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, torch.nan], dtype=torch.float16)
    gradient = torch.tensor([1e-4, 0.5, 0.0, 0.0, 1.0], dtype=torch.float16)
    after = before - 0.1 * gradient
    counts = count_updates(before, after, gradient)
    assert counts == Updates(attempted=2, swallowed=1)
    # the same weights carried in FP32, as a recipe that rounds them after each step does
    assert count_updates(before.float(), after.float(), gradient.float()) == counts
