"""Sentences follow the evidence, whichever way it points."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from halfstep.diagnosis.culprit import Breakdown
from halfstep.diagnosis.footprint import Footprint
from halfstep.diagnosis.probe import Evidence, Sample
from halfstep.diagnosis.statistics import Exponents, Updates, reach
from halfstep.study.page import Story, build_page, headline
from halfstep.study.runs import Experiment, Outcome, Run, Variant
from halfstep.study.verdict import (
    Parity,
    compare,
    cost_sentence,
    gradient_sentence,
    loss_scale_exponent,
    mixed_sentence,
    why,
)

RECIPES = {
    Variant.FP32: "fp32",
    Variant.MIXED: "fp16",
    Variant.NO_MASTER: "fp16-nomaster",
    Variant.NAIVE: "fp16-naive",
    Variant.NAIVE_RAISED: "fp16-naive",
}


def runs(variant: Variant, *errors: float, swallowed: int = 0, **more) -> list[Run]:
    sample = Sample(
        step=1,
        weight_gradients=Exponents(bins={-30: 1, -10: 3}, zeros=4),
        activation_gradients=Exponents(bins={-10: 1}),
        updates=Updates(attempted=100, swallowed=swallowed),
    )
    return [
        Run(
            experiment=Experiment(
                task="speech", recipe=RECIPES[variant], seed=seed, variant=variant
            ),
            outcome=more.pop("outcome", Outcome.FINISHED),
            error=error,
            evidence=more.pop("evidence", Evidence(samples=(sample,))),
            **more,
        )
        for seed, error in enumerate(errors)
    ]


BASE = runs(Variant.FP32, 26.0, 27.0, 28.0)


@pytest.mark.parametrize(
    ("errors", "parity"),
    [
        ((26.5, 27.5, 28.5), Parity.SAME),
        ((28.9, 28.9, 28.9), Parity.SAME),
        ((29.1, 29.1, 29.1), Parity.WORSE),
        ((20.0, 20.0, 20.0), Parity.SAME),
        ((39.1,), Parity.UNDECIDED),
        ((), Parity.UNDECIDED),
    ],
)
def test_parity_is_a_difference_within_the_spread_of_seeds(errors, parity):
    assert compare(BASE, runs(Variant.MIXED, *errors)).parity is parity


def test_one_run_of_the_baseline_has_no_spread():
    assert compare(BASE[:1], runs(Variant.MIXED, 27.0, 27.0)).parity is Parity.UNDECIDED


def test_a_run_that_is_not_finite_is_worse():
    broken = runs(Variant.NAIVE, math.nan, outcome=Outcome.NOT_FINITE)
    assert compare(BASE, broken).parity is Parity.WORSE


def test_failure_is_told_with_its_reason():
    breakdown = Breakdown(
        step=1, where="update", names={"a": 60}, elements=100, reason="it divided by zero"
    )
    broken = runs(
        Variant.NAIVE,
        math.nan,
        outcome=Outcome.NOT_FINITE,
        reason=breakdown.reason,
        steps=1,
        evidence=Evidence(breakdown=breakdown),
    )
    sentence = why("Naive", BASE, broken, score="CER")
    assert sentence == (
        "Naive failed in 1 of 1 runs, at step 1: it divided by zero. "
        "60% of the weights were not finite after it."
    )


def test_not_failing_is_told_too():
    fine = runs(Variant.NAIVE_RAISED, 26.5, 27.0, 28.0, swallowed=40)
    sentence = why("Naive", BASE, fine, score="CER")
    assert sentence.startswith("Naive did not fail: 27.2% CER against 27.0%, a difference of +0.2")
    assert sentence.endswith("Swallowed updates: 40% at first, 40% in the last quarter.")


def test_worse_is_told_with_what_was_swallowed():
    worse = runs(Variant.NO_MASTER, 36.0, 37.0, 38.0, swallowed=90)
    sentence = why("No master", BASE, worse, score="CER")
    assert sentence.startswith("No master did worse: 37.0% CER against 27.0%, 10.0 points")
    assert "Swallowed updates: 90% at first, 90% in the last quarter." in sentence


def test_a_run_that_broke_is_no_evidence():
    broken = runs(Variant.NAIVE, math.nan, outcome=Outcome.FAILED, reason="no memory")
    assert why("Naive", BASE, broken, score="CER") == "Naive could not be run: no memory."


def test_zeros_of_fp32_are_told_apart():
    sentence = gradient_sentence(BASE, reach(torch.float16), scale=16)
    assert "would turn 25% of the non-zero weight gradients and 0% of" in sentence
    assert "with a scale of 2¹⁶, 0% and 0%" in sentence
    assert "Already zero in FP32, and no loss of FP16: 50% and 0%" in sentence


def test_the_lowest_scale_counts():
    mixed = [
        *runs(Variant.MIXED, 27.0, loss_scale=2.0**13),
        *runs(Variant.MIXED, 1.0, loss_scale=2.0**11),
    ]
    assert loss_scale_exponent(mixed) == 11
    assert loss_scale_exponent(BASE) == 16


def test_costs_are_those_measured():
    held = Footprint(weights=2**20, working=0, activations=2**22, gradients=2**20, optimizer=2**21)
    base = runs(Variant.FP32, 27.0, step_ms=100.0, footprint=held)
    mixed = runs(
        Variant.MIXED,
        27.0,
        step_ms=110.0,
        footprint=dataclasses.replace(held, activations=2**21, working=2**19),
    )
    sentence = cost_sentence(base, mixed)
    assert "keeps 2.0 MiB of activations where FP32 keeps 4.0, and 6.5 MiB in all" in sentence
    assert "instead of 8.0; " in sentence
    assert sentence.endswith("at 1.10 of FP32's time a step.")
    assert cost_sentence(BASE, mixed) == "Bytes and times were not measured."


def story(*reader: Run, missing: tuple[str, ...] = ()) -> Story:
    return Story(
        what="a test",
        corpus="none",
        reader=reader,
        digits=(),
        notes=(),
        missing=missing,
        machine=(),
    )


def test_headline_follows_the_runs():
    mixed = runs(Variant.MIXED, 26.0, 27.5, 28.0)
    assert "reads as well" in headline(story(*BASE, *mixed))
    worse = runs(Variant.MIXED, 36.0, 37.5, 38.0)
    assert "did not train" in headline(story(*BASE, *worse))
    assert "no mixed-precision run" in headline(story(*BASE))
    assert "reads as well" not in headline(story(*BASE[:1], *mixed[:1]))
    assert mixed_sentence(BASE, []).endswith("at least one has no finished run.")


def test_a_page_of_nothing_can_be_written():
    text = build_page(story(missing=("all of it",)))
    assert "Not in it: all of it." in text
    assert "plotly" in text
