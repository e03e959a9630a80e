"""Formats as data: limits, names, and what cannot be."""

from __future__ import annotations

import dataclasses
import math
import pickle

import ml_dtypes
import pytest

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format import Format, Kind, Overflow, Rounding, Specials, Subnormals, formats

_NAMED = """
fp32 tf32 bf16 fp16 e5m2 e4m3fn e4m3 e4m3fnuz e5m2fnuz
binary8p1se binary8p1sf binary8p2se binary8p2sf binary8p3se binary8p3sf binary8p4se binary8p4sf
binary8p5se binary8p5sf binary8p6se binary8p6sf binary8p7se binary8p7sf
e3m2 e2m3 e2m1 e8m0 int8 int4 ternary binary
"""
NAMED = _NAMED.split()
_FAMILY = """
e6m9 e1m0 e1m3 e2m0 e8m22 e7m23 int2 int32 q1.7 q8.8 q3.29
"""
FAMILY = _FAMILY.split()

_SUFFIXED = """
e4m3fn:nan fp16:saturate e6m9:nan e4m3fn:flush e5m2:saturate:flush int16:wrap q3.5:wrap
binary8p3sf:nan:flush
"""
SUFFIXED = _SUFFIXED.split()

# name: max, lowest, smallest, smallest normal, eps, bits, inf, nan; from the standards' own tables
LIMITS = {
    "fp32": (3.4028234663852886e38, -3.4028234663852886e38, 2**-149, 2**-126, 2**-23, 32, 1, 1),
    "fp16": (65504, -65504, 2**-24, 2**-14, 2**-10, 16, 1, 1),
    "bf16": (3.3895313892515355e38, -3.3895313892515355e38, 2**-133, 2**-126, 2**-7, 16, 1, 1),
    "e5m2": (57344, -57344, 2**-16, 2**-14, 2**-2, 8, 1, 1),
    "e4m3fn": (448, -448, 2**-9, 2**-6, 2**-3, 8, 0, 1),
    "e4m3": (240, -240, 2**-9, 2**-6, 2**-3, 8, 1, 1),
    "e4m3fnuz": (240, -240, 2**-10, 2**-7, 2**-3, 8, 0, 1),
    "e5m2fnuz": (57344, -57344, 2**-17, 2**-15, 2**-2, 8, 0, 1),
    "binary8p1se": (2.0**62, -(2.0**62), 2**-63, 2**-63, 1, 8, 1, 1),
    "binary8p3se": (49152, -49152, 2**-17, 2**-15, 2**-2, 8, 1, 1),
    "binary8p4se": (224, -224, 2**-10, 2**-7, 2**-3, 8, 1, 1),
    "binary8p4sf": (240, -240, 2**-10, 2**-7, 2**-3, 8, 0, 1),
    "binary8p7sf": (1.984375, -1.984375, 2**-6, 1, 2**-6, 8, 0, 1),
    "fp16:flush": (65504, -65504, 2**-14, 2**-14, 2**-10, 16, 1, 1),
    "e3m2": (28, -28, 0.0625, 0.25, 0.25, 6, 0, 0),
    "e2m3": (7.5, -7.5, 0.125, 1, 0.125, 6, 0, 0),
    "e2m1": (6, -6, 0.5, 1, 0.5, 4, 0, 0),
    "e8m0": (2.0**127, 2**-127, 2**-127, 2**-127, 1, 8, 0, 1),
    "int8": (127, -128, 1, math.nan, 1, 8, 0, 0),
    "q3.5": (3.96875, -4, 0.03125, math.nan, 0.03125, 8, 0, 0),
    "ternary": (1, -1, 1, math.nan, 1, 2, 0, 0),
    "binary": (1, -1, 1, math.nan, 2, 1, 0, 0),
    "e6m9": (4290772992, -4290772992, 2**-39, 2**-30, 2**-9, 16, 1, 1),
    "e1m3": (1.75, -1.75, 0.25, math.nan, 0.125, 5, 1, 1),
    "e1m0": (0, 0, math.nan, math.nan, 1, 2, 1, 0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str):
    f = Format.parse(name)
    found = (f.max, f.lowest, f.smallest, f.smallest_normal, f.eps, f.bits, f.has_inf, f.has_nan)
    assert found == pytest.approx(LIMITS[name], rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("bf16", ml_dtypes.bfloat16),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e4m3", ml_dtypes.float8_e4m3),
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e2m1", ml_dtypes.float4_e2m1fn),
    ],
)
def test_limits_are_those_of_ml_dtypes(name: str, other: type):
    f, limits = Format.parse(name), ml_dtypes.finfo(other)
    assert f.max == float(limits.max)
    assert f.lowest == float(limits.min)
    assert f.smallest_normal == float(limits.smallest_normal)
    assert f.smallest_subnormal == float(limits.smallest_subnormal)
    assert f.eps == float(limits.eps)
    assert f.min_exponent == int(limits.minexp)


@pytest.mark.parametrize("name", [*NAMED, *FAMILY, *SUFFIXED])
def test_name_is_the_text_form(name: str):
    f = Format.parse(name)
    assert str(f) == name
    assert Format.parse(str(f)) == f
    assert Format.parse(f) is f
    assert pickle.loads(pickle.dumps(f)) == f
    assert len({f, Format.parse(name)}) == 1


