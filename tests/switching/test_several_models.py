"""Several models and optimizers in one loop: GANs, shared parts, and whose scale an overflow lowers."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import PER_LAYER, RECIPES, assert_close, batch, gradients, mlp, sgd, unit
from halfstep.errors import SwitchError
from halfstep.switching import engine, overrides

X, Y = batch()


def gan(recipes, optimizers, step):
    """Gradients of both nets after ``step``, FP32 and switched."""
    found = []
    for pair in (("fp32", "fp32"), recipes):
        g, d = mlp(inputs=6, outputs=4, seed=1), mlp(inputs=4, outputs=1, seed=2)
        held = optimizers(g, d)
        switches = [halfstep.switch(m, o, r) for m, o, r in zip((g, d), held, pair, strict=True)]
        step(g, d, *held)
        found.append(
            {f"{n}.{k}": v for n, m in (("g", g), ("d", d)) for k, v in gradients(m).items()}
        )
        for s in reversed(switches):
            s.off()
    return found


PAIRS = [("bf16", "bf16"), ("fp16:initial=1024", "fp16:initial=32"), ("bf16", "fp16:initial=4096")]


@pytest.mark.parametrize("recipes", PAIRS)
def test_a_gan_whose_discriminator_is_frozen_in_the_generators_step(recipes):
    def step(g, d, opt_g, opt_d):
        fake = g(X)
        (d(Y).exp().mean() - d(fake.detach()).mean()).backward()
        opt_d.step()
        d.requires_grad_(False)
        d(fake).square().mean().backward()
        opt_g.step()
        d.requires_grad_(True)

    wanted, got = gan(recipes, lambda g, d: (sgd(g), sgd(d)), step)
    assert_close(got, wanted, "bf16" if "bf16" in recipes else "fp16", 6 * PER_LAYER)


@pytest.mark.parametrize("recipes", PAIRS)
def test_a_gan_whose_generators_gradient_passes_a_discriminator_that_keeps_its_own(recipes):
    def step(g, d, opt_g, opt_d):
        d(g(X)).square().mean().backward()
        opt_g.step()
        opt_d.zero_grad()
        (d(Y).exp().mean() - d(g(X).detach()).mean()).backward()
        opt_d.step()

    wanted, got = gan(recipes, lambda g, d: (sgd(g), sgd(d)), step)
    assert_close(got, wanted, "bf16" if "bf16" in recipes else "fp16", 6 * PER_LAYER)


@pytest.mark.parametrize("recipes", PAIRS)
def test_two_models_with_one_optimizer(recipes):
    def one(g, d):
        optimizer = torch.optim.SGD([*g.parameters(), *d.parameters()], lr=0.1)
        return optimizer, optimizer

    def step(g, d, optimizer, _):
        before = [p.detach().clone() for p in g.parameters()]
        d(g(X)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(before[0], g[0].weight)

    wanted, got = gan(recipes, one, step)
    assert_close(got, wanted, "bf16" if "bf16" in recipes else "fp16", 6 * PER_LAYER)


def test_an_overflow_in_the_second_optimizer_lowers_the_scale_though_the_first_was_clean():
    model = mlp()
    optimizers = [sgd(model[4]), sgd(model[:4])]
    switch = halfstep.switch(model, optimizers, "fp16:initial=1024,interval=1000")
    (model(X) - Y).square().mean().backward()
    model[0].weight.grad[0, 0] = float("inf")
    optimizers[0].step()
    assert switch.last_step.applied
    optimizers[1].step()
    assert not switch.last_step.applied
    assert switch.loss_scale == 512.0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_scale_moves_once_a_backward_however_many_optimizers_step(bad):
    model = mlp()
    optimizers = [sgd(model[2 * k]) for k in range(3)]
    switch = halfstep.switch(model, optimizers, "fp16:initial=1024,interval=1")
    for _ in range(2):
        model.zero_grad()
        (model(X) - Y).square().mean().backward()
        for o in optimizers:
            o.step()
    assert switch.loss_scale == 4096.0
    model.zero_grad()
    (model(X) - Y).square().mean().backward()
    for k in range(bad, 3):
        model[2 * k].bias.grad[0] = float("nan")
    for o in optimizers:
        o.step()
    assert switch.loss_scale == 2048.0
    assert switch.skipped_steps == 3 - bad


def test_one_optimizer_of_two_switched_models_skips_for_both_and_lowers_both_scales():
    a, b = mlp(seed=1), mlp(seed=2)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    first = halfstep.switch(a, optimizer, "fp16:initial=1024")
    second = halfstep.switch(b, optimizer, "fp16:initial=64")
    before = copy.deepcopy([a.state_dict(), b.state_dict()])
    (a(X) + b(X)).square().mean().backward()
    b[2].weight.grad[3, 3] = float("inf")
    optimizer.step()
    for switch in (first, second):
        assert not switch.last_step.applied
        assert switch.skipped_steps == 1
    assert first.loss_scale == 512.0
    assert second.loss_scale == 32.0
    assert list(second.last_step.nonfinite) == ["2.weight"]
    for model, old in zip((a, b), before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    optimizer.zero_grad()
    (a(X) + b(X)).square().mean().backward()
    optimizer.step()
    assert first.last_step.applied
    assert second.last_step.applied


def test_an_overflow_on_the_way_through_another_switched_model_lowers_its_scale():
    """The critic's scale is too high for the generator's loss: unless it is lowered, no step ever passes."""
    g, d = mlp(outputs=4, seed=1), mlp(inputs=4, outputs=1, seed=2)
    opt_g, opt_d = sgd(g), sgd(d)
    of_g = halfstep.switch(g, opt_g, "fp16:initial=4")
    of_d = halfstep.switch(d, opt_d, "fp16:initial=65536")
    for _ in range(12):
        g.zero_grad()
        (100.0 * d(g(X)).sum()).backward()
        opt_g.step()
        if of_g.last_step.applied:
            break
        d.zero_grad()
        (1e-3 * d(Y).square().mean()).backward()  # does not overflow at any scale here
        opt_d.step()
        assert of_d.last_step.applied
    assert of_g.last_step.applied
    assert of_d.loss_scale < 65536.0


def test_two_loops_side_by_side_leave_each_others_scale_alone():
    a, b = mlp(seed=1), mlp(seed=2)
    opt_a, opt_b = sgd(a), sgd(b)
    of_a = halfstep.switch(a, opt_a, "fp16:initial=1024")
    of_b = halfstep.switch(b, opt_b, "fp16:initial=1024")
    a(X).square().mean().backward()
    b(X).square().mean().backward()
    a[0].weight.grad[0, 0] = float("inf")
    opt_a.step()
    opt_b.step()
    assert of_a.loss_scale == 512.0
    assert of_b.loss_scale == 1024.0
    assert of_b.last_step.applied


@pytest.mark.parametrize("recipe", ["bf16", "fp16"])
def test_the_loss_of_another_model_is_not_mine(recipe):
    model, other = mlp(), mlp(seed=5)
    optimizer = sgd(model)
    halfstep.switch(model, optimizer, recipe)
    model(X).square().mean().backward()
    (other(X).sum() * float("inf")).backward()
    optimizer.step()


class Outer(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.inner = mlp(outputs=6, seed=seed)
        self.head = mlp(seed=seed + 1)

    def forward(self, x):
        return self.head(self.inner(x))


@pytest.mark.parametrize("inner_first", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_switched_model_inside_a_switched_model(recipe, inner_first):
    found = []
    for r in ("fp32", recipe):
        model = Outer()
        opt_inner, opt_head = sgd(model.inner), sgd(model.head)
        inner = [(model.inner, opt_inner), (model, opt_head)]
        for m, o in inner if inner_first else reversed(inner):
            halfstep.switch(m, o, r)
        (model(X) - Y).square().mean().backward()
        model.inner(2 * X).square().mean().backward()
        opt_inner.step()
        opt_head.step()
        found.append(gradients(model))
    assert_close(found[1], found[0], recipe, 6 * PER_LAYER)


def test_an_overflow_in_an_inner_models_optimizer_lowers_the_scale_in_use():
    model = Outer()
    opt_inner, opt_head = sgd(model.inner), sgd(model.head)
    halfstep.switch(model.inner, opt_inner, "fp16:initial=256")
    outer = halfstep.switch(model, opt_head, "fp16:initial=65536")
    for _ in range(20):
        model.zero_grad()
        (1e3 * (model(X) - Y)).sum().backward()
        if not torch.isfinite(model.inner[0].weight.grad).all():
            for p in model.head.parameters():  # as if only the inner gradients had overflowed
                p.grad = torch.zeros_like(p)
        opt_head.step()
        opt_inner.step()
        if not outer.last_step.nonfinite and torch.isfinite(model.inner[0].weight.grad).all():
            break
    assert outer.loss_scale < 65536.0
    assert torch.isfinite(model.inner[0].weight.grad).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_part_shared_by_two_switched_models(recipe):
    found = []
    for r in ("fp32", recipe):
        shared = mlp(outputs=6, seed=3)
        a, b = nn.Sequential(shared, mlp(seed=1)), nn.Sequential(shared, mlp(seed=2))
        opt_a, opt_b = sgd(a), sgd(b[1])
        halfstep.switch(a, opt_a, r)
        halfstep.switch(b, opt_b, r.replace("8192", "128"))
        ((a(X) - Y).square().mean() + (b(X) + Y).square().mean()).backward()
        shared(3 * X).square().mean().backward()
        found.append(
            {f"{n}{k}": v for n, m in (("a", a), ("b", b)) for k, v in gradients(m).items()}
        )
        opt_a.step()
        opt_b.step()
    assert_close(found[1], found[0], recipe, 6 * PER_LAYER)


def test_off_of_one_of_two_overlapping_switches_leaves_the_other_at_work():
    shared = mlp(outputs=6, seed=3)
    a, b = nn.Sequential(shared, mlp(seed=1)), nn.Sequential(shared, mlp(seed=2))
    plain = copy.deepcopy(b)
    first = halfstep.switch(a, sgd(a), "fp16:initial=64")
    halfstep.switch(b, sgd(b), "fp16:initial=128")
    first.off()
    (b(X) - Y).square().mean().backward()
    (plain(X) - Y).square().mean().backward()
    assert_close(gradients(b), gradients(plain), "fp16", 6 * PER_LAYER)
    assert not torch.equal(b(X), plain(X))
    expected = plain[1](X)
    assert torch.equal(a[1](X), mlp(seed=1)(X)), "the part that was a's alone is FP32 again"
    assert (b[1](X) - expected).norm() <= 3 * PER_LAYER * unit("fp16") * expected.norm()


def test_a_model_is_not_switched_twice():
    model = mlp()
    switch = halfstep.switch(model, sgd(model), "fp16")
    with pytest.raises(
        SwitchError, match=r"this Sequential is switched already, to fp16; call off\(\)"
    ):
        halfstep.switch(model, sgd(model), "bf16")
    switch.off()
    halfstep.switch(model, sgd(model), "bf16").off()


def test_a_switched_model_that_is_dropped_is_freed_and_its_kernels_go():
    gc.collect()
    halfstep.switch(mlp(), None, "bf16").off()
    before = len(engine._listeners), dict(overrides._installed)
    model = mlp()
    switch = halfstep.switch(model, sgd(model), "fp16")
    model(X).sum().backward()
    gone = weakref.ref(model)
    del model, switch
    gc.collect()
    assert gone() is None
    halfstep.switch(mlp(), None, "bf16").off()  # takes what was left
    assert (len(engine._listeners), dict(overrides._installed)) == before
