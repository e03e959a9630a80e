"""Whatever text or change a recipe is asked of: a recipe, or one of our errors."""

from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import HalfstepError
from halfstep.recipe import Recipe, recipes
from halfstep.recipe.recipe import DESCRIPTION_FIELDS, FORMAT_FIELDS

NUMBERS = ["initial", "growth", "backoff", "interval", "floor", "ceiling", "patience", "hysteresis"]
FLAGS = ["consecutive_hysteresis"]
KEYS = [*FORMAT_FIELDS, "operands", "policy", "scaling", "loss_scaling", *NUMBERS, *FLAGS]
RULES = ["none", "static", "dynamic", "log-normal", "amp", "true", "amp/softplus-own"]
VALUES = ["1e400", "-1", "0", "nan", "inf", "65536", "2.5"]
FORMATS = ["e4m3fn", "fp16/chunk64", "mxfp4", "int0", "e0m0", "e99m99"]
OTHERS = ["params=float32", "compute=half", "torch.float16"]
words = st.sampled_from([*recipes(), *KEYS, *RULES, *VALUES, *FORMATS, *OTHERS])
pieces = st.lists(words | st.sampled_from(list(":=,/ .-")) | st.text(max_size=4), max_size=9)
texts = pieces.map("".join) | st.builds(
    lambda base, pairs: f"{base}:" + ",".join(f"{k}={v}" for k, v in pairs),
    words,
    st.lists(st.tuples(st.sampled_from(KEYS), words | st.text(max_size=6)), max_size=4),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts)
def test_any_text(text):
    try:
        recipe = Recipe.parse(text)
    except HalfstepError as error:
        assert str(error)
        return
    assert Recipe.parse(str(recipe)) == recipe


CHANGES = [*KEYS, *DESCRIPTION_FIELDS]
values = words | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(recipes())), st.dictionaries(st.sampled_from(CHANGES), values, max_size=3)
)
def test_any_change(name, changes):
    try:
        recipe = Recipe.parse(name).replace(**changes)
    except HalfstepError as error:
        assert str(error)
        return
    assert Recipe.parse(str(recipe)) == recipe


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values | st.lists(values) | st.dictionaries(st.sampled_from(DESCRIPTION_FIELDS), values))
def test_any_object(given):
    try:
        Recipe.parse(given)
    except HalfstepError as error:
        assert str(error)