def test_catalogue_is_by_name_and_says_its_sources():
    assert list(formats()) == NAMED
    for name, f in formats().items():
        assert f.name == name
        assert f.source
        assert Format.parse(name) is f


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("float16", "fp16"),
        ("Half", "fp16"),
        ("float32", "fp32"),
        ("torch.bfloat16", "bf16"),
        ("torch.float8_e4m3fn", "e4m3fn"),
        ("torch.int8", "int8"),
        ("float8_e5m2", "e5m2"),
        ("fp4_e2m1", "e2m1"),
        (" FP16 ", "fp16"),
        # members of a family that have a name
        ("e5m10", "fp16"),
        ("e8m23", "fp32"),
        ("e8m7", "bf16"),
        ("e8m10", "tf32"),
        ("q8.0", "int8"),
        ("q5.0", "int5"),
        ("e4m3fn:saturate", "e4m3fn"),
        ("e4m3fn:keep:nan:saturate", "e4m3fn"),
        ("e5m2:flush:saturate", "e5m2:saturate:flush"),
        ("p3109_k8p3se", "binary8p3se"),
        ("p3109_k8p3sf", "binary8p3sf"),
        ("p3109_8p3", "binary8p3se"),
        ("binary8p4", "binary8p4se"),
        ("torch.float8_e4m3fnuz", "e4m3fnuz"),
    ],
)
def test_synonyms(given: str, name: str):
    assert Format.parse(given).name == name


def test_torch_dtype_is_a_name():
    torch = pytest.importorskip("torch")
    assert Format.parse(torch.float8_e5m2).name == "e5m2"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("fp61", "unknown format 'fp61'; did you mean "),
        ("flaot16", "unknown format 'flaot16'; did you mean float16"),
        ("fp8_e4m3", "unknown format 'fp8_e4m3'; did you mean e4m3 or e4m3fn?"),
        ("fp8", "unknown format 'fp8'; known: e4m3fn, e5m2"),
        ("zzzzzzzzz", "unknown format 'zzzzzzzzz'; known: bf16, "),
        (16, "unknown format '16'; "),
    ],
)
def test_unknown_names_are_met_with_near_ones(given: object, text: str):
    with pytest.raises(UnknownNameError) as raised:
        Format.parse(given)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            "e9m2",
            (
                "e9m2: 9 exponent and 2 mantissa bits; a floating-point format has 1 to 8 exponent "
                "bits and 0 to 23 mantissa bits"
            ),
        ),
        ("e0m2", "e0m2: 0 exponent and 2 mantissa bits; "),
        ("e5m24", "e5m24: 5 exponent and 24 mantissa bits; "),
        ("int1", "int1: 1 integer and 0 fraction bits; a fixed-point format has 1 or more"),
        ("int33", "int33: 33 integer and 0 fraction bits; "),
        ("q0.8", "q0.8: 0 integer and 8 fraction bits; "),
        (
            "fp16:sat",
            "suffix 'sat' in format 'fp16:sat'; allowed after a colon: inf, saturate, nan, ",
        ),
        (
            "fp16:wrap",
            "fp16:wrap: overflow to wrap, which this format cannot; allowed: saturate, inf",
        ),
        (
            "int8:inf",
            "int8:inf: overflow to inf, which this format cannot; allowed: saturate, wrap",
        ),
        ("ternary:wrap", "ternary:wrap: overflow to wrap, which this format cannot; "),
        ("int8:flush", "int8:flush: flushes subnormal numbers; only a floating-point format with"),
        ("e1m3:flush", "e1m3:flush: flushes subnormal numbers; only a floating-point format with"),
        ("e8m0:flush", "e8m0:flush: flushes subnormal numbers; only a floating-point format with"),
        (
            "e4m3fn:inf",
            "e4m3fn:inf: overflow to inf, which this format cannot; allowed: saturate, nan",
        ),
    ],
)
def test_impossible_formats_are_refused(given: str, text: str):
    with pytest.raises(FormatError) as raised:
        Format.parse(given)
    assert str(raised.value).startswith(text)


def test_a_format_is_frozen_and_made_of_keywords():
    f = Format.parse("fp16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.bias = 99  # type: ignore[misc]
    with pytest.raises(TypeError):
        Format("fp16")  # type: ignore[misc]


def test_one_literal_can_say_any_of_them():
    mine = Format(name="mine", exponent_bits=3, mantissa_bits=4, bias=4, specials=Specials.NONE)
    assert (mine.max, mine.kind, mine.overflow) == (15.5, Kind.FLOAT, Overflow.SATURATE)


def test_overflow_there_and_back():
    f = Format.parse("e4m3fn")
    assert f.with_overflow(Overflow.NAN).with_overflow(Overflow.SATURATE) == f


def test_a_literal_of_ones_own_has_suffixes():
    mine = Format(name="mine", exponent_bits=3, mantissa_bits=4, bias=4, specials=Specials.IEEE)
    flushes = mine.with_overflow(Overflow.NAN).with_subnormals(Subnormals.FLUSH)
    assert (flushes.name, flushes.smallest) == ("mine:nan:flush", 2.0**-3)


def test_rounding_names():
    assert Rounding.parse("nearest") is Rounding.NEAREST
    assert Rounding.parse(Rounding.UP) is Rounding.UP
    with pytest.raises(UnknownNameError, match="unknown rounding 'stochasic'; did you mean stoch"):
        Rounding.parse("stochasic")
