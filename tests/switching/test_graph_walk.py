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


def test_a_leaf_that_someone_can_look_at_has_the_true_gradient():
    model = Leafy(keep=True)
    halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe="fp16:initial=1024")
    model(torch.ones(2, 4)).sum().backward()
    wanted = model.linear.weight.detach().sum(0).expand(2, 1, 4)
    assert torch.allclose(model.kept.grad, wanted, atol=1e-2)


def test_a_gradient_is_mended_once_however_often_the_graph_is_walked():
    """States kept from call to call are walked in every later call, retained graphs in each backward."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.hidden = [torch.ones(4, requires_grad=True)]
            self.state = torch.zeros(4)

        def forward(self, x):
            self.state = self.state + self.hidden[0] * self.linear(x).mean(0)
            self.aux = self.linear(x).float().square().mean()
            return self.state

    def run(recipe):
        torch.manual_seed(0)
        model = Keeping()
        if recipe:
            halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe)
        for _ in range(3):
            out = model(torch.ones(2, 4))
        loss = out.sum() + model.aux
        loss.backward(retain_graph=True)
        loss.backward()
        return model.hidden[0].grad, model.linear.weight.grad

    for got, wanted in zip(run("fp16:initial=1024"), run(None), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-2, atol=1e-2)


def test_an_activation_of_another_switched_model_is_an_error():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.other = None

        def forward(self, x):
            self.inner = self.linear(x)
            return (
                self.inner * 1.0 if self.other is None else self.inner + self.other[0].inner.float()
            )

    first, second = Kept(), Kept()
    for model in (first, second):
        halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp16:initial=1024")
    first(torch.ones(2, 4))
    second.other = [first]
    with pytest.raises(
        ScaledGradientError, match=r"from an activation made inside of a switched model"
    ):
        second(torch.ones(2, 4))
