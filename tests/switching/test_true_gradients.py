"""``p.grad`` is the true FP32 gradient at any loss scale: what reads or changes it is as in FP32."""

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import PER_LAYER, RECIPES, assert_close, batch, both, gradients, mlp, sgd, unit

X, Y = batch()


def mse(model, factor=1.0):
    return factor * (model(X) - Y).square().mean()


@pytest.mark.parametrize("exponent", range(0, 21, 2))
def test_the_gradient_is_the_same_at_any_loss_scale(exponent):
    # 2^-8 of the loss: its gradient times 2^20 stays below 65504.
    def program(model, optimizer, switch):
        mse(model, 2.0**-8).backward()
        return gradients(model)

    wanted, got = both(program, f"fp16:initial={2**exponent}")
    if (
        exponent >= 8
    ):  # below, they are among FP16's subnormals, which have fewer bits: the next test
        assert_close(got, wanted, "fp16")
    else:
        small = 2.0**-25 / 2.0**exponent  # half the distance of subnormals, unscaled
        for name in wanted:
            bound = 3 * PER_LAYER * (unit("fp16") * wanted[name].norm() + small * X.numel() ** 0.5)
            assert (got[name] - wanted[name]).norm() <= bound, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_inf_and_nan_apart_every_gradient_is_fp32(recipe):
    def program(model, optimizer, switch):
        mse(model).backward()
        return gradients(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)
    assert all(not torch.equal(got[k], wanted[k]) for k in got), "nothing was rounded"


@pytest.mark.parametrize("recipe", RECIPES)
def test_clipping_by_norm(recipe):
    def program(model, optimizer, switch):
        mse(model, 10.0).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5, "nothing was clipped"
        return {"norm": norm, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_clipping_by_value(recipe):
    limit = 0.05

    def program(model, optimizer, switch):
        mse(model, 10.0).backward()
        nn.utils.clip_grad_value_(model.parameters(), limit)
        return gradients(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)
    clipped = {k: (v.abs() == limit) for k, v in got.items()}
    assert any(c.any() for c in clipped.values())
    assert max(v.abs().max() for v in got.values()) <= limit


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_l2_penalty_on_the_parameters_in_the_loss(recipe):
    def program(model, optimizer, switch):
        penalty = sum(p.square().sum() for p in model.parameters())
        (mse(model) + 3.0 * penalty).backward()
        return gradients(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_l2_penalty_taken_inside_forward_reads_the_masters(recipe):
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x), 3.0 * sum(p.square().sum() for p in self.parameters())

    def program(model, optimizer, switch):
        out, penalty = model(X)
        ((out - Y).square().mean() + penalty).backward()
        return gradients(model)

    wanted, got = both(program, recipe, Penalised)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_decay_momentum_and_schedule_over_many_steps(recipe):
    def program(model, optimizer, switch):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        for _ in range(10):
            optimizer.zero_grad()
            mse(model).backward()
            optimizer.step()
            schedule.step()
        return {k: p.detach() for k, p in model.named_parameters()}

    def optimizer(model):
        return sgd(model, 0.05, momentum=0.9, weight_decay=0.01)

    wanted, got = both(program, recipe, optimizer=optimizer)
    # The updates are off by the gradient's error; the weights moved by about themselves at most.
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_hooks_on_parameters_see_and_change_true_gradients(recipe):
    def program(model, optimizer, switch):
        seen = {}
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name: seen.__setitem__(name, g.clone()) or 2.0 * g)
        mse(model).backward()
        return {**{f"seen {k}": v for k, v in seen.items()}, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_autograd_grad_and_backward_with_inputs(recipe):
    def program(model, optimizer, switch):
        last = list(model.parameters())[-2:]
        grads = torch.autograd.grad(mse(model), list(model.parameters()))
        mse(model).backward(inputs=last)
        assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 2
        return {**{f"grad {k}": g for k, g in enumerate(grads)}, **gradients(model)}

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_parameters_have_no_gradient_and_do_not_move(recipe):
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
        return model

    def program(model, optimizer, switch):
        mse(model).backward()
        assert [k for k, p in model.named_parameters() if p.grad is None] == [
            "0.weight",
            "0.bias",
            "2.bias",
        ]
        return gradients(model)

    wanted, got = both(program, recipe, make)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_freezing_and_thawing_between_steps(recipe):
    def program(model, optimizer, switch):
        seen = {}
        for turn, frozen in enumerate([True, False, True]):
            model[2].requires_grad_(not frozen)
            model.zero_grad()
            mse(model).backward()
            assert (model[2].weight.grad is None) == frozen
            seen |= {f"{turn} {k}": v.clone() for k, v in gradients(model).items()}
        return seen

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_parameter_that_forward_does_not_use_keeps_no_gradient_and_fires_no_hook(recipe):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.unused = nn.Linear(6, 4)

        def forward(self, x):
            return self.net(x)

    def program(model, optimizer, switch):
        fired = []
        model.unused.weight.register_hook(lambda g: fired.append(g.shape))
        model.unused.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.shape))
        mse(model).backward()
        assert model.unused.weight.grad is None
        assert not fired
        return gradients(model)

    wanted, got = both(program, recipe, Half)
    assert_close(got, wanted, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_parameter_group_added_later(recipe):
    def program(model, optimizer, switch):
        seen = {}
        head = model[4].weight.detach().clone()
        for turn in range(2):
            optimizer.zero_grad()
            model.zero_grad()
            mse(model).backward()
            optimizer.step()
            seen |= {f"{turn} {k}": p.detach().clone() for k, p in model.named_parameters()}
            assert torch.equal(model[4].weight, head) == (turn == 0)
            if turn == 0:
                optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.5})
        return seen

    wanted, got = both(program, recipe, optimizer=lambda m: sgd(m[:4]))
    assert_close(got, wanted, recipe)


def test_an_overflow_in_a_group_added_later_is_seen():
    model = mlp()
    optimizer = sgd(model[:4])
    switch = halfstep.switch(model, optimizer, "fp16:initial=65536")
    optimizer.add_param_group({"params": list(model[4].parameters())})
    mse(model).backward()
    model[4].bias.grad[1] = float("inf")
    optimizer.step()
    assert not switch.last_step.applied
    assert switch.last_step.nonfinite == {"4.bias": 1}


@pytest.mark.parametrize("recipe", RECIPES)
def test_sparse_gradients_of_an_embedding(recipe):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(20, 8, sparse=True)
            self.net = mlp(inputs=8)

        def forward(self, x):
            return self.net(self.table(x))

    def optimizers(model):
        return [torch.optim.SparseAdam(model.table.parameters()), sgd(model.net)]

    def program(model, optimizer, switch):
        words = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
        (model(words) - Y).square().mean().backward()
        assert model.table.weight.grad.is_sparse
        grads = gradients(model)
        grads["table.weight"] = grads["table.weight"].to_dense()
        before = model.table.weight.detach().clone()
        if switch.plan.active:
            model.table.weight.grad._values()[0, 0] = torch.nan
            if switch.loss_scale > 1.0:  # at 1 it would be an error
                optimizer[0].step()
                assert switch.last_step.nonfinite == {"table.weight": 1}
            assert torch.equal(model.table.weight, before)
        return grads

    wanted, got = both(program, recipe, Words, optimizers)
    assert_close(got, wanted, recipe)
