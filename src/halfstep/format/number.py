"""`Format`: one number format as one frozen value; every limit is derived from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format.choices import Kind, Overflow, Specials, Subnormals

__all__ = ["Format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A scalar number format: which numbers there are, how they are coded, what overflow becomes.

    A literal states the fields below; ``max``, ``eps``, ``smallest`` and all other limits are
    properties derived from them, exact as Python floats. ``str(format)`` is its name, and
    ``Format.parse(str(format)) == format``.

    Raises `FormatError` for fields that contradict each other.

    >>> f = Format.parse("e4m3fn")
    >>> f.max, f.smallest, f.eps, f.has_inf, f.has_nan, f.bits
    (448.0, 0.001953125, 0.125, False, True, 8)
    """

    name: str
    kind: Kind = Kind.FLOAT
    exponent_bits: int = 0
    """Width of the exponent field of a float."""
    mantissa_bits: int = 0
    """Stored bits after the binary point: of a float's significand, or of a fixed-point number."""
    integer_bits: int = 0
    """Bits of a fixed-point number before the binary point, the sign included."""
    bias: int = 0
    """What is subtracted from a float's exponent field."""
    signed: bool = True
    zero: bool = True
    """False for a float whose exponent field 0 is a power of two like any other (e8m0)."""
    symmetric: bool = False
    """True for a fixed-point format that leaves its most negative code unused (ternary)."""
    specials: Specials = Specials.NONE
    overflow: Overflow = Overflow.SATURATE
    subnormals: Subnormals = Subnormals.KEEP
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind is Kind.FLOAT:
            possible = 1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 23
            given = f"{self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits"
            allowed = "1 to 8 exponent bits and 0 to 23 mantissa bits"
        elif self.kind is Kind.FIXED:
            possible = self.integer_bits >= 1 and self.mantissa_bits >= 0 and 2 <= self.bits <= 32
            given = f"{self.integer_bits} integer and {self.mantissa_bits} fraction bits"
            allowed = "1 or more integer bits (the sign is one of them), 2 to 32 bits in all"
        else:
            possible, given, allowed = True, "", ""
        if not possible:
            raise FormatError(f"{self.name}: {given}; a {self.kind.value} format has {allowed}")
        if self.subnormals is Subnormals.FLUSH and not (self.zero and self.smallest_normal > 0):
            raise FormatError(
                f"{self.name}: flushes subnormal numbers; only a floating-point format with normal "
                "numbers and zero can"
            )
        possible_overflows = [Overflow.SATURATE]
        possible_overflows += [Overflow.INF] if self.has_inf else []
        possible_overflows += [Overflow.NAN] if self.has_nan else []
        possible_overflows += [Overflow.WRAP] if self._can_wrap else []
        if self.overflow not in possible_overflows:
            raise FormatError(
                f"{self.name}: overflow to {self.overflow.value}, which this format cannot; "
                f"allowed: {', '.join(o.value for o in possible_overflows)}"
            )

    @classmethod
    def parse(cls, given: object) -> Format:
        """The format that is meant by a name, a torch dtype, or a format (returned as it is).

        A name is one of the catalogue (`formats`), of a family (``eXmY`` with 1 <= X <= 8 and
        0 <= Y <= 23, IEEE-like; ``intN`` and ``qI.F`` with 2 to 32 bits, I counts the sign), or a
        synonym (``float16``, ``half``, ``torch.float8_e4m3fn`` ...). Suffixes override what the
        literal says: ``:inf``, ``:saturate``, ``:nan`` and ``:wrap`` what overflow becomes,
        ``:flush`` and ``:keep`` what subnormal numbers do (``e5m2:saturate:flush``).

        Raises `UnknownNameError` for a name that is none of these, `FormatError` for a format that
        cannot be.

        >>> Format.parse("e6m9").max
        4290772992.0
        >>> Format.parse("q3.5").lowest, Format.parse("e4m3fn:nan").overflow.value
        (-4.0, 'nan')
        """
        if isinstance(given, cls):
            return given
        # Names mean literals, and literals are made of this class: import at the call.
        from halfstep.format.names import parse_name

        return parse_name(str(given))

    def with_overflow(self, overflow: Overflow) -> Format:
        """This format with another overflow; its name says so."""
        return self._with(overflow, self.subnormals)

    def with_subnormals(self, subnormals: Subnormals) -> Format:
        """This format with its subnormal numbers kept or flushed to zero; its name says so.

        >>> f = Format.parse("e4m3fn").with_subnormals(Subnormals.FLUSH)
        >>> str(f), f.smallest == f.smallest_normal, f.smallest_subnormal
        ('e4m3fn:flush', True, nan)
        """
        return self._with(self.overflow, subnormals)

    def _with(self, overflow: Overflow, subnormals: Subnormals) -> Format:
        if (overflow, subnormals) == (self.overflow, self.subnormals):
            return self
        stem = self.name.partition(":")[0]
        try:
            base = Format.parse(stem)
        except UnknownNameError:  # a literal of the user's
            base = self
        suffixes = [overflow.value] if overflow is not base.overflow else []
        suffixes += [subnormals.value] if subnormals is not base.subnormals else []
        name = ":".join([base.name, *suffixes])
        return replace(self, name=name, overflow=overflow, subnormals=subnormals)

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)  # of all fields it would cost microseconds at every cached call

    # What there is

    @property
    def bits(self) -> int:
        """Bits of one number, as stored."""
        if self.kind is Kind.FLOAT:
            return int(self.signed) + self.exponent_bits + self.mantissa_bits
        if self.kind is Kind.FIXED:
            return self.integer_bits + self.mantissa_bits
        return 1

    @property
    def code_count(self) -> int:
        """How many codes mean something: 2^bits, but those less that are unused."""
        if self.subnormals is Subnormals.FLUSH:
            return 2**self.bits - (1 + int(self.signed)) * (2**self.mantissa_bits - 1)
        return 2**self.bits - int(self.symmetric)

    def codes(self) -> Iterator[int]:
        """Every code that means something, ascending as an unsigned integer."""
        return (code for code in range(2**self.bits) if not self.is_unused(code))

    def is_unused(self, code: int) -> bool:
        """True for the code that a symmetric format leaves out, and for flushed subnormal numbers."""
        if self.symmetric:
            return code == 1 << (self.bits - 1)
        if self.subnormals is Subnormals.KEEP:
            return False
        magnitude = code % 2 ** (self.bits - int(self.signed))
        return 0 < magnitude < 2**self.mantissa_bits

    @property
    def has_inf(self) -> bool:
        """True if some code is infinity."""
        return self.specials in (Specials.IEEE, Specials.EXTENDED)

    @property
    def has_nan(self) -> bool:
        """True if some code is NaN."""
        if self.specials is Specials.IEEE:
            return self.mantissa_bits > 0
        return self.specials is not Specials.NONE

    @property
    def has_zero(self) -> bool:
        """True if some code is zero."""
        return self.zero and self.kind is not Kind.BINARY

    @property
    def has_negative_zero(self) -> bool:
        """True if zero has two codes, +0 and -0."""
        return (
            self.kind is Kind.FLOAT and self.zero and self.signed and not self._nan_for_minus_zero
        )

    @property
    def odd_exponents(self) -> bool:
        """True if, without a mantissa, what makes a number odd is the last bit of its exponent.

        So in IEEE P3109 (not checked); IEEE 754 has no such rule, and all numbers but zero are odd.
        """
        return self._nan_for_minus_zero and self.mantissa_bits == 0

    @property
    def _nan_for_minus_zero(self) -> bool:
        return self.specials in (Specials.EXTENDED, Specials.FINITE)

    @property
    def _can_wrap(self) -> bool:
        return self.kind is Kind.FIXED and not self.symmetric

    # Limits

    @property
    def precision(self) -> int:
        """Significant bits: the stored mantissa bits and the leading one. 0 where not a float."""
        return self.mantissa_bits + 1 if self.kind is Kind.FLOAT else 0

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number. Of a fixed-point number, of its spacing."""
        if self.kind is not Kind.FLOAT:
            return -self.mantissa_bits
        return 1 - self.bias if self.zero else -self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the binade that the largest number is in."""
        return math.frexp(self.max)[1] - 1 if self.max else self.min_exponent

    @property
    def quantum_exponent(self) -> int:
        """log2 of the spacing at zero, the finest there is."""
        if self.kind is Kind.FLOAT:
            return self.min_exponent - self.mantissa_bits
        return -self.mantissa_bits

    @property
    def max(self) -> float:
        """The largest finite number."""
        if self.kind is Kind.FLOAT:
            return float(self.magnitude_of(self.max_magnitude_code))
        if self.kind is Kind.FIXED:
            return float(Fraction(2 ** (self.bits - 1) - 1, 2**self.mantissa_bits))
        return 1.0

    @property
    def lowest(self) -> float:
        """The most negative finite number; of an unsigned format the smallest there is."""
        if self.kind is Kind.FIXED and not self.symmetric:
            return -(2.0 ** (self.integer_bits - 1))
        if not self.signed:
            return 0.0 if self.zero else self.smallest
        return -self.max

    @property
    def smallest(self) -> float:
        """The smallest positive number; NaN if there is none (e1m0)."""
        if self.kind is Kind.BINARY:
            return 1.0
        if self.kind is Kind.FLOAT and self.max == 0:
            return math.nan
        if self.subnormals is Subnormals.FLUSH or not self.zero:
            return math.ldexp(1.0, self.min_exponent)
        return math.ldexp(1.0, self.quantum_exponent)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number of full precision; NaN for fixed point and e1mY."""
        value = math.ldexp(1.0, self.min_exponent)
        return value if self.kind is Kind.FLOAT and value <= self.max else math.nan

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number below the normal ones; NaN if there is none."""
        normal = self.smallest_normal
        has_any = self.kind is Kind.FLOAT and self.mantissa_bits > 0 and self.zero
        return self.smallest if has_any and self.smallest != normal else math.nan

    @property
    def eps(self) -> float:
        """The distance from 1 to the next larger number, as numpy.finfo has it.

        Of a fixed-point format, the spacing; of binary, 2.
        """
        if self.kind is Kind.BINARY:
            return 2.0
        return math.ldexp(1.0, -self.mantissa_bits)

    # Codes

    @property
    def max_magnitude_code(self) -> int:
        """The code of the largest finite number of a float, its sign bit left out."""
        all_ones = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        if self.specials is Specials.IEEE:
            return all_ones - 2**self.mantissa_bits
        # unsigned, P3109's NaN has the uppermost code, and infinity the one below
        taken = int(self._nan_for_minus_zero and not self.signed)
        return all_ones - taken - int(self.specials in (Specials.NAN_ONLY, Specials.EXTENDED))

    def magnitude_of(self, code: int) -> Fraction:
        """The absolute value of a float's finite code, sign bit left out.

        field = code >> mantissa_bits; (1 + mantissa / 2^mantissa_bits) * 2^(field - bias), and
        without the 1, at the exponent of field 1, where field is 0.
        """
        field, mantissa = divmod(code, 2**self.mantissa_bits)
        if field == 0 and self.zero:
            return mantissa * Fraction(2) ** self.quantum_exponent
        significand = 2**self.mantissa_bits + mantissa
        return significand * Fraction(2) ** (field - self.bias - self.mantissa_bits)
