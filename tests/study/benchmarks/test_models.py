"""The timed programs are what the table says they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from halfstep.study.benchmarks.models import Workload, cnn, lstm, small_layers, transformer


@pytest.mark.parametrize(
    ("build", "millions"), [(transformer, 19.9), (cnn, 11.2), (lstm, 5.2), (small_layers, 0.04)]
)
def test_size(build: Callable[[], Workload], millions: float):
    parameters = sum(p.numel() for p in build().model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_small_layers_are_300_parameters():
    assert len(list(small_layers().model.parameters())) == 300


@pytest.mark.parametrize("build", [cnn, lstm, small_layers])
def test_same_seed_same_step_and_copies_are_their_own(build: Callable[[], Workload]):
    first, again = build(), build()
    copied = first.to("cpu")
    with torch.no_grad():
        losses = [float(w.loss(w.model(w.inputs))) for w in (first, again, copied)]
        assert losses[0] == losses[1] == losses[2]
        next(copied.model.parameters()).zero_()
    assert next(first.model.parameters()).abs().sum() > 0
