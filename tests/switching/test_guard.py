"""The optimizer's side: what is skipped, what is left alone, what is learnt later."""

import pytest
import torch
from torch import nn

import halfstep
from halfstep.errors import NonFiniteError
from halfstep.switching import StepReason, guard


def overflowing(monkeypatch, deferred):
    """A model whose gradient overflows at scale 65536 and not at 8192, with a fused optimizer."""
    if deferred:  # what a CUDA device does, on the CPU's fused kernel: it takes found_inf too
        monkeypatch.setattr(guard.Guard, "_on_device", lambda self: True)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return model, optimizer, halfstep.switch(model, optimizer, recipe="fp16")


@pytest.mark.parametrize("deferred", [False, True])
def test_an_overflowing_step_is_skipped_and_said(monkeypatch, deferred):
    model, optimizer, switch = overflowing(monkeypatch, deferred)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for scale in (65536.0, 32768.0, 16384.0, 8192.0):
        (4.0 * model(torch.ones(1, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = switch.last_step
        assert report.loss_scale == scale
        assert report.applied == (scale == 8192.0)
        if not report.applied:
            assert report.reason is StepReason.OVERFLOW
            assert set(report.nonfinite) == {"weight", "bias"}
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert switch.skipped_steps == 3
    assert not torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("deferred", [False, True])
def test_overflow_at_the_floor_is_an_error(monkeypatch, deferred):
    model, optimizer, switch = overflowing(monkeypatch, deferred)
    switch.off()
    switch = halfstep.switch(model, optimizer, recipe="fp16-noscale")
    before = model.weight.clone()
    with pytest.raises(NonFiniteError, match=r"loss scale 1, which is as low.*weight \(\d+\)"):
        (1e6 * model(torch.ones(1, 4))).sum().backward()
        optimizer.step()
        switch.last_step  # noqa: B018 - a deferred outcome is learnt here
    assert torch.equal(model.weight, before)


def test_a_step_that_raised_does_not_disarm_the_guard():
    class Fragile(torch.optim.SGD):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("disk full")
            return super().step(closure)

    model = nn.Linear(4, 4)
    optimizer = Fragile(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, recipe="fp16")
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="disk full"):
        optimizer.step()
    optimizer.broken = False
    optimizer.zero_grad()
    (1e3 * model(torch.ones(1, 4))).sum().backward()
    optimizer.step()
    assert not switch.last_step.applied
    assert switch.skipped_steps == 1
