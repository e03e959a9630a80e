"""torch.compile around a switched model, in every order: the losses of the eager one, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import halfstep

# torch's own, in its compiler
pytestmark = pytest.mark.filterwarnings("default")


def losses(order, recipe):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 8), torch.arange(8) % 3
    called = model
    if order == "compile, switch":
        called = torch.compile(model, backend="aot_eager")
    if order == "in place, switch":
        model.compile(backend="aot_eager")
    if order == "compile, switch the compiled":
        called = torch.compile(model, backend="aot_eager")
    switched = called if order == "compile, switch the compiled" else model
    switch = halfstep.switch(switched, optimizer, recipe=recipe)
    if order == "switch, compile":
        called = torch.compile(model, backend="aot_eager")
    if order == "switch, in place":
        model.compile(backend="aot_eager")
    found = []
    for k in range(4):
        if recipe == "fp16":
            switch.load_state_dict({"scale": 2.0 ** (3 * k)})  # in no graph as a constant
        optimizer.zero_grad()
        loss = cross_entropy(called(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    switch.off()
    assert (model._compiled_call_impl is not None) == ("in place" in order)
    return found


@pytest.mark.parametrize("recipe", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "order",
    [
        "compile, switch",
        "compile, switch the compiled",
        "switch, compile",
        "in place, switch",
        "switch, in place",
    ],
)
def test_a_compiled_model_trains_as_the_eager_one(order, recipe):
    assert losses(order, recipe) == losses("eager", recipe)
