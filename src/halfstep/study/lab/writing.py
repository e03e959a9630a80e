"""Figures of a finding as text, the same in the terminal and on the page."""

from __future__ import annotations

import math

from halfstep.study.lab.results import Finding

__all__ = ["interval", "number"]


def number(value: float) -> str:
    """Four significant digits; whole numbers and small powers of two as they are.

    >>> number(0.06249), number(65504.0), number(2.0**-24)
    ('0.06249', '65504', '2^-24')
    """
    if value.is_integer() and abs(value) < 1e7:
        return f"{value:.0f}"
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 and exponent < 1 else f"{value:.4g}"


def interval(finding: Finding) -> str:
    """What counts as the published figure: one number where it is exact."""
    low, high = number(finding.low), number(finding.high)
    return low if finding.low == finding.high else f"{low} to {high}"
