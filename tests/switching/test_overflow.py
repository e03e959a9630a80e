"""A step whose gradients overflow: skipped, reported, nothing touched, the scale halved; or an error."""

import copy
import math

import pytest
import torch

import halfstep
from against_fp32 import assert_close, batch, both, gradients, mlp, sgd
from halfstep.errors import NonFiniteError
from halfstep.switching import StepReason

X, Y = batch()


def backward(model, factor=1.0):
    (factor * (model(X) - Y).square().mean()).backward()


def bits(model, optimizer):
    """All that a step may change, by value."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), gradients(model)))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


class Ascending(torch.optim.Optimizer):
    """A user's own: counts its steps, and does not test for missing gradients."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.count = 0

    def step(self, closure=None):
        loss = closure() if closure else None
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"] / self.count)
                self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
        return loss

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}


class Calling(torch.optim.AdamW):
    """A user's subclass around a parent's step."""

    def step(self, closure=None):
        return super().step(closure)


class Listing(torch.optim.Optimizer):
    """A user's own that keeps its parameters in a list beside the groups."""

    def __init__(self, params):
        self.mine = list(params)
        super().__init__(self.mine, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.mine:
            if p.grad is not None:
                p -= 0.1 * p.grad


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "own step": Ascending,
    "super().step()": Calling,
    "own list": Listing,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_touched_and_the_next_step_is_as_if_it_had_not_been(name):
    def program(model, optimizer, switch):
        for turn in range(4):
            optimizer.zero_grad()
            backward(model)
            if turn == 2 and switch.plan.active:
                continue_after_overflow(model, optimizer, switch)
            optimizer.step()
        return {k: p.detach() for k, p in model.named_parameters()}, optimizer

    def continue_after_overflow(model, optimizer, switch):
        scale, clean = switch.loss_scale, copy.deepcopy(gradients(model))
        model[2].weight.grad[1, 2] = math.inf
        model[4].bias.grad[0] = math.nan
        model[4].bias.grad[3] = -math.inf
        before = bits(model, optimizer)
        with torch.no_grad():
            optimizer.step()
        assert same(bits(model, optimizer), before)
        report = switch.last_step
        assert not report.applied
        assert not switch.was_step_applied()
        assert report.reason is StepReason.OVERFLOW
        assert report.loss_scale == scale
        assert report.nonfinite == {"2.weight": 1, "4.bias": 2}
        assert switch.loss_scale == scale / 2
        assert (switch.steps, switch.skipped_steps) == (3, 1)
        for k, p in model.named_parameters():
            p.grad = clean[k]

    def make(model):
        return OPTIMIZERS[name](model.parameters())

    (wanted, plain), (got, optimizer) = both(program, "fp16:initial=8192", optimizer=make)
    # Sign-like updates (Adam's first steps, Rprop) turn a tiny gradient's rounding into a whole step: compare
    # what moved as a whole, at 3 steps of the learning rate's size.
    lr = plain.param_groups[0]["lr"]
    for k in wanted:
        assert (got[k] - wanted[k]).norm() <= 0.02 * wanted[k].norm() + 6 * lr, k
    assert same(
        [s.get("step") for s in optimizer.state_dict()["state"].values()],
        [s.get("step") for s in plain.state_dict()["state"].values()],
    )


def test_a_real_overflow_halves_until_it_fits_and_then_trains_as_fp32():
    def program(model, optimizer, switch):
        applied = 0
        for _ in range(30):
            if applied == 5:
                break
            optimizer.zero_grad()
            backward(model, 4.0)
            optimizer.step()
            applied += 1 if not switch.plan.active else switch.last_step.applied
        return {k: p.detach() for k, p in model.named_parameters()}, switch

    def make(model):
        return sgd(model, lr=0.01)

    (wanted, _), (got, switch) = both(program, f"fp16:initial={2**24}", optimizer=make)
    assert switch.skipped_steps >= 4
    assert switch.loss_scale == 2.0**24 / 2**switch.skipped_steps
    assert_close(got, wanted, "fp16")


def test_growth_after_an_interval_of_clean_steps():
    model = mlp()
    optimizer = sgd(model, lr=1e-3)
    switch = halfstep.switch(model, optimizer, "fp16:initial=256,interval=3")
    scales = []
    for turn in range(10):
        optimizer.zero_grad()
        backward(model)
        if turn == 4:
            model[0].bias.grad.fill_(math.nan)
        optimizer.step()
        scales.append(switch.loss_scale)
    assert scales == [256, 256, 512, 512, 256, 256, 256, 512, 512, 512]


@pytest.mark.parametrize("floor", [1.0, 8.0, 10.0])
def test_the_scale_stops_at_its_floor_and_overflow_there_is_an_error(floor):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    switch = halfstep.switch(model, optimizer, f"fp16:initial=64,floor={floor}")
    backward(model)
    optimizer.step()
    seen = []
    for _ in range(math.ceil(math.log2(64 / floor))):
        optimizer.zero_grad()
        backward(model, 1e9)
        optimizer.step()
        seen.append(switch.loss_scale)
    assert seen[-1] == floor
    optimizer.zero_grad()
    backward(model, 1e9)
    before = bits(model, optimizer)
    text = rf"not finite at loss scale {floor:g}, which is as low as it goes: 0\.weight \(\d+\)"
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=text) as error:
            optimizer.step()
        assert "The step was not applied" in str(error.value)
        assert "The loss is finite" in str(error.value)
        assert same(bits(model, optimizer), before)
        assert switch.loss_scale == floor
    optimizer.zero_grad()  # the run may be continued
    backward(model)
    optimizer.step()
    assert switch.last_step.applied


