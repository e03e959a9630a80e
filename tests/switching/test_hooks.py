"""Hooks on gradients in the middle of the model see and change true gradients, as in FP32."""

import gc

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import RECIPES, assert_close, batch, both, gradients, mlp
from halfstep.errors import ScaledGradientError

X, Y = batch()


def mse(model):
    return (model(X) - Y).square().mean()


class Caught(nn.Module):
    """Keeps an activation, and hooks it if told to."""

    hook = None

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        self.h = self.net[:2](x)
        if self.hook is not None:
            self.h.register_hook(self.hook)
        return self.net[2:](self.h)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tensor_hook_inside_forward(recipe):
    def program(model, optimizer, switch):
        seen = []
        model.hook = lambda g: seen.append(g.float())
        mse(model).backward()
        return {"seen": seen[0], **gradients(model)}

    wanted, got = both(program, recipe, Caught)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tensor_hook_on_a_captured_activation(recipe):
    """Grad-CAM."""

    def program(model, optimizer, switch):
        seen = []
        loss = mse(model)
        handle = model.h.register_hook(lambda g: seen.append(g.float()))
        loss.backward(retain_graph=True)
        handle.remove()
        loss.backward()
        assert len(seen) == 1
        return {"seen": seen[0], **gradients(model)}

    wanted, got = both(program, recipe, Caught)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_hook_returns_goes_on(recipe):
    def program(model, optimizer, switch):
        model.hook = lambda g: 0.1 * g.sign() - g
        mse(model).backward()
        return gradients(model)

    wanted, got = both(program, recipe, Caught)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("at", ["0", "2", ""])
def test_full_backward_hooks_of_modules(recipe, at):
    def program(model, optimizer, switch):
        seen = {}
        module = model.get_submodule(at)

        def post(m, grad_input, grad_output):
            seen["output"] = grad_output[0].float()
            if grad_input[0] is not None:
                seen["input"] = grad_input[0].float()
                return (3.0 * grad_input[0],)
            return None

        def pre(m, grad_output):
            seen["pre"] = grad_output[0].float()
            return (0.5 * grad_output[0],)

        module.register_full_backward_hook(post)
        module.register_full_backward_pre_hook(pre)
        x = X.clone().requires_grad_()
        (model(x) - Y).square().mean().backward()
        assert set(seen) == {"input", "output", "pre"}
        return {"x": x.grad, **seen, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


def test_retain_grad_inside_is_refused_and_outside_allowed():
    model = Caught()
    halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp16:initial=64")
    out = model(X)
    with pytest.raises(
        ScaledGradientError, match=r"retain_grad\(\) .*TanhBackward0.*register_hook"
    ):
        model.h.retain_grad()
    out.retain_grad()
    out.sum().backward()
    assert torch.equal(out.grad, torch.ones_like(out))
    switched = torch.ones(3, requires_grad=True) * 2
    switched.retain_grad()
    switched.sum().backward()
    assert torch.equal(switched.grad, torch.ones(3))


def test_with_the_last_switch_off_torch_is_as_it_was():
    gc.collect()  # models of earlier tests, switched and dropped: the next switch clears up after them
    halfstep.switch(mlp(), None, "fp16").off()
    before = torch.Tensor.register_hook, torch.Tensor.retain_grad
    model = mlp()
    switches = [
        halfstep.switch(m, torch.optim.SGD(m.parameters(), lr=0.1), "fp16") for m in (model, mlp())
    ]
    for switch in switches:
        switch.off()
    assert (torch.Tensor.register_hook, torch.Tensor.retain_grad) == before
