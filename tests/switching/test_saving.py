"""`Switch.save` and `Switch.resume`: the run goes on bit for bit; what does not fit is named."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import batch, sgd
from halfstep.errors import CheckpointError, SwitchError

SCRIPT = Path(__file__).parent / "scripts" / "killed.py"
X, Y = batch()


def kill(times, seed, folder):
    done = subprocess.run(
        [sys.executable, SCRIPT, str(times), str(seed), folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_five_times_it_has_the_losses_of_an_uninterrupted_run(tmp_path):
    assert kill(5, 0, tmp_path).startswith("5 kills")


@pytest.mark.slow
def test_killed_at_two_hundred_random_points(tmp_path):
    assert kill(200, 1, tmp_path).startswith("200 kills")


def make(seed=0, width=16, recipe="fp16:initial=1024,interval=3", optimizer=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 4)
    )
    stepper = optimizer(model.parameters(), lr=0.01)
    return model, stepper, halfstep.switch(model, stepper, recipe)


def advance(model, optimizer, steps=4):
    losses = []
    for _ in range(steps):
        noise = torch.randn(X.shape) * random.random() + np.random.rand()
        loss = (model(X + noise) - Y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model, optimizer, switch):
    state = optimizer.state_dict()
    tensors = [t for of in state["state"].values() for t in of.values()]
    return [*model.state_dict().values(), *tensors], state["param_groups"], switch.state_dict()


def assert_same(a, b):
    assert all(map(torch.equal, a[0], b[0]))
    assert a[1:] == b[1:]


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        ("fp32", torch.optim.Adagrad),
        ("bf16", torch.optim.AdamW),
        ("fp16:initial=1024,interval=3", torch.optim.AdamW),
        ("fp16:initial=1024,interval=3", torch.optim.NAdam),
        ("fp16-nomaster", torch.optim.AdamW),
        ("fp16-naive", torch.optim.SGD),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path, recipe, optimizer):
    model, stepper, switch = make(recipe=recipe, optimizer=optimizer)
    advance(model, stepper)
    switch.save(tmp_path / "run.pt", epoch=3)
    wanted, then = advance(model, stepper), everything(model, stepper, switch)
    model, stepper, switch = make(seed=5, recipe=recipe, optimizer=optimizer)
    resumed = switch.resume(tmp_path / "run.pt")
    assert (resumed.more, resumed.missing, resumed.unexpected) == ({"epoch": 3}, (), ())
    assert advance(model, stepper) == wanted
    assert_same(everything(model, stepper, switch), then)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3, 5]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_schedulers_are_saved_by_their_state(tmp_path, schedule):
    model, stepper, switch = make()
    scheduler = schedule(stepper)
    given = (torch.tensor(1.0).item(),) if "Plateau" in type(scheduler).__name__ else ()
    for _ in range(3):
        advance(model, stepper, 1)
        scheduler.step(*given)
    switch.save(tmp_path / "run.pt", scheduler=scheduler)
    rates = []
    for _ in range(4):
        advance(model, stepper, 1)
        scheduler.step(*given)
        rates.append(stepper.param_groups[0]["lr"])
    model, stepper, switch = make(seed=5)
    scheduler = schedule(stepper)
    switch.resume(tmp_path / "run.pt", scheduler=scheduler)
    for rate in rates:
        advance(model, stepper, 1)
        scheduler.step(*given)
        assert stepper.param_groups[0]["lr"] == rate


def test_an_interrupted_save_changes_nothing(tmp_path):
    *_, switch = make()
    switch.save(tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"content\['more'\]\['loader'\] is a builtins.range"):
        switch.save(tmp_path / "run.pt", loader=range(3))
    switch.resume(tmp_path / "run.pt")


# -- what does not fit ------------------------------------------------------------------------------------


def test_other_shapes_are_named_and_nothing_is_changed(tmp_path):
    *_, switch = make(width=8)
    switch.save(tmp_path / "run.pt")
    model, stepper, switch = make(seed=1)
    advance(model, stepper)
    before, numbers = everything(model, stepper, switch), torch.get_rng_state()
    for partial in (False, True):
        with pytest.raises(CheckpointError) as caught:
            switch.resume(tmp_path / "run.pt", partial=partial)
        assert "0.weight is (8, 6) in the checkpoint and (16, 6) in the model; 0.bias" in str(
            caught.value
        )
    assert_same(everything(model, stepper, switch), before)
    assert torch.equal(torch.get_rng_state(), numbers)


class Grown(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(3, 3))


def grown(*names):
    model = Grown(*names)
    optimizer = sgd(model, momentum=0.9)
    switch = halfstep.switch(model, optimizer, "fp32")
    sum((p * p).sum() for p in model.parameters()).backward()
    optimizer.step()
    return model, optimizer, switch


def test_missing_and_unexpected_keys_are_an_error_or_reported(tmp_path):
    old, old_optimizer, switch = grown("a", "b")
    switch.save(tmp_path / "run.pt", epoch=2)
    model, optimizer, switch = grown("b", "c")
    kept = model.c.weight.detach().clone()
    with pytest.raises(CheckpointError) as caught:
        switch.resume(tmp_path / "run.pt")
    assert (
        "does not fit: missing model c.weight, model c.bias, optimizer 0 c.weight, optimizer 0 c.bias. "
        "unexpected model a.weight, model a.bias, optimizer 0 a.weight, optimizer 0 a.bias. "
        "resume(path, partial=True) takes what fits"
    ) in str(caught.value)
    resumed = switch.resume(tmp_path / "run.pt", partial=True)
    assert resumed.missing[0] == "model c.weight"
    assert resumed.unexpected[-1] == "optimizer 0 a.bias"
    assert torch.equal(model.b.weight, old.b.weight)
    assert torch.equal(model.c.weight, kept)
    momentum = [
        o.state[m.b.weight]["momentum_buffer"]
        for o, m in ((optimizer, model), (old_optimizer, old))
    ]
    assert torch.equal(*momentum), (
        "by name: it is the first parameter of one and the third of the other"
    )
    optimizer.step()


def test_a_scheduler_that_was_not_saved_is_missing(tmp_path):
    _, stepper, switch = make()
    switch.save(tmp_path / "run.pt")
    scheduler = torch.optim.lr_scheduler.StepLR(stepper, 2)
    with pytest.raises(CheckpointError, match=r"does not fit: missing scheduler\. resume"):
        switch.resume(tmp_path / "run.pt", scheduler=scheduler)


def test_another_optimizer_is_refused(tmp_path):
    *_, switch = make()
    switch.save(tmp_path / "run.pt")
    *_, other = make(optimizer=torch.optim.SGD)
    with pytest.raises(CheckpointError, match="optimizer 0 was a AdamW, the switch has a SGD"):
        other.resume(tmp_path / "run.pt")
    none = halfstep.switch(nn.Linear(6, 4), None, "fp32")
    with pytest.raises(CheckpointError, match="holds 1 optimizers, the switch has 0"):
        none.resume(tmp_path / "run.pt", partial=True)


def test_another_recipe_is_refused_and_nothing_is_changed(tmp_path):
    *_, switch = make(recipe="bf16")
    switch.save(tmp_path / "run.pt")
    model, stepper, switch = make(seed=3)
    before = everything(model, stepper, switch)
    with pytest.raises(SwitchError, match="recipe"):
        switch.resume(tmp_path / "run.pt")
    assert_same(everything(model, stepper, switch), before)


def test_keys_are_the_models_own_under_a_wrapper(tmp_path):
    model, stepper, switch = make(recipe="fp32")
    switch.save(tmp_path / "run.pt")
    switch.off()
    compiled = torch.compile(model, backend="eager")
    halfstep.switch(compiled, stepper, "fp32").resume(tmp_path / "run.pt")
