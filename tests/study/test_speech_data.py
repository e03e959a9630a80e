"""The real recordings: fetched, counted, split without a leak. Needs apt and a package mirror."""

from __future__ import annotations

import difflib
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from halfstep.study.corpus import Corpus, load_speech
from halfstep.study.datasets import PROMPTS, fetch_debian
from halfstep.study.transcripts import LETTERS, read_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt on this machine"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    return load_speech(cache)


def test_there_are_as_many_as_were_counted(cache: Path, corpus: Corpus):
    prompts = read_prompts(fetch_debian(PROMPTS, cache))
    assert len(prompts) == 544
    assert all(set(prompt.text) <= set(LETTERS) for prompt in prompts)
    assert (len(corpus.train), len(corpus.development), len(corpus.test)) == (431, 32, 49)


def test_no_near_identical_sentence_is_on_two_sides(corpus: Corpus):
    sides = (corpus.train, corpus.development, corpus.test)
    for one, other in itertools.combinations(sides, 2):
        for first, second in itertools.product(one, other):
            matcher = difflib.SequenceMatcher(None, first.text, second.text, autojunk=False)
            assert matcher.quick_ratio() <= 0.8 or matcher.ratio() <= 0.8, (first, second)


def test_features_are_normalised_and_long_enough_for_their_texts(corpus: Corpus):
    heard = torch.cat([sentence.versions[0] for sentence in corpus.train])
    torch.testing.assert_close(heard.mean(0), torch.zeros(40), atol=1e-3, rtol=0)
    torch.testing.assert_close(heard.std(0), torch.ones(40), atol=1e-3, rtol=0)
    for sentence in (*corpus.train, *corpus.development, *corpus.test):
        repeats = sum(a == b for a, b in itertools.pairwise(sentence.text))
        for version in sentence.versions:
            assert len(version) // 3 >= len(sentence.text) + repeats
            assert bool(torch.isfinite(version).all())


def test_a_second_load_needs_no_network(cache: Path, corpus: Corpus, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    again = load_speech(cache)
    assert [s.text for s in again.test] == [s.text for s in corpus.test]
