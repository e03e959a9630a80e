"""What the walk of the graph lets pass and what it does not."""

import pytest
import torch
from torch import nn

import halfstep
from halfstep.errors import ScaledGradientError


class Leafy(nn.Module):
    """Makes a leaf inside forward, as models with gradient checkpointing do to their input."""

    def __init__(self, keep):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.keep = keep
        self.kept = None

    def forward(self, x):
        leaf = x[:, None].detach()
        leaf.requires_grad = True
        if self.keep:
            self.kept = leaf
        return self.linear(leaf)


def test_a_leaf_that_only_the_graph_holds_is_harmless():
    model = Leafy(keep=False)
    halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe="fp16:initial=1024")
    model(torch.ones(2, 4)).sum().backward()
    assert torch.allclose(model.linear.weight.grad, torch.full((4, 4), 2.0))


def test_a_leaf_that_someone_can_look_at_is_an_error():
    model = Leafy(keep=True)
    halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe="fp16:initial=1024")
    with pytest.raises(ScaledGradientError, match=r"forward used kept \(2, 1, 4\)"):
        model(torch.ones(2, 4))
