"""The state of a switch as plain numbers, in the words of ``torch.amp.GradScaler``, read and written.

torch's five keys are on top, so that a GradScaler loads the state of a switch and a switch that of a
GradScaler; what torch has no word for is under the one key ``halfstep``::

    scale, growth_factor, backoff_factor, growth_interval, _growth_tracker
    halfstep: version, recipe, steps, skipped_steps, tolerance, useless, moments: count, mean, slow, square
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from halfstep.errors import RecipeError, SwitchError, UnknownNameError
from halfstep.recipe import LossScaling, Recipe, ScalingKind
from halfstep.switching.loss_scale import LossScale, Moments

__all__ = ["VERSION", "State", "read_state", "write_state"]

VERSION = 1
_OURS = "halfstep"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a switch goes on from."""

    loss_scale: LossScale
    steps: int
    skipped_steps: int


def write_state(state: State, recipe: Recipe) -> dict[str, Any]:
    """``state`` of a switch with ``recipe`` as plain numbers and text."""
    now = state.loss_scale
    return {
        "scale": now.scale,
        "growth_factor": now.rule.growth,
        "backoff_factor": now.rule.backoff,
        "growth_interval": now.rule.interval,
        "_growth_tracker": now.clean,
        _OURS: {
            "version": VERSION,
            "recipe": str(recipe),
            "steps": state.steps,
            "skipped_steps": state.skipped_steps,
            "tolerance": now.tolerance,
            "useless": now.useless,
            "moments": asdict(now.moments),
        },
    }


def read_state(given: object, recipe: Recipe, now: State) -> State:
    """The state that ``given`` says, of a switch that is at ``now``: what ``given`` lacks stays as it is.

    Growth, backoff and interval are the state's, as in torch, where the recipe's scale moves by them; a scale
    that the recipe does not move is not read. One outside the recipe's floor and ceiling is brought between.

    Raises:
        SwitchError: it is no state, of a newer version, of another recipe, or has a value that cannot be.
    """
    if not isinstance(given, Mapping):
        raise SwitchError(f"the state of a switch is a dict, not a {type(given).__name__}")
    if not given:
        raise SwitchError(
            "the state is empty: a GradScaler that is not enabled saves that; leave it out to start afresh"
        )
    if not (_OURS in given or "scale" in given):
        keys = ", ".join(sorted(str(key) for key in given)[:5])
        raise SwitchError(
            f"no state of a switch or of a GradScaler: it has neither 'halfstep' nor 'scale', but {keys}"
        )
    ours = given.get(_OURS, {})
    if not isinstance(ours, Mapping):
        raise SwitchError(f"halfstep={ours!r} in the state is not a dict")
    moments = ours.get("moments", {})
    if not isinstance(moments, Mapping):
        raise SwitchError(f"moments={moments!r} in the state is not a dict")
    _check_version(ours)
    _check_recipe(ours, recipe)
    old = now.loss_scale
    loss_scale = replace(
        old,
        rule=_rule(given, old.rule),
        scale=_scale(given, old),
        clean=_whole(given, "_growth_tracker", old.clean),
        tolerance=max(1, _whole(ours, "tolerance", old.tolerance)),
        useless=_whole(ours, "useless", old.useless),
        moments=Moments(
            count=_whole(moments, "count", old.moments.count),
            mean=_number(moments, "mean", old.moments.mean),
            slow=_number(moments, "slow", old.moments.slow),
            square=_number(moments, "square", old.moments.square),
        ),
    )
    return State(
        loss_scale=loss_scale,
        steps=_whole(ours, "steps", now.steps),
        skipped_steps=_whole(ours, "skipped_steps", now.skipped_steps),
    )


def _check_version(ours: Mapping[Any, Any]) -> None:
    version = _whole(ours, "version", VERSION)
    if version > VERSION:
        raise SwitchError(
            f"the state is of version {version}; this halfstep reads versions up to {VERSION}: "
            "load it with a newer one"
        )


def _check_recipe(ours: Mapping[Any, Any], recipe: Recipe) -> None:
    text = ours.get("recipe", recipe)
    try:
        same = Recipe.parse(text) == recipe
    except (RecipeError, UnknownNameError) as error:
        raise SwitchError(
            f"the state is of a recipe that this halfstep does not know: {error}"
        ) from None
    if not same:
        raise SwitchError(f"the state is of recipe {text}; this switch runs {recipe}")


def _rule(given: Mapping[Any, Any], rule: LossScaling) -> LossScaling:
    """The rule with the numbers of the state, where the scale moves by such numbers."""
    if rule.kind is not ScalingKind.DYNAMIC:
        return rule
    try:
        return replace(
            rule,
            growth=_number(given, "growth_factor", rule.growth),
            backoff=_number(given, "backoff_factor", rule.backoff),
            interval=_whole(given, "growth_interval", rule.interval),
        )
    except RecipeError as error:
        raise SwitchError(f"{error}, in the state") from None


def _scale(given: Mapping[Any, Any], old: LossScale) -> float:
    if not old.moves:
        return old.scale
    scale = _number(given, "scale", old.scale)
    if scale <= 0:
        raise SwitchError(
            f"scale={scale} in the state is not above 0: the run that saved it could not go on. "
            "Leave the state out to start afresh"
        )
    return min(max(scale, old.rule.floor), old.rule.ceiling)


def _number(given: Mapping[Any, Any], key: str, otherwise: float) -> float:
    value = given.get(key, otherwise)
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of many
        number = math.nan
    if not math.isfinite(number):
        raise SwitchError(f"{key}={value!r} in the state is not a finite number")
    return number


def _whole(given: Mapping[Any, Any], key: str, otherwise: int) -> int:
    number = _number(given, key, otherwise)
    if number < 0 or number != int(number):
        raise SwitchError(f"{key}={given[key]!r} in the state is not a whole number from 0 on")
    return int(number)
