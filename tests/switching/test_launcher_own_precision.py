"""Scripts with mixed precision of their own: the recipe decides inside models, no loss is scaled twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfstep.recipe import Recipe
from halfstep.switching.launcher import Launcher


@pytest.fixture
def launch():
    launched = []

    def make(recipe):
        launched.append(Launcher(Recipe.parse(recipe)))
        launched[-1].install()
        return launched[-1]

    enter, scale = torch.autocast.__enter__, torch.amp.GradScaler.scale
    yield make
    for launcher in launched:
        launcher.remove()
    assert (torch.autocast.__enter__, torch.amp.GradScaler.scale) == (enter, scale)


class Net(nn.Module):
    """Two layers; the second one in an autocast of its own, ``inner``."""

    def __init__(self, inner=None):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.inner = inner
        self.dtypes = []

    def forward(self, x):
        x = self.first(x)
        self.dtypes.append(x.dtype)
        if self.inner is None:
            x = self.second(x)
        else:
            with self.inner:
                x = self.second(x)
        self.dtypes.append(x.dtype)
        return x


def made(inner=None):
    torch.manual_seed(0)
    model = Net(inner)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("recipe", "low"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
@pytest.mark.parametrize("inner", [None, bf16], ids=["around", "inside"])
def test_the_recipe_decides_inside_the_model(launch, recipe, low, inner):
    launcher = launch(recipe)
    model, optimizer = made(inner and inner())
    autocast = bf16()
    for _ in range(2):
        with autocast:
            loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
    assert model.dtypes == [low] * 4
    assert (autocast.fast_dtype, autocast._enabled) == (torch.bfloat16, True)
    assert launcher.summary().autocast
    assert "torch.autocast: inside the models the recipe decides" in str(launcher.summary())


def test_an_autocast_inside_the_model_takes_the_recipes_dtype(launch):
    launch("bf16")
    model, _ = made(torch.autocast("cpu", dtype=torch.float16))
    model(X)
    assert model.dtypes == [torch.bfloat16] * 2


def test_an_fp32_island_stays_one(launch):
    launch("fp16")
    model, optimizer = made(torch.autocast("cpu", enabled=False))
    # An island reads FP32: the script casts, as it must for torch's own autocast.
    model.first.register_forward_hook(lambda module, args, out: out.float())
    model(X).square().mean().backward()
    optimizer.step()
    assert model.dtypes == [torch.float32] * 2


def test_outside_of_the_models_autocast_is_the_scripts(launch):
    launch("fp16")
    model, _ = made()
    with bf16():
        out = model(X)
        assert (out @ out.t()).dtype == torch.bfloat16
    assert out.dtype == torch.float32


def test_recomputation_is_in_the_recipe_and_is_no_autocast_of_the_scripts(launch):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    launcher = launch("fp16")
    model = Checkpointed()
    torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    assert model.dtypes == [torch.float16] * 3  # recomputed as far as backward needs it
    assert not launcher.summary().autocast


def test_a_backward_within_a_backward_is_not_counted(launch):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, self.first(x), use_reentrant=True)

    launcher = launch("bf16")
    Checkpointed()(X).square().mean().backward()
    assert launcher.summary().backwards == 1


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp32"])
def test_a_grad_scaler_loop_gives_the_weights_of_a_loop_without(launch, recipe):
    def trained(scaler):
        model, optimizer = made()
        norms = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            if scaler is None:
                loss.backward()
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
                scaler.step(optimizer)
                scaler.update()
        return norms, copy.deepcopy(model.state_dict())

    launcher = launch(recipe)
    norms, weights = trained(None)
    assert not launcher.summary().grad_scaler
    scaler = torch.amp.GradScaler("cpu")
    scaled_norms, scaled_weights = trained(scaler)
    assert scaled_norms == norms
    for name, weight in weights.items():
        assert torch.equal(scaled_weights[name], weight)
    assert scaler.get_scale() == 1.0
    assert [run.steps for run in launcher.summary().models] == [4, 4]
    assert "GradScaler: at 1, the recipe does the loss scaling" in str(launcher.summary())


def test_a_grad_scaler_of_models_that_are_not_switched_is_torchs(launch):
    launcher = launch("fp16")
    model = nn.Linear(4, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(X.double()).mean()).backward()
    assert model.bias.grad.tolist() == [32768.0, 32768.0]
    scaler.step(optimizer)
    scaler.update()
    assert launcher.summary().models == ()


@pytest.mark.parametrize(
    ("device", "enabled", "found"), [("cpu", False, False), ("cuda", True, True)]
)
@pytest.mark.filterwarnings(
    "ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available"
)
def test_a_grad_scaler_that_is_off(launch, device, enabled, found):
    launcher = launch("fp16")
    model, optimizer = made()
    scaler = torch.amp.GradScaler(device, enabled=enabled)
    scaler.scale(model(X).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert launcher.summary().grad_scaler == found
    assert launcher.summary().models[0].steps == 1
