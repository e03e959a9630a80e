"""The text-book codec: every code of every small format, and the grid's own laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import FormatError
from halfstep.format import Format, Kind, Rounding, decode, encode, round_number

_SMALL = """
bf16 fp16 e5m2 e4m3fn e4m3 e3m2 e2m3 e2m1 e8m0 int8 int4 int2 ternary binary e6m9 e1m0
e1m3 e2m0 e3m0 e8m1 q3.5 q1.7 e4m3fnuz e5m2fnuz binary8p1se binary8p1sf binary8p3se binary8p4sf
binary8p7se binary8p7sf fp16:flush e4m3fn:flush binary8p3se:flush int8:wrap
"""
SMALL = _SMALL.split()
DETERMINISTIC = [r for r in Rounding if r is not Rounding.STOCHASTIC]


def same(a: object, b: object) -> bool:
    """Equal as numbers with a sign of zero, NaN equal to NaN."""
    x, y = float(a), float(b)  # type: ignore[arg-type]
    both_nan = math.isnan(x) and math.isnan(y)
    return both_nan or (x == y and math.copysign(1, x) == math.copysign(1, y))


@pytest.mark.parametrize("name", SMALL)
def test_every_code_comes_back(name: str):
    f = Format.parse(name)
    seen = 0
    for code in f.codes():
        value = decode(code, f)
        seen += 1
        if isinstance(value, float) and math.isnan(value):
            assert math.isnan(decode(encode(value, f), f))
            continue
        assert encode(value, f) == code
        if not (isinstance(value, float) and math.isinf(value)):
            assert same(round_number(value, f), value)
    assert seen == f.code_count


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", ml_dtypes.bfloat16),
        ("fp16", np.float16),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e4m3", ml_dtypes.float8_e4m3),
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e8m0", ml_dtypes.float8_e8m0fnu),
        ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
        ("e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
    ],
)
def test_every_code_means_what_ml_dtypes_says(name: str, dtype: type):
    f = Format.parse(name)
    width = np.uint16 if f.bits == 16 else np.uint8
    with np.errstate(invalid="ignore"):  # signalling NaNs
        theirs = np.arange(2**f.bits).astype(width).view(dtype).astype(np.float64)
    ours = [float(decode(code, f)) for code in range(2**f.bits)]
    assert all(map(same, ours, theirs.tolist()))


def tie(a: Fraction, b: Fraction, f: Format) -> Fraction:
    """IEEE 754-2019, section 4.3.1: if the two nearest are equally near, "the one with an even
    least significant digit shall be delivered; if that is not possible, the one larger in
    magnitude" (which happens where there is but one digit)."""
    if f.kind is Kind.FLOAT and f.mantissa_bits == 0 and not f.odd_exponents:
        return Fraction(0) if 0 in (a, b) else max(a, b, key=abs)
    return next(v for v in (a, b) if encode(v, f) % 2 == 0)


def odd_one(a: Fraction, b: Fraction, f: Format) -> Fraction:
    """Without a mantissa all numbers but 0 are odd, and the one nearer to zero stays."""
    if f.kind is Kind.FLOAT and f.mantissa_bits == 0 and not f.odd_exponents and 0 not in (a, b):
        return min(a, b, key=abs)
    return a if a != tie(a, b, f) else b


_NEIGHBOURLY = "e4m3fn e2m1 e3m2 e1m3 e2m0 int4 q3.5 e8m0 binary8p1se binary8p3se binary8p4sf"


