"""The text form of a recipe, read and written: ``base`` or ``base:key=value,...``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from halfstep.errors import FormatError, RecipeError, UnknownNameError
from halfstep.format import Accumulator, BlockFormat, Format, Rounding
from halfstep.format.blocks import is_block_name
from halfstep.recipe.catalogue import CATALOGUE, SYNONYMS
from halfstep.recipe.exceptions import Keep
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.op_policy import OpPolicy
from halfstep.recipe.recipe import DESCRIPTION_FIELDS, FORMAT_FIELDS, OPERAND_FIELDS, Recipe, Update

__all__ = ["changed_recipe", "parse_recipe", "recipe_text"]


def _scalar_or_blocks(given: object) -> Format | BlockFormat:
    if isinstance(given, (Format, BlockFormat)):
        return given
    text = str(given).lower()
    return BlockFormat.parse(text) if is_block_name(text) else Format.parse(text)


_OPTIONS: dict[str, Any] = {
    "keep": Keep.parse,
    "amax_history": int,
    "hadamard": int,
    "gradient_rounding": Rounding.parse,
    "inference_only": bool,
    "update": Update.parse,
    "moments": _scalar_or_blocks,
}
_SCALING_NUMBERS: dict[str, type[float | int]] = {
    "initial": float,
    "growth": float,
    "backoff": float,
    "interval": int,
    "floor": float,
    "ceiling": float,
    "patience": int,
    "hysteresis": int,
    "consecutive_hysteresis": bool,
}
_TEXT_KEYS = ("operands", *FORMAT_FIELDS, "policy", *_OPTIONS, "scaling", *_SCALING_NUMBERS)
_ANY_KEYS = (*DESCRIPTION_FIELDS, *_TEXT_KEYS, "loss_scaling")

E_ = TypeVar("E_", bound=Enum)


def parse_recipe(given: object) -> Recipe:
    """The recipe that a text, a torch dtype or a recipe means; see `Recipe.parse`."""
    if isinstance(given, Recipe):
        return given
    text = str(given)
    # A torch dtype is known by its text, so that torch need not be imported.
    if not isinstance(given, str) and not text.startswith("torch."):
        raise RecipeError(
            f"a recipe cannot be made of {given!r}, a {type(given).__name__}; "
            "give a name such as 'fp16', a torch dtype or a Recipe"
        )
    text = text.strip().lower().removeprefix("torch.")
    base, colon, tail = text.partition(":")
    if not colon and "=" in base:
        return _parse_jmp(text)
    recipe = _named(base.strip())
    if not colon:
        return recipe
    return changed_recipe(recipe, _pairs(tail, text, _TEXT_KEYS), where=f" in {text!r}")


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any], *, where: str = "") -> Recipe:
    """The recipe with those fields changed and renamed; ``where`` ends the text of an error."""
    values: dict[str, Any] = {}
    scaling: dict[str, Any] = {}
    for key, value in changes.items():
        if key == "operands":
            values |= dict.fromkeys(OPERAND_FIELDS, _operand(key, value, where))
        elif key == "accumulate":
            values[key] = _accumulator(key, value, where)
        elif key in OPERAND_FIELDS:
            values[key] = _operand(key, value, where)
        elif key in FORMAT_FIELDS:
            values[key] = _format(key, value, where)
        elif key == "policy":
            values[key] = _policy(key, value, where)
        elif key in _OPTIONS:
            values[key] = _option(key, value, where)
        elif key == "scaling":
            scaling["kind"] = _member(key, value, ScalingKind, where)
        elif key in _SCALING_NUMBERS:
            scaling[key] = _number(key, value, _SCALING_NUMBERS[key], where)
        elif key in (*DESCRIPTION_FIELDS, "loss_scaling"):
            values[key] = value
        else:
            raise RecipeError(f"unknown key {key!r}{where}; allowed: {', '.join(_ANY_KEYS)}")
    if scaling:
        old = values.get("loss_scaling", recipe.loss_scaling)
        if not isinstance(old, LossScaling):
            raise RecipeError(f"loss_scaling={old!r}{where} must be a LossScaling(kind=...)")
        try:
            values["loss_scaling"] = dataclasses.replace(old, **scaling)
        except RecipeError as error:
            raise RecipeError(f"{error}{where}") from None
    changed = dataclasses.replace(recipe, **values)
    return changed if "name" in changes else _renamed(changed, keep=changes)


def recipe_text(recipe: Recipe) -> str:
    """The shortest text from the recipe's own base that parses to an equal recipe."""
    base = _base(recipe)
    differences = ",".join(f"{key}={value}" for key, value in _differences(base, recipe))
    return f"{base.name}:{differences}" if differences else base.name


def _base(recipe: Recipe) -> Recipe:
    """The catalogue's recipe that this one is a variant of: by its name, or else plain FP32."""
    return CATALOGUE.get(recipe.name.partition(":")[0], CATALOGUE["fp32"])


def _differences(base: Recipe, recipe: Recipe) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key in FORMAT_FIELDS:
        if getattr(base, key) != getattr(recipe, key):
            pairs.append((key, str(getattr(recipe, key))))
    if base.policy != recipe.policy:
        pairs.append(("policy", str(recipe.policy)))
    for key in _OPTIONS:
        if getattr(base, key) != getattr(recipe, key):
            value = getattr(recipe, key)
            pairs.append((key, str(value.value if isinstance(value, Enum) else value).lower()))
    old, new = base.loss_scaling, recipe.loss_scaling
    if old.kind is not new.kind:
        pairs.append(("scaling", new.kind.value))
    for key in _SCALING_NUMBERS:
        if getattr(old, key) != getattr(new, key):
            pairs.append((key, repr(getattr(new, key)).lower().removesuffix(".0")))
    return pairs


