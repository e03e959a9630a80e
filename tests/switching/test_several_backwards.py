"""More than one backward, loss, optimizer or model a step: accumulation, double backward, GANs."""

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import PER_LAYER, RECIPES, assert_close, batch, both, gradients, mlp, sgd

X, Y = batch()


def mse(model):
    return (model(X) - Y).square().mean()


def set_scale(switch, scale):
    switch.load_state_dict({**switch.state_dict(), "scale": scale})


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulation_over_micro_batches_while_the_scale_changes(recipe):
    def program(model, optimizer, switch):
        for k, (x, y) in enumerate(zip(X.chunk(4), Y.chunk(4), strict=True)):
            if switch.recipe.loss_scaling.kind.value == "dynamic":
                set_scale(switch, [2.0**4, 2.0**14, 1.0, 2.0**9][k])
            ((model(x) - y).square().mean() / 4).backward()
        return gradients(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


def test_the_scale_may_change_between_forward_and_backward():
    def program(model, optimizer, switch):
        loss = mse(model)
        if switch.plan.active:
            set_scale(switch, 64.0)
        loss.backward()
        return gradients(model)

    wanted, got = both(program, "fp16:initial=32768")
    assert_close(got, wanted, "fp16")


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_losses_on_one_graph(recipe):
    def program(model, optimizer, switch):
        out = model(X)
        (out - Y).square().mean().backward(retain_graph=True)
        first = {f"first {k}": g.clone() for k, g in gradients(model).items()}
        (out + Y).abs().mean().backward()
        return {**first, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_forwards_and_one_backward(recipe):
    def program(model, optimizer, switch):
        (
            mse(model)
            + model(2.0 * X).square().mean()
            + model(model(X).detach() @ torch.ones(4, 6)).mean()
        ).backward()
        return gradients(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_fed_its_own_output(recipe):
    def program(model, optimizer, switch):
        x = X
        for _ in range(3):
            x = model(x)
        x.square().mean().backward()
        return gradients(model)

    wanted, got = both(program, recipe, lambda: mlp(outputs=6))
    assert_close(got, wanted, recipe, 7 * PER_LAYER if recipe == "bf16" else 9 * PER_LAYER)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_of_the_input(recipe):
    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        scores = model(x)
        scores[torch.arange(len(x)), scores.argmax(1)].sum().backward()
        return {"saliency": x.grad, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fgsm_attack_and_training_on_it(recipe):
    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad((model(x) - Y).square().mean(), x)
        (model(x.detach() + 0.1 * g) - Y).square().mean().backward()
        return {"g": g, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("scale", [1, 256, 32768])
def test_input_gradients_are_exact_in_the_scale(scale):
    """One bias: no rounding at all in its backward, so any factor left over would be seen to the bit."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.b

    model = Shift()
    halfstep.switch(model, sgd(model), f"fp16:initial={scale}")
    x = torch.ones(2, 4, requires_grad=True)
    (model(x) * 0.5).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 4), 0.5))
    assert torch.equal(model.b.grad, torch.full((4,), 1.0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_wgan_gp_gradient_penalty(recipe):
    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        score = model(x).sum(1)
        (g,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        penalty = (g.norm(dim=1) - 1).square().mean()
        (score.mean() + 10 * penalty).backward()
        return {"penalty": penalty.detach(), **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe, 6 * PER_LAYER)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loss_of_derivatives_alone(recipe):
    """As in physics-informed networks: the second backward comes in by a gradient, not by the output."""

    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (g - 1).square().mean().backward()
        return {k: v for k, v in gradients(model).items() if k != "4.bias"}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe, 6 * PER_LAYER)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_penalty_on_parameters_and_a_scale_that_moves_in_between(recipe):
    def program(model, optimizer, switch):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(mse(model), parameters, create_graph=True)
        if switch.recipe.loss_scaling.kind.value == "dynamic":
            set_scale(switch, 512.0)
        sum(g.square().sum() for g in grads).backward()
        return gradients(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe, 6 * PER_LAYER)


@pytest.mark.parametrize("recipe", RECIPES)
def test_hessian_vector_product(recipe):
    def program(model, optimizer, switch):
        parameters = list(model.parameters())
        torch.manual_seed(3)
        vector = [torch.randn_like(p) for p in parameters]
        grads = torch.autograd.grad(mse(model), parameters, create_graph=True)
        product = torch.autograd.grad(grads, parameters, vector)
        return dict(enumerate(product))

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe, 6 * PER_LAYER)


@pytest.mark.parametrize("recipe", RECIPES)
def test_three_derivatives(recipe):
    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        value = model(x).sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.square().sum()
        value.backward()
        return {"x": x.grad, **{k: v for k, v in gradients(model).items() if k != "4.bias"}}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe, 7 * PER_LAYER if recipe == "bf16" else 20 * PER_LAYER)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_optimizers_over_one_model(recipe):
    def pair(model):
        return [sgd(model[:2]), torch.optim.SGD(model[4].parameters(), lr=0.2)]

    def program(model, optimizers, switch):
        for _ in range(3):
            model.zero_grad()
            mse(model).backward()
            for o in optimizers:
                o.step()
        return {k: p.detach() for k, p in model.named_parameters()}

    wanted, got = both(program, recipe, optimizer=pair)
    assert_close(got, wanted, recipe)
