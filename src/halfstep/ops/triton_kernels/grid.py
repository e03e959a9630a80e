"""A format and a rounding as constants that a Triton kernel is compiled for."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

from halfstep.format import Accumulator, Format, Kind, Products, Rounding, overflow

__all__ = ["Grid", "Sums", "bits_of_float", "grid_of", "sums_of"]


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