@pytest.mark.parametrize("name", _NEIGHBOURLY.split())
@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_rounding_between_all_neighbours(name: str, rounding: Rounding):
    """Between neighbours a < b: just above a, the middle, just below b."""
    f = Format.parse(name)
    values = sorted({Fraction(v) for c in f.codes() if math.isfinite(v := decode(c, f))})
    for a, b in itertools.pairwise(values):
        tiny = (b - a) / 1024
        expected = {
            Rounding.NEAREST: [a, tie(a, b, f), b],
            Rounding.AWAY: [a, b if b > 0 else a, b],
            Rounding.TOWARD_ZERO: [a, a, a] if a >= 0 else [b, b, b],
            Rounding.UP: [b, b, b],
            Rounding.DOWN: [a, a, a],
            Rounding.TO_ODD: [odd_one(a, b, f)] * 3,
        }[rounding]
        found = [round_number(v, f, rounding) for v in (a + tiny, (a + b) / 2, b - tiny)]
        assert found == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("fp16", 65519.999, 65504.0),
        ("fp16", 65520.0, math.inf),
        ("fp16", -65520.0, -math.inf),
        ("fp16:saturate", 65520.0, 65504.0),
        ("fp16:saturate", math.inf, 65504.0),
        ("fp16:nan", 65520.0, math.nan),
        ("fp16:nan", math.inf, math.inf),
        ("e4m3fn", 464.0, 448.0),
        ("e4m3fn", 1e9, 448.0),
        ("e4m3fn", -math.inf, -448.0),
        ("e4m3fn:nan", 464.0, 448.0),
        ("e4m3fn:nan", 464.001, math.nan),
        ("e4m3fn:nan", math.inf, math.nan),
        ("e4m3fnuz", 248.0, math.nan),
        ("e4m3fnuz", -0.0, 0.0),
        ("binary8p3se", 53248.0, 49152.0),
        ("binary8p3se", 53249.0, math.inf),
        ("binary8p3sf", 1e9, 57344.0),
        ("binary8p3sf:nan", 1e9, math.nan),
        ("binary8p1se", 3.0, 4.0),  # exponents 1 and 2 with bias 64: the code of 4 is even
        ("binary8p1se", 6.0, 4.0),
        ("binary8p1se", -1e-30, 0.0),
        ("q3.5:wrap", 4.0, -4.0),
        ("e2m1", 100.0, 6.0),
        ("e2m1", math.nan, math.nan),
        ("int8", 127.6, 127.0),
        ("int8", -1e9, -128.0),
        ("int8", -0.2, 0.0),
        ("ternary", -5.0, -1.0),
        ("e2m1", -0.2, -0.0),
        ("e1m0:saturate", -9.0, -0.0),
        ("e1m0:saturate", -math.inf, -0.0),
        ("e8m0", 0.0, 2.0**-127),
        ("e8m0", -0.0, 2.0**-127),
        ("e8m0", -1.0, math.nan),
        ("e8m0", 1e39, math.nan),
        ("e8m0", 3.0, 4.0),
        ("binary", 0.0, 1.0),
        ("binary", -0.0, 1.0),
        ("binary", -1e-30, -1.0),
        ("binary", -math.inf, -1.0),
    ],
)
def test_ends_of_the_range(name: str, value: float, expected: float):
    assert same(round_number(value, Format.parse(name)), expected)


QUARTER = 2.0**-26  # of fp16's spacing just below 2^-14, its smallest normal number


@pytest.mark.parametrize(
    ("rounding", "value", "expected"),
    [
        # rounded to 11 bits with the spacing of the binade below, 2^-25: a tie goes to 2^-14
        (Rounding.NEAREST, 2.0**-14 - QUARTER, 2.0**-14),
        (Rounding.NEAREST, -(2.0**-14) + QUARTER, -(2.0**-14)),
        (Rounding.NEAREST, 2.0**-14 - QUARTER * 1.001, 0.0),
        (Rounding.NEAREST, -(2.0**-14) + QUARTER * 1.001, -0.0),
        (Rounding.NEAREST, 2.0**-24, 0.0),
        (Rounding.AWAY, 2.0**-14 - QUARTER, 2.0**-14),
        (Rounding.TOWARD_ZERO, 2.0**-14 - QUARTER / 64, 0.0),
        (Rounding.UP, 2.0**-14 - QUARTER * 1.999, 2.0**-14),
        (Rounding.UP, 2.0**-14 - QUARTER * 2, 0.0),  # it is a number of 11 bits: a subnormal one
        (Rounding.UP, 1e-30, 0.0),
        (Rounding.DOWN, -(2.0**-14) + QUARTER / 64, -(2.0**-14)),
        (Rounding.DOWN, -1e-30, -0.0),
        (Rounding.DOWN, 2.0**-14 - QUARTER / 64, 0.0),
        (Rounding.TO_ODD, 2.0**-14 - QUARTER / 64, 0.0),
        (Rounding.TO_ODD, 2.0**-14, 2.0**-14),
    ],
)
def test_subnormals_are_flushed_after_rounding(rounding: Rounding, value: float, expected: float):
    """IEEE 754-2019, section 7.5: tiny is what "computed as though the exponent range were
    unbounded" lies below the smallest normal number."""
    assert same(round_number(value, Format.parse("fp16:flush"), rounding), expected)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_wrapping_is_twos_complement(rounding: Rounding):
    f = Format.parse("int8:wrap")
    for value in (127, 128, -128, -129, 255, 256, 300, -1000, 2**40 + 5):
        expected = (value + 128) % 256 - 128
        assert round_number(Fraction(value), f, rounding) == expected
    assert round_number(127.5, f) == -128
    assert math.isnan(round_number(math.inf, f))


