"""Codes and roundings against gfloat's, which knows P3109, OCP and IEEE formats by their parameters."""

from __future__ import annotations

import itertools
import math

import gfloat
import pytest
from gfloat import formats as theirs

from halfstep.format import Format, Kind, Rounding, decode, round_number

_OCP = {
    "fp16": theirs.format_info_binary16,
    "bf16": theirs.format_info_bfloat16,
    "e5m2": theirs.format_info_ocp_e5m2,
    "e4m3fn:nan": theirs.format_info_ocp_e4m3,
    "e3m2": theirs.format_info_ocp_e3m2,
    "e2m3": theirs.format_info_ocp_e2m3,
    "e2m1": theirs.format_info_ocp_e2m1,
    "e8m0": theirs.format_info_ocp_e8m0,
}
_DOMAINS = {"e": gfloat.Domain.Extended, "f": gfloat.Domain.Finite}
_P3109 = {
    f"binary8p{p}s{d}": theirs.format_info_p3109(8, p, gfloat.Signedness.Signed, domain)
    for p in range(1, 8)
    for d, domain in _DOMAINS.items()
}
FORMATS = _OCP | _P3109
MODES = {
    Rounding.NEAREST: gfloat.RoundMode.TiesToEven,
    Rounding.AWAY: gfloat.RoundMode.TiesToAway,
    Rounding.TOWARD_ZERO: gfloat.RoundMode.TowardZero,
    Rounding.UP: gfloat.RoundMode.TowardPositive,
    Rounding.DOWN: gfloat.RoundMode.TowardNegative,
}


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (
        a == b and math.copysign(1, a) == math.copysign(1, b)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_code(name: str):
    f = Format.parse(name)
    for code in f.codes():
        assert same(float(decode(code, f)), gfloat.decode_float(FORMATS[name], code).fval), code


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"e8m0", "fp16", "bf16"}))
@pytest.mark.parametrize("rounding", MODES)
def test_rounding_around_every_number(name: str, rounding: Rounding):
    """On, between and beyond all numbers; where they saturate, ours do."""
    f = Format.parse(name)
    numbers = sorted({float(v) for c in f.codes() if math.isfinite(v := decode(c, f))})
    top = numbers[-1]
    points = [*numbers, *((a + b) / 2 for a, b in itertools.pairwise(numbers))]
    points += [a + (b - a) * t for a, b in itertools.pairwise(numbers) for t in (0.1, 0.9)]
    points += [s * t * top for s in (1, -1) for t in (1.01, 1.1, 1.25, 1.3, 2, 1e3)]
    points += [math.inf, -math.inf, 0.0, -0.0]
    saturates = f.overflow.value == "saturate"
    for value in points:
        right = gfloat.round_float(FORMATS[name], value, MODES[rounding], sat=saturates)
        assert same(float(round_number(value, f, rounding)), float(right)), value


def test_kinds_are_floats():
    assert all(Format.parse(name).kind is Kind.FLOAT for name in FORMATS)
