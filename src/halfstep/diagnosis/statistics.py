"""Counting what a format would lose: binades of values, and updates that leave a weight where it
was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Exponents", "Reach", "Updates", "count_exponents", "count_updates", "reach", "total"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What a format can hold, as exponents of two: from ``smallest`` (subnormal) to ``largest``.

    ``normal`` is the smallest exponent with all bits of the significand.
    """

    name: str
    smallest: int
    normal: int
    largest: int


def reach(dtype: torch.dtype) -> Reach:
    """The exponents ``dtype`` holds; for float16: -24, -14, 15.

    >>> reach(torch.float16)
    Reach(name='float16', smallest=-24, normal=-14, largest=15)
    """
    limits = torch.finfo(dtype)

    def exponent(value: float) -> int:
        return int(torch.tensor(value, dtype=torch.float64).frexp().exponent) - 1

    return Reach(
        name=str(dtype).removeprefix("torch."),
        smallest=exponent(limits.tiny * limits.eps),
        normal=exponent(limits.tiny),
        largest=exponent(limits.max),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponents:
    """How many values lie in each binade.

    ``bins[e]`` counts values with 2^e < abs(value) <= 2^(e+1). The upper end is the closed one
    because rounding to nearest even sends exactly half the smallest number to zero: with these
    bins :meth:`flushed` is exact. ``zeros`` are values that were zero already, and are no loss of
    any format; ``nonfinite`` counts infinities and NaN.
    """

    bins: Mapping[int, int] = field(default_factory=dict)
    zeros: int = 0
    nonfinite: int = 0

    @property
    def nonzero(self) -> int:
        """Finite values that are not zero."""
        return sum(self.bins.values())

    @property
    def values(self) -> int:
        """All values counted."""
        return self.nonzero + self.zeros + self.nonfinite

    def flushed(self, to: Reach, *, scale: int = 0) -> int:
        """How many non-zero values ``to`` rounds to zero after multiplication by 2^scale (nearest
        even).
        """
        return sum(count for e, count in self.bins.items() if e + scale + 1 < to.smallest)

    def subnormal(self, to: Reach, *, scale: int = 0) -> int:
        """How many lie between zero and the normal range of ``to`` after 2^scale: kept, with fewer
        bits.
        """
        return sum(
            count for e, count in self.bins.items() if to.smallest - 1 <= e + scale < to.normal
        )

    def overflown(self, to: Reach, *, scale: int = 0) -> int:
        """How many lie above the largest binade of ``to`` after multiplication by 2^scale."""
        return sum(count for e, count in self.bins.items() if e + scale > to.largest)

    def lost_share(self, to: Reach, *, scale: int = 0) -> float:
        """:meth:`flushed` over non-zero values, in percent; 0 if there are none."""
        return 100.0 * self.flushed(to, scale=scale) / self.nonzero if self.nonzero else 0.0

    @property
    def zero_share(self) -> float:
        """``zeros`` over all values, in percent; 0 if there are none."""
        return 100.0 * self.zeros / self.values if self.values else 0.0

    def __add__(self, other: Exponents) -> Exponents:
        bins = dict(self.bins)
        for exponent, count in other.bins.items():
            bins[exponent] = bins.get(exponent, 0) + count
        return Exponents(
            bins=bins, zeros=self.zeros + other.zeros, nonfinite=self.nonfinite + other.nonfinite
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """How many elements of the weights were to change, and how many could not on a
    format's grid.
    """

    attempted: int = 0
    swallowed: int = 0

    @property
    def swallowed_share(self) -> float:
        """``swallowed`` over ``attempted``, in percent; 0 if nothing was attempted."""
        return 100.0 * self.swallowed / self.attempted if self.attempted else 0.0

    def __add__(self, other: Updates) -> Updates:
        return Updates(
            attempted=self.attempted + other.attempted, swallowed=self.swallowed + other.swallowed
        )


def count_exponents(values: Tensor) -> Exponents:
    """The :class:`Exponents` of ``values``, any shape and floating dtype, without a copy to
    float64.
    """
    flat = values.detach().reshape(-1)
    finite = flat[torch.isfinite(flat)]
    nonzero = finite[finite != 0].float()
    mantissa, exponent = torch.frexp(
        nonzero
    )  # |value| = mantissa * 2^exponent, mantissa in [0.5, 1)
    binade = exponent - 1 - (mantissa.abs() == 0.5).int()
    bins: dict[int, int] = {}
    if len(binade):
        lowest = int(binade.min())
        counts = torch.bincount(binade - lowest)
        bins = {lowest + i: count for i, count in enumerate(counts.tolist()) if count}
    return Exponents(bins=bins, zeros=len(finite) - len(nonzero), nonfinite=len(flat) - len(finite))


def count_updates(
    before: Tensor, after: Tensor, gradient: Tensor, *, grid: torch.dtype = torch.float16
) -> Updates:
    """Which elements of a weight were to change and, on ``grid``, would stay as they were.

    ``before`` and ``after`` are the weight around one optimizer step, ``gradient`` what the step
    was given; all of one shape.

    Where the weight has more bits than ``grid`` (a master copy), an update is attempted if
    ``after != before``, and swallowed if adding it to the rounded weight gives the rounded weight:
    ``round(round(before) + (after - before)) == round(before)``. Where the weight is on the grid
    itself the update is no longer to be seen: it counts as attempted if ``gradient`` is not zero,
    as swallowed if the weight did not move. Elements that are not finite are left out.
    """
    before, after = before.detach(), after.detach()
    on_grid = before.dtype == grid or (_on_grid(before, grid) and _on_grid(after, grid))
    finite = torch.isfinite(before) & torch.isfinite(after) & torch.isfinite(gradient)
    if on_grid:
        attempted = (gradient.detach() != 0) & finite
        swallowed = attempted & (after == before)
    else:
        attempted = (after != before) & finite
        rounded = before.to(grid)
        moved = (rounded.float() + (after.float() - before.float())).to(grid)
        swallowed = attempted & (moved == rounded)
    return Updates(attempted=int(attempted.sum()), swallowed=int(swallowed.sum()))


def _on_grid(values: Tensor, grid: torch.dtype) -> bool:
    return bool(((values.to(grid).to(values.dtype) == values) | values.isnan()).all())


def total(parts: Iterable[Exponents]) -> Exponents:
    """The sum of ``parts``; nothing counted if there are none."""
    return sum(parts, start=Exponents())
