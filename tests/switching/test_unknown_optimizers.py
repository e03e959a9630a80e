"""An optimizer that the switch was not given, or that is made later, is guarded when it first steps."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import halfstep
from halfstep.switching import StepReason


def overflowing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    given = torch.optim.SGD(model[0].parameters(), lr=0.1)
    switch = halfstep.switch(model, given, "fp16")
    (1e3 * model(torch.ones(2, 4))).sum().backward()
    return model, given, switch


def test_what_overflowed_reaches_no_optimizer():
    model, given, switch = overflowing()
    before = [p.clone() for p in model.parameters()]
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    given.step()
    other.step()
    assert switch.last_step.reason is StepReason.OVERFLOW
    assert set(switch.last_step.nonfinite) == {"2.weight", "2.bias"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert switch.loss_scale == 32768.0, "one backward, one verdict"


def test_an_optimizer_of_other_parameters_is_left_alone():
    _, _, switch = overflowing()
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.full((1, 2), torch.inf)).sum().backward()
    optimizer.step()  # its own business
    assert not other.weight.isfinite().all()
    assert not optimizer._optimizer_step_pre_hooks
    assert switch.steps == 0


def test_off_lets_go_of_it():
    model, _, switch = overflowing()
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    other.step()
    assert other._optimizer_step_pre_hooks
    switch.off()
    assert not other._optimizer_step_pre_hooks


class Counting(torch.optim.SGD):
    """As pytorch_optimizer's Adai: raises where there is nothing to step, and keeps a count of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.total = torch.zeros(())

    def step(self, closure=None):
        size = sum(p.numel() for g in self.param_groups for p in g["params"] if p.grad is not None)
        if size == 0:
            raise ValueError("no parameters")
        self.total += size
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
                p.data.add_(p.grad, alpha=-group["lr"])


class Wrapping(torch.optim.Optimizer):
    """As its Magma: groups and state are those of the optimizer inside."""

    def __init__(self, params, lr):
        self.inner = torch.optim.SGD(params, lr, momentum=0.9)
        self.defaults = self.inner.defaults
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def state(self):
        return self.inner.state

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [Counting, Wrapping])
def test_a_step_of_any_class_can_be_skipped(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = kind(model.parameters(), 0.1)
    switch = halfstep.switch(model, optimizer, "fp16:initial=1024")
    x = torch.ones(2, 4)
    model(x).sum().backward()
    optimizer.step()
    assert switch.last_step.applied
    weights = [p.detach().clone() for p in model.parameters()]
    count = getattr(optimizer, "total", torch.zeros(())).clone()
    optimizer.zero_grad()
    (1e5 * model(x)).sum().backward()
    optimizer.step()
    assert not switch.last_step.applied
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(count, getattr(optimizer, "total", count))
    assert len(optimizer.state) == 4
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert switch.last_step.applied
    assert not torch.equal(weights[0], model[0].weight)
