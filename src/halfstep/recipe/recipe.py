"""A recipe: which number format is used where in training, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from halfstep.errors import RecipeError
from halfstep.format import Accumulator, Format
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.op_policy import OpPolicy

__all__ = ["Recipe"]

FORMAT_FIELDS = (
    "weight",
    "activation",
    "gradient",
    "store",
    "accumulate",
    "master",
    "optimizer",
)
DESCRIPTION_FIELDS = ("name", "summary", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Formats by role, what is kept between steps, and the loss scale.

    A dot product reads operands in ``weight``, ``activation`` and ``gradient`` format, by the role
    of each, multiplies exactly, adds in ``accumulate`` and writes its result in ``store``.
    Parameters are kept in ``master`` between steps; the optimizer computes and keeps its state in
    ``optimizer``. Two recipes are equal when they do the same, whatever they are called.

    Raises `RecipeError` where a field is not of its type.

    >>> recipe = Recipe.parse("fp16").replace(accumulate="fp16")
    >>> str(recipe)
    'fp16:accumulate=fp16'
    >>> Recipe.parse(str(recipe)) == recipe
    True
    """

    name: str = field(compare=False)
    summary: str = field(compare=False)
    source: str = field(compare=False)
    weight: Format
    activation: Format
    gradient: Format
    store: Format
    accumulate: Accumulator
    master: Format
    optimizer: Format
    loss_scaling: LossScaling
    policy: OpPolicy

    def __post_init__(self) -> None:
        for key in DESCRIPTION_FIELDS:
            _check_type(self, key, str, "a text")
        for key in FORMAT_FIELDS:
            if key == "accumulate":
                _check_type(self, key, Accumulator, "say Accumulator.parse(text)")
            else:
                _check_type(self, key, Format, "say Format.parse(text)")
        _check_type(self, "loss_scaling", LossScaling, "say LossScaling(kind=...)")
        _check_type(self, "policy", OpPolicy, "say OpPolicy.parse(text)")

    @property
    def is_identity(self) -> bool:
        """True for plain FP32, every format fp32 and scale 1: nothing is to be done."""
        return self.loss_scaling.kind is ScalingKind.NONE and all(
            str(getattr(self, key)) == "fp32" for key in FORMAT_FIELDS
        )

    @property
    def adds_in_fp32(self) -> bool:
        """True where dot products add in FP32, in whatever order the kernels do."""
        return str(self.accumulate) == "fp32"

    @property
    def guarded(self) -> bool:
        """True where gradients that are not finite are kept from the optimizer.

        False where the optimizer itself runs in less than FP32 without a loss scale (fp16-naive):
        such a recipe shows what a plain 16-bit program does, so they pass.
        """
        return self.loss_scaling.kind is not ScalingKind.NONE or self.optimizer.name == "fp32"

    @classmethod
    def parse(cls, given: object) -> Recipe:
        """The recipe that is meant by a text, a torch dtype, or a recipe (returned as it is).

        A text is a name of the catalogue, a synonym (``16-mixed``, ``mixed_float16``,
        ``float16``, ``params=float32,compute=float16,output=float32`` ...), or a variant
        ``base:key=value,...`` whose keys are the format fields, ``operands`` (weight, activation
        and gradient at once), ``policy``, ``scaling`` and the numbers of `LossScaling`.

        Raises `UnknownNameError` for a name that is not known, `RecipeError` for a key or a value
        that is not.

        >>> Recipe.parse("bf16-mixed").name
        'bf16'
        >>> Recipe.parse("fp16:scaling=none").loss_scaling.kind
        <ScalingKind.NONE: 'none'>
        """
        # The text form reads the catalogue, which is made of recipes: import at the call.
        from halfstep.recipe.text import parse_recipe

        return parse_recipe(given)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other values, renamed to say so; format names may be given as text.

        Keys are the fields of the recipe and, as in the text form, ``operands``, ``scaling`` and
        the numbers of `LossScaling`. Without a ``name`` the copy is named by its text form, and a
        copy that equals the catalogue's recipe gets that one's name back.

        Raises `RecipeError` for a key or a value that is not allowed.

        >>> Recipe.parse("fp16").replace(initial=1024.0, policy="paper").name
        'fp16:policy=paper,initial=1024'
        """
        from halfstep.recipe.text import changed_recipe

        return changed_recipe(self, changes)

    def __str__(self) -> str:
        """The text form: short, and ``Recipe.parse`` of it is equal to the recipe."""
        from halfstep.recipe.text import recipe_text

        return recipe_text(self)


def _check_type(recipe: Recipe, key: str, kind: type, how: str) -> None:
    value = getattr(recipe, key)
    if not isinstance(value, kind):
        raise RecipeError(
            f"recipe {recipe.name!r}: {key} is {value!r}, a {type(value).__name__}; "
            f"it must be a {kind.__name__}, {how}, or use Recipe.replace, which takes text"
        )
