"""Op policies as data: text and JSON forms, edits, and what cannot be."""

from __future__ import annotations

import json

import pytest

from halfstep.errors import HalfstepError, RecipeError, UnknownNameError
from halfstep.recipe import OpClass, OpPolicy, Recipe, policies

AMP = policies()["amp"]
EDITS = ["amp", "paper", "amp/softplus-own", "paper/mm-fp32/sum.dim_IntList-own/tanh-fp32"]


def test_no_operation_is_in_two_classes():
    names = [name for name, _ in AMP.classes]
    assert sorted(set(names)) == names


@pytest.mark.parametrize("text", EDITS)
def test_text_and_json_come_back(text: str):
    policy = OpPolicy.parse(text)
    assert str(policy) == text
    assert OpPolicy.parse(str(policy)) == policy
    assert OpPolicy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("text", EDITS)
def test_a_recipe_carries_it(text: str):
    recipe = Recipe.parse("bf16").replace(policy=text)
    assert recipe.policy == OpPolicy.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(str(recipe)).policy == recipe.policy
    assert Recipe.parse("bf16").replace(policy=OpPolicy.parse(text)) == recipe


def test_a_name_without_overload_is_all_of_its_overloads():
    edited = OpPolicy.parse("amp/softmax-own/mul-fp32")
    assert str(edited) == "amp/mul-fp32/softmax.int-own"
    assert edited.class_of("softmax") is edited.class_of("softmax.int") is OpClass.OWN
    assert edited.class_of("mul.Tensor") is OpClass.WIDE
    assert AMP.class_of("pow") is OpClass.WIDE
    one = OpPolicy.parse("amp/sum.dim_IntList-own")
    assert one.class_of("sum.dim_IntList") is OpClass.OWN
    assert one.class_of("sum") is OpClass.WIDE
    assert OpPolicy.parse("amp/relu-own") == AMP


def test_an_edit_and_its_undoing():
    edited = AMP.with_class("exp", OpClass.OWN)
    assert edited != AMP
    assert AMP.differences(edited) == {"exp": (OpClass.WIDE, OpClass.OWN)}
    assert edited.with_class("exp", "fp32") == AMP


def test_json_says_everything_and_what_is_left_out_is_own():
    record = json.loads(AMP.to_json())
    assert sum(len(ops) for ops in record["classes"].values()) == len(AMP.classes)
    del record["classes"]["widest"]
    edited = OpPolicy.from_json(json.dumps(record))
    assert edited.class_of("atan2") is OpClass.OWN
    assert set(AMP.differences(edited)) == set(AMP.names(OpClass.WIDEST))


@pytest.mark.parametrize("kind", OpClass)
def test_every_class_says_why(kind: OpClass):
    assert kind.why


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("amq", UnknownNameError, "unknown op policy 'amq'; did you mean amp?"),
        ("amp/exp", RecipeError, "policy 'amp/exp': 'exp' should be operation-class, as in"),
        (
            "amp/exp-fp33",
            UnknownNameError,
            "unknown class of operations 'fp33'; did you mean fp32?",
        ),
        (
            "amp/exp-dot",
            RecipeError,
            "policy amp: exp cannot be of class 'dot'; allowed: fp32, own, widest",
        ),
        (
            "amp/softpluss-own",
            RecipeError,
            "policy 'amp/softpluss-own': no operation 'softpluss'; did you mean softplus?",
        ),
    ],
)
def test_what_cannot_be_is_an_error(text: str, kind: type[HalfstepError], message: str):
    with pytest.raises(kind) as raised:
        OpPolicy.parse(text)
    assert str(raised.value).startswith(message)
    with pytest.raises(RecipeError, match="policy="):
        Recipe.parse("fp16").replace(policy=text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 1, "base": "amp", "classes": {"fp32": 3}}',
        '{"version": 2, "base": "amp", "classes": {}}',
        '{"version": 1, "base": "amp", "classes": {"fp32": ["exp"], "own": ["exp"]}}',
        '{"version": 1, "base": "nobody", "classes": {}}',
        '{"version": 1, "base": "amp", "classes": {"what": ["exp"]}}',
    ],
)
def test_other_json_is_an_error_of_ours(text: str):
    with pytest.raises(HalfstepError):
        OpPolicy.from_json(text)
