"""Recipes: the catalogue, the text form and its round trip, the errors."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import RecipeError, UnknownNameError
from halfstep.format import Format
from halfstep.recipe import LossScaling, Recipe, ScalingKind, policies, recipes
from halfstep.recipe.catalogue import SYNONYMS
from halfstep.recipe.recipe import FORMAT_FIELDS

NAMES = list(recipes())
FORMATS = ["fp32", "bf16", "fp16", "e4m3fn", "e5m2", "e6m9"]

format_changes = st.dictionaries(
    st.sampled_from([*FORMAT_FIELDS, "operands"]), st.sampled_from(FORMATS)
)
other_changes = st.fixed_dictionaries(
    {},
    optional={
        "update": st.sampled_from(["nearest", "stochastic", "kahan"]),
        "moments": st.sampled_from(["fp32", "bf16", "e4m3fn", "e4m3fn@1x128", "mxfp8_e4m3"]),
        "policy": st.sampled_from(["amp", "paper"]),
        "scaling": st.sampled_from(["none", "static", "dynamic", "log-normal"]),
        "initial": st.floats(1.0, 2.0**100),
        "growth": st.floats(1.0, 16.0),
        "backoff": st.floats(0.01, 0.99),
        "interval": st.integers(1, 10**6),
        "floor": st.floats(2.0**-20, 1.0),
        "ceiling": st.floats(2.0**100, 2.0**127),
        "patience": st.integers(1, 100),
        "hysteresis": st.integers(1, 100),
        "consecutive_hysteresis": st.booleans(),
    },
)


@given(st.sampled_from(NAMES), format_changes, other_changes)
def test_text_form_round_trips(name: str, formats: dict[str, str], others: dict[str, object]):
    recipe = Recipe.parse(name).replace(**formats).replace(**others)
    again = Recipe.parse(str(recipe))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.name == recipe.name == str(recipe)
    assert (again.summary, again.source) == (recipe.summary, recipe.source)


def test_a_recipe_of_ones_own_round_trips_under_any_name():
    mine = Recipe.parse("fp16").replace(name="mine", accumulate="e6m9")
    assert mine.name == "mine"
    assert Recipe.parse(str(mine)) == mine


def test_an_accumulator_is_written_as_it_is_read():
    text = "fp16:accumulate=fp16/chunk64/between-fp32"
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert recipe.replace(accumulate="fp16/chunk64").name == "fp16:accumulate=fp16/chunk64"
    assert recipe.replace(accumulate="fp32") == Recipe.parse("fp16")
    assert Recipe.parse("fp16:accumulate=fp16/pairwise") == Recipe.parse("fp16-acc16-pairwise")


def test_catalogue_is_the_issues():
    assert NAMES == [
        "fp32",
        "bf16",
        "fp16",
        "bf16-pure",
        "bf16-sr",
        "bf16-kahan",
        "fp16-naive",
        "fp16-noscale",
        "fp16-nomaster",
        "fp16-acc16",
        "fp16-acc16-chunk64",
        "fp16-acc16-pairwise",
        "tf32",
        "fp8",
        "fp8-delayed",
        "fp8-rowwise",
        "fp8-block",
        "fp8-chunk64",
        "mxfp8",
        "mxfp6",
        "mxfp4",
        "nvfp4",
        "int8",
        "binary",
        "int8-inference",
        "int4-inference",
        "binary-inference",
    ]
    for name, recipe in recipes().items():
        assert recipe.name == name
        assert Recipe.parse(name) is recipe
        assert str(recipe) == recipe.name
        assert recipe.summary
        assert recipe.source


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fp16-noscale", {"scaling": "none"}),
        ("fp16-nomaster", {"master": "fp16"}),
        ("fp16-acc16", {"accumulate": "fp16"}),
        ("fp16-acc16-chunk64", {"accumulate": "fp16/chunk64"}),
        ("fp16-acc16-pairwise", {"accumulate": "fp16/pairwise"}),
        (
            "fp16-naive",
            {"master": "fp16", "optimizer": "fp16", "scaling": "none", "policy": "paper"},
        ),
    ],
)
def test_an_ablation_is_fp16_but_for_what_its_name_says(name: str, changes: dict[str, str]):
    assert Recipe.parse("fp16").replace(**changes) == Recipe.parse(name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "bf16-pure",
            {"master": "bf16", "optimizer": "bf16", "policy": "paper"},
        ),
        ("bf16-sr", {"master": "bf16", "moments": "bf16", "update": "stochastic"}),
        ("bf16-kahan", {"master": "bf16", "moments": "bf16", "update": "kahan"}),
    ],
)
def test_a_recipe_without_masters_is_bf16_but_for_what_its_name_says(name, changes):
    assert Recipe.parse("bf16").replace(**changes) == Recipe.parse(name)


def test_a_wrong_update_or_moments_is_told_what_is_allowed():
    with pytest.raises(
        RecipeError, match=r"update=up: unknown update 'up'; known: kahan, nearest, stochastic"
    ):
        Recipe.parse("bf16").replace(update="up")
    with pytest.raises(RecipeError, match=r"moments=e4m3gn in .*unknown format"):
        Recipe.parse("bf16:moments=e4m3gn")
    with pytest.raises(RecipeError, match=r"moments is 8, a int"):
        dataclasses.replace(Recipe.parse("bf16"), moments=8)  # pyright: ignore
    assert not Recipe.parse("fp32:moments=bf16").is_identity


def test_only_fp32_is_the_identity_and_only_naive_is_unguarded():
    assert [r.name for r in recipes().values() if r.is_identity] == ["fp32"]
    assert [r.name for r in recipes().values() if not r.guarded] == ["bf16-pure", "fp16-naive"]
    assert not Recipe.parse("fp32:scaling=dynamic").is_identity


def test_loss_scale_of_the_catalogue():
    scaled = {r.name for r in recipes().values() if r.loss_scaling.kind is ScalingKind.DYNAMIC}
    assert scaled == {"fp16", "fp16-nomaster"} | {
        "fp16-acc16",
        "fp16-acc16-chunk64",
        "fp16-acc16-pairwise",
        "fp8-chunk64",
    }


def test_defaults_are_those_of_torchs_grad_scaler():
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu")
    ours = LossScaling(kind=ScalingKind.DYNAMIC)
    assert ours.initial == theirs.get_scale()
    assert ours.growth == theirs.get_growth_factor()
    assert ours.backoff == theirs.get_backoff_factor()
    assert ours.interval == theirs.get_growth_interval()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *SYNONYMS.items(),
        ("FP16", "fp16"),
        (" bf16 ", "bf16"),
        ("torch.float16", "fp16"),
        ("params=float32,compute=float16,output=float32", "fp16"),
        ("params=float32, compute=bfloat16, output=float32", "bf16"),
        ("p=f32,c=f32,o=f32", "fp32"),
        ("params=half,compute=half,output=float32", "fp16-naive"),
        ("params=bfloat16,compute=bfloat16,output=full", "bf16-pure"),
    ],
)
def test_what_users_already_write(text: str, name: str):
    assert Recipe.parse(text).name == name


def test_torch_dtypes():
    torch = pytest.importorskip("torch")
    assert Recipe.parse(torch.float16).name == "fp16"
    assert Recipe.parse(torch.bfloat16).name == "bf16"
    assert Recipe.parse(torch.float32).name == "fp32"


def test_a_recipe_parses_to_itself():
    recipe = Recipe.parse("fp16").replace(floor=0.5)
    assert Recipe.parse(recipe) is recipe


def test_variants():
    recipe = Recipe.parse("fp16: operands = e4m3fn")
    assert recipe.weight == recipe.activation == recipe.gradient == Format.parse("e4m3fn")
    assert recipe.store == Format.parse("fp16")
    assert recipe.name == "fp16:weight=e4m3fn,activation=e4m3fn,gradient=e4m3fn"
    assert recipe.replace(operands="fp16").name == "fp16"
    assert Recipe.parse("fp16:initial=1024,floor=0.5").loss_scaling == LossScaling(
        kind=ScalingKind.DYNAMIC, initial=1024.0, floor=0.5
    )


@pytest.mark.parametrize("value", [2.5, float("inf"), float("nan"), "2.0", None])
def test_a_whole_number_is_one(value: object):
    with pytest.raises(RecipeError, match=r"^interval=.*: allowed: a whole number"):
        Recipe.parse("fp16").replace(interval=value)


def test_replace_takes_values_as_well_as_text():
    bf16 = Format.parse("bf16")
    scaling = LossScaling(kind=ScalingKind.NONE)
    recipe = Recipe.parse("fp16").replace(
        store=bf16, policy=policies()["paper"], loss_scaling=scaling
    )
    assert (recipe.store, recipe.policy, recipe.loss_scaling) == (
        bf16,
        policies()["paper"],
        scaling,
    )
    assert recipe.name == "fp16:store=bf16,policy=paper,scaling=none"
    assert recipe.summary.endswith("; here store=bf16,policy=paper,scaling=none")
    assert "1710.03740" in recipe.source


KEYS = (
    "operands, weight, activation, gradient, store, accumulate, master, optimizer, policy, "
    "keep, amax_history, hadamard, gradient_rounding, inference_only, update, moments, "
    "scaling, initial, growth, backoff, interval, floor, ceiling, patience, hysteresis, "
    "consecutive_hysteresis"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp16:acc=fp16", f"unknown key 'acc' in 'fp16:acc=fp16'; allowed: {KEYS}"),
        ("fp16:accumulate", f"'accumulate' in 'fp16:accumulate' should be key=value; keys: {KEYS}"),
        ("fp16:", f"'' in 'fp16:' should be key=value; keys: {KEYS}"),
        ("fp16:policy=x", "policy=x in 'fp16:policy=x': unknown op policy 'x'; known: amp, paper"),
        (
            "fp16:scaling=x",
            "scaling=x in 'fp16:scaling=x': allowed: none, static, dynamic, log-normal",
        ),
        ("fp16:interval=2.5", "interval=2.5 in 'fp16:interval=2.5': allowed: a whole number"),
        ("fp16:growth=x", "growth=x in 'fp16:growth=x': allowed: a number"),
        (
            "fp16:consecutive_hysteresis=1",
            "consecutive_hysteresis=1 in 'fp16:consecutive_hysteresis=1': allowed: true or false",
        ),
        (
            "fp16:ceiling=1024",
            "loss scaling: initial=65536.0 must be finite and at most ceiling=1024.0 in 'fp16:ceiling=1024'",
        ),
        (
            "fp16:master=fp16,master=fp32",
            "key 'master' is given twice in 'fp16:master=fp16,master=fp32'; give it once",
        ),
        (
            "fp16:initial=0.5",
            "loss scaling: initial=0.5 must be finite and at least floor=1.0 in 'fp16:initial=0.5'",
        ),
        (
            "compute=int8",
            (
                "unknown dtype 'int8' in 'compute=int8'; allowed: "
                "float32, f32, full, float16, f16, half, bfloat16, bf16"
            ),
        ),
        (
            "compute=float16,output=float16",
            (
                "output=fp16 in 'compute=float16,output=float16': a switched model returns FP32; "
                "write output=float32"
            ),
        ),
    ],
)
def test_bad_text_says_token_text_and_allowed(text: str, message: str):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert str(caught.value) == message


def test_bad_format_in_a_variant():
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("fp16:accumulate=fp61")
    message = str(caught.value)
    assert message.startswith(
        "accumulate=fp61 in 'fp16:accumulate=fp61': unknown format or unit 'fp61'"
    )
    assert "did you mean fp16" in message
    assert "`halfstep formats`" in message


def test_unknown_name_suggests_near_ones():
    with pytest.raises(UnknownNameError) as caught:
        Recipe.parse("fp16-native")
    assert str(caught.value).startswith("unknown recipe 'fp16-native'; did you mean fp16-naive")


@pytest.mark.parametrize("given", [16, None, Format.parse("fp16")])
def test_what_is_no_recipe(given: object):
    with pytest.raises(RecipeError, match="give a name such as 'fp16', a torch dtype or a Recipe"):
        Recipe.parse(given)


def test_replace_names_the_bad_key():
    with pytest.raises(RecipeError, match="unknown key 'acumulate'; allowed: name, summary"):
        Recipe.parse("fp16").replace(acumulate="fp16")


def test_fields_are_of_their_type():
    with pytest.raises(RecipeError, match="recipe 'fp16': weight is 'fp16', a str; it must be a"):
        dataclasses.replace(Recipe.parse("fp16"), weight="fp16")


@pytest.mark.parametrize(
    "numbers",
    [
        {"floor": 0.0},
        {"initial": 0.5},
        {"initial": float("inf")},
        {"growth": 0.9},
        {"backoff": 1.0},
        {"interval": 0},
        {"growth": float("nan")},
        {"ceiling": 0.5},
        {"ceiling": 2.0**128},
        {"patience": 0},
        {"hysteresis": 0},
    ],
)
def test_loss_scaling_that_would_not_work(numbers: dict[str, float]):
    (key,) = numbers
    with pytest.raises(RecipeError, match=f"loss scaling: {key}="):
        LossScaling(kind=ScalingKind.DYNAMIC, **numbers)


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.parse("fp16").name = "mine"
