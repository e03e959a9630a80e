"""Rounding to a grid in Triton, on the bits of float32 and with integers only.

The bits of a float32 less those of its binade's start are its significand, a multiple of
2^(exponent - 150); rounding drops so many of its last bits, and the exponent follows by the carry.
Neither the casts of the hardware nor those of the interpreter take part.
"""

# What is here is compiled by Triton, which may not be installed; its constants have our attributes.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from halfstep.ops.random_bits import FIRST, SECOND, STRIDE

__all__ = [
    "INTERPRETED",
    "finish_bits",
    "from_bits",
    "round_bits",
    "round_kernel",
    "start_bits",
    "to_bits",
]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FIRST, _SECOND, _STRIDE = tl.constexpr(FIRST), tl.constexpr(SECOND), tl.constexpr(STRIDE)


@triton.jit(do_not_specialize=["count", "key_low", "key_high", "key_used"])
def round_kernel(
    x_ptr,
    out_ptr,
    count,
    key_low,
    key_high,
    key_used,
    to: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out`` = round(x), both contiguous; element i has random bits i of the key."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:  # without a mask it is read and written 16 bytes at a time
        _round_block(x_ptr, out_ptr, start, None, key_low, key_high, key_used, to, BLOCK)
    else:
        mask = tl.arange(0, BLOCK) < count - start
        _round_block(x_ptr, out_ptr, start, mask, key_low, key_high, key_used, to, BLOCK)


@triton.jit
def _round_block(
    x_ptr,
    out_ptr,
    start,
    mask,
    key_low,
    key_high,
    key_used,
    to: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inside = tl.arange(0, BLOCK)
    bits = to_bits(tl.load(x_ptr + start + inside, mask=mask))
    random = tl.zeros_like(bits).to(tl.uint32)
    if to.rounding == "stochastic":
        # a block begins at a multiple of its size, so the index carries into no upper half inside
        low = (start & 0xFFFFFFFF).to(tl.uint32) + inside.to(tl.uint32)
        random = finish_bits(start_bits(low, key_low), (start >> 32).to(tl.uint32), key_high)
        random = random & key_used.to(tl.uint32, bitcast=True)
    rounded = from_bits(round_bits(bits, random, to), out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + inside, rounded, mask=mask)


@triton.jit
def round_bits(bits, random, grid: tl.constexpr):
    """The bits of float32 numbers, int32, rounded to the grid; ``random`` is uint32."""
    magnitude = bits & 0x7FFFFFFF
    negative = bits < 0
    if grid.is_even_below:
        exponent = tl.maximum(magnitude >> 23, 1)
        base = (exponent - 1) << 23
        significand = magnitude - base
        away = tl.maximum(grid.reach - exponent, grid.least_dropped)
        dropped = tl.minimum(away, 25)  # of more than 24 bits nothing is left
    else:
        base = tl.zeros_like(magnitude)
        significand = magnitude
        away = tl.full(magnitude.shape, grid.least_dropped, tl.int32)
        dropped = away
    all_dropped = (1 << dropped) - 1
    if grid.rounding == "nearest":
        addend = (all_dropped + ((significand >> dropped) & 1)) >> 1
    elif grid.rounding == "away":
        addend = (all_dropped + 1) >> 1
    elif grid.rounding == "up":
        addend = tl.where(negative, 0, all_dropped)
    elif grid.rounding == "down":
        addend = tl.where(negative, all_dropped, 0)
    elif grid.rounding == "to_odd":
        inexact = (significand & all_dropped) != 0
        addend = tl.where(inexact & ((significand >> dropped) & 1 == 0), 1 << dropped, 0)
    elif grid.rounding == "stochastic":
        addend = ((random >> (31 - dropped).to(tl.uint32)) >> 1).to(tl.int32)
    else:
        tl.static_assert(grid.rounding == "toward_zero")
        addend = tl.zeros_like(magnitude)
    kept = (significand + addend) & ~all_dropped
    rounded = tl.where(kept == 0, 0, kept + base)
    if grid.is_even_below and (
        grid.rounding == "up"
        or grid.rounding == "down"
        or grid.rounding == "to_odd"
        or grid.rounding == "stochastic"
    ):
        # what is far below the smallest number still reaches it
        if grid.rounding == "stochastic":
            rest = (significand << 7).to(tl.uint32) >> (tl.minimum(away, 56) - 25).to(tl.uint32)
            grows = rest + random < rest  # in units of 2^-32: it carries
        else:
            grows = (addend > 0) & (significand > 0)
        rounded = tl.where(away > 24, tl.where(grows, grid.least, 0), rounded)
    result = rounded | (bits & -0x80000000)
    if not grid.negative_zero:
        result = tl.where(rounded == 0, 0, result)
    return _overflow(result, rounded, bits, grid)


@triton.jit
def _overflow(result, rounded, bits, grid: tl.constexpr):
    magnitude = bits & 0x7FFFFFFF
    negative = bits < 0
    becomes = tl.where(negative, grid.overflow_down, grid.overflow_up)
    if grid.infinity_differs:
        infinity = tl.where(negative, grid.infinity_down, grid.infinity_up)
        becomes = tl.where(magnitude == 0x7F800000, infinity, becomes)
    limit = tl.where(negative, grid.lowest, grid.highest)
    result = tl.where(rounded > limit, becomes, result)
    return tl.where(magnitude > 0x7F800000, bits | 0x00400000, result)


# 16-bit floats


@triton.jit
def to_bits(x):
    """The bits, as int32, of x as float32; exact."""
    if x.dtype == tl.bfloat16:
        return x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits, dtype: tl.constexpr):
    """The number that a float32 of these bits is, in a type that holds it."""
    if dtype == tl.bfloat16:
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return bits.to(tl.float32, bitcast=True).to(dtype)


# Random bits, the twin of halfstep/ops/random_bits.py: what depends on the element, then on the key


@triton.jit
def start_bits(index, key_low):
    """The first round, of the lower half of the index, uint32."""
    h = index ^ key_low.to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * _FIRST
    return h ^ (h >> 15)


@triton.jit
def finish_bits(h, index_high, key_high):
    """The second round, of the upper halves of the index and of the key."""
    h = h ^ (key_high.to(tl.uint32, bitcast=True) + index_high * _STRIDE)
    h = h * _SECOND
    return h ^ (h >> 15)
