"""Weights that are computed: weight and spectral norm, parametrizations, pruning; functional calls."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from twins import RECIPES, UNIT, check, on, run

pytestmark = [
    pytest.mark.parametrize("recipe", RECIPES),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated"),
]
K = 12


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


class Gated(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * torch.sigmoid(self.gate)


def registered(part):
    def make():
        layer = nn.Linear(6, 6)
        parametrize.register_parametrization(layer, "weight", part())
        return layer

    return make


def pruned():
    layer = nn.Linear(6, 6)
    prune.random_unstructured(layer, "weight", 0.4)
    return layer


MAKES = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "weight norm, old": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "spectral norm, old": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "orthogonal by Cayley": lambda: parametrizations.orthogonal(
        nn.Linear(6, 6), orthogonal_map="cayley"
    ),
    "symmetric": registered(Symmetric),
    "with a parameter of its own": registered(Gated),
    "pruned": pruned,
}


@pytest.mark.parametrize("where", ["root", "inside"])
@pytest.mark.parametrize("name", MAKES)
def test_computed_weights(recipe, name, where):
    def make():
        layer = MAKES[name]()
        return layer if where == "root" else nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer)

    low, exact = check(make, lambda: torch.randn(5, 6, requires_grad=True), recipe, k=K)
    for (key, a), (_, b) in zip(
        low.model.named_buffers(), exact.model.named_buffers(), strict=True
    ):
        assert a.dtype == b.dtype, key
        # the vectors of power iteration are signed dot products: two a step
        torch.testing.assert_close(a, b, rtol=0, atol=8 * UNIT[recipe])


def test_a_convolution_and_a_recurrent_layer_with_weight_norm(recipe):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
            self.rnn = parametrizations.weight_norm(nn.LSTM(6, 6), "weight_hh_l0")

        def forward(self, x):
            return self.rnn(self.conv(x).permute(2, 0, 1))[0]

    check(Net, lambda: torch.randn(2, 4, 8, requires_grad=True), recipe, k=20)


def test_cached_parametrizations(recipe):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x):
            with parametrize.cached():
                return self.layer(x) + self.layer(x * 2)

    check(Twice, lambda: torch.randn(5, 6), recipe, k=K)


def test_a_parametrization_added_and_removed_while_on(recipe):
    def call(model, x):
        first = model(x)
        parametrizations.weight_norm(model[0])
        second = model(x)
        parametrize.remove_parametrizations(model[0], "weight")
        return first, second, model(x)

    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))  # noqa: E731
    exact = run(make, lambda: torch.randn(5, 6), "fp32", call=call)
    low = run(make, lambda: torch.randn(5, 6), recipe, call=call)
    for a, b in zip(low.outputs, exact.outputs, strict=True):
        assert (a - b).norm() <= K * UNIT[recipe] * b.norm()
    for name, g in exact.grads.items():
        assert (low.grads[name] - g).norm() <= K * UNIT[recipe] * g.norm(), name


# -- functional calls -------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def moved(model, t=1.5):
    return {name: p * t for name, p in model.named_parameters()}


def test_functional_call_outside(recipe):
    def call(model, x):
        return functional_call(model, moved(model), (x,))

    low, _ = check(net, lambda: torch.randn(5, 6, requires_grad=True), recipe, k=K, call=call)
    assert all(type(p) is nn.Parameter for p in low.model.parameters())


def test_functional_call_of_leaves(recipe):
    """The gradients are the given tensors'; the model's own parameters get none."""

    def gradients(which):
        torch.manual_seed(0)
        model = net()
        leaves = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        on(model, which)
        x = torch.randn(5, 6)
        functional_call(model, leaves, (x,)).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        return {k: v.grad for k, v in leaves.items()}

    low, exact = gradients(recipe), gradients("fp32")
    for name, g in exact.items():
        assert (low[name] - g).norm() <= K * UNIT[recipe] * g.norm(), name
        assert low[name].dtype == torch.float32


def test_functional_call_inside(recipe):
    class Meta(nn.Module):
        """Fast weights: one inner layer is run with weights computed from its own."""

        def __init__(self):
            super().__init__()
            self.inner, self.shift = net(), nn.Parameter(torch.randn(8, 6) / 4)

        def forward(self, x):
            weights = dict(self.inner.named_parameters())
            fast = {"0.weight": self.inner[0].weight + self.shift}
            assert set(fast) <= set(weights)
            return self.inner(x) + functional_call(self.inner, fast, (x,))

    low, _ = check(Meta, lambda: torch.randn(5, 6), recipe, k=K)
    assert len(low.grads) == 7


def test_func_grad(recipe):
    """It cannot go through the boundary's autograd functions, and says so: take loss.backward()."""

    def gradients(which):
        torch.manual_seed(0)
        model = net()
        params = {k: p.detach() for k, p in model.named_parameters()}
        on(model, which)
        x = torch.randn(5, 6)

        def loss(params):
            return functional_call(model, params, (x,)).square().mean()

        return grad(loss)(params)

    gradients("fp32")
    with pytest.raises(RuntimeError, match="setup_context"):
        gradients(recipe)


def test_vmap_of_inference(recipe):
    """An ensemble by vmap over stacked weights, without gradients."""

    def outputs(which):
        torch.manual_seed(0)
        models = [net() for _ in range(3)]
        stacked = {
            k: torch.stack([dict(m.named_parameters())[k].detach() for m in models])
            for k in dict(models[0].named_parameters())
        }
        on(models[0], which)
        x = torch.randn(5, 6)
        with torch.no_grad():
            return vmap(lambda p: functional_call(models[0], p, (x,)))(stacked)

    exact = outputs("fp32")
    low = outputs(recipe)
    assert (low - exact).norm() <= K * UNIT[recipe] * exact.norm()
