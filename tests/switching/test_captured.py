"""Activations that leave forward by a side door, and outputs of every kind: right, or an error."""

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import PER_LAYER, assert_close, batch, both, gradients, mlp, sgd
from halfstep.errors import ScaledGradientError

X, Y = batch()
RECIPE = "fp16:initial=8192"


class Net(nn.Module):
    """A switched model with room for mischief."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)


def mse(out):
    return (out - Y).square().mean()


def fails(make, text, program):
    with pytest.raises(ScaledGradientError, match=text):
        both(program, RECIPE, make)
    wanted, got = both(program, "bf16", make)  # at scale 1 there is nothing to leak
    assert_close(got, wanted, "bf16", 6 * PER_LAYER)


def holds(make, program, roundings=3 * PER_LAYER):
    for recipe in ("bf16", RECIPE):
        wanted, got = both(program, recipe, make)
        assert_close(got, wanted, recipe, roundings)


class Featured(Net):
    def forward(self, x):
        self.feature = self.net[:2](x)
        return self.net[2:](self.feature)


def feature_loss(model, optimizer, switch):
    (mse(model(X)) + model.feature.float().square().mean()).backward()
    return gradients(model)


def test_an_activation_kept_in_an_attribute_and_used_outside_is_right():
    holds(Featured, feature_loss)


SMALL = 2.0**-18
"""Times a loss: of its gradients FP16 has nothing left without a scale."""


@pytest.mark.parametrize(
    "distance",
    [
        lambda h, t: (h.float() - t).square().mean(),
        lambda h, t: (h.float() - t).abs().mean() * (h.float() * t).sum(),
        lambda h, t: torch.nn.functional.mse_loss(h, t.to(h.dtype)).float(),
        lambda h, t: (h * 2 + t.to(h.dtype)).tanh().float().square().mean(),
        lambda h, t: torch.cat([h[:, :4], h[:, 4:]], 1).float().std(),
        lambda h, t: (h.float() * t).sum() + h.square().sum(dtype=torch.float32),
    ],
    ids=["cast", "twice", "narrow", "chain", "cat", "sum"],
)
def test_features_caught_by_a_forward_hook_are_matched_outside(distance):
    """Distillation, perceptual losses: the gradient has the loss scale before it is rounded to 16 bits."""
    target = torch.rand(len(X), 16, generator=torch.Generator().manual_seed(3))

    def program(model, optimizer, switch):
        caught = []
        model.net[1].register_forward_hook(lambda m, i, o: caught.append(o))
        free = target.clone().requires_grad_()  # a leaf beside it has its own gradient
        out = model(X)
        (SMALL * (mse(out) + distance(caught[0], free))).backward()
        return (
            {"free": free.grad, **gradients(model)} if free.grad is not None else gradients(model)
        )

    holds(Net, program, 6 * PER_LAYER)


def test_a_loss_in_16_bits_made_of_an_activation_is_an_error_that_says_what_to_do():
    def program(model, optimizer, switch):
        model(X)
        model.feature.square().mean().backward()
        return gradients(model)

    model = Featured()
    switch = halfstep.switch(model, sgd(model), RECIPE)
    with pytest.raises(ScaledGradientError, match=r"float16.*Make the loss FP32"):
        program(model, None, switch)


class Balanced(Net):
    """A term of the loss kept in an attribute, in FP32: a mixture's balance, a divergence, a commitment."""

    def forward(self, x):
        h = self.net[:2](x)
        self.balance = h.softmax(1).mean(0).square().sum()
        return self.net[2:](h)


@pytest.mark.parametrize(
    "use", [lambda b: 3.0 * b, torch.sqrt, lambda b: b], ids=["times", "sqrt", "itself"]
)
def test_a_term_of_the_loss_in_fp32_that_is_kept_in_an_attribute_is_right(use):
    def program(model, optimizer, switch):
        out = model(X)
        (mse(out) + use(model.balance)).backward()
        return gradients(model)

    holds(Balanced, program, 6 * PER_LAYER)


