"""The living definition of what a matrix unit adds, in int64 of plain torch, on any device.

See `halfstep.format.Unit` for the rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.format import Datapath, Format, Unit

__all__ = ["sum_of_blocks"]

CANONICAL_NAN = {"fp32": 0x7FFFFFFF, "fp16": 0x7FFFE000}  # fp16's 0x7FFF, as fp32
_FAR = 62  # a shift by so much leaves nothing of a term
_C_DIGITS = 23  # fraction bits of the running sum
_C_LEAST = {"fp32": -126, "fp16": -14}


def sum_of_blocks(
    unit: Unit, operands: tuple[Format, ...], a: Tensor, b: Tensor, steps: range, start: Tensor
) -> Tensor:
    """``start`` (..., M, N) and the products of these steps, block after block; all float64."""
    path = unit.datapath(*operands)
    left, right = operands
    total = start
    for first in range(steps.start, steps.stop, path.block):
        inside = range(first, min(first + path.block, steps.stop))
        total = _block(path, a[..., inside.start : inside.stop], left, b, right, inside, total)
    return total


def _block(
    path: Datapath, a: Tensor, left: Format, b: Tensor, right: Format, steps: range, c: Tensor
) -> Tensor:
    b = b[..., steps.start : steps.stop, :]
    count = len(steps)
    a_digits, a_exponent = _split(a, left.mantissa_bits, left.min_exponent)
    b_digits, b_exponent = _split(b, right.mantissa_bits, right.min_exponent)
    c_digits, c_exponent = _split(c, _C_DIGITS, _C_LEAST[path.result])
    # (digits, exponent, fraction bits of the digits) of each term of the sum
    terms = [
        (
            a_digits[..., :, k, None] * b_digits[..., k, None, :],
            a_exponent[..., :, k, None] + b_exponent[..., k, None, :],
            left.mantissa_bits + right.mantissa_bits,
        )
        for k in range(count)
    ]
    terms.append((c_digits, c_exponent, _C_DIGITS))
    largest = torch.full_like(c, path.lowest_exponent, dtype=torch.int64)
    for digits, exponent, _ in terms:
        largest = torch.where(digits != 0, torch.maximum(largest, exponent), largest)
    last = largest - path.fraction_bits  # the exponent of the last digit that is kept
    total = torch.zeros_like(largest)
    for digits, exponent, fraction in terms:
        total += _shifted(digits, exponent - fraction - last)
    if path.result == "fp16":
        result = _nearest_half(total, last, path.result_bits)
    else:
        result = _truncated(total, last, path.result_bits)
    return _with_specials(result, a, b, c, CANONICAL_NAN[path.result])


def _split(x: Tensor, fraction: int, least: int) -> tuple[Tensor, Tensor]:
    """x = digits * 2^(exponent - fraction), as int64; the exponent of zero is of no concern."""
    x = torch.where(x.isfinite(), x, 0.0)
    exponent = (torch.frexp(x).exponent.to(torch.int64) - 1).clamp(min=least)
    return torch.ldexp(x, (fraction - exponent).to(x.dtype)).to(torch.int64), exponent


def _shifted(digits: Tensor, by: Tensor) -> Tensor:
    """digits * 2^by, truncated toward zero."""
    magnitude = (digits.abs() << by.clamp(0, _FAR)) >> (-by).clamp(0, _FAR)
    return torch.where(digits < 0, -magnitude, magnitude)


def _truncated(total: Tensor, last: Tensor, fraction: int) -> Tensor:
    """total * 2^last with so many fraction bits as an fp32 number, toward zero; float64."""
    size = torch.frexp(total.to(torch.float64)).exponent - 1 + last
    drop = (size.clamp(min=_C_LEAST["fp32"]) - fraction - last).clamp(0, _FAR)
    magnitude = (total.abs() >> drop) << drop
    value = torch.ldexp(magnitude.to(torch.float64), last.to(torch.float64))
    value = torch.where(value >= 2.0**128, torch.inf, value)
    return torch.where(total < 0, -value, value)


def _nearest_half(total: Tensor, last: Tensor, fraction: int) -> Tensor:
    """total * 2^last, which float64 holds, as an fp16 number, to nearest, ties to even; float64."""
    exact = torch.ldexp(total.abs().to(torch.float64), last.to(torch.float64))
    exponent = (torch.frexp(exact).exponent - 1).clamp(min=_C_LEAST["fp16"])
    quantum = torch.ldexp(torch.ones_like(exact), (exponent - fraction).to(torch.float64))
    value = (exact / quantum).round() * quantum
    value = torch.where(value >= 2.0**16, torch.inf, value)
    return torch.where(total < 0, -value, value)


def _with_specials(result: Tensor, a: Tensor, b: Tensor, c: Tensor, nan_bits: int) -> Tensor:
    if all(bool(x.isfinite().all()) for x in (a, b, c)):
        return result
    # finite terms cannot make a float64 sum overflow: 2^8 of at most 2^256
    terms: Sequence[Tensor] = [a[..., :, k, None] * b[..., k, None, :] for k in range(a.shape[-1])]
    special = sum(terms, start=c)
    nan = torch.tensor(nan_bits, dtype=torch.int32, device=c.device).view(torch.float32)
    result = torch.where(special.isinf(), special, result)
    return torch.where(special.isnan(), nan.to(torch.float64), result)
