"""Dot products by the definition in `halfstep.matmul`, one number at a time, in fractions.

Finite numbers and nearest or directed roundings; the sign of a zero is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from halfstep.format import (
    Accumulator,
    Format,
    Order,
    Products,
    Rounding,
    Unit,
    round_number,
)


def dot(a: Sequence[float], b: Sequence[float], accumulator: Accumulator, initial: float = 0.0):
    """The sum of a[k] * b[k] as the accumulator makes it; a float where it overflowed."""
    exact = [Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)]
    between = accumulator.chunk or accumulator.split > 1
    format = accumulator.between if between else accumulator.format
    start = _number(round_number(Fraction(initial), format, Rounding.NEAREST))
    if accumulator.split == 1:
        return float(_chunks(exact, accumulator, start))
    total, length = start, max(-(-len(exact) // accumulator.split), 1)
    for first in range(0, len(exact), length):
        part = _chunks(exact[first : first + length], accumulator, Fraction(0))
        total = _between(total + part, accumulator)
    return float(total)


def _chunks(exact: list[Fraction], accumulator: Accumulator, start: Fraction) -> Fraction:
    if not accumulator.chunk:
        return _products(exact, accumulator, start)
    total = start
    for first in range(0, len(exact), accumulator.chunk):
        inside = _products(exact[first : first + accumulator.chunk], accumulator, Fraction(0))
        total = _between(total + inside, accumulator)
    return total


def _products(exact: list[Fraction], accumulator: Accumulator, start: Fraction) -> Fraction:
    def r(x: Fraction) -> Fraction:
        return _number(round_number(x, accumulator.format, accumulator.rounding))

    terms = [r(x) for x in exact] if accumulator.products is Products.ROUNDED else exact
    if accumulator.order is Order.PAIRWISE:
        if not terms:
            return start
        while len(terms) > 1:
            odd = terms[-1:] if len(terms) % 2 else []
            terms = [r(x + y) for x, y in zip(terms[::2], terms[1::2], strict=False)] + odd
        return r(start + terms[0])
    total, lost = start, Fraction(0)
    for x in terms:
        if accumulator.compensated:
            term = r(x - lost)
            new = r(total + term)
            lost = r(r(new - total) - term)
            total = new
        else:
            total = r(total + x)
    return total


def _between(x: Fraction, accumulator: Accumulator) -> Fraction:
    same = accumulator.between == accumulator.adder
    format: Format = accumulator.between
    return _number(round_number(x, format, accumulator.rounding if same else Rounding.NEAREST))


def _number(x: Fraction | float) -> Fraction:
    return Fraction(x)  # an infinity or NaN raises: choose operands that stay finite


def unit_dot(
    a: Sequence[float], b: Sequence[float], accumulator: Accumulator, initial: float = 0.0
) -> float:
    """The sum as the unit makes it, by the rule in `Unit`; finite operands and initial value."""
    unit, (left, right) = accumulator.adder, accumulator.operands
    if not isinstance(unit, Unit):
        raise TypeError(unit)
    path = unit.datapath(left, right)
    half = path.result == "fp16"
    least = -14 if half else -126
    c = Fraction(
        round_number(Fraction(initial), accumulator.start, Rounding.NEAREST) if half else initial
    )
    result = float(c)
    for first in range(0, len(a), path.block):
        terms, exponents = [c], [path.lowest_exponent]
        if c:
            exponents.append(_exponent(c, least))
        for x, y in zip(a[first : first + path.block], b[first : first + path.block], strict=True):
            x, y = Fraction(x), Fraction(y)
            terms.append(x * y)
            if x * y:
                exponents.append(_exponent(x, left.min_exponent) + _exponent(y, right.min_exponent))
        last = Fraction(2) ** (max(exponents) - path.fraction_bits)
        total = sum(int(term / last) for term in terms) * last  # int() truncates toward zero
        size = _exponent(total, least) if total else least
        digit = Fraction(2) ** (size - path.result_bits)
        # round() to nearest, ties to even; int() toward zero
        c = (round(total / digit) if half else int(total / digit)) * digit
        if abs(c) >= 2 ** (16 if half else 128):
            return math.copysign(math.inf, c)
        result = math.copysign(float(c), total) if total else 0.0
    return result


def _exponent(x: Fraction, least: int) -> int:
    """floor(log2(|x|)), or the least there is."""
    x = abs(x)
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    guess -= x < Fraction(2) ** guess
    return max(guess, least)
