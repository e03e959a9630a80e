"""Every rule of the loss scale on a real model: static, log-normal, hysteresis, patience, ceiling."""

import math

import pytest
import torch

import halfstep
from against_fp32 import assert_close, batch, both, gradients, mlp, sgd
from halfstep.errors import NonFiniteError

X, Y = batch()


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    (factor * (model(X) - Y).square().mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("scaling", ["static,initial=1000", "log-normal", "dynamic,hysteresis=2"])
def test_gradients_are_true_whatever_the_rule(scaling):
    def program(model, optimizer, switch):
        step(model, optimizer)
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        return gradients(model)

    wanted, got = both(program, f"fp16:scaling={scaling}", optimizer=lambda m: sgd(m, lr=0.01))
    assert_close(got, wanted, "fp16")


def test_a_static_scale_never_moves_and_an_overflow_is_an_error_after_patience():
    model = mlp()
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, "fp16:scaling=static,initial=1024,patience=3")
    step(model, optimizer)
    assert switch.last_step.applied
    for _ in range(2):
        step(model, optimizer, 1e9)
        assert not switch.last_step.applied
        assert switch.loss_scale == 1024
    with pytest.raises(NonFiniteError, match="not finite at loss scale 1024, which is as low"):
        step(model, optimizer, 1e9)
    step(model, optimizer)
    assert switch.last_step.applied
    assert switch.loss_scale == 1024


def test_hysteresis_and_ceiling_on_a_model():
    model = mlp()
    optimizer = sgd(model, lr=1e-3)
    rule = "fp16:initial=256,interval=2,hysteresis=2,ceiling=512"
    switch = halfstep.switch(model, optimizer, rule)
    scales = []
    for factor in (1e9, 1e9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        step(model, optimizer, factor)
        scales.append(switch.loss_scale)
    assert scales == [256, 128, 128, 256, 256, 512, 512, 512]
    assert switch.skipped_steps == 2


def test_log_normal_follows_the_largest_gradient():
    model = mlp()
    optimizer = sgd(model, lr=0.0)
    switch = halfstep.switch(model, optimizer, "fp16:scaling=log-normal,initial=8")
    for _ in range(20):
        step(model, optimizer)
    largest = max(float(g.abs().max()) for g in gradients(model).values())
    assert switch.loss_scale == 2.0 ** math.floor(math.log2(65504.0 / largest))


def test_two_optimizers_of_one_backward_count_once_with_the_larger_gradient():
    model = mlp()
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[k::2], lr=0.0) for k in range(2)]
    switch = halfstep.switch(model, optimizers, "fp16:scaling=log-normal,initial=8")
    (model(X) - Y).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    largest = max(float(g.abs().max()) for g in gradients(model).values())
    assert switch.loss_scale == 2.0 ** math.floor(math.log2(65504.0 / largest))