def test_outside_makes_a_captured_activation_right():
    class Teaching(Net):
        keep = staticmethod(lambda h: h)

        def forward(self, x):
            h = self.net[:2](x)
            self.feature = self.keep(h)
            return self.net[2:](h)

    def program(model, optimizer, switch):
        model.keep = switch.outside
        out = model(X)
        assert model.feature.dtype == torch.float32
        (mse(out) + model.feature.square().mean()).backward()
        return gradients(model)

    def hooked(model, optimizer, switch):
        caught = []
        model.net[1].register_forward_hook(lambda m, i, o: caught.append(switch.outside(o)))
        (mse(model(X)) + caught[0].square().mean()).backward()
        return gradients(model)

    holds(Teaching, program)
    holds(Teaching, hooked)


def test_what_went_outside_may_be_returned_and_used_inside_again():
    class Both(Net):
        keep = staticmethod(lambda h: h)
        inside = False

        def forward(self, x):
            h = self.net[:2](x)
            left = self.keep(h)
            return self.net[2:](left if self.inside else h), left

    def program(model, optimizer, switch):
        model.keep = switch.outside
        out, left = model(X)
        (mse(out) + left.square().mean()).backward()
        return gradients(model)

    holds(Both, program)

    class Back(Both):
        inside = True

    holds(Back, program)


def test_a_working_copy_kept_and_used_outside_is_an_error():
    class Keeping(Net):
        def forward(self, x):
            self.kept = [self.net[0].weight]
            return self.net(x)

    def program(model, optimizer, switch):
        (mse(model(X)) + model.kept[0].float().square().sum()).backward()
        return gradients(model)

    fails(Keeping, r"a working copy .* is used outside of it by \w+", program)


def test_gradients_of_inside_activations_are_refused_where_they_are_asked_for():
    """Grad-CAM: torch.autograd.grad with respect to a captured activation."""

    def program(model, optimizer, switch):
        out = model(X)
        (g,) = torch.autograd.grad(out[:, 0].sum(), model.feature)
        return {"g": g.float()}

    fails(
        Featured, r"gradient .* with respect to an activation made inside .*TanhBackward0", program
    )


@pytest.mark.parametrize("form", ["outputs", "passthrough", "parameter"])
def test_outputs_of_every_kind_are_right(form):
    class Giving(Net):
        def forward(self, x):
            if form == "outputs":
                h = self.net[:2](x)
                return self.net[2:](h), h
            return self.net(x), (x if form == "passthrough" else self.net[0].weight)

    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        out, other = model(x)
        assert other.dtype == torch.float32
        (mse(out) + (3.0 * other).square().mean()).backward()
        return {"x": x.grad, **gradients(model)}

    holds(Giving, program)


class Hidden:
    """An output in which no tensor is found: a distribution of a library's own."""

    def __init__(self, mean):
        self._mean = mean

    def loss(self):
        return (self._mean.float() - Y).square().mean()


def test_an_output_that_hides_its_tensors_is_right_and_its_overflows_lower_the_scale():
    weight = nn.Parameter(torch.ones(4))

    class Distributed(Net):
        def forward(self, x):
            return Hidden(self.net(x) * weight)

    def program(model, optimizer, switch):
        weight.grad = None
        model(X).loss().backward()
        return {"weight": weight.grad.clone(), **gradients(model)}

    holds(Distributed, program, 4 * PER_LAYER)
    model = Distributed()
    optimizer = sgd(model, 0.01)
    switch = halfstep.switch(model, optimizer, "fp16:initial=1048576")
    for _ in range(12):
        optimizer.zero_grad()
        (100 * model(X).loss()).backward()
        optimizer.step()
    assert switch.last_step.applied
    assert switch.skipped_steps > 2
    assert switch.loss_scale == 2.0 ** (20 - switch.skipped_steps)


def test_a_leaf_that_only_a_captured_term_is_made_of_has_the_true_gradient():
    class Aside(Net):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Parameter(torch.full((16,), 0.5))]

        def forward(self, x):
            h = self.net[:2](x)
            self.aside = (h * self.hidden[0]).float().square().mean()
            return self.net[2:](h)

    def program(model, optimizer, switch):
        out = model(X)
        (mse(out) + model.aside).backward()
        return {"hidden": model.hidden[0].grad, **gradients(model)}

    holds(Aside, program, 4 * PER_LAYER)
