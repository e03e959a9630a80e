"""The recipe's numbers on FP32 carriers, and what is known of each storage: its role, if it is rounded.

A carrier is a tensor of the dtype that the program believes it has (FP32 or FP64), whose values are those of
the recipe. What is known of it is a mark on its storage: views share it, and it goes with the storage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    "to",
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

    def note_single(self, t: Tensor) -> None:
        """Note that a single number is of the forward: with it alone a backward has no gradient."""
        if t.layout is torch.strided and not self.of(t) & ROLES:
            self.set(t, ACTIVATION | WIDE)

    def is_of_forward(self, t: Tensor) -> bool:
        """True for a single number that is known to be no gradient."""
        return isinstance(t, nn.Parameter) or bool(self.of(t) & (ACTIVATION | WEIGHT))


# torch's own: the program's ``Tensor.to`` and ``float`` are looked at (`surroundings.patch_float`).
_TO: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.float16: torch._C.TensorBase.half,
    torch.bfloat16: torch._C.TensorBase.bfloat16,
    torch.float32: torch._C.TensorBase.float,
    torch.float64: torch._C.TensorBase.double,
}


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in a floating-point dtype, past what the program's own changes of dtype meet."""
    return _TO[dtype](t)


_ROLES = {WEIGHT: Role.WEIGHT, ACTIVATION: Role.ACTIVATION, GRADIENT: Role.GRADIENT}
_SITE = Site("", named=False)
# Of a convolution's weight, by its dimensions: the two axes of channels to the end, and to where they were.
_TURNS = {n: ((*range(2, n), 0, 1), (n - 2, n - 1, *range(n - 2))) for n in (3, 4, 5)}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Tiles:
    """Rounds convolutions' operands to a format of tiles; to nearest, where they are not random."""

    __slots__ = ("are_random", "kernels", "planes")

    def __init__(self, format: BlockFormat, first: Format | None, are_random: bool) -> None:
        self.are_random = are_random
        self.planes = ops.block_rounder(format, first, joined=True)
        self.kernels = ops.kernel_rounder(format, first)


