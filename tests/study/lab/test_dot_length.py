"""Dot products of growing length: bounds hold, growth is the root of K, and a worse sum is seen."""

from __future__ import annotations

import pytest

from halfstep.study.lab import dot_length as module
from halfstep.study.lab.dot_length import BOUNDS, dot_length

LENGTHS, GROWTH = (2**6, 2**8, 2**10), (2**6, 2**10)


@pytest.fixture(scope="module")
def result():
    return dot_length(5, lengths=LENGTHS, growth=GROWTH)


def curve(result, panel: int, name: str) -> tuple[float, ...]:
    (found,) = (c for c in result.panels[panel].curves if c.name == name)
    return found.y


def test_every_finding_is_reproduced(result):
    assert [f.claim for f in result.findings if not f.reproduced] == []
    assert len(result.findings) == len(BOUNDS) + 4


def test_orders_are_ranked_as_theory_has_them(result):
    for panel in (0, 1):
        last = {c.name: c.y[-1] for c in result.panels[panel].curves}
        assert last["fp32"] < last["fp16/kahan"] < last["fp16/pairwise"] < last["fp16/chunk64"]
        assert last["fp16/chunk64"] < last["fp16"] < last["e6m9"] < last["bf16"]


def test_a_sum_of_one_sign_stalls_to_nearest_and_not_stochastically(result):
    assert curve(result, 1, "bf16")[-1] > 0.1
    assert curve(result, 1, "fp16/stochastic")[-1] < curve(result, 0, "fp16/stochastic")[-1] * 2


def test_a_tree_that_is_none_breaks_its_bound_or_the_growth_its_law(
    monkeypatch: pytest.MonkeyPatch,
):
    bound = next(b for b in BOUNDS if b.accumulate == "fp16/pairwise")
    monkeypatch.setattr(module, "ACCUMULATORS", ("fp16", "e6m9", "fp16/stochastic", "bf16"))
    sequential = module.Bound(
        accumulate="bf16",
        written=bound.written,
        factor=bound.factor,
        derivation=bound.derivation,
        source=bound.source,
    )
    monkeypatch.setattr(module, "BOUNDS", (sequential,))
    broken = dot_length(5, lengths=(2**10, 2**11), growth=(2**10, 2**11))
    assert not broken.findings[0].reproduced
