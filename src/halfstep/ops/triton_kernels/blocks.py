"""Block formats in Triton, quantised and dequantised in one pass: scales that are powers of two.

Twin of halfstep/ops/block_reference.py.
"""

# What is here is compiled by Triton, which may not be installed; its constants have our attributes.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from halfstep.ops.triton_kernels.rounding import (
    finish_bits,
    from_bits,
    round_bits,
    start_bits,
    to_bits,
)

__all__ = ["round_blocks_kernel"]


@triton.jit(do_not_specialize=["key_low", "key_high"])
def round_blocks_kernel(
    x_ptr,
    out_ptr,
    blocks,
    length,
    inner,
    key_low,
    key_high,
    to: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXTENT: tl.constexpr,
):
    """``out`` = the blocks of x, (outer, length, inner), as their format has them; each along length."""
    per_line = tl.cdiv(length, EXTENT)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    # neighbours in memory are neighbours here: inner runs fastest
    line, within = block // inner, block % inner
    place = (line % per_line) * EXTENT + tl.arange(0, EXTENT)[None, :]
    index = ((line // per_line) * length + place) * inner + within
    mask = (block < blocks) & (place < length)
    bits = to_bits(tl.load(x_ptr + index, mask=mask, other=0.0))
    amax = tl.max(bits & 0x7FFFFFFF, axis=1, keep_dims=True)  # of bits: NaN is above infinity
    exponent = _scale_exponent(amax, to)
    # a product with the reciprocal of a power of two is rounded as the quotient is
    quotient = bits.to(tl.float32, bitcast=True) * _power_of_two(-exponent)
    random = tl.zeros_like(bits).to(tl.uint32)
    if to.element.rounding == "stochastic":
        h = start_bits((index & 0xFFFFFFFF).to(tl.uint32), key_low)
        random = finish_bits(h, (index >> 32).to(tl.uint32), key_high)
    element = from_bits(round_bits(to_bits(quotient), random, to.element), tl.float32)
    scaled = to_bits(element * _power_of_two(exponent))
    scaled = tl.where(amax < 0x7F800000, scaled, 0x7FC00000)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        scaled = round_bits(scaled, random, to.carrier)
    tl.store(out_ptr + index, from_bits(scaled, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_exponent(amax, to: tl.constexpr):
    """log2 of the scale of blocks whose largest magnitudes have these bits."""
    # a subnormal number's bits are the number in units of 2^-149, and exact as a float
    unit = amax.to(tl.float32).to(tl.int32, bitcast=True)
    is_normal = amax >= 0x00800000
    exponent = tl.where(is_normal, (amax >> 23) - 127, (unit >> 23) - 127 - 149)
    fraction = tl.where(is_normal, amax, unit) & 0x7FFFFF
    exponent += (fraction >= to.least_fraction_up).to(tl.int32) - to.element_exponent
    exponent = tl.minimum(tl.maximum(exponent, to.lowest), to.highest)
    return tl.where(amax == 0, to.lowest, exponent)


@triton.jit
def _power_of_two(exponent):
    """2^exponent as float32, for -149 < exponent < 128."""
    normal = (exponent + 127) << 23
    subnormal = 1 << tl.maximum(exponent + 149, 0)
    return tl.where(exponent < -126, subnormal, normal).to(tl.float32, bitcast=True)
