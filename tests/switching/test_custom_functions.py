"""Custom autograd functions in the region, with torch.amp's decorators and without; moves of the model."""

import pytest
import torch
from torch import nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function

from halfstep.errors import SwitchError
from twins import RECIPES, check, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Scale(Function):
    """Point-wise, no decorator: takes and gives what comes."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0).to(w.dtype)


class Product(Function):
    """A matrix product, no decorator: its operands must agree, as under torch.autocast."""

    @staticmethod
    def forward(ctx, x, w):
        x = x.to(w.dtype)
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        return g @ w.t(), x.t() @ g


class Exact(Function):
    """Decorated for FP32, as losses and kernels without 16-bit versions are."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, w):
        assert x.dtype == w.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        assert g.dtype == torch.float32
        return g @ w.t(), x.t() @ g


class Current(Function):
    """Decorated to run in whatever autocast is on."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (g @ w.t()).to(x.dtype), (x.t() @ g).to(w.dtype)


class Net(nn.Module):
    def __init__(self, function, shape):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x):
        h = self.function.apply(self.first(x), self.weight)
        return self.last(self.function.apply(h.softmax(-1), self.weight) + h)


@pytest.mark.parametrize("function", [Scale, Product, Exact, Current], ids=lambda f: f.__name__)
def test_custom_functions(recipe, function):
    shape = (6,) if function is Scale else (6, 6)
    check(lambda: Net(function, shape), lambda: torch.randn(5, 6, requires_grad=True), recipe, k=12)


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_straight_through_estimator(recipe):
    class Binary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            w = StraightThrough.apply(self.last.weight)
            return nn.functional.linear(self.first(x).tanh(), w, self.last.bias)

    check(Binary, lambda: torch.randn(5, 6), recipe, k=10)


def test_functions_that_save_and_hooks_on_saved_tensors(recipe):
    packed = []

    def pack(t):
        packed.append(t.dtype)
        return t

    def call(model, x):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return model(x)

    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    check(make, lambda: torch.randn(5, 6), recipe, k=6, call=call)
    assert torch.float16 in packed or torch.bfloat16 in packed


def test_offloaded_activations(recipe):
    def call(model, x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    check(make, lambda: torch.randn(5, 6), recipe, k=6, call=call)


# -- the model is moved or its gradients cleared ----------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(recipe, set_to_none):
    model = net()
    on(model, recipe)
    x = torch.randn(5, 6)
    model(x).sum().backward()
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))


@pytest.mark.parametrize(
    "move", ["to float32", "to cpu", "float", "cpu", "share_memory", "channels last"]
)
def test_moves_that_change_nothing(recipe, move):
    moves = {
        "to float32": lambda m: m.to(torch.float32),
        "to cpu": lambda m: m.to("cpu"),
        "float": lambda m: m.float(),
        "cpu": lambda m: m.cpu(),
        "share_memory": lambda m: m.share_memory(),
        "channels last": lambda m: m.to(memory_format=torch.channels_last),
    }

    def call(model, x):
        model(x)
        return moves[move](model)(x)

    check(net, lambda: torch.randn(5, 6), recipe, k=6, call=call)


@pytest.mark.parametrize("move", ["half", "bfloat16", "to float16"])
def test_masters_in_16_bits_are_refused(recipe, move):
    """A master in 16 bits is what the switch is there to avoid: said at the next call, with its name."""
    model = net()
    on(model, recipe)
    {
        "half": lambda: model.half(),
        "bfloat16": lambda: model.bfloat16(),
        "to float16": lambda: model.to(torch.float16),
    }[move]()
    with pytest.raises(SwitchError, match=r"weight \(6, 6\) is torch\.\w+: the masters are FP32"):
        model(torch.randn(5, 6))
    model.float()
    assert model(torch.randn(5, 6)).dtype == torch.float32


def test_a_move_to_fp64_goes_its_own_way(recipe):
    """FP64 is left alone, as torch.autocast does: nothing of the model is in 16 bits any more."""
    model = net()
    on(model, recipe)
    twin = net().double()
    model.double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(model(x), twin(x))
    model(x).square().mean().backward()
    twin(x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_a_move_to_another_device_is_refused(recipe):
    model = net()
    on(model, recipe)
    model.to("meta")
    with pytest.raises(SwitchError, match="moved from cpu to meta while switched"):
        model(torch.randn(5, 6, device="meta"))


def test_a_new_data_tensor_is_the_new_master(recipe):
    def call(model, x):
        model(x)
        with torch.no_grad():
            model[0].weight.data = model[0].weight.data * 2
            model[2].weight.mul_(0.5)
        return model(x)

    check(net, lambda: torch.randn(5, 6), recipe, k=8, call=call)
