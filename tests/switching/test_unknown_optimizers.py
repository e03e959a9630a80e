"""An optimizer that the switch was not given, or that is made later, is guarded when it first steps."""

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