def test_directed_roundings_stop_at_the_largest():
    """IEEE 754-2019, section 7.4: "roundTowardZero carries all overflows to the format's largest
    finite number with the sign of the intermediate result", and so on by direction."""
    f = Format.parse("fp16")
    found = [
        (round_number(1e9, f, r), round_number(-1e9, f, r))
        for r in (Rounding.TOWARD_ZERO, Rounding.DOWN, Rounding.UP)
    ]
    assert found == [(65504, -65504), (65504, -math.inf), (math.inf, -65504)]
    assert round_number(math.inf, f, Rounding.TOWARD_ZERO) == math.inf


@given(
    st.fractions(min_value=-500, max_value=500),
    st.sampled_from(["e4m3fn", "fp16", "int8", "q3.5", "e2m0", "ternary"]),
)
def test_stochastic_is_unbiased_by_definition(value: Fraction, name: str):
    """The draws that grow the magnitude make up exactly the distance from the smaller one."""
    f = Format.parse(name)
    low = round_number(value, f, Rounding.TOWARD_ZERO)
    high = round_number(value, f, Rounding.UP if value > 0 else Rounding.DOWN)
    if low == high or not math.isfinite(high):
        return
    share = (value - Fraction(low)) / (Fraction(high) - Fraction(low))
    below, at = 1 - share - Fraction(1, 10**12), 1 - share
    assert round_number(value, f, Rounding.STOCHASTIC, max(below, Fraction(0))) == low
    assert round_number(value, f, Rounding.STOCHASTIC, at) == high


@given(st.floats(allow_nan=False), st.sampled_from(SMALL), st.sampled_from(DETERMINISTIC))
def test_rounding_again_changes_nothing(value: float, name: str, rounding: Rounding):
    f = Format.parse(name)
    if name == "binary" and rounding is not Rounding.NEAREST:
        return
    once = round_number(value, f, rounding)
    assert same(round_number(once, f, rounding), once)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: decode(256, Format.parse("int8")), "code 256 of int8; allowed: 0 to 255"),
        (lambda: decode(2, Format.parse("ternary")), "code 2 of ternary is not used"),
        (lambda: encode(0.1, Format.parse("fp16")), "0.1 is not a number of fp16; round it first"),
        (lambda: encode(0.0, Format.parse("e8m0")), "0.0 is not a number of e8m0"),
        (lambda: encode(math.nan, Format.parse("e2m1")), "NaN has no code in e2m1"),
        (lambda: encode(math.inf, Format.parse("e4m3fn")), "inf has no code in e4m3fn; its larg"),
        (
            lambda: round_number(1.0, Format.parse("binary"), Rounding.UP),
            "binary has no rounding 'up'; allowed: nearest, stochastic",
        ),
    ],
)
def test_errors_say_what_is_allowed(call: Callable[[], object], text: str):
    with pytest.raises(FormatError) as raised:
        call()
    assert str(raised.value).startswith(text)