@pytest.mark.parametrize("recipe", ["bf16", "fp16", "fp16-noscale", "fp16-nomaster", "fp16-acc16"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_an_error_and_says_so(recipe, value):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    switch = halfstep.switch(model, optimizer, recipe)
    scale = switch.loss_scale
    loss = (model(X) - Y).square().mean() + value
    loss.backward()
    before = bits(model, optimizer)
    with pytest.raises(NonFiniteError, match=rf"the loss itself is not finite \({value}\)"):
        optimizer.step()
    assert same(bits(model, optimizer), before)
    assert switch.loss_scale == scale, "no loss scale mends that"
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert switch.last_step.applied, "one bad batch is not held against the next"


@pytest.mark.parametrize("recipe", ["bf16", "fp16-noscale"])
def test_without_a_scale_to_lower_an_overflow_is_an_error_at_once(recipe):
    model = mlp()
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, recipe)
    assert switch.loss_scale == 1.0
    backward(model)
    model[2].bias.grad[5] = math.inf
    before = bits(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"loss scale 1, .*: 2\.bias \(1\)"):
        optimizer.step()
    assert same(bits(model, optimizer), before)


def test_noscale_keeps_scale_1_and_loses_what_is_below_fp16s_range():
    def program(model, optimizer, switch):
        backward(model, 2.0**-22)
        return gradients(model), switch.loss_scale

    (wanted, _), (lost, scale) = both(program, "fp16-noscale")
    _, (kept, _) = both(program, "fp16")
    assert scale == 1.0
    assert sum((g == 0).sum() for g in lost.values()) > 0.5 * sum(g.numel() for g in lost.values())
    assert_close(kept, wanted, "fp16")


def test_schedulers_do_not_warn_and_go_on_after_a_skipped_first_step():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    halfstep.switch(model, optimizer, "fp16")
    late = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # made after the switch
    for turn in range(3):  # a warning would be an error here
        optimizer.zero_grad()
        backward(model)
        if turn == 0:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        schedule.step()
        late.step()
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_a_skipped_step_that_raises_leaves_the_optimizer_whole():
    class Needy(torch.optim.SGD):
        def step(self, closure=None):
            _ = [p.sum() for g in self.param_groups for p in g["params"]][5]
            return super().step(closure)

    model = mlp()
    optimizer = Needy(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "fp16:initial=8")
    backward(model)
    model[0].bias.grad[0] = math.inf
    with pytest.raises(IndexError):
        optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 6
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert switch.last_step.applied
