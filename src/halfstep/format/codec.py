"""The exact scalar codec: decode, encode and round one number, in fractions. Written to be read.

The text-book twin of every array kernel: slow, and right by inspection. A value is a `Fraction`, or
a Python float where no fraction exists: infinities, NaN, and -0.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

from halfstep.errors import FormatError
from halfstep.format.choices import Kind, Overflow, Rounding, Specials
from halfstep.format.number import Format

__all__ = ["Value", "decode", "encode", "overflow", "round_number"]

Value = Fraction | float


def decode(code: int, format: Format) -> Value:
    """The number that a code means.

    -0 and infinities and NaN come as floats, all else as a fraction. Raises `FormatError` for a
    code that is out of range or unused.

    >>> decode(0b0_1111_110, Format.parse("e4m3fn"))
    Fraction(448, 1)
    """
    if not 0 <= code < 2**format.bits:
        raise FormatError(f"code {code} of {format}; allowed: 0 to {2**format.bits - 1}")
    if format.kind is Kind.BINARY:
        return Fraction(1 if code else -1)
    sign_bit = 1 << (format.bits - 1)
    if format.kind is Kind.FIXED:
        if format.symmetric and code == sign_bit:
            raise FormatError(f"code {code} of {format} is not used")
        integer = code - 2 * sign_bit if code & sign_bit else code
        return Fraction(integer, 2**format.mantissa_bits)
    negative = format.signed and bool(code & sign_bit)
    magnitude = code & (sign_bit - 1) if format.signed else code
    if magnitude > format.max_magnitude_code:
        infinite = format.has_inf and magnitude == format.max_magnitude_code + 1
        return (-math.inf if negative else math.inf) if infinite else math.nan
    value = format.magnitude_of(magnitude)
    if negative and value == 0:
        return -0.0
    return -value if negative else value


def encode(value: Value, format: Format) -> int:
    """The code of a number that is on the format's grid; of NaN, the quiet one.

    Raises `FormatError` for a number that no code means: round it first.

    >>> hex(encode(Fraction(-3, 2), Format.parse("fp16")))
    '0xbe00'
    """
    if isinstance(value, float) and math.isnan(value):
        if not format.has_nan:
            raise FormatError(f"NaN has no code in {format}")
        return _nan_code(format)
    negative = math.copysign(1.0, value) < 0
    if isinstance(value, float) and math.isinf(value):
        if not format.has_inf:
            raise FormatError(f"{value} has no code in {format}; its largest is {format.max}")
        return (int(negative) << (format.bits - 1)) | (format.max_magnitude_code + 1)
    exact = Fraction(value)
    if round_number(value, format) != exact:
        raise FormatError(f"{value} is not a number of {format}; round it first")
    if format.kind is Kind.BINARY:
        return int(exact > 0)
    if format.kind is Kind.FIXED:
        return int(exact * 2**format.mantissa_bits) % 2**format.bits
    sign = int(negative and format.signed) << (format.bits - 1)
    return sign | _magnitude_code(abs(exact), format)


def round_number(
    value: Value,
    format: Format,
    rounding: Rounding = Rounding.NEAREST,
    uniform: Fraction = Fraction(0),
) -> Value:
    """The number of the format that ``value`` rounds to.

    NaN stays NaN, also where the format has no code for it: an error must stay visible. -0 and what
    rounds to zero from below become -0.0 where the format has it. A number that rounds beyond the
    largest becomes what ``format.overflow`` says; directed roundings stop at the largest number as
    in IEEE 754 section 7.4. Infinity saturates where overflow does, else it stays, or becomes NaN
    in a format without it. Negative numbers become NaN in an unsigned format; zero becomes the
    smallest number in a format without zero.

    ``uniform``, in [0, 1), is what `Rounding.STOCHASTIC` draws: the magnitude becomes
    floor(magnitude / quantum + uniform) * quantum. The quantum is
    2^(max(exponent, min_exponent) - mantissa_bits).
    Binary has the roundings nearest (0 is a tie and becomes 1) and stochastic, where 1 has the
    probability (1 + value) / 2 for values in [-1, 1].

    >>> round_number(Fraction(1, 10), Format.parse("e2m1"))
    Fraction(0, 1)
    >>> round_number(Fraction(5, 2), Format.parse("e2m1")), round_number(1e9, Format.parse("fp16"))
    (Fraction(2, 1), inf)
    """
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    negative = math.copysign(1.0, value) < 0
    infinite = isinstance(value, float) and math.isinf(value)
    if format.kind is Kind.BINARY:
        exact = Fraction(-1 if negative else 1) if infinite else Fraction(value)
        return _round_binary(exact, rounding, uniform)
    if not format.signed and negative and value != 0:
        return math.nan
    if infinite:
        return overflow(format, rounding, negative=negative, finite=False)
    magnitude = abs(Fraction(value))
    quantum = _quantum(magnitude, format)
    count = magnitude // quantum
    rest = magnitude / quantum - count
    count += _round_up(rounding, count, rest, negative, uniform)
    result = count * quantum
    if not format.has_zero:
        result = max(result, Fraction(format.smallest))
    if result > abs(Fraction(format.lowest if negative and format.signed else format.max)):
        return overflow(format, rounding, negative=negative, finite=True)
    if negative and result == 0:
        return -0.0 if format.has_negative_zero else Fraction(0)
    return -result if negative and format.signed else result


def _quantum(magnitude: Fraction, format: Format) -> Fraction:
    """The spacing of the grid, as if exponents had no upper end, in the binade of ``magnitude``."""
    if format.kind is Kind.FIXED:
        return Fraction(2) ** format.quantum_exponent
    exponent = max(_exponent(magnitude), format.min_exponent)
    return Fraction(2) ** (exponent - format.mantissa_bits)


def _exponent(magnitude: Fraction) -> int:
    """The integer e with 2^e <= magnitude < 2^(e+1); very small for zero."""
    if magnitude == 0:
        return -(10**6)
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return e if Fraction(2) ** e <= magnitude else e - 1


_Step = Callable[[int, Fraction, bool, Fraction], bool]
_HALF = Fraction(1, 2)

# rounding -> does the count of quanta grow by one? (count, rest in [0, 1), negative, uniform)
_STEPS: Mapping[Rounding, _Step] = MappingProxyType(
    {
        Rounding.NEAREST: lambda n, rest, _, __: rest > _HALF or (rest == _HALF and n % 2 == 1),
        Rounding.AWAY: lambda _, rest, __, ___: rest >= _HALF,
        Rounding.TOWARD_ZERO: lambda _, __, ___, ____: False,
        Rounding.UP: lambda _, rest, negative, __: rest > 0 and not negative,
        Rounding.DOWN: lambda _, rest, negative, __: rest > 0 and negative,
        Rounding.STOCHASTIC: lambda _, rest, __, uniform: rest + uniform >= 1,
    }
)


def _round_up(
    rounding: Rounding, count: int, rest: Fraction, negative: bool, uniform: Fraction
) -> int:
    return int(_STEPS[rounding](count, rest, negative, uniform))


def _round_binary(value: Fraction, rounding: Rounding, uniform: Fraction) -> Fraction:
    if rounding is Rounding.NEAREST:
        return Fraction(1 if value >= 0 else -1)
    if rounding is Rounding.STOCHASTIC:
        clipped = min(max(value, Fraction(-1)), Fraction(1))
        return Fraction(1 if (clipped + 1) / 2 + uniform >= 1 else -1)
    raise FormatError(f"binary has no rounding {rounding.value!r}; allowed: nearest, stochastic")


def overflow(format: Format, rounding: Rounding, *, negative: bool, finite: bool) -> Value:
    """What becomes of a finite number that rounds beyond the largest, or of an infinity.

    The largest number where overflow saturates, and for a finite number where the rounding goes
    toward zero; else infinity or NaN.
    """
    stops = finite and not rounding.magnitude_grows(negative)
    if format.overflow is Overflow.SATURATE or stops:
        return Fraction(format.lowest if negative else format.max)
    if format.has_inf and (format.overflow is Overflow.INF or not finite):
        return -math.inf if negative else math.inf
    return math.nan


def _nan_code(format: Format) -> int:
    if format.specials is Specials.NAN_ONLY:
        return format.max_magnitude_code + 1
    quiet = 1 << (format.mantissa_bits - 1)
    return (format.max_magnitude_code + 1) | quiet


def _magnitude_code(magnitude: Fraction, format: Format) -> int:
    if magnitude == 0:
        return 0
    exponent = max(_exponent(magnitude), format.min_exponent)
    significand = int(magnitude / Fraction(2) ** (exponent - format.mantissa_bits))
    if significand < 2**format.mantissa_bits:
        return significand  # subnormal: exponent field 0
    field = exponent + format.bias
    return (field << format.mantissa_bits) + significand - 2**format.mantissa_bits
