"""Decoding against its definition, shapes, and a model that learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from halfstep.study.recognizer import (
    Recognizer,
    RecognizerShape,
    best_path,
    encode,
    error_rate,
)


def collapse(path: tuple[int, ...]) -> str:
    """The definition, said slowly: merge runs, drop blanks."""
    merged = [key for key, _ in itertools.groupby(path)]
    return "".join("ab"[key - 1] for key in merged if key)


def test_every_path_of_five_steps_collapses_as_defined():
    for path in itertools.product(range(3), repeat=5):
        scores = torch.nn.functional.one_hot(torch.tensor(path), 3).float()
        assert best_path(scores, "ab") == collapse(path)


def test_scores_that_are_no_number_read_as_nothing():
    assert best_path(torch.full((4, 3), math.nan), "ab") == ""


def test_encode_is_the_inverse_up_to_repeats():
    assert encode("cab", "abc").tolist() == [3, 1, 2]
    assert encode("", "abc").tolist() == []


def test_error_rate_is_edits_over_characters():
    assert error_rate(["kitten", "abcd"], ["sitting", "abcd"]) == pytest.approx(100 * 3 / 10)
    assert error_rate(["ab"], [""]) == 100.0


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 29, 30, 31])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_steps_are_the_scores_there_are(frames: int, stride: int):
    shape = RecognizerShape(bands=5, classes=4, channels=8, stride=stride, layers=1)
    model = Recognizer(shape).eval()
    scores = model(torch.randn(2, frames, 5))
    assert scores.shape == (2, int(model.steps(torch.tensor(frames))), 4)


def test_it_learns_two_sounds_by_heart():
    torch.manual_seed(0)
    model = Recognizer(RecognizerShape(bands=4, classes=3, channels=16, layers=1, dropout=0.0))
    features = torch.randn(2, 30, 4)
    targets = torch.cat([encode("abba", "ab"), encode("bab", "ab")])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        scores = model(features).log_softmax(2).transpose(0, 1)
        lengths = torch.full((2,), len(scores))
        loss = torch.nn.functional.ctc_loss(scores, targets, lengths, torch.tensor([4, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [best_path(one, "ab") for one in model(features)] == ["abba", "bab"]
