"""Who asks is told of each step; what follows steps does not follow a skipped one."""

import copy

import pytest
import torch

import halfstep
from against_fp32 import batch, mlp, sgd
from halfstep.errors import OperandError
from halfstep.switching import StepReason, log_to, on_applied

X, Y = batch()


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    (factor * (model(X) - Y).square().mean()).backward()
    optimizer.step()


def switched(recipe="fp16:initial=256"):
    model = mlp()
    optimizer = sgd(model, lr=1e-3)
    return model, optimizer, halfstep.switch(model, optimizer, recipe)


FACTORS = (1.0, 1e9, 1.0, 1e9, 1e9, 1.0)


def test_a_callback_is_told_of_each_step_and_of_none_after_remove():
    model, optimizer, switch = switched()
    seen, more = [], []
    handle = switch.on_step(seen.append)
    switch.on_step(lambda report: more.append((report, switch.loss_scale)))
    assert (switch.last_step.step, switch.last_step.reason) == (0, StepReason.NONE_YET)
    for factor in FACTORS:
        step(model, optimizer, factor)
        assert seen[-1] is switch.last_step
    assert [(r.step, r.applied, r.loss_scale, r.skipped_steps) for r in seen] == [
        (1, True, 256, 0),
        (2, False, 256, 1),
        (3, True, 128, 1),
        (4, False, 128, 2),
        (5, False, 64, 3),
        (6, True, 32, 3),
    ]
    assert (switch.steps, switch.skipped_steps, switch.was_step_applied()) == (6, 3, True)
    assert [scale for _, scale in more] == [256, 128, 128, 64, 32, 32], (
        "the scale has moved by then"
    )
    handle.remove()
    handle.remove()
    step(model, optimizer)
    assert len(seen) == 6
    assert len(more) == 7


def test_a_callback_may_end_itself_and_another():
    model, optimizer, switch = switched()
    calls = []

    def first(report):
        calls.append("first")
        mine.remove()
        other.remove()

    mine = switch.on_step(first)
    other = switch.on_step(lambda report: calls.append("other"))
    switch.on_step(lambda report: calls.append("last"))
    step(model, optimizer)
    step(model, optimizer)
    assert calls == ["first", "last", "last"]


def test_a_callback_that_raises_has_its_error_seen_and_the_step_is_whole():
    model, optimizer, switch = switched()

    def fail(report):
        raise OSError("disk full")

    handle = switch.on_step(fail)
    before = model[0].weight.detach().clone()
    with pytest.raises(OSError, match="disk full"):
        step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    handle.remove()
    step(model, optimizer, 1e9)
    assert switch.skipped_steps == 1


def test_bf16_reports_too():
    model, optimizer, switch = switched("bf16")
    seen = []
    switch.on_step(seen.append)
    step(model, optimizer)
    assert [(r.applied, r.loss_scale, r.step) for r in seen] == [(True, 1.0, 1)]


@pytest.mark.parametrize("wrong", [None, 3, "loss"])
def test_what_is_no_callback(wrong):
    _, _, switch = switched()
    with pytest.raises(OperandError, match="on_step takes a function of a StepReport, not a"):
        switch.on_step(wrong)
    with pytest.raises(OperandError, match="log_to takes an object with add_scalar or a function"):
        log_to(wrong)


LOGGED = [(256, 0), (256, 1), (128, 1), (128, 2), (64, 3), (32, 3)]


def test_a_writer_with_add_scalar():
    class Board:
        def __init__(self):
            self.rows = []

        def add_scalar(self, tag, scalar_value, global_step):
            self.rows.append((tag, scalar_value, global_step))

    model, optimizer, switch = switched()
    board = Board()
    switch.on_step(log_to(board))
    for factor in FACTORS:
        step(model, optimizer, factor)
    assert board.rows == [
        row
        for k, (scale, skipped) in enumerate(LOGGED, 1)
        for row in (("amp/loss_scale", scale, k), ("amp/skipped_steps", skipped, k))
    ]


def test_a_function_of_a_dict_and_a_step():
    model, optimizer, switch = switched()
    rows = []
    switch.on_step(log_to(lambda values, step: rows.append((step, values))))
    for factor in FACTORS:
        step(model, optimizer, factor)
    assert rows == [
        (k, {"amp/loss_scale": scale, "amp/skipped_steps": skipped})
        for k, (scale, skipped) in enumerate(LOGGED, 1)
    ]


def test_an_average_follows_applied_steps_only():
    model, optimizer, switch = switched()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    switch.on_step(on_applied(lambda: averaged.update_parameters(model)))
    for factor in FACTORS:
        step(model, optimizer, factor)
    assert int(averaged.n_averaged) == FACTORS.count(1.0)


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        ],
        [2],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_paced_scheduler_waits_at_skipped_steps(name):
    def rates(factors, paced):
        model, optimizer, switch = switched()
        scheduler = SCHEDULERS[name](optimizer)
        kind = type(scheduler)
        if paced:
            handle = switch.pace(scheduler)
            assert isinstance(scheduler, kind)
        seen = []
        for factor in factors:
            step(model, optimizer, factor)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            if switch.was_step_applied():
                seen.append(optimizer.param_groups[0]["lr"])
        state = scheduler.state_dict()
        if paced:
            assert state.keys() == SCHEDULERS[name](sgd(mlp())).state_dict().keys()
            copy.deepcopy(state)
            handle.remove()
            assert type(scheduler) is kind
        return seen, scheduler.state_dict()

    with_skips, state = rates(FACTORS, paced=True)
    without, wanted = rates([1.0] * 3, paced=False)
    assert with_skips == without
    if name != "SequentialLR":  # its state holds schedulers' private copies
        assert state == wanted
    # and without it the schedule runs ahead
    assert rates(FACTORS, paced=False)[0] != without


def test_each_scheduler_goes_by_its_own_optimizer():
    model = mlp()
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[k::2], lr=1.0) for k in range(2)]
    switch = halfstep.switch(model, optimizers, "fp16:initial=256")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    for scheduler in schedulers:
        switch.pace(scheduler)
    (model(X) - Y).square().mean().backward()
    parameters[1].grad[0] = torch.inf
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        optimizer.step()
        scheduler.step()
    assert [s.get_last_lr() for s in schedulers] == [[0.5], [1.0]]


def test_only_schedulers_of_the_switchs_optimizers_are_paced():
    model, _, switch = switched()
    other = torch.optim.lr_scheduler.ExponentialLR(sgd(model), 0.5)
    for wrong in (other, None, 3):
        with pytest.raises(OperandError, match="pace takes a scheduler of one of the switch's"):
            switch.pace(wrong)


def test_a_deferred_outcome_is_asked_for_by_the_scheduler(monkeypatch):
    from halfstep.switching import guard

    monkeypatch.setattr(guard.Guard, "_on_device", lambda self: True)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, lr=1.0)
    switch = halfstep.switch(model, optimizer, "fp16:initial=256")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    switch.pace(scheduler)
    for factor, lr in ((1.0, 0.5), (1e9, 0.5), (1.0, 0.25)):
        optimizer.zero_grad()
        (factor * model(torch.ones(1, 4))).sum().backward()
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [lr]
