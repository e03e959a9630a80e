"""Batches, and the loop around the recogniser."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from halfstep.study.corpus import Corpus, Sentence, normalised
from halfstep.study.handwriting import load_handwriting
from halfstep.study.runs import Experiment, Outcome, Run, Variant
from halfstep.study.training import Batch, Plan, batches, train_recognizer
from halfstep.study.transcripts import Part

SMALL = Plan(steps=3, batch=4, channels=16, points=1, probe_every=2)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_handwriting()


def first(corpus: Corpus, plan: Plan, seed: int, count: int = 3) -> list[Batch]:
    return list(itertools.islice(batches(corpus, plan, seed), count))


def test_batches_are_the_seeds(corpus: Corpus):
    one, two, other = (first(corpus, SMALL, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a.features, b.features) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].targets, other[0].targets)


def test_an_epoch_has_every_sentence_once(corpus: Corpus):
    plan = dataclasses.replace(SMALL, join=0.0, batch=8)
    count = math.ceil(len(corpus.train) / plan.batch)
    seen = first(corpus, plan, seed=0, count=count)
    assert sum(len(batch.lengths) for batch in seen) == len(corpus.train)
    characters = sum(int(batch.target_lengths.sum()) for batch in seen)
    assert characters == sum(len(sentence.text) for sentence in corpus.train)


def test_what_is_past_a_sentence_is_zero(corpus: Corpus):
    (batch,) = first(corpus, SMALL, seed=0, count=1)
    assert int(batch.lengths.max()) == batch.features.shape[1]
    for features, length in zip(batch.features, batch.lengths, strict=True):
        assert not features[length:].any()


def test_joined_speech_has_a_space_between():
    sentence = Sentence(versions=(torch.randn(50, 4),), text="ab")
    sides = {part: [sentence] * 8 for part in Part}
    spoken = normalised(title="", alphabet=" ab", sides=sides)
    plan = dataclasses.replace(SMALL, join=1.0, batch=1)
    (batch,) = first(spoken, plan, seed=0, count=1)
    assert int(batch.lengths) == 8 * 50  # joined until 400 frames
    assert batch.targets.tolist() == ([2, 3, 1] * 8)[:-1]


def test_normalised_on_the_training_part_only():
    sides = {
        Part.TRAIN: [Sentence(versions=(torch.full((4, 2), 3.0),), text="a")],
        Part.DEVELOPMENT: [Sentence(versions=(torch.full((4, 2), 5.0),), text="a")],
        Part.TEST: [],
    }
    corpus = normalised(title="", alphabet="a", sides=sides)
    assert corpus.train[0].versions[0].abs().max() == 0
    assert corpus.development[0].versions[0].min() == pytest.approx(2 / 1e-3)


def run(corpus: Corpus, recipe: str, plan: Plan = SMALL, **options: float) -> Run:
    experiment = Experiment(
        task="handwriting", recipe=recipe, seed=0, variant=Variant.FP32, options=options
    )
    return train_recognizer(experiment, corpus, plan, lambda share, figure: None)


def test_a_run_is_the_same_again(corpus: Corpus):
    one, two = run(corpus, "fp32"), run(corpus, "fp32")
    assert one.outcome is Outcome.FINISHED
    assert [point.loss for point in one.curve] == [point.loss for point in two.curve]
    assert one.evidence == two.evidence
    assert len(one.examples) == len(corpus.test)


def test_recipes_begin_with_the_same_loss(corpus: Corpus):
    plan = dataclasses.replace(SMALL, steps=1)
    exact, mixed = (run(corpus, recipe, plan).curve[0].loss for recipe in ("fp32", "fp16"))
    assert mixed == pytest.approx(exact, rel=1e-2)
    assert mixed != exact


def test_naive_fails_by_eps_and_not_with_a_larger_one(corpus: Corpus):
    naive = run(corpus, "fp16-naive")
    assert (naive.outcome, naive.steps) == (Outcome.NOT_FINITE, 1)
    assert math.isnan(naive.error)
    raised = run(corpus, "fp16-naive", eps=1e-4)
    assert raised.outcome is Outcome.FINISHED
    assert raised.steps == SMALL.steps


def test_no_digit_image_is_on_two_sides(corpus: Corpus):
    assert (len(corpus.train), len(corpus.development), len(corpus.test)) == (600, 60, 100)
    assert all(3 <= len(s.text) <= 10 for s in (*corpus.train, *corpus.test))
    assert corpus.bands == 28
