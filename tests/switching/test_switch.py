"""The switch on small models, each recipe against the FP32 run."""

import pytest
import torch
from torch import nn

import halfstep
from halfstep.switching import StepReason

MODELS = {
    "linear": lambda: nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(8, 4),
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)),
        nn.Linear(4, 16),
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True),
        nn.Flatten(),
        nn.Linear(64, 4),
    ),
}
# Distance of the gradient from FP32's, in units of the format's rounding error: errors of a few layers add.
UNIT = {"bf16": 2.0**-9, "fp16": 2.0**-12}
LAYERS = 30


def gradient(make, recipe, seed=0):
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, recipe=recipe)
    loss = (model(torch.randn(8, 16)) - torch.randn(8, 4)).square().mean()
    loss.backward()
    grad = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    optimizer.step()
    switch.off()
    return loss.item(), grad, switch


@pytest.mark.parametrize("recipe", ["bf16", "fp16", "fp16-noscale", "fp16-nomaster", "fp16-naive"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_fp32_within_the_rounding(name, recipe):
    loss, grad, _ = gradient(MODELS[name], "fp32")
    low_loss, low_grad, switch = gradient(MODELS[name], recipe)
    unit = UNIT["bf16" if recipe == "bf16" else "fp16"]
    assert low_loss == pytest.approx(loss, rel=LAYERS * unit)
    assert low_loss != loss, "nothing was rounded"
    assert (low_grad - grad).norm() <= LAYERS * unit * grad.norm()
    assert switch.last_step.applied
    assert switch.last_step.reason in (StepReason.FINITE, StepReason.UNGUARDED)


def test_off_gives_the_model_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    before = {k: set(m.__dict__) for k, m in model.named_modules()}
    switch = halfstep.switch(model, None, recipe="bf16")
    model[0](torch.ones(2, 4))
    switch.off()
    assert {k: set(m.__dict__) for k, m in model.named_modules()} == before
    assert type(model[0]._parameters) is dict
    x = torch.randn(2, 4)
    assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
