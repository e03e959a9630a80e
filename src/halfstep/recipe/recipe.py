"""A recipe: which number format is used where in training, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from halfstep.errors import RecipeError, UnknownNameError
from halfstep.format import Accumulator, BlockFormat, Format, Rounding
from halfstep.recipe.exceptions import NOTHING_KEPT, Keep
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.op_policy import OpPolicy

__all__ = ["Recipe", "Update"]

FORMAT_FIELDS = (
    "weight",
    "activation",
    "gradient",
    "store",
    "accumulate",
    "master",
    "optimizer",
)
OPERAND_FIELDS = ("weight", "activation", "gradient")
DESCRIPTION_FIELDS = ("name", "summary", "source")
_FP32 = Format.parse("fp32")


class Update(Enum):
    """How a weight becomes a number of ``master`` again after the optimizer has moved it."""

    NEAREST = "nearest"
    """To the nearest, ties to even: an update below half a spacing is lost, each time."""
    STOCHASTIC = "stochastic"
    """Up or down by chance, so that the mean is right: what is lost once comes in another time."""
    KAHAN = "kahan"
    """To the nearest; what is lost is kept in a second number of ``master`` and added next time."""

    @classmethod
    def parse(cls, given: object) -> Update:
        """The update of that name; an `Update` is returned as it is."""
        try:
            return cls(given)
        except ValueError:
            raise UnknownNameError("update", given, [member.value for member in cls]) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Formats by role, what is kept between steps, and the loss scale.

    A dot product reads operands in ``weight``, ``activation`` and ``gradient`` format, by the role
    of each, multiplies exactly, adds in ``accumulate`` and writes its result in ``store``.
    An operand format may be a `BlockFormat`: its blocks lie along the axis that the product sums over.
    Parameters are kept in ``master`` between steps; the optimizer computes and keeps its state in
    ``optimizer``; after a step weights are rounded as ``update`` says, its state to ``moments``.
    Two recipes are equal when they do the same, whatever they are called.

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
    weight: Format | BlockFormat
    activation: Format | BlockFormat
    gradient: Format | BlockFormat
    store: Format
    accumulate: Accumulator
    master: Format
    optimizer: Format
    loss_scaling: LossScaling
    policy: OpPolicy
    keep: Keep = NOTHING_KEPT
    """Dot products whose operands stay in the store format."""
    amax_history: int = 0
    """Steps whose largest magnitudes set the scale of a tensor; 0: the tensor's own, as it is now."""
    hadamard: int = 0
    """Size of the random Hadamard transform on both operands of a weight gradient; 0: none."""
    gradient_rounding: Rounding = Rounding.NEAREST
    """How gradients are rounded to their operand format."""
    inference_only: bool = False
    """True where nothing says how to train with it: an optimizer is refused."""
    update: Update = Update.NEAREST
    """How weights become numbers of ``master`` again after a step."""
    moments: Format | BlockFormat = _FP32
    """What optimizer state is kept in between steps; fp32: as the optimizer leaves it."""

    def __post_init__(self) -> None:
        for key in DESCRIPTION_FIELDS:
            _check_type(self, key, str, "a text")
        for key in FORMAT_FIELDS:
            if key == "accumulate":
                _check_type(self, key, Accumulator, "say Accumulator.parse(text)")
            elif key in OPERAND_FIELDS:
                _check_type(
                    self, key, (Format, BlockFormat), "say Format.parse or BlockFormat.parse"
                )
            else:
                _check_type(self, key, Format, "say Format.parse(text)")
        _check_type(self, "loss_scaling", LossScaling, "say LossScaling(kind=...)")
        _check_type(self, "policy", OpPolicy, "say OpPolicy.parse(text)")
        _check_type(self, "keep", Keep, "say Keep.parse(text)")
        _check_type(self, "gradient_rounding", Rounding, "say Rounding.parse(text)")
        _check_type(self, "inference_only", bool, "say True or False")
        _check_type(self, "update", Update, "say Update.parse(text)")
        _check_type(self, "moments", (Format, BlockFormat), "say Format.parse or BlockFormat.parse")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if type(self.amax_history) is not int or self.amax_history < 0:
            raise RecipeError(
                f"recipe {self.name!r}: amax_history={self.amax_history!r}; allowed: 0, or how many steps"
            )
        size = self.hadamard
        if type(size) is not int or size < 0 or size & (size - 1):
            raise RecipeError(
                f"recipe {self.name!r}: hadamard={size!r}; allowed: 0 and powers of two"
            )
        scaled = [key for key in OPERAND_FIELDS if isinstance(getattr(self, key), BlockFormat)]
        if self.amax_history and any(
            getattr(self, key).rows or not getattr(self, key).element.max for key in scaled
        ):
            raise RecipeError(
                f"recipe {self.name!r}: amax_history={self.amax_history} with blocks smaller than a tensor; "
                "a history is of whole tensors: operands such as e4m3fn@tensor"
            )

    @property
    def is_identity(self) -> bool:
        """True for plain FP32, every format fp32 and scale 1: nothing is to be done."""
        return self.loss_scaling.kind is ScalingKind.NONE and all(
            str(getattr(self, key)) == "fp32" for key in (*FORMAT_FIELDS, "moments")
        )

    @property
    def adds_in_fp32(self) -> bool:
        """True where dot products add in FP32, in whatever order the kernels do."""
        return str(self.accumulate) == "fp32"

    @property
    def reads_by_role(self) -> bool:
        """True where a dot product rounds its operands to other formats than the store format."""
        return any(getattr(self, key) != self.store for key in OPERAND_FIELDS)

    @property
    def largest_gradient(self) -> float:
        """The largest magnitude that a gradient in the region may have: blocks have scales of their own."""
        if isinstance(self.gradient, BlockFormat):
            return self.store.max
        return min(self.gradient.max, self.store.max)

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
        and gradient at once), ``update``, ``moments``, ``policy``, ``scaling`` and the numbers of
        `LossScaling`.

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


def _check_type(recipe: Recipe, key: str, kind: type | tuple[type, ...], how: str) -> None:
    value = getattr(recipe, key)
    if not isinstance(value, kind):
        names = " or a ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise RecipeError(
            f"recipe {recipe.name!r}: {key} is {value!r}, a {type(value).__name__}; "
            f"it must be a {names}, {how}, or use Recipe.replace, which takes text"
        )
