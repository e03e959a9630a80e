"""no_grad, inference_mode, eval, frozen parameters, mixed in one forward; autocast islands of the users."""

import pytest
import torch
from torch import nn

from twins import RECIPES, check, on, run

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


def low_dtype(recipe):
    return torch.bfloat16 if recipe == "bf16" else torch.float16


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "eval"])
def test_inference(recipe, mode):
    def call(model, x):
        model.eval()
        if mode == "eval":
            return model(x)
        with getattr(torch, mode)():
            return model(x)

    low, _ = check(net, lambda: torch.randn(5, 6), recipe, k=6, call=call, backward=False)
    x = torch.randn(4, 6)
    low.model.train()
    low.model(x).sum().backward()  # and training goes on
    assert all(p.grad is not None for p in low.model.parameters())


class Mixed(nn.Module):
    """A parameter is first read without a graph, then with one; and the other way round."""

    def __init__(self, context):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.context = context

    def forward(self, x):
        with self.context():
            target = self.norm(self.a(x)).clone()
        y = self.norm(self.a(x)) + target.clone()
        y = self.b(y)
        with self.context():
            more = self.norm(self.b(y)).clone()
        return self.b(y + more.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_parameter_read_with_and_without_a_graph(recipe, context):
    low, _ = check(lambda: Mixed(context), lambda: torch.randn(4, 6), recipe, k=20)
    assert len(low.grads) == 6


class GradInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.a(x).tanh()
        with torch.enable_grad():
            return self.b(h)


def test_enable_grad_inside_no_grad(recipe):
    def call(model, x):
        with torch.no_grad():
            return model(x)

    low, _ = check(GradInside, lambda: torch.randn(4, 6), recipe, k=8, call=call)
    assert low.grads.keys() == {"b.weight", "b.bias"}


class PassesOn(nn.Module):
    """Uses its input where grad is enabled again, and returns it too."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        with torch.enable_grad():
            return self.a(x), x * 2.0, x


def test_an_input_that_requires_grad_under_no_grad(recipe):
    def call(model, x):
        with torch.no_grad():
            return model(x)

    low, _ = check(PassesOn, lambda: torch.randn(4, 6, requires_grad=True), recipe, k=8, call=call)
    assert "input 0" in low.grads


class FrozenThenLive(nn.Module):
    """Frozen weights first read in inference mode, then saved for the backward of what is below."""

    def __init__(self):
        super().__init__()
        self.below, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        with torch.inference_mode():
            self.frozen(x)
        return self.frozen(self.below(x))


def test_a_frozen_parameter_first_read_in_inference_mode(recipe):
    low, _ = check(FrozenThenLive, lambda: torch.randn(4, 6), recipe, k=8)
    assert low.grads.keys() == {"below.weight", "below.bias"}


def test_requires_grad_toggled_between_calls(recipe):
    def call(model, x):
        model[0].requires_grad_(False)
        first = model(x)
        model[0].requires_grad_(True)
        second = model(x)
        model[3].requires_grad_(False)
        third = model(x)
        model.requires_grad_(True)
        return first, second, third

    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))  # noqa: E731
    check(make, lambda: torch.randn(4, 6), recipe, k=12, call=call)


def test_a_wholly_frozen_model_passes_gradients_to_its_input(recipe):
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).requires_grad_(
            False
        )

    def inputs():
        return torch.randn(4, 6, requires_grad=True)

    low, _ = check(make, inputs, recipe, k=12)
    assert low.grads.keys() == {"input 0"}


def test_training_and_evaluation_take_turns(recipe):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    switch = on(model, recipe, optimizer)
    x = torch.randn(8, 6)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert switch.last_step.applied
        model.eval()
        with torch.inference_mode():
            first = model(x)
        with torch.no_grad():
            second = model(x)
        assert torch.equal(first, second)


class Island(nn.Module):
    """What users write around an operation that must be FP32."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.seen = []

    def forward(self, x):
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            y = self.b(h.float())
            self.seen.append((self.b.weight.dtype, y.dtype))
        # the same layer outside of the island too: two copies, one gradient
        return self.c(y) + self.b(h)


def test_an_fp32_island(recipe):
    low, _ = check(Island, lambda: torch.randn(4, 6, requires_grad=True), recipe, k=12)
    assert low.model.seen == [(torch.float32, torch.float32)]


class DecoratedIsland(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.exact(self.a(x)))

    @torch.autocast("cpu", enabled=False)
    def exact(self, h):
        return (h.float() @ self.a.weight).logsumexp(-1, keepdim=True) + h


def test_a_decorated_fp32_island(recipe):
    check(DecoratedIsland, lambda: torch.randn(4, 6), recipe, k=12)


def test_a_model_that_shuts_autocast_out_is_fp32(recipe):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        @torch.autocast("cpu", enabled=False)
        def forward(self, x):
            return self.b(self.a(x).tanh())

    low, exact = run(Whole, lambda: torch.randn(4, 6), recipe), None
    exact = run(Whole, lambda: torch.randn(4, 6), "fp32")
    assert torch.equal(low.outputs[0], exact.outputs[0])
    for name, grad in exact.grads.items():
        torch.testing.assert_close(low.grads[name], grad, rtol=1e-6, atol=1e-6)


class Casts(nn.Module):
    """``.half()``, ``.bfloat16()``, ``.float()``, ``.to()`` and ``type_as`` by the user's hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.a(x).float()
        h = h + self.a(x).to(x.dtype)
        h = self.b(h.half().float())
        h = h.type_as(x) * self.a.weight.float().sum()
        return self.b(h.bfloat16().to(self.b.weight.dtype)) + h


def test_casts_by_the_users_hand(recipe):
    # .half() and .bfloat16() round in the FP32 run too: bf16's unit bounds both
    exact = run(Casts, lambda: torch.randn(4, 6), "fp32")
    low = run(Casts, lambda: torch.randn(4, 6), recipe)
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 20 * 2.0**-8 * grad.norm(), name
        assert low.grads[name].dtype == torch.float32


class OwnAutocast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype):
            h = self.b(self.a(x).relu())
        return self.a(h.float()) + self.b(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_of_the_users_inside(recipe, dtype):
    """The model of a user who has it already: gradients are right, the recipe's format is what counts."""
    torch.manual_seed(0)
    low = run(lambda: OwnAutocast(dtype), lambda: torch.randn(4, 6), recipe)
    exact = run(lambda: OwnAutocast(torch.bfloat16), lambda: torch.randn(4, 6), "fp32")
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 16 * 2.0**-8 * grad.norm(), name
        assert low.grads[name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_of_the_users_around_the_loop(recipe, dtype):
    def call(model, x):
        with torch.autocast("cpu", dtype=dtype):
            return model(x)

    exact = run(GradInside, lambda: torch.randn(4, 6), "fp32")
    low = run(GradInside, lambda: torch.randn(4, 6), recipe, call=call)
    plain = run(GradInside, lambda: torch.randn(4, 6), recipe)
    assert low.outputs[0].dtype == torch.float32
    assert torch.equal(low.outputs[0], plain.outputs[0])
    assert low.grads.keys() == exact.grads.keys()


def test_working_copies_are_what_the_recipe_says(recipe):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(self.a(x)), self.a.weight.dtype, self.norm.weight.dtype, self.a.weight

    model = Looks()
    on(model, recipe)
    _, weight, norm, copy = model(torch.randn(2, 6))
    assert (weight, norm) == (low_dtype(recipe), torch.float32)
    assert torch.equal(copy, model.a.weight.to(low_dtype(recipe)).float())
    assert model.a.weight.dtype == torch.float32
