"""The probe looks on without touching: what it counts, what it finds, what it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halfstep.diagnosis.culprit import first_nonfinite_layer, nonfinite_counts
from halfstep.diagnosis.probe import Probe
from halfstep.diagnosis.statistics import count_exponents, total


def model_and_data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(32, 6), torch.randint(3, (32,))


def train(model: nn.Module, optimizer, data, labels, steps: int) -> None:
    for _ in range(steps):
        scores = model(data.to(next(model.parameters()).dtype)).float()
        nn.functional.cross_entropy(scores, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_is_the_same_with_and_without():
    model, data, labels = model_and_data()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    with Probe(model, optimizer, every=3):
        train(model, optimizer, data, labels, 10)
    train(twin, torch.optim.Adam(twin.parameters()), data, labels, 10)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_samples_every_few_steps_and_counts_every_gradient():
    model, data, labels = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Probe(model, optimizer, every=4) as probe:
        train(model, optimizer, data, labels, 9)
    evidence = probe.evidence()
    parameters = sum(p.numel() for p in model.parameters())
    assert [sample.step for sample in evidence.samples] == [1, 5, 9]
    for sample in evidence.samples:
        assert sample.weight_gradients.values == parameters
        assert sample.activation_gradients.values == 32 * (8 + 8 + 3)
        assert 0 < sample.updates.attempted <= parameters
    assert {layer.name for layer in evidence.layers} == {"0", "1", "2"}
    assert total(layer.weight_gradients for layer in evidence.layers) == evidence.weight_gradients
    assert evidence.breakdown is None


def test_first_sample_is_the_gradient_itself():
    model, data, labels = model_and_data()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Probe(model, optimizer, every=1) as probe:
        train(model, optimizer, data, labels, 1)
    nn.functional.cross_entropy(twin(data), labels).backward()
    expected = total(count_exponents(p.grad) for p in twin.parameters() if p.grad is not None)
    assert probe.evidence().weight_gradients == expected


def test_hooks_are_gone_afterwards():
    model, data, labels = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Probe(model, optimizer, every=1) as probe:
        pass
    train(model, optimizer, data, labels, 2)
    assert probe.evidence().samples == ()


def test_adam_dividing_by_zero_is_named():
    model, data, labels = model_and_data()
    model.half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8)
    data[:, 0] = 0  # a column of weights with no gradient at all: 0 / 0
    with Probe(model, optimizer) as probe:
        train(model, optimizer, data, labels, 2)
    breakdown = probe.breakdown
    assert breakdown is not None
    assert (breakdown.step, breakdown.where) == (1, "update")
    assert "0.weight" in breakdown.names
    assert "eps of 1e-08 is 0 in float16" in breakdown.reason
    assert probe.evidence().breakdown == breakdown


def test_a_larger_eps_does_not_break():
    model, data, labels = model_and_data()
    model.half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
    data[:, 0] = 0
    with Probe(model, optimizer) as probe:
        train(model, optimizer, data, labels, 3)
    assert probe.breakdown is None


def test_a_gradient_that_is_not_finite_is_named_before_the_weights():
    model, data, labels = model_and_data()
    data[3, 2] = torch.inf
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Probe(model, optimizer) as probe:
        train(model, optimizer, data, labels, 1)
    assert probe.breakdown is not None
    assert probe.breakdown.where == "gradient"
    assert "the gradient of" in probe.breakdown.reason


def test_first_layer_that_is_not_finite():
    model, data, _ = model_and_data()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    assert first_nonfinite_layer(model, lambda: model(data)) == "2"
    data[0, 0] = torch.inf
    assert first_nonfinite_layer(model, lambda: model(data)) == "0"
    assert nonfinite_counts(model.named_parameters()) == {"2.weight": 1}


def test_a_healthy_model_has_no_such_layer():
    model, data, _ = model_and_data()
    assert first_nonfinite_layer(model, lambda: model(data)) == ""


def test_every_must_be_a_step():
    model, _, _ = model_and_data()
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        Probe(model, torch.optim.SGD(model.parameters(), lr=0.1), every=0)
