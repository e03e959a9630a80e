"""The recipe's numbers on FP32 carriers, and what is known of each storage: its role, if it is rounded.

A carrier is a tensor of the dtype that the program believes it has (FP32 or FP64), whose values are those of
the recipe. What is known of it is a mark on its storage: views share it, and it goes with the storage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep import ops
from halfstep.format import BlockFormat, Format
from halfstep.recipe import Recipe
from halfstep.switching.operands import Operands, Role, Site

__all__ = [
    "ACTIVATION",
    "CARRIERS",
    "GRADIENT",
    "LOW",
    "ROLES",
    "WEIGHT",
    "WIDE",
    "Marks",
    "Numbers",
]

CARRIERS = (torch.float32, torch.float64)

LOW = 1
"""On the grid of the store format."""
WIDE = 2
"""Never rounded where it is read, whatever the policy: statistics that a backward reads."""
WEIGHT = 4
ACTIVATION = 8
GRADIENT = 16
ROLES = WEIGHT | ACTIVATION | GRADIENT
_BITS = 5


class Marks:
    """Marks of one emulation; those of another mean nothing to it."""

    __slots__ = ("_owner",)

    def __init__(self, serial: int) -> None:
        self._owner = serial << _BITS

    def of(self, t: Tensor) -> int:
        """The marks of a strided tensor's storage; 0 where it has none."""
        mark = getattr(t.untyped_storage(), "_halfstep_mark", 0)
        return mark - self._owner if mark >> _BITS == self._owner >> _BITS else 0

    def set(self, t: Tensor, marks: int) -> None:
        """Mark its storage, in place of what it was marked with."""
        t.untyped_storage()._halfstep_mark = self._owner | marks  # pyright: ignore[reportAttributeAccessIssue]


_ROLES = {WEIGHT: Role.WEIGHT, ACTIVATION: Role.ACTIVATION, GRADIENT: Role.GRADIENT}
_SITE = Site("", named=False)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Numbers:
    """How the formats of one recipe round.

    ``dtype`` is torch's dtype of the store format, or FP32 where torch has none.
    """

    __slots__ = ("_operands", "dtype", "identity", "recipe", "store")

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.store = recipe.store
        self.dtype: torch.dtype = _DTYPES.get(recipe.store.name, torch.float32)
        self.identity = recipe.store.name == "fp32"
        self._operands = Operands(recipe)

    def stored(self, t: Tensor, scale: float = 1.0) -> Tensor:
        """``t`` rounded to the store format; ``t * scale`` is what is rounded, and divided out again."""
        return t if self.identity else _rounded(t, self.store, self.dtype, scale)

    def operand(self, t: Tensor, marks: int, dim: int, scale: float = 1.0) -> Tensor:
        """``t`` as a dot product that sums over ``dim`` reads it: rounded to the format of its role."""
        role = _ROLES[marks & ROLES]
        format = self._operands.format(role)
        if format == self.store:
            return t if marks & LOW else self.stored(t, scale)
        if str(format) == "fp32":
            return t
        if not isinstance(format, BlockFormat) and t.dtype is torch.float64:
            return _rounded(t, format, torch.float32, scale)
        x = t if scale == 1.0 else t * scale
        y = self._operands.rounded(x, role, dim, _SITE)
        return y if scale == 1.0 else y / scale

    @property
    def ignores_axes(self) -> bool:
        """True where an operand is rounded alike for all products that read it."""
        return self._operands.ignores_axes

    def master(self, t: Tensor) -> Tensor:
        """``t`` rounded to the format that weights are kept in."""
        return ops.round_to(t.detach(), self.recipe.master)


def _rounded(t: Tensor, format: Format, dtype: torch.dtype, scale: float) -> Tensor:
    # A power of two: multiplying and dividing by it is exact, so this is the scaled program's rounding.
    x = t if scale == 1.0 else t * scale
    if dtype is not torch.float32 and t.dtype is torch.float32:
        y = x.to(dtype).to(torch.float32)
    else:
        y = ops.round_to(x.detach(), format)
    return y if scale == 1.0 else y.div_(scale)
