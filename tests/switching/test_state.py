"""What a switch saves: plain, in torch's words, read by torch and from torch; bad states are our errors."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfstep
from against_fp32 import batch, mlp, sgd
from halfstep.errors import HalfstepError, SwitchError
from halfstep.recipe import Recipe
from halfstep.switching import LossScale
from halfstep.switching.state import State, read_state, write_state

X, Y = batch()
TORCHS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    (factor * (model(X) - Y).square().mean()).backward()
    optimizer.step()


def switched(recipe):
    model = mlp()
    optimizer = sgd(model, lr=1e-3)
    return model, optimizer, halfstep.switch(model, optimizer, recipe)


RULES = [
    "fp16:initial=512,interval=3",
    "fp16:initial=512,interval=3,hysteresis=2,floor=0.25,ceiling=2048",
    "fp16:scaling=log-normal,initial=512",
    "fp16:scaling=static,initial=512,patience=9",
    "bf16",
]


@pytest.mark.parametrize("recipe", RULES)
def test_a_resumed_run_has_the_same_scales(recipe):
    factors = (1.0, 1e9, 1.0, 1.0, 1e9, 1.0, 1.0, 1.0)
    if recipe == "bf16":
        factors = (1.0,) * 8

    def run(stop):
        model, optimizer, switch = switched(recipe)
        seen = []
        for k, factor in enumerate(factors):
            if k == stop:
                state = json.loads(json.dumps(switch.state_dict()))  # plain
                switch.off()
                switch = halfstep.switch(model, optimizer, recipe)
                switch.load_state_dict(state)
                assert switch.state_dict() == state
            step(model, optimizer, factor)
            seen.append((switch.loss_scale, switch.steps, switch.skipped_steps))
        return seen

    straight = run(None)
    for stop in (1, 2, 5):
        assert run(stop) == straight


def test_torch_reads_ours():
    model, optimizer, switch = switched("fp16:initial=512,interval=30,growth=4")
    for factor in (1.0, 1e9, 1.0, 1.0):
        step(model, optimizer, factor)
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(switch.state_dict())
    assert scaler.get_scale() == 256
    assert scaler.state_dict() == {k: switch.state_dict()[k] for k in TORCHS}


@pytest.mark.parametrize("lazy", [False, True])
def test_we_read_torchs(lazy):
    scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_factor=4.0, growth_interval=3)
    if not lazy:
        scaler.scale(torch.ones(()))
    model, optimizer, switch = switched("fp16")
    switch.load_state_dict(scaler.state_dict())
    assert switch.loss_scale == 1024
    assert {k: switch.state_dict()[k] for k in TORCHS} == scaler.state_dict()
    scales = []
    for _ in range(4):
        step(model, optimizer)
        scales.append(switch.loss_scale)
    assert scales == [1024, 1024, 4096, 4096]
    again = switched("fp16")[2]
    again.load_state_dict(switch.state_dict())
    assert again.state_dict() == switch.state_dict(), "torch's numbers are kept from then on"


@pytest.mark.parametrize("recipe", ["bf16", "fp16:scaling=static,initial=128"])
def test_a_scale_that_does_not_move_is_not_read(recipe):
    _, _, switch = switched(recipe)
    scale = switch.loss_scale
    switch.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    assert switch.loss_scale == scale


def test_what_a_state_lacks_stays_and_what_it_has_too_much_is_left():
    model, optimizer, switch = switched("fp16:initial=512")
    for _ in range(3):
        step(model, optimizer)
    switch.load_state_dict({"scale": 64.0, "halfstep": {"version": 1, "tomorrow": 1}, "more": None})
    assert (switch.loss_scale, switch.steps) == (64, 3)
    assert switch.state_dict()["_growth_tracker"] == 3


@pytest.mark.parametrize(("scale", "used"), [(2.0**-20, 0.5), (2.0**40, 4096.0)])
def test_a_scale_outside_of_the_recipes_range_is_brought_into_it(scale, used):
    _, _, switch = switched("fp16:initial=512,floor=0.5,ceiling=4096")
    switch.load_state_dict({"scale": scale})
    assert switch.loss_scale == used


BAD = [
    (None, "the state of a switch is a dict, not a NoneType"),
    ({}, "the state is empty: a GradScaler that is not enabled saves that"),
    ({"weight": 1, "bias": 2}, "neither 'halfstep' nor 'scale', but bias, weight"),
    (
        {"scale": 0.0},
        "scale=0.0 in the state is not above 0: the run that saved it could not go on",
    ),
    ({"scale": -4.0}, "scale=-4.0 in the state is not above 0"),
    ({"scale": math.nan}, "scale=nan in the state is not a finite number"),
    ({"scale": "64"}, "scale='64' in the state is not a finite number"),
    ({"scale": torch.ones(2)}, r"scale=tensor\(\[1., 1.\]\) in the state is not a finite number"),
    ({"scale": 8, "_growth_tracker": -1}, "_growth_tracker=-1 in the state is not a whole number"),
    ({"scale": 8, "growth_factor": 0.5}, "growth=0.5 must be finite and at least 1, in the state"),
    ({"scale": 8, "growth_interval": 0}, "interval=0 must be finite and at least 1 step, in the"),
    ({"scale": 8, "backoff_factor": 2}, "backoff=2.0 must be finite and between 0 and 1"),
    ({"halfstep": 3}, "halfstep=3 in the state is not a dict"),
    ({"halfstep": {"moments": 3}}, "moments=3 in the state is not a dict"),
    ({"halfstep": {"version": 2}}, "of version 2; this halfstep reads versions up to 1"),
    ({"halfstep": {"version": "new"}}, "version='new' in the state is not a finite number"),
    ({"halfstep": {"recipe": "bf16"}}, "the state is of recipe bf16; this switch runs fp16"),
    ({"halfstep": {"recipe": "fp17"}}, "a recipe that this halfstep does not know: unknown recipe"),
    ({"halfstep": {"recipe": 3}}, "a recipe that this halfstep does not know: a recipe cannot be"),
    ({"halfstep": {"steps": 2.5}}, "steps=2.5 in the state is not a whole number from 0 on"),
]


@pytest.mark.parametrize(("state", "message"), BAD)
def test_a_bad_state_is_an_error_that_says_why_and_changes_nothing(state, message):
    _, _, switch = switched("fp16")
    before = switch.state_dict()
    with pytest.raises(SwitchError, match=message):
        switch.load_state_dict(state)
    assert switch.state_dict() == before


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=3)
    | st.sampled_from(["fp16", "bf16", 2.0**16, 1, torch.ones(()), torch.ones(3)]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
moments = st.dictionaries(st.sampled_from(["count", "mean", "slow", "square"]), values)
ours = st.dictionaries(
    st.sampled_from(["version", "recipe", "steps", "skipped_steps", "tolerance", "useless"]), values
)
states = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(TORCHS, values),
        "halfstep": st.builds(lambda o, m: {**o, "moments": m}, ours, moments | values) | values,
        "other": values,
    },
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(states | values, st.sampled_from(["fp16", "fp16:scaling=log-normal", "bf16"]))
def test_whatever_is_loaded_there_are_only_our_errors_and_a_scale_that_works(given, text):
    recipe = Recipe.parse(text)
    start = LossScale.start(recipe.loss_scaling)
    try:
        state = read_state(given, recipe, State(loss_scale=start, steps=0, skipped_steps=0))
    except HalfstepError as error:
        assert str(error)
        return
    json.dumps(write_state(state, recipe))
    for finite in (True, False):
        assert 1 <= state.loss_scale.after(finite=finite, largest=1.0).scale < math.inf
