"""Models are found when they are called: which are switched, when, with which optimizers."""

from __future__ import annotations

import copy
import gc
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfstep.errors import SwitchError
from halfstep.recipe import Recipe
from halfstep.switching.launcher import Launcher


@pytest.fixture
def launch():
    launched = []

    def make(recipe="fp16"):
        launcher = Launcher(Recipe.parse(recipe))
        launcher.install()
        launched.append(launcher)
        return launcher

    original = nn.Module._call_impl, torch.optim.Optimizer.add_param_group
    yield make
    for launcher in launched:
        launcher.remove()
    assert (nn.Module._call_impl, torch.optim.Optimizer.add_param_group) == original


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Seen(nn.Module):
    """Notes the dtype that its layer works in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dtypes = []

    def forward(self, x):
        x = self.layer(x)
        self.dtypes.append(x.dtype)
        return x


def sgd(*models):
    return torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1)


def train(model, optimizer, x=None):
    loss = model(torch.ones(3, 4) if x is None else x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def names(launcher):
    return [model.name for model in launcher.summary().models]


def test_the_model_of_an_optimizer_is_switched_at_its_first_call(launch):
    launcher = launch()
    model = Seen()
    optimizer = sgd(model)
    for _ in range(3):
        train(model, optimizer)
    assert model.dtypes == [torch.float16] * 3
    (run,) = launcher.summary().models
    assert (run.name, run.optimizers, run.steps, run.skipped) == ("Seen", ("SGD",), 3, 0)
    assert run.scales == ((1, 65536.0),)
    assert launcher.summary().backwards == 3


def test_the_weights_are_those_of_the_switch_by_hand(launch):
    import halfstep

    def trained():
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer

    model, optimizer = trained()
    halfstep.switch(model, optimizer, recipe="fp16")
    by_hand = [train(model, optimizer) for _ in range(5)]
    launch()
    model, optimizer = trained()
    assert [train(model, optimizer) for _ in range(5)] == by_hand


def test_a_model_that_is_evaluated_first_is_switched_then(launch):
    launcher = launch()
    model = Seen()
    optimizer = sgd(model)
    with torch.no_grad():
        model(torch.ones(3, 4))
    assert model.dtypes == [torch.float16]
    train(model, optimizer)
    assert launcher.summary().models[0].steps == 1


def test_an_optimizer_made_after_the_first_call_gets_its_loss_scale(launch):
    launcher = launch()
    model = net()
    model(torch.ones(3, 4)).sum().backward()
    assert launcher.summary().models[0].optimizers == ()
    model.zero_grad()
    optimizer = sgd(model)
    train(model, optimizer)
    (run,) = launcher.summary().models
    assert (run.optimizers, run.steps, run.scales) == (("SGD",), 1, ((1, 65536.0),))


def test_parameters_given_to_an_optimizer_later_count(launch):
    launcher = launch()
    body, head = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = sgd(head)
    head(body(torch.ones(3, 4))).mean().backward()  # the body has no optimizer yet
    optimizer.add_param_group({"params": list(body.parameters())})
    optimizer.step()
    optimizer.zero_grad()
    head(body(torch.ones(3, 4))).mean().backward()
    optimizer.step()
    assert [run.optimizers for run in launcher.summary().models] == [("SGD",), ("SGD",)]
    assert {run.scales[-1][1] for run in launcher.summary().models} == {65536.0}


def test_weights_updated_by_hand(launch):
    launcher = launch()
    model = Seen()
    for _ in range(4):
        model(torch.ones(3, 4)).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert model.dtypes == [torch.float16] * 4
    summary = launcher.summary()
    assert (summary.models[0].steps, summary.backwards) == (0, 4)
    assert "Seen, updated without an optimizer object" in str(summary)
    assert "4 backward passes" in str(summary)


def test_several_models_and_optimizers(launch):
    launcher = launch()
    generator, critic = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1))
    of_generator, of_critic = sgd(generator), torch.optim.Adam(critic.parameters())
    for _ in range(3):
        of_critic.zero_grad()
        fake = generator(torch.ones(3, 4))
        (critic(fake.detach()).mean() - critic(torch.ones(3, 4)).mean()).backward()
        of_critic.step()
        of_generator.zero_grad()
        (-critic(fake).mean()).backward()
        of_generator.step()
    runs = {run.name: run for run in launcher.summary().models}
    assert {name: (run.optimizers, run.steps) for name, run in runs.items()} == {
        "Linear": (("SGD",), 3),
        "Sequential": (("Adam",), 3),
    }


def test_two_optimizers_of_one_model(launch):
    launcher = launch()
    model = net()
    first, second = sgd(model[0]), torch.optim.Adam(model[2].parameters())
    train(model, first)
    second.step()
    assert sorted(launcher.summary().models[0].optimizers) == ["Adam", "SGD"]


def test_what_no_one_trains_is_left_in_fp32(launch):
    launcher = launch()
    frozen, teacher, average = Seen(), Seen(), Seen()
    frozen.requires_grad_(False)
    model = Seen()
    optimizer = sgd(model)
    frozen(torch.ones(3, 4))
    with torch.no_grad():
        teacher(torch.ones(3, 4))
    train(model, optimizer)
    average = copy.deepcopy(model).eval()
    with torch.inference_mode():
        average(torch.ones(3, 4))
    assert frozen.dtypes == teacher.dtypes == [torch.float32]
    assert average.dtypes == [torch.float16, torch.float32]  # the first is the copied list's
    assert names(launcher) == ["Seen"]


def test_frozen_first_and_trained_later(launch):
    launcher = launch()
    model = Seen()
    model.requires_grad_(False)
    model(torch.ones(3, 4))
    model.requires_grad_(True)
    optimizer = sgd(model)
    train(model, optimizer)
    assert model.dtypes == [torch.float32, torch.float16]
    assert names(launcher) == ["Seen"]


def test_a_larger_root_takes_over_those_inside_it(launch):
    launcher = launch()
    body = Seen()
    body(torch.ones(3, 4)).sum().backward()  # as to learn its output's shape
    model = nn.Sequential(body, nn.Linear(4, 2))
    optimizer = sgd(model)
    train(model, optimizer)
    train(body, optimizer)
    (run,) = launcher.summary().models
    assert (run.name, run.steps) == ("Sequential", 2)
    assert body.dtypes == [torch.float16] * 3


def test_a_gradient_in_flight_when_a_larger_root_takes_over(launch):
    launch()
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    nn.init.constant_(head.weight, 0.3)  # of one sign: nothing cancels
    optimizer = sgd(body, head)
    early = body(torch.ones(3, 4)).mean()
    late = nn.Sequential(body, head)(torch.ones(3, 4)).mean()
    (early + late).backward()
    expected = torch.autograd.grad(
        F.linear(torch.ones(3, 4), body.weight, body.bias).mean()
        + F.linear(F.linear(torch.ones(3, 4), body.weight, body.bias), head.weight).mean(),
        body.weight,
    )[0]
    # fp16 operands and gradients: half a unit in the last place (2^-11) for each of four roundings
    torch.testing.assert_close(body.weight.grad, expected, rtol=4 * 2.0**-11, atol=0)
    optimizer.step()


def test_wrapped_models_are_named_with_what_they_wrap(launch):
    launcher = launch()
    model = nn.DataParallel(Seen())
    train(model, sgd(model))
    assert names(launcher) == ["DataParallel(Seen)"]
    assert model.module.dtypes == [torch.float16]


def test_lazy_parameters_are_looked_at_again(launch):
    launcher = launch()
    model = nn.Sequential(nn.LazyLinear(4), Seen())
    model(torch.ones(3, 4))
    optimizer = sgd(model)
    train(model, optimizer)
    assert model[1].dtypes == [torch.float32, torch.float16]
    assert names(launcher) == ["Sequential"]
    assert launcher.summary().left == ()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(4, 4).double(), "its parameters are torch.float64"),
        (
            lambda: nn.Linear(4, 4).bfloat16(),
            "it has parameters in torch.bfloat16: the switch starts",
        ),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "compiled to TorchScript"),
    ],
    ids=["float64", "bfloat16", "script"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_cannot_be_switched_is_left_and_named(launch, make, reason):
    launcher = launch()
    model = make()
    optimizer = sgd(model)
    x = torch.ones(3, 4, dtype=next(model.parameters()).dtype)
    for _ in range(2):
        out = model(x)
        assert out.dtype == x.dtype
        out.sum().backward()
        optimizer.step()
    summary = launcher.summary()
    assert summary.models == ()
    assert len(summary.left) == 1
    assert summary.left[0].reason.startswith(reason)
    assert str(summary).startswith("halfstep: nothing was switched\nhalfstep: left as it is: ")


def test_nothing_was_switched(launch):
    launcher = launch()
    nn.CrossEntropyLoss()(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
    assert str(launcher.summary()).startswith("halfstep: nothing was switched: no torch.nn.Module")


def test_a_recipe_without_an_executor_is_refused_at_once():
    with pytest.raises(SwitchError, match="no executor"):
        Launcher(Recipe.parse("fp16:store=e5m2"))


def test_recipe_fp32_changes_no_bit(launch):
    def losses():
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return [train(model, optimizer) for _ in range(4)]

    plain = losses()
    launcher = launch("fp32")
    assert losses() == plain
    assert [(run.name, run.steps) for run in launcher.summary().models] == [("Sequential", 4)]


def test_recipe_fp32_counts_steps_of_an_optimizer_made_late(launch):
    launcher = launch("fp32")
    model = net()
    model(torch.ones(3, 4))
    gc.collect()
    train(model, sgd(model))
    assert [(run.optimizers, run.steps) for run in launcher.summary().models] == [(("SGD",), 1)]


def test_plain_16_bit_turns_the_optimizer_too(launch):
    launch("fp16-naive")
    model = net()
    model(torch.ones(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {s["momentum_buffer"].dtype for s in optimizer.state.values()} == {torch.float16}


def test_skipped_steps_are_noted_with_their_parameters(launch):
    launcher = launch()
    model = net()
    optimizer = sgd(model)
    train(model, optimizer)
    train(model, optimizer, torch.full((3, 4), 3e3))
    train(model, optimizer)
    (run,) = launcher.summary().models
    assert (run.steps, run.skipped) == (3, 1)
    assert run.scales == ((1, 65536.0), (3, 32768.0))
    (skip,) = run.skips
    assert (skip.step, skip.loss_scale) == (2, 65536.0)
    assert set(skip.nonfinite) <= {name for name, _ in model.named_parameters()}
    assert "3 steps, 1 skipped; loss scale 32768 to 65536" in str(launcher.summary())


def test_models_that_a_script_drops_are_dropped(launch):
    launcher = launch()
    gone = []
    for _ in range(3):
        model = net()
        train(model, sgd(model))
        gone.append(weakref.ref(model))
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert [run.steps for run in launcher.summary().models] == [1, 1, 1]
    assert "3 x Sequential, SGD: 1 step," in str(launcher.summary())


def test_a_call_inside_a_region_is_torchs_own(launch):
    launch()
    model = net()
    train(model, sgd(model))
    inner = model[0].__dict__["_call_impl"].inner
    assert inner.__func__ is not nn.Module._call_impl
    assert inner.__func__.__module__ == "torch.nn.modules.module"


def test_a_forked_child_looks_for_no_models(launch):
    launcher = launch()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        model = Seen()
        model(torch.ones(3, 4))
        os.write(writing, str(model.dtypes).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"[torch.float32]"
    assert launcher.summary().models == ()


def test_remove_leaves_what_is_switched(launch):
    launcher = launch()
    model, other = Seen(), Seen()
    optimizer = sgd(model)
    train(model, optimizer)
    launcher.remove()
    train(model, optimizer)
    train(other, sgd(other))
    assert model.dtypes == [torch.float16] * 2
    assert other.dtypes == [torch.float32]
    assert launcher.summary().models[0].steps == 2


@pytest.mark.filterwarnings("default")  # torch's, of its compiler
@pytest.mark.parametrize("order", ["compiled", "in place"])
def test_a_compiled_model_is_one_model(launch, order):
    def losses(compiled):
        torch.manual_seed(0)
        model = net()
        optimizer = sgd(model)
        called = model
        if compiled and order == "compiled":
            called = torch.compile(model, backend="aot_eager")
        elif compiled:
            model.compile(backend="aot_eager")
        return [train(called, optimizer) for _ in range(3)]

    wanted = losses(False)
    torch.compiler.reset()
    launcher = launch("bf16")
    found = losses(True)
    (model,) = launcher.summary().models
    assert (model.name, model.steps) == ("Sequential", 3)
    assert launcher.summary().backwards == 3
    launcher.remove()
    torch.compiler.reset()
    launch("bf16")
    assert found == losses(False)
    assert found != wanted


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_a_first_step_whose_closure_finds_the_model_is_guarded_like_the_others(launch, kind):
    """Lightning's: the model is called, and switched, when the optimizer's step has begun."""
    launcher = launch("fp16:initial=16777216")
    model = net()
    optimizer = kind(model.parameters(), lr=0.01)
    x, y = 50 * torch.randn(64, 4), torch.randint(2, (64,))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]
    (run,) = launcher.summary().models
    assert run.skipped > 0


def test_a_failing_step_that_is_run_again_is_no_backward_pass_of_the_script(launch):
    launcher = launch("fp16")
    model = net()
    optimizer = sgd(model)
    for _ in range(
        5
    ):  # the fourth overflow in a row is run again, to see whether the scale is to blame
        optimizer.zero_grad()
        (model(torch.ones(2, 4)).sum() * 2e4).backward()
        optimizer.step()
    summary = launcher.summary()
    assert summary.models[0].skipped >= 4
    assert summary.backwards == 5
