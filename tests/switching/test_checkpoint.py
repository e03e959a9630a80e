"""Activation checkpointing: forward run again inside the backward is the same region, and scales once."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from twins import RECIPES, check, on, run

pytestmark = [
    pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"]),
    pytest.mark.parametrize("recipe", RECIPES),
]


def block():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8))


class Net(nn.Module):
    """Two blocks, run by ``how(block, x)``."""

    def __init__(self, how):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([block(), block()])
        self.extra = nn.Parameter(torch.randn(8, 8) / 3)
        self.drop = nn.Dropout(0.5)
        self.how = how

    def forward(self, x):
        x = self.first(x)
        for part in self.blocks:
            x = x + self.how(self, part, x)
        return x


def through(function, x, reentrant, **more):
    return checkpoint(function, x, use_reentrant=reentrant, **more)


HOWS = {
    "a submodule": lambda r: lambda net, part, x: through(part, x, r),
    "a function with submodules": lambda r: (
        lambda net, part, x: through(lambda h: part(h).sin() + part[0](h), x, r)
    ),
    "a closure of parameters": lambda r: (
        lambda net, part, x: through(
            lambda h: torch.tanh(h @ net.extra) * part[0].weight.sum(), x, r
        )
    ),
    "a parameter read before and inside": lambda r: (
        lambda net, part, x: x @ net.extra + through(lambda h: part(h @ net.extra), x, r)
    ),
    "nested": lambda r: (
        lambda net, part, x: through(
            lambda h: part(h) + through(lambda g: torch.tanh(part[0](g) @ net.extra), h, r), x, r
        )
    ),
    "sequential": lambda r: lambda net, part, x: checkpoint_sequential(part, 2, x, use_reentrant=r),
    "dropout": lambda r: lambda net, part, x: through(lambda h: net.drop(part(h)), x, r),
    "no part needs its random state": lambda r: (
        lambda net, part, x: through(part, x, r, preserve_rng_state=False)
    ),
}


@pytest.mark.parametrize("how", HOWS)
def test_inside_a_model(recipe, reentrant, how):
    inputs = lambda: torch.randn(4, 6, requires_grad=True)  # noqa: E731
    low, _ = check(lambda: Net(HOWS[how](reentrant)), inputs, recipe, k=40)
    assert torch.is_autocast_enabled("cpu") is False
    assert low.switch.loss_scale == (256.0 if recipe == "fp16" else 1.0)


@pytest.mark.parametrize("how", ["a submodule", "dropout", "nested", "a closure of parameters"])
def test_the_same_bits_as_without(recipe, reentrant, how):
    """Recomputed activations are the same bits, and so are gradients, but for the order of their sums."""
    plain = lambda net, part, x: HOWS[how](reentrant)(net, part, x)  # noqa: E731

    def without(net, part, x):
        def call(function, x, *args, **kwargs):
            return function(x)

        saved, globals()["through"] = through, call
        try:
            return HOWS[how](reentrant)(net, part, x)
        finally:
            globals()["through"] = saved

    inputs = lambda: torch.randn(4, 6, requires_grad=True)  # noqa: E731
    a = run(lambda: Net(plain), inputs, recipe)
    b = run(lambda: Net(without), inputs, recipe)
    assert torch.equal(a.outputs[0], b.outputs[0])
    unit = 2.0**-8 if recipe == "bf16" else 2.0**-11
    for name, grad in b.grads.items():
        assert (a.grads[name] - grad).norm() <= 4 * unit * grad.norm(), name


def call_whole(reentrant):
    def call(model, x):
        return through(model, x, reentrant)

    return call


def test_around_the_whole_model(recipe, reentrant):
    net = lambda: Net(lambda net, part, x: net.drop(part(x)))  # noqa: E731
    inputs = lambda: torch.randn(4, 6, requires_grad=True)  # noqa: E731
    check(net, inputs, recipe, k=40, call=call_whole(reentrant))


# the inner one runs in the outer's no_grad: torch says so in FP32 too
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_around_the_whole_and_inside(recipe, reentrant):
    net = lambda: Net(HOWS["nested"](reentrant))  # noqa: E731
    inputs = lambda: torch.randn(4, 6, requires_grad=True)  # noqa: E731
    check(net, inputs, recipe, k=40, call=call_whole(reentrant))


def test_around_parts_called_by_themselves(recipe, reentrant):
    def call(model, x):
        x = model.first(x)
        for part in model.blocks:
            x = x + through(lambda h, part=part: part(h).relu(), x, reentrant)
        return x

    inputs = lambda: torch.randn(4, 6, requires_grad=True)  # noqa: E731
    check(lambda: Net(None), inputs, recipe, k=40, call=call)


class Rich(nn.Module):
    """Convolution, recurrence and attention recomputed."""

    def __init__(self, reentrant):
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.reentrant = reentrant

    def forward(self, x):
        h = through(lambda t: self.conv(t).tanh(), x, self.reentrant)
        h = through(lambda t: self.rnn(t)[0], h.transpose(1, 2), self.reentrant)
        return through(self.attend, h, self.reentrant)


def test_layers_of_every_kind(recipe, reentrant):
    inputs = lambda: torch.randn(2, 6, 5, requires_grad=True)  # noqa: E731
    low, _ = check(lambda: Rich(reentrant), inputs, recipe, k=50)
    assert low.model.rnn._flat_weights[0] is low.model.rnn.weight_ih_l0


def test_several_steps_with_a_scale_that_moves(recipe, reentrant):
    torch.manual_seed(0)
    model = Net(HOWS["nested"](reentrant))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    switch = on(model, recipe, optimizer)
    for scale in (2.0, 4096.0, 64.0):
        if recipe == "fp16":
            switch.load_state_dict(switch.state_dict() | {"scale": scale})
        x = torch.randn(4, 6, requires_grad=True)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert switch.last_step.applied
        assert max(p.grad.abs().max().item() for p in model.parameters()) < 10.0


def test_a_scale_that_changes_between_forward_and_backward(recipe, reentrant):
    def loss(out):
        if recipe == "fp16":
            for switch in live:
                switch.load_state_dict(switch.state_dict() | {"scale": 32.0})
        return out.square().mean()

    live = []

    def call(model, x):
        owners = model.__dict__.get("_call_impl")
        live.extend(owners.owners if owners is not None else [])
        return model(x)

    inputs = lambda: torch.randn(4, 6, requires_grad=True)  # noqa: E731
    check(lambda: Net(HOWS["a submodule"](reentrant)), inputs, recipe, k=40, call=call, loss=loss)


def test_an_exception_in_the_recomputation(recipe, reentrant):
    calls = []

    def fails(net, part, x):
        def function(h):
            calls.append(1)
            if len(calls) == 3:
                raise ValueError("in the backward")
            return part(h)

        return through(function, x, reentrant)

    torch.manual_seed(0)
    model = Net(fails)
    on(model, recipe)
    out = model(torch.randn(4, 6, requires_grad=True))
    with pytest.raises(ValueError, match="in the backward"):
        out.sum().backward()
    assert not torch.is_autocast_enabled("cpu")
    assert model.extra.dtype == torch.float32
    assert model.first.weight is dict.__getitem__(model.first._parameters, "weight")
    assert torch.backends.mha.get_fastpath_enabled()
    model(torch.randn(4, 6, requires_grad=True)).sum().backward()


def test_with_a_leaf_input_that_requires_no_grad(recipe, reentrant):
    """The reentrant kind needs an input with a gradient; given none, parameters get none in FP32 either."""
    if reentrant:
        pytest.skip("torch warns that gradients will be None")
    check(
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)),
        lambda: torch.randn(4, 6),
        recipe,
        k=8,
        call=lambda model, x: through(model, x, False),
    )
