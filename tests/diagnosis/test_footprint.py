"""Bytes held by a step, where they can be counted by hand."""

from __future__ import annotations

import torch
from torch import nn

import halfstep
from halfstep.diagnosis.footprint import measure_footprint


def test_a_linear_layer_by_hand():
    model = nn.Linear(10, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    data = torch.randn(8, 10)

    def loss() -> torch.Tensor:
        return model(data).square().sum()

    loss().backward()
    optimizer.step()
    held = measure_footprint(model, optimizer, loss)
    assert held.weights == held.gradients == 160
    assert held.working == 0
    assert held.optimizer == 2 * 160 + 4  # two moments and a count of steps
    assert held.activations == 8 * 10 * 4 + 8 * 4 * 4  # the input, and the output for square()
    assert held.total == 160 + 160 + 324 + 448


def test_a_storage_saved_twice_counts_once():
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(8, 10, requires_grad=True)
    held = measure_footprint(model, optimizer, lambda: (model(data) * data + data * data).sum())
    assert held.activations == 2 * 8 * 10 * 4
    assert held.optimizer == 0


def test_working_copies_of_a_switch_are_no_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(8, 32)
    halfstep.switch(model, optimizer, recipe="bf16")
    held = measure_footprint(model, optimizer, lambda: model(data).sum())
    assert held.weights == held.gradients == 2 * 32 * 32 * 4
    assert held.working == held.weights / 2
    assert held.activations <= 2 * 8 * 32 * 4
