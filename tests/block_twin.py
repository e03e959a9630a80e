"""Block formats in fractions, one number at a time: the text-book twin of `halfstep.ops.block_reference`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from halfstep.format import BlockFormat, Format, Rounding, ScaleRule, Value, round_number

FP32 = Format.parse("fp32")


def float64(value: Value) -> float:
    """To nearest; Python's division of integers is."""
    return float(value)


def in_working_type(value: Fraction, dtype: torch.dtype) -> Value:
    """One rounding to nearest in what the dtype is computed in."""
    if dtype is not torch.float64:
        return round_number(value, FP32)
    try:
        return Fraction(float64(value))
    except OverflowError:
        return math.copysign(math.inf, value)


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def power_of_two_scale(amax: Fraction, f: BlockFormat) -> Fraction:
    top = floor_log2(Fraction(f.element.max))
    if amax == 0:
        return Fraction(2) ** -127
    exponent = floor_log2(amax)
    if f.rule is ScaleRule.CEIL:
        exponent += amax > Fraction(2) ** exponent
    elif f.rule is ScaleRule.EVEN:
        grid = Fraction(2) ** (exponent - f.digits)
        exponent = floor_log2(round(amax / grid) * grid)  # round() takes ties to even
    elif f.rule is ScaleRule.RCEIL:
        while Fraction(f.element.max) * Fraction(2) ** (exponent - top) >= amax:
            exponent -= 1
        while Fraction(f.element.max) * Fraction(2) ** (exponent - top) < amax:
            exponent += 1
    return Fraction(2) ** min(max(exponent - top, -127), 127)


def clamped(value: Value, low: float, high: float) -> Fraction:
    return Fraction(min(max(value, Fraction(low)), Fraction(high)))


def amax_scale(amax: Fraction, tensor_scale: Fraction, f: BlockFormat, dtype: torch.dtype) -> Value:
    quotient = in_working_type(amax / Fraction(f.element.max), dtype)
    if isinstance(quotient, Fraction):
        quotient = in_working_type(quotient / tensor_scale, dtype)
    least = 2.0**-126 if f.scale.name == "fp32" else f.scale.smallest
    return round_number(clamped(quotient, least, f.scale.max), f.scale)


def blocks_of(shape: Sequence[int], f: BlockFormat, dim: int) -> list[list[tuple[int, ...]]]:
    """The indices of the elements of each block."""
    extents = [1] * len(shape)
    if f.rows == 0:
        extents = list(shape)
    else:
        extents[dim] = f.columns or shape[dim]
        others = [axis for axis in range(len(shape)) if axis != dim]
        if f.rows > 1 and others:
            extents[others[-1]] = f.rows
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in itertools.product(*(range(n) for n in shape)):
        block = tuple(i // e for i, e in zip(index, extents, strict=True))
        found.setdefault(block, []).append(index)
    return list(found.values())


def is_bad(value: float) -> bool:
    return math.isnan(value) or math.isinf(value)


def rounded(
    x: Tensor,
    name: str,
    dim: int,
    rounding: Rounding = Rounding.NEAREST,
    draws: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``round_blocks(x)`` in the working type, and each element's scale (without the tensor scale)."""
    f = BlockFormat.parse(name)
    dtype = x.dtype
    working = torch.float64 if dtype is torch.float64 else torch.float32
    result = torch.full(x.shape, math.nan, dtype=working)
    scales = torch.full(x.shape, math.nan, dtype=torch.float32)
    blocks = blocks_of(x.shape, f, dim % x.dim())
    numbers = [[x[index].item() for index in block] for block in blocks]
    tensor_scale = Fraction(1)
    if f.has_tensor_scale:
        fine = [abs(v) for block in numbers if not any(map(is_bad, block)) for v in block]
        largest = in_working_type(Fraction(max(fine, default=0)) / Fraction(f.largest), dtype)
        limits = torch.finfo(torch.float32)
        tensor_scale = clamped(largest, limits.smallest_normal, limits.max)
        tensor_scale = Fraction(round_number(tensor_scale, FP32))
    for block, values in zip(blocks, numbers, strict=True):
        if any(map(is_bad, values)):
            continue
        amax = max(abs(Fraction(v)) for v in values)
        if f.rule is ScaleRule.AMAX:
            scale = amax_scale(amax, tensor_scale, f, dtype)
        else:
            scale = power_of_two_scale(amax, f)
        total = round_number(Fraction(scale) * tensor_scale, FP32)
        for index, value in zip(block, values, strict=True):
            quotient = in_working_type(Fraction(value) / Fraction(total), dtype)
            if quotient == 0:  # a fraction has no -0
                quotient = math.copysign(0.0, value)
            draw = Fraction(draws[index].item(), 2**32) if draws is not None else Fraction(0)
            element = round_number(quotient, f.element, rounding, draw)
            number = in_working_type(Fraction(element) * Fraction(total), dtype)
            result[index] = math.copysign(float(number), element)
            scales[index] = float(scale)
    return result, scales
