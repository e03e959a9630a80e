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
from halfstep.format.choices import Kind, Overflow, Rounding, Specials, Subnormals
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
    if format.is_unused(code):
        raise FormatError(f"code {code} of {format} is not used")
    sign_bit = 1 << (format.bits - 1)
    if format.kind is Kind.FIXED:
        integer = code - 2 * sign_bit if code & sign_bit else code
        return Fraction(integer, 2**format.mantissa_bits)
    if format.has_nan and code == _nan_code(format):
        return math.nan
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
    has_sign = format.signed and (exact != 0 or format.has_negative_zero)
    sign = int(negative and has_sign) << (format.bits - 1)
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
    in IEEE 754, and so does `Rounding.TO_ODD`; where overflow wraps no rounding stops.
    Infinity saturates where overflow does, else it stays, or becomes NaN in a format without it.
    Negative numbers become NaN in an unsigned format; zero becomes the smallest number in a format
    without zero.

    ``uniform``, in [0, 1), is what `Rounding.STOCHASTIC` draws: the magnitude becomes
    floor(magnitude / quantum + uniform) * quantum. With n random bits it is a multiple of 2^-n, and
    the probability to grow is floor(2^n rest) / 2^n. The quantum is
    2^(max(exponent, min_exponent) - mantissa_bits).

    Where subnormal numbers are flushed the quantum is 2^(exponent - mantissa_bits), as if exponents
    had no lower end, and what is then below 2^min_exponent becomes zero of its sign, in every
    rounding: tininess after rounding (IEEE 754-2019; not checked).

    Odd is a number whose last digit is; without a mantissa that is every one but zero, or as the
    exponent's code is where ``format.odd_exponents``.
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
    exponent = _quantum_exponent(magnitude, format)
    quantum = Fraction(2) ** exponent
    count = magnitude // quantum
    rest = magnitude / quantum - count
    count += _round_up(rounding, _is_odd(count, exponent, format), rest, negative, uniform)
    result = count * quantum
    if format.subnormals is Subnormals.FLUSH and result < Fraction(2) ** format.min_exponent:
        result = Fraction(0)
    if not format.has_zero:
        result = max(result, Fraction(format.smallest))
    if result > abs(Fraction(format.lowest if negative and format.signed else format.max)):
        if format.overflow is Overflow.WRAP:
            return _wrapped(-result if negative else result, format)
        return overflow(format, rounding, negative=negative, finite=True)
    if negative and result == 0:
        return -0.0 if format.has_negative_zero else Fraction(0)
    return -result if negative and format.signed else result


def _quantum_exponent(magnitude: Fraction, format: Format) -> int:
    """log2 of the grid's spacing around ``magnitude``, as if exponents had no upper end."""
    if format.kind is Kind.FIXED:
        return format.quantum_exponent
    exponent = _exponent(magnitude)
    if format.subnormals is Subnormals.KEEP or magnitude == 0:
        exponent = max(exponent, format.min_exponent)
    return exponent - format.mantissa_bits


def _exponent(magnitude: Fraction) -> int:
    """The integer e with 2^e <= magnitude < 2^(e+1); very small for zero."""
    if magnitude == 0:
        return -(10**6)
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return e if Fraction(2) ** e <= magnitude else e - 1


def _is_odd(count: int, quantum_exponent: int, format: Format) -> bool:
    """True if the number of so many quanta is odd."""
    if count and format.odd_exponents:
        return (quantum_exponent + format.bias) % 2 == 1
    return count % 2 == 1  # without a mantissa count is 0 or 1


def _wrapped(value: Fraction, format: Format) -> Fraction:
    """``value`` less that multiple of 2^bits quanta which brings it into the range."""
    lowest, span = Fraction(format.lowest), Fraction(2) ** (format.bits + format.quantum_exponent)
    return (value - lowest) % span + lowest


_Step = Callable[[bool, Fraction, bool, Fraction], bool]
_HALF = Fraction(1, 2)

# rounding -> does the count of quanta grow by one? (it is odd, rest in [0, 1), negative, uniform)
_STEPS: Mapping[Rounding, _Step] = MappingProxyType(
    {
        Rounding.NEAREST: lambda odd, rest, _, __: rest > _HALF or (rest == _HALF and odd),
        Rounding.AWAY: lambda _, rest, __, ___: rest >= _HALF,
        Rounding.TOWARD_ZERO: lambda _, __, ___, ____: False,
        Rounding.UP: lambda _, rest, negative, __: rest > 0 and not negative,
        Rounding.DOWN: lambda _, rest, negative, __: rest > 0 and negative,
        Rounding.STOCHASTIC: lambda _, rest, __, uniform: rest + uniform >= 1,
        Rounding.TO_ODD: lambda odd, rest, _, __: rest > 0 and not odd,
    }
)


def _round_up(
    rounding: Rounding, odd: bool, rest: Fraction, negative: bool, uniform: Fraction
) -> int:
    return int(_STEPS[rounding](odd, rest, negative, uniform))


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
    toward zero; else infinity or NaN. NaN where it wraps, which only finite numbers can.
    """
    if format.overflow is Overflow.WRAP:
        return math.nan
    stops = finite and not rounding.magnitude_grows(negative)
    if format.overflow is Overflow.SATURATE or stops:
        last = format.lowest if negative else format.max
        return Fraction(last) if last else last  # e1m0 has no number but zeros
    if format.has_inf and (format.overflow is Overflow.INF or not finite):
        return -math.inf if negative else math.inf
    return math.nan


def _nan_code(format: Format) -> int:
    if format.specials in (Specials.EXTENDED, Specials.FINITE):
        return 1 << (format.bits - 1) if format.signed else 2**format.bits - 1
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
