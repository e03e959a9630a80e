"""A format and a rounding as constants that a Triton kernel is compiled for."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache

from halfstep.format import (
    Accumulator,
    BlockFormat,
    Format,
    Kind,
    Products,
    Rounding,
    ScaleRule,
    overflow,
)

__all__ = ["Blocks", "Grid", "Sums", "bits_of_float", "blocks_of", "grid_of", "sums_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All a rounding of float32 numbers needs to know; fields of numbers are their bits, as int32."""

    rounding: str
    least_dropped: int
    """Bits that a normal number loses."""
    is_even_below: bool
    """Whether the grid is even where float32 numbers are still normal."""
    reach: int
    """Where it is even, a number of biased exponent e loses ``reach - e`` bits."""
    least: int
    """The smallest positive number."""
    highest: int
    lowest: int
    """The magnitude of the most negative number."""
    overflow_up: int
    overflow_down: int
    infinity_up: int
    infinity_down: int
    negative_zero: bool

    @property
    def infinity_differs(self) -> bool:
        """Whether infinity becomes something else than what overflows."""
        return (self.infinity_up, self.infinity_down) != (self.overflow_up, self.overflow_down)

    @property
    def is_float32(self) -> bool:
        """Whether float32 is this grid, overflow included."""
        return self == grid_of(Format.parse("fp32"), Rounding.NEAREST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """An accumulator as constants."""

    adder: Grid
    between: Grid
    chunk: int
    rounds_products: bool


def bits_of_float(x: float) -> int:
    """The bits of a float32, as a signed integer; -0.0 is -2^31, any NaN the quiet one."""
    return 0x7FC00000 if x != x else struct.unpack("<i", struct.pack("<f", x))[0]


@cache
def grid_of(format: Format, rounding: Rounding) -> Grid:
    """The constants of a format whose numbers are float32 numbers."""

    def becomes(*, negative: bool, finite: bool) -> int:
        return bits_of_float(float(overflow(format, rounding, negative=negative, finite=finite)))

    digits = format.mantissa_bits if format.kind is Kind.FLOAT else 23
    return Grid(
        rounding=rounding.value,
        least_dropped=23 - digits,
        is_even_below=format.quantum_exponent + digits > -126,
        reach=format.quantum_exponent + 150,
        least=bits_of_float(2.0**format.quantum_exponent),
        highest=bits_of_float(format.max),
        lowest=bits_of_float(-format.lowest),
        overflow_up=becomes(negative=False, finite=True),
        overflow_down=becomes(negative=True, finite=True),
        infinity_up=becomes(negative=False, finite=False),
        infinity_down=becomes(negative=True, finite=False),
        negative_zero=format.has_negative_zero,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A block format, whose scales are powers of two, as constants."""

    element: Grid
    carrier: Grid
    """bfloat16's, to which the result may have to be rounded."""
    element_exponent: int
    """Of the largest power of two that is an element."""
    least_fraction_up: int
    """From which fraction on, in units of 2^-23, the rule takes the next power of two."""
    lowest: int
    highest: int
    """Exponents that a scale can have."""


@cache
def blocks_of(format: BlockFormat, rounding: Rounding) -> Blocks:
    """The constants of a block format with another rule than amax."""
    one = 2**23
    up = {
        ScaleRule.FLOOR: one,
        ScaleRule.CEIL: 1,
        ScaleRule.EVEN: one - one // 2 ** (format.digits + 1),
        ScaleRule.RCEIL: int((2 * math.frexp(format.element.max)[0] - 1) * one) + 1,
    }
    return Blocks(
        element=grid_of(format.element, rounding),
        carrier=grid_of(Format.parse("bf16"), Rounding.NEAREST),
        element_exponent=format.element.max_exponent,
        least_fraction_up=up[format.rule],
        lowest=format.scale.min_exponent,
        highest=format.scale.max_exponent,
    )


@cache
def sums_of(accumulator: Accumulator) -> Sums:
    """The constants of an accumulator that is no unit."""
    own = accumulator.between == accumulator.adder
    return Sums(
        adder=grid_of(accumulator.format, accumulator.rounding),
        between=grid_of(accumulator.between, accumulator.rounding if own else Rounding.NEAREST),
        chunk=accumulator.chunk,
        rounds_products=accumulator.products is Products.ROUNDED,
    )
