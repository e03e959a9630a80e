"""Steps that are more than one call: closures, LBFGS, optimizers that step inside the backward, threads."""

import math
import threading

import pytest
import torch

import halfstep
from against_fp32 import PER_LAYER, RECIPES, assert_close, batch, both, gradients, mlp, sgd
from halfstep.errors import NonFiniteError

X, Y = batch()


def mse(model, factor=1.0):
    return factor * (model(X) - Y).square().mean()


def weights(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_with_a_closure(recipe, keyword):
    def program(model, optimizer, switch):
        def closure():
            optimizer.zero_grad()
            loss = mse(model)
            loss.backward()
            return loss

        for _ in range(3):
            loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss.item() > 0
        return weights(model)

    wanted, got = both(program, recipe)
    assert_close(got, wanted, recipe)


def test_a_closure_that_overflows_is_evaluated_again_at_a_lower_scale():
    def program(model, optimizer, switch):
        calls = []

        def closure():
            optimizer.zero_grad()
            loss = mse(model, 4.0)
            loss.backward()
            calls.append(switch.loss_scale)
            return loss

        optimizer.step(closure)
        return weights(model), calls, switch

    def make(model):
        return sgd(model, lr=0.01, momentum=0.9)

    (wanted, _, _), (got, calls, switch) = both(program, f"fp16:initial={2**22}", optimizer=make)
    assert len(calls) >= 3
    assert calls == [2.0**22 / 2**k for k in range(len(calls))]
    assert switch.last_step.applied
    assert switch.skipped_steps == len(calls) - 1
    assert_close(got, wanted, "fp16")


def test_a_closure_that_does_not_zero_gradients_starts_again_from_what_was_there():
    def program(model, optimizer, switch):
        model.zero_grad()
        mse(model, 0.5).backward()

        def closure():
            loss = mse(model, 4.0)
            loss.backward()
            return loss

        if switch.plan.active:
            switch.load_state_dict({**switch.state_dict(), "scale": 2.0**22})
        optimizer.step(closure)
        return {**weights(model), **{f"grad {k}": g for k, g in gradients(model).items()}}

    wanted, got = both(program, "fp16:initial=64", optimizer=lambda m: sgd(m, lr=0.01))
    assert_close(got, wanted, "fp16")


def test_a_closure_at_the_floor_raises_and_changes_nothing():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    switch = halfstep.switch(model, optimizer, "fp16:initial=4")
    before = weights(model)

    def closure(factor=1e9):
        optimizer.zero_grad()
        loss = mse(model, factor)
        loss.backward()
        return loss

    with pytest.raises(NonFiniteError, match="loss scale 1, which is as low as it goes"):
        optimizer.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    assert not optimizer.state
    optimizer.step(lambda: closure(1.0))
    assert switch.last_step.applied


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search):
    def program(model, optimizer, switch):
        def closure():
            optimizer.zero_grad()
            loss = mse(model, 4.0)
            loss.backward()
            return loss

        start = closure().item()
        for _ in range(3):
            optimizer.step(closure)
        with torch.no_grad():
            return start, mse(model, 4.0).item(), switch

    def make(model):
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn=search)

    (start, wanted, _), (_, got, switch) = both(program, f"fp16:initial={2**22}", optimizer=make)
    assert wanted < 0.7 * start
    assert switch.skipped_steps >= 3
    assert math.isfinite(got)
    # Quasi-Newton paths part by more than the rounding: hold the descent, not the path.
    assert abs(got - wanted) < 0.1 * (start - wanted)


@pytest.mark.parametrize("recipe", [*RECIPES, "fp16:initial=65536,interval=1"])
def test_optimizers_that_step_inside_the_backward(recipe):
    """One optimizer a parameter, called by its gradient's arrival; the scale must not move meanwhile."""

    def program(model, optimizers, switch):
        by_parameter = dict(zip(model.parameters(), optimizers, strict=True))
        start = weights(model)

        def arrived(p):
            by_parameter[p].step()
            by_parameter[p].zero_grad()

        for p in model.parameters():
            p.register_hook(
                lambda g: g
            )  # lowered by itself: its gradient is not there with the others
            p.register_post_accumulate_grad_hook(arrived)
        for _ in range(4):
            mse(model, 0.01).backward()
        assert all(p.grad is None for p in model.parameters())
        return {k: v - start[k] for k, v in weights(model).items()}, switch.loss_scale

    def make(model):
        return [torch.optim.SGD([p], lr=0.5) for p in model.parameters()]

    (wanted, _), (got, scale) = both(program, recipe, optimizer=make)
    assert_close(got, wanted, "bf16" if recipe == "bf16" else "fp16")
    if "interval=1" in recipe:
        assert scale == 65536 * 2**4


def test_an_overflow_inside_the_backward_lowers_the_scale_once_and_after_it():
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    switch = halfstep.switch(model, list(optimizers.values()), "fp16:initial=1024")
    for p, optimizer in optimizers.items():
        p.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    model[2].weight.register_hook(lambda g: g.fill_(math.inf))
    before = weights(model)
    mse(model).backward()
    assert switch.loss_scale == 512.0
    assert switch.skipped_steps == 1
    changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert changed == set(before) - {"2.weight"}


def test_two_threads_train_side_by_side():
    """torch numbers graph nodes by thread: one thread's must not be taken for the other's."""
    results, errors = {}, []
    barrier = threading.Barrier(2, timeout=60)
    recipes = ("fp32", "fp16:initial=8192")
    # Made here: the two threads would draw their weights from one global generator.
    models = {recipe: mlp() for recipe in recipes}

    def train(recipe):
        try:
            model = models[recipe]
            optimizer = sgd(model, lr=0.05)
            switch = halfstep.switch(model, optimizer, recipe)
            for _ in range(20):
                barrier.wait()
                optimizer.zero_grad()
                mse(model).backward()
                optimizer.step()
            results[recipe] = weights(model), switch
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=train, args=(r,)) for r in recipes]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    wanted, got = results["fp32"][0], results["fp16:initial=8192"][0]
    assert_close(got, wanted, "fp16", 3 * PER_LAYER)
    for _, switch in results.values():
        switch.off()