class Numbers:
    """How the formats of one recipe round.

    ``dtype`` is torch's dtype of the store format, or FP32 where torch has none.
    """

    __slots__ = (
        "_format",
        "_operands",
        "_rows",
        "_store",
        "_tiled",
        "dtype",
        "identity",
        "reads",
        "recipe",
    )

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._format = recipe.store
        self.dtype: torch.dtype = _DTYPES.get(recipe.store.name, torch.float32)
        self.identity = recipe.store.name == "fp32"
        self._operands = Operands(recipe)
        self._store = _rounder(self._format, self.dtype)
        self._rows = ops.row_rounder(self._format)
        self.reads: dict[int, Callable[[Tensor, int, float], Tensor]] = {}
        """By role, and whether it is of the store format: how a dot product reads it; see `operand`."""
        self._tiled: dict[int, _Tiles] = {}
        """Of the roles whose blocks span a second axis, and as `reads`."""
        for mark, role in _ROLES.items():
            format = self._operands.format(role)
            read = self._reader(role)
            if format == self._format:
                self.reads[mark], self.reads[mark | LOW] = read, _as_it_is
            else:
                self.reads[mark], self.reads[mark | LOW] = self._after_store(role, read), read
            if isinstance(format, BlockFormat) and format.rows > 1:
                first = None if self.identity else self._format
                are_random = self._operands.is_stochastic(role)
                self._tiled[mark] = _Tiles(format, first, are_random)
                self._tiled[mark | LOW] = _Tiles(format, None, are_random)

    def _after_store(
        self, role: Role, read: Callable[[Tensor, int, float], Tensor]
    ) -> Callable[[Tensor, int, float], Tensor]:
        """Operands flow in the store format, a weight's working copy too: rounded to it first."""
        if self.identity:
            return read
        format = self._operands.format(role)
        if not isinstance(format, BlockFormat) or self._operands.is_stochastic(role):
            return lambda t, dim, scale: read(self.stored(t, scale), dim, scale)
        in_blocks = ops.block_rounder(format, self._format)

        def both(t: Tensor, dim: int, scale: float) -> Tensor:
            if scale == 1.0 and t.dtype is torch.float32:
                return in_blocks(t, dim)
            return read(self.stored(t, scale), dim, scale)

        return both

    def _reader(self, role: Role) -> Callable[[Tensor, int, float], Tensor]:
        format = self._operands.format(role)
        if format == self._format:
            return lambda t, dim, scale: self.stored(t, scale)
        if str(format) == "fp32":
            return _as_it_is
        if self._operands.is_stochastic(role):
            return lambda t, dim, scale: self._rounded(t, role, dim, scale)
        if isinstance(format, Format):
            rounded = _rounder(format, torch.float32)
            return lambda t, dim, scale: _scaled(rounded, t, scale)
        in_blocks = ops.block_rounder(format)

        def plain(t: Tensor, dim: int, scale: float) -> Tensor:
            if scale == 1.0 and t.dtype is torch.float32:
                return in_blocks(t, dim)
            return self._rounded(t, role, dim, scale)

        return plain

    def _rounded(self, t: Tensor, role: Role, dim: int, scale: float) -> Tensor:
        """In blocks, or by random bits."""
        x = t if scale == 1.0 else t * scale
        if t.dtype is torch.float64 and isinstance(format := self._operands.format(role), Format):
            y = ops.round_to(x.detach(), format)
        else:
            y = self._operands.rounded(x, role, dim, _SITE)
        return y if scale == 1.0 else y / scale

    def stored(self, t: Tensor, scale: float = 1.0) -> Tensor:
        """``t`` rounded to the store format; ``t * scale`` is what is rounded, and divided out again."""
        return t if self.identity else _scaled(self._store, t, scale)

    def store(self, made: Tensor, bias: Tensor | None) -> Tensor:
        """An FP32 result, with a rounded bias added to its rows, in the store format; written over."""
        if self.identity:
            return made if bias is None else made.add_(bias)
        return self._rows(made, bias)

    def operand(self, t: Tensor, marks: int, dim: int, scale: float = 1.0) -> Tensor:
        """``t`` as a dot product that sums over ``dim`` reads it: rounded to the format of its role."""
        return self.reads[marks & (ROLES | LOW)](t, dim, scale)

    def plane(self, t: Tensor, marks: int, dim: int, scale: float = 1.0) -> Tensor:
        """As `operand`, of a convolution's (N, C, *positions): its axes after ``dim`` are one to a tile."""
        key = marks & (ROLES | LOW)
        tiles = self._tiled.get(key)
        if tiles is None:
            return self.reads[key](t, dim, scale)
        if scale == 1.0 and t.dtype is torch.float32 and not tiles.are_random:
            return tiles.planes(t, dim)
        return self.reads[key](t.flatten(dim + 1), dim, scale).view_as(t)

    def kernel(self, t: Tensor, marks: int, dim: int, scale: float = 1.0) -> Tensor:
        """As `operand`, of a convolution's weight: tiles span its first two axes, ``dim`` is one of them."""
        key = marks & (ROLES | LOW)
        tiles = self._tiled.get(key)
        if tiles is None:
            return self.reads[key](t, dim, scale)
        if scale == 1.0 and t.dtype is torch.float32 and not tiles.are_random:
            return tiles.kernels(t, dim)
        there, back = _TURNS[t.dim()]
        turned = t.permute(there).contiguous()
        return self.reads[key](turned, dim - 2, scale).permute(back)

    @property
    def gradient_is_stored(self) -> bool:
        """True where a dot product reads a gradient in the store format."""
        return self._operands.format(Role.GRADIENT) == self._format

    @property
    def ignores_axes(self) -> bool:
        """True where an operand is rounded alike for all products that read it."""
        return self._operands.ignores_axes

    def master(self, t: Tensor) -> Tensor:
        """``t`` rounded to the format that weights are kept in."""
        return ops.round_to(t.detach(), self.recipe.master)


def _as_it_is(t: Tensor, dim: int, scale: float) -> Tensor:
    return t


def _rounder(format: Format, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounds carriers to ``format``, by way of torch's ``dtype`` where that is not FP32."""
    rounded = ops.rounder(format)
    if dtype is torch.float32:
        return rounded

    narrowed, widened = _TO[dtype], _TO[torch.float32]

    def by_dtype(t: Tensor) -> Tensor:
        return widened(narrowed(t)) if t.dtype is torch.float32 else rounded(t)

    return by_dtype


def _scaled(rounded: Callable[[Tensor], Tensor], t: Tensor, scale: float) -> Tensor:
    # A power of two: multiplying and dividing by it is exact, so this is the scaled program's rounding.
    return rounded(t) if scale == 1.0 else rounded(t * scale).div_(scale)
