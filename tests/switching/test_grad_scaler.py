"""``halfstep.GradScaler`` held to what torch's own device-generic tests check of torch's, written anew."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import halfstep
from halfstep.errors import NonFiniteError, OperandError, SwitchError
from halfstep.switching import StepReason

KINDS = {"torch": torch.amp.GradScaler, "halfstep": halfstep.GradScaler}


@pytest.fixture(params=KINDS)
def scaler_kind(request):
    return KINDS[request.param]


def pair(**options):
    """Two equal models, an optimizer of each, batches; the control and the scaled one."""
    torch.manual_seed(0)
    control = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    scaled = copy.deepcopy(control)
    data = [(torch.randn(8, 8), torch.randn(8, 8)) for _ in range(4)]
    made = [
        options.get("optimizer", SGD)(m.parameters(), lr=1.0, **options.get("settings", {}))
        for m in (control, scaled)
    ]
    return control, scaled, *made, data


def run_case(scaler_kind, run, unskipped, skipped, atol=1e-7, **options):
    """`run` under a scaler that is on and one that is off; one batch is made to overflow.

    The scale is 128 * growth^unskipped * backoff^skipped, and the weights are the same.
    """
    for enabled in (True, False):
        control, scaled, of_control, of_scaled, data = pair(**options)
        scaler = scaler_kind(
            "cpu", init_scale=128.0, growth_factor=2.0, growth_interval=1, enabled=enabled
        )
        run(control, of_control, data, scaler, bad=2, use=False)
        run(scaled, of_scaled, data, scaler, bad=2, use=True)
        if enabled:
            assert scaler.get_scale() == 128.0 * 2.0**unskipped * 0.5**skipped
        else:
            assert scaler.get_scale() == 1.0
        for c, s in zip(control.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(c, s, rtol=1e-5, atol=atol)


def mse(model, x, y):
    return (model(x) - y).square().mean()


def spoil(model):
    model[1].weight.grad.fill_(math.inf)


def loop(between=lambda model, optimizer, scaler, use: None):
    def run(model, optimizer, data, scaler, bad, use):
        for k, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            if not use:
                loss.backward()
                between(model, optimizer, scaler, use)
                if k != bad or not scaler.is_enabled():
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if k == bad and scaler.is_enabled():
                spoil(model)
            between(model, optimizer, scaler, use)
            scaler.step(optimizer)
            scaler.update()

    return run


OPTIMIZERS = {
    "SGD": {"optimizer": SGD},
    "SGD foreach": {"optimizer": SGD, "settings": {"foreach": True}},
    "SGD fused": {"optimizer": SGD, "settings": {"fused": True}},
    "Adam": {"optimizer": Adam, "atol": 1e-3},
    "AdamW fused": {"optimizer": AdamW, "settings": {"fused": True}, "atol": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_training_is_plain_training(scaler_kind, name):
    run_case(scaler_kind, loop(), 3, 1, **OPTIMIZERS[name])


def test_clipping_while_scaled(scaler_kind):
    def clip(model, optimizer, scaler, use):
        limit = 0.2 * (scaler.get_scale() if use else 1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    # a norm of inf turns clipped gradients to 0 and NaN: still found
    run_case(scaler_kind, loop(clip), 3, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD", "SGD fused"])
def test_clipping_after_unscaling(scaler_kind, name):
    def clip(model, optimizer, scaler, use):
        if use:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)

    run_case(scaler_kind, loop(clip), 3, 1, **OPTIMIZERS[name])


def test_gradient_penalty(scaler_kind):
    def run(model, optimizer, data, scaler, bad, use):
        for k, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            root = scaler.scale(loss) if use else loss
            grads = torch.autograd.grad(root, list(model.parameters()), create_graph=True)
            factor = 1.0 / scaler.get_scale() if use else 1.0
            norm = sum((g * factor).square().sum() for g in grads).sqrt()
            total = loss + norm
            if use:
                scaler.scale(total).backward()
                if k == bad and scaler.is_enabled():
                    spoil(model)
                scaler.step(optimizer)
                scaler.update()
            else:
                total.backward()
                if k != bad or not scaler.is_enabled():
                    optimizer.step()

    run_case(scaler_kind, run, 3, 1, atol=1e-5)


def test_accumulation(scaler_kind):
    def run(model, optimizer, data, scaler, bad, use):
        for k, (x, y) in enumerate(data):
            loss = mse(model, x, y) / 2
            (scaler.scale(loss) if use else loss).backward()
            if k % 2 == 1:
                if use:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()

    run_case(scaler_kind, run, 2, 0)


def test_two_models_two_optimizers_two_losses(scaler_kind):
    for enabled in (True, False):
        worlds = []
        for use in (False, True):
            torch.manual_seed(1)
            models = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)]
            optimizers = [SGD(m.parameters(), lr=1.0) for m in models]
            data = [(torch.randn(8, 8), torch.randn(8, 8)) for _ in range(4)]
            scaler = scaler_kind("cpu", init_scale=128.0, growth_interval=1, enabled=enabled)
            for k, (x, y) in enumerate(data):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                a, b = (m(x) for m in models)
                losses = [(a + 2 * b - y).square().mean(), (0.6 * a - b - y).square().mean()]
                for n, loss in enumerate(losses):
                    root = scaler.scale(loss) if use else loss
                    root.backward(retain_graph=n == 0)
                if use:
                    if k == 2 and enabled:
                        spoil(models[0])
                    scaler.unscale_(optimizers[0])
                    for optimizer in optimizers:
                        scaler.step(optimizer)
                    scaler.update()
                else:
                    for n, optimizer in enumerate(optimizers):
                        if not (k == 2 and n == 0 and enabled):
                            optimizer.step()
            worlds.append([p for m in models for p in m.parameters()])
        assert scaler.get_scale() == (128.0 * 2**3 * 0.5 if enabled else 1.0)
        for c, s in zip(*worlds, strict=True):
            torch.testing.assert_close(c, s, rtol=1e-5, atol=1e-6)


def test_scale_takes_nested_iterables(scaler_kind):
    scaler = scaler_kind("cpu", init_scale=2.0)
    one = torch.full((1,), 4.0)
    assert scaler.scale(one) == 8
    out = scaler.scale([one, (one, [one])])
    assert isinstance(out, list)
    assert isinstance(out[1], tuple)
    assert [out[0].item(), out[1][0].item(), out[1][1][0].item()] == [8, 8, 8]
    assert [t.item() for t in scaler.scale(t for t in (one, one))] == [8, 8]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_sparse_gradients(scaler_kind, value):
    def scaler_and(values):
        scaler = scaler_kind("cpu", init_scale=128.0)
        scaler.scale(torch.ones(()))
        p = nn.Parameter(torch.zeros(2, 10))
        p.grad = torch.sparse_coo_tensor(
            [[0, 1, 1], [2, 0, 2]], values, (2, 10), check_invariants=True
        )
        return scaler, p, SGD([p], lr=1.0)

    scaler, p, optimizer = scaler_and([16.0, 32.0, 64.0])
    scaler.unscale_(optimizer)
    assert torch.equal(p.grad._values(), torch.tensor([16.0, 32.0, 64.0]) / 128)
    scaler.step(optimizer)
    scaler.update()
    assert p[1, 2] == -0.5
    scaler, p, optimizer = scaler_and([16.0, value, 64.0])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 64
    assert not p.any()


def test_state_round_trips(scaler_kind):
    first = scaler_kind(
        "cpu", init_scale=3.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=2
    )
    second = scaler_kind(
        "cpu", init_scale=6.0, growth_factor=7.0, backoff_factor=0.8, growth_interval=1
    )
    second.load_state_dict(first.state_dict())
    assert second.get_scale() == 3.0
    assert second.state_dict() == first.state_dict()
    second.scale(torch.ones(()))
    second.load_state_dict({**first.state_dict(), "_growth_tracker": 1})
    assert second.state_dict()["_growth_tracker"] == 1
    assert set(first.state_dict()) == {
        "scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker",
    }  # fmt: skip


def test_the_disabled(scaler_kind):
    scaler = scaler_kind("cpu", enabled=False)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    assert (scaler.state_dict(), scaler.get_scale(), scaler.is_enabled()) == ({}, 1.0, False)
    scaler.load_state_dict({"anything": 1})
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([math.inf])
    optimizer = SGD([weight], lr=1.0)
    scaler.unscale_(optimizer)
    assert scaler.step(optimizer, closure=lambda: 5.0) == 5.0
    scaler.update()
    assert weight == -math.inf, "torch's contract: a scaler that is off is not there"


@pytest.mark.parametrize("lazy", [True, False])
def test_pickle(scaler_kind, lazy):
    scaler = scaler_kind("cpu", init_scale=3.0, growth_factor=4.0, growth_interval=2)
    if not lazy:
        scaler.scale(torch.ones(()))
    again = pickle.loads(pickle.dumps(scaler))
    assert again.state_dict() == scaler.state_dict()
    assert again.scale(torch.ones(())) == 3.0


def test_misuse_is_torchs(scaler_kind):
    scaler = scaler_kind("cpu")
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    with pytest.raises(AssertionError):
        scaler.step(optimizer)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called on this optimizer"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(AssertionError):
        scaler.update()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 1.0)
    with pytest.raises(RuntimeError, match="source state dict is empty"):
        scaler.load_state_dict({})
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(SGD([weight], lr=1.0))


def test_the_scale_is_set_by_hand(scaler_kind):
    scaler = scaler_kind("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.update(16.0)
    assert scaler.get_scale() == 16
    scaler.update(torch.tensor(32.0))
    assert scaler.get_scale() == 32


def test_the_scale_does_not_overflow(scaler_kind):
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=0.0)
    scaler = scaler_kind("cpu", init_scale=2.0**126, growth_interval=1)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * 2.0**-100).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**127


# -- what is ours -------------------------------------------------------------------------------------


def one():
    weight = nn.Parameter(torch.ones(2))
    return weight, SGD([weight], lr=0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_is_reported(fused):
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.5, fused=fused)
    scaler = halfstep.GradScaler("cpu", init_scale=8.0)
    assert scaler.last_step.reason is StepReason.NONE_YET
    for bad in (False, True):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if bad:
            weight.grad[1] = math.inf
        assert scaler.step(optimizer) is None
        scaler.update()
    report = scaler.last_step
    assert (report.applied, report.reason) == (False, StepReason.OVERFLOW)
    assert (report.loss_scale, report.step, report.skipped_steps) == (8.0, 2, 1)
    assert report.nonfinite == {"parameter 0 of group 0 of SGD": 1}
    assert scaler.get_scale() == 4
    assert weight.tolist() == [0.5, 0.5]


def test_at_the_floor_an_overflow_is_an_error_and_the_loop_may_go_on():
    weight, optimizer = one()
    scaler = halfstep.GradScaler("cpu", init_scale=8.0, min_loss_scale=4.0)
    for error in (False, True, True):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        weight.grad[1] = math.nan
        if error:
            with pytest.raises(NonFiniteError, match="not finite at loss scale 4, which is as low"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step.applied
    assert weight.tolist() == [0.5, 0.5]


def test_a_loss_that_is_not_finite_does_not_lower_the_scale():
    weight, optimizer = one()
    scaler = halfstep.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * math.nan).sum()).backward()
    with pytest.raises(NonFiniteError, match=r"the loss itself is not finite \(nan\)"):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("fused", [False, True])
def test_what_goes_bad_between_unscaling_and_the_step_does_not_reach_the_weights(fused):
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.5, fused=fused)
    scaler = halfstep.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    weight.grad.fill_(math.inf)
    with pytest.raises(NonFiniteError, match=r"parameter 0 of group 0 of SGD\. Something between"):
        scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.0, 1.0]
    assert scaler.get_scale() == 8


def test_what_was_bad_when_unscaled_is_an_overflow_even_if_it_is_mended():
    weight, optimizer = one()
    scaler = halfstep.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    weight.grad[0] = math.inf
    scaler.unscale_(optimizer)
    weight.grad.nan_to_num_(0.0, 0.0, 0.0)
    scaler.step(optimizer)
    scaler.update()
    assert not scaler.last_step.applied
    assert scaler.get_scale() == 4


@pytest.mark.comparison
@pytest.mark.parametrize("fused", [False, True])
def test_torch_lets_it_reach_them(fused):
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    weight.grad.fill_(math.inf)
    scaler.step(optimizer)
    assert weight.isinf().all()


def test_states_of_torch_and_of_a_switch_are_loaded():
    theirs = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=7)
    scaler = halfstep.GradScaler("cpu")
    scaler.load_state_dict(theirs.state_dict())
    assert scaler.state_dict() == theirs.state_dict()
    theirs.load_state_dict(halfstep.GradScaler("cpu", 64.0).state_dict())
    assert theirs.get_scale() == 64
    model = nn.Linear(2, 2)
    switch = halfstep.switch(model, SGD(model.parameters()), "fp16:initial=32")
    scaler.load_state_dict(switch.state_dict())
    assert scaler.get_scale() == 32
    switch.load_state_dict({**scaler.state_dict(), "scale": 16.0})
    assert switch.loss_scale == 16
    scaler.load_state_dict({"scale": 2.0**-30})
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict()["growth_interval"] == 2000
    for scale in (0.0, math.nan, math.inf):
        with pytest.raises(SwitchError, match="in the state is not finite and above 0"):
            scaler.load_state_dict({"scale": scale})


@pytest.mark.parametrize("floor", [0.0, -1.0, 2.0**17, math.nan])
def test_a_floor_that_cannot_be(floor):
    with pytest.raises(
        OperandError, match=r"min_loss_scale=.* must be above 0 and at most init_scale"
    ):
        halfstep.GradScaler("cpu", min_loss_scale=floor)