def _renamed(recipe: Recipe, *, keep: Mapping[str, Any]) -> Recipe:
    """The recipe under its text form; summary and source follow from its base unless kept."""
    base = _base(recipe)
    text = recipe_text(recipe)
    _, _, differences = text.partition(":")
    summary = f"{base.summary}; here {differences}" if differences else base.summary
    return dataclasses.replace(
        recipe,
        name=text,
        summary=keep.get("summary", summary),
        source=keep.get("source", base.source),
    )


def _named(name: str) -> Recipe:
    name = SYNONYMS.get(name, name)
    if name not in CATALOGUE:
        raise UnknownNameError("recipe", name, [*CATALOGUE, *SYNONYMS])
    return CATALOGUE[name]


def _pairs(tail: str, text: str, allowed: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for token in tail.split(","):
        key, equals, value = (part.strip() for part in token.partition("="))
        if not (key and equals and value):
            raise RecipeError(
                f"{token.strip()!r} in {text!r} should be key=value; keys: {', '.join(allowed)}"
            )
        if key not in allowed:
            raise RecipeError(f"unknown key {key!r} in {text!r}; allowed: {', '.join(allowed)}")
        if key in pairs:
            raise RecipeError(f"key {key!r} is given twice in {text!r}; give it once")
        pairs[key] = value
    return pairs


def _format(key: str, value: object, where: str) -> Format:
    if isinstance(value, Format):
        return value
    try:
        return Format.parse(str(value).lower())
    except (UnknownNameError, FormatError) as error:
        raise RecipeError(
            f"{key}={value}{where}: {error}; allowed: the names that `halfstep formats` lists"
        ) from None


def _operand(key: str, value: object, where: str) -> Format | BlockFormat:
    if isinstance(value, BlockFormat) or not is_block_name(str(value).lower()):
        return value if isinstance(value, BlockFormat) else _format(key, value, where)
    try:
        return BlockFormat.parse(value)
    except (UnknownNameError, FormatError) as error:
        raise RecipeError(f"{key}={value}{where}: {error}") from None


def _option(key: str, value: Any, where: str) -> Any:
    parse = _OPTIONS[key]
    if isinstance(parse, type):
        return _number(key, value, parse, where)
    try:
        return parse(value)
    except (RecipeError, UnknownNameError, FormatError) as error:
        raise RecipeError(f"{key}={value}{where}: {error}") from None


def _accumulator(key: str, value: object, where: str) -> Accumulator:
    try:
        return Accumulator.parse(value)
    except (UnknownNameError, FormatError) as error:
        raise RecipeError(
            f"{key}={value}{where}: {error}; allowed: the names that `halfstep formats` lists, and "
            "words after them such as fp16/chunk64/between-fp32"
        ) from None


def _policy(key: str, value: object, where: str) -> OpPolicy:
    try:
        return OpPolicy.parse(value)
    except (UnknownNameError, RecipeError) as error:
        raise RecipeError(f"{key}={value}{where}: {error}") from None


def _member(key: str, value: object, kind: type[E_], where: str) -> E_:
    if isinstance(value, kind):
        return value
    words = [member.value for member in kind]
    if value not in words:
        raise RecipeError(f"{key}={value}{where}: allowed: {', '.join(words)}")
    return kind(value)


_KINDS: dict[type, str] = {float: "a number", int: "a whole number", bool: "true or false"}
_FLAGS = {"true": True, "false": False}


def _number(key: str, value: Any, kind: type[float | int], where: str) -> float | int:
    try:
        if kind is bool:
            return _FLAGS[str(value).lower()]
        number = kind(value)
        if kind is int and not isinstance(value, str) and number != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError, KeyError):
        raise RecipeError(f"{key}={value}{where}: allowed: {_KINDS[kind]}") from None
    return number


# --- jmp's policies, "params=float32,compute=float16,output=float32" -----------------------------

_JMP_KEYS = {
    "params": "params",
    "p": "params",
    "compute": "compute",
    "c": "compute",
    "output": "output",
    "o": "output",
}
_JMP_DTYPES = {
    "float32": "fp32",
    "f32": "fp32",
    "full": "fp32",
    "float16": "fp16",
    "f16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
}


def _parse_jmp(text: str) -> Recipe:
    """The recipe of a policy in jmp's words: compute names the region, params what is kept."""
    names = {"params": "fp32", "compute": "fp32", "output": "fp32"}
    for key, value in _pairs(text, text, tuple(_JMP_KEYS)).items():
        if value not in _JMP_DTYPES:
            raise RecipeError(
                f"unknown dtype {value!r} in {text!r}; allowed: {', '.join(_JMP_DTYPES)}"
            )
        names[_JMP_KEYS[key]] = _JMP_DTYPES[value]
    if names["output"] != "fp32":
        raise RecipeError(
            f"output={names['output']} in {text!r}: a switched model returns FP32; "
            "write output=float32"
        )
    if names["params"] == names["compute"] == "fp16":
        return CATALOGUE["fp16-naive"]
    if names["params"] == names["compute"] == "bf16":
        return CATALOGUE["bf16-pure"]
    recipe = CATALOGUE[names["compute"]]
    return changed_recipe(recipe, {"master": names["params"], "optimizer": names["params"]})
