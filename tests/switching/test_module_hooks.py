"""Hooks of every kind see what they would see in FP32: true gradients, and the root's FP32 output."""

import pytest
import torch
from torch import nn

from twins import RECIPES, UNIT, all_off, on, run

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def inputs():
    return torch.randn(5, 6, requires_grad=True)


def seen_by(recipe, register, call=lambda model, x: model(x)):
    """What the hooks that ``register(model, note)`` sets saw in one run."""
    found = []

    def note(*values):
        found.extend(v.detach().clone() for v in values if v is not None)

    def registered(model, x):
        register(model, note)
        return call(model, x)

    run(net, inputs, recipe, call=registered)
    all_off()
    return found


def assert_same(recipe, register, k=6, **how):
    low, exact = seen_by(recipe, register, **how), seen_by("fp32", register, **how)
    assert len(low) == len(exact) > 0
    for a, b in zip(low, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= k * UNIT[recipe] * b.norm()


def test_parameter_hooks_see_true_gradients(recipe):
    def register(model, note):
        for p in model.parameters():
            p.register_hook(note)

    assert_same(recipe, register)


def test_post_accumulate_hooks_see_true_gradients(recipe):
    def register(model):
        found = {}
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, n=name: found.update({n: p.grad}))
        register.found = found

    low, exact = {}, {}
    for which, found in ((recipe, low), ("fp32", exact)):
        run(net, inputs, which, call=lambda m, x: (register(m), m(x))[1])
        found.update(register.found)
    assert low.keys() == exact.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, grad in exact.items():
        assert (low[name] - grad).norm() <= 6 * UNIT[recipe] * grad.norm()


def test_a_parameter_hook_changes_the_gradient(recipe):
    def call(model, x):
        for p in model.parameters():
            p.register_hook(lambda g: g.clamp(-0.5, 0.5) * 2)
        return model(x)

    low, exact = run(net, inputs, recipe, call=call), run(net, inputs, "fp32", call=call)
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 12 * UNIT[recipe] * grad.norm()


def test_hooks_on_inputs_and_outputs(recipe):
    def call(model, x):
        x = x * 1.0
        x.register_hook(call.note)
        out = model(x)
        out.register_hook(call.note)
        out.retain_grad()
        return out

    def register(model, note):
        call.note = note

    assert_same(recipe, register, call=call)


def test_root_hooks_see_what_the_caller_sees(recipe):
    """The region is closed before the root's forward hooks: an FP32 output whose gradient is not scaled."""

    def register(model, note):
        def hook(module, args, out):
            note(out)
            out.register_hook(note)

        model.register_forward_hook(hook)

    assert_same(recipe, register)


@pytest.mark.parametrize("where", ["root", "child"])
def test_forward_hooks_change_the_output(recipe, where):
    def call(model, x):
        target = model if where == "root" else model[0]
        target.register_forward_hook(lambda m, a, out: out * 2 + 1)
        target.register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
        target.register_forward_hook(lambda m, a, k, out: out - 1, with_kwargs=True)
        return model(x)

    low, exact = run(net, inputs, recipe, call=call), run(net, inputs, "fp32", call=call)
    assert (low.outputs[0] - exact.outputs[0]).norm() <= 6 * UNIT[recipe] * exact.outputs[0].norm()
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 8 * UNIT[recipe] * grad.norm()


def test_always_called_hooks_of_the_root(recipe):
    calls = []
    model = net()
    model.register_forward_hook(lambda m, a, out: calls.append(out), always_call=True)
    on(model, recipe)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7))
    assert calls == [None]
    model(torch.randn(5, 6))
    assert calls[1].dtype == torch.float32


@pytest.mark.parametrize("where", ["root", "child"])
def test_full_backward_hooks_see_true_gradients(recipe, where):
    def register(model, note):
        target = model if where == "root" else model[2]
        target.register_full_backward_hook(lambda m, gi, go: note(*gi, *go))

    assert_same(recipe, register)


@pytest.mark.parametrize("where", ["root", "child"])
def test_full_backward_pre_hooks_see_true_gradients(recipe, where):
    def register(model, note):
        target = model if where == "root" else model[2]
        target.register_full_backward_pre_hook(lambda m, go: note(*go))

    assert_same(recipe, register)


@pytest.mark.parametrize("where", ["root", "child"])
def test_full_backward_hooks_change_gradients(recipe, where):
    """Gradients that a hook gives back are true ones, and go on scaled as the others."""

    def call(model, x):
        target = model if where == "root" else model[2]
        target.register_full_backward_hook(lambda m, gi, go: tuple(g * 3 for g in gi))
        target.register_full_backward_pre_hook(lambda m, go: tuple(g.clamp(-0.5, 0.5) for g in go))
        return model(x)

    low, exact = run(net, inputs, recipe, call=call), run(net, inputs, "fp32", call=call)
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 12 * UNIT[recipe] * grad.norm(), name


def test_global_module_hooks(recipe):
    calls = []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, a: None),
        nn.modules.module.register_module_forward_hook(lambda m, a, out: calls.append(type(m))),
        nn.modules.module.register_module_full_backward_hook(lambda m, gi, go: None),
    ]
    try:
        low, exact = run(net, inputs, recipe), run(net, inputs, "fp32")
    finally:
        for handle in handles:
            handle.remove()
    assert calls == 2 * [nn.Linear, nn.Tanh, nn.Linear, nn.Sequential]
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 6 * UNIT[recipe] * grad.norm()


def test_hooks_on_a_part_called_by_itself(recipe):
    def register(model, note):
        model[0].register_forward_hook(lambda m, a, out: note(out))
        model[2].register_full_backward_hook(lambda m, gi, go: note(*go))

    def call(model, x):
        return model[2](model[0](x).tanh())

    assert_same(recipe, register, call=call)


def test_a_hook_of_the_root_that_reads_parameters(recipe):
    """As weight norm and pruning do: what a pre-hook makes of parameters is part of the region."""

    class Root(nn.Linear):
        pass

    def make():
        root = Root(6, 3)
        del root._parameters["weight"]
        root.raw = nn.Parameter(torch.randn(3, 6) / 2)
        root.weight = None

        def hook(module, args):
            module.weight = module.raw * (module.raw.abs() > 0.1)

        root.register_forward_pre_hook(hook)
        return root

    low, exact = run(make, inputs, recipe), run(make, inputs, "fp32")
    for name, grad in exact.grads.items():
        assert (low.grads[name] - grad).norm() <= 6 * UNIT[recipe] * grad.norm()
