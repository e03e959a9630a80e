"""Dot products with a chosen accumulator in Triton: a tile of sums in registers, a rounding a step.

Twin of halfstep/ops/summation.py. A step adds an exact product to a float32 by one FMA that rounds
to odd: the hardware's, down and up, of which the odd one is taken. Another rounding, to at most
two bits less, is then that of the exact sum.
"""

# What is here is compiled by Triton, which may not be installed; its constants have our attributes.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from halfstep.ops.random_bits import STRIDE
from halfstep.ops.summation import CHUNK, PRODUCT, SUM, rounding_of
from halfstep.ops.triton_kernels.fma import fma_down, fma_nearest, fma_up
from halfstep.ops.triton_kernels.rounding import (
    finish_bits,
    from_bits,
    round_bits,
    start_bits,
    to_bits,
)

__all__ = ["matmul_kernel"]


def _moved(roundings: int) -> tl.constexpr:
    """By how much so many roundings move the upper half of the key, as int32."""
    by = roundings * STRIDE
    return tl.constexpr((by + 2**31) % 2**32 - 2**31)


_STRIDE = _moved(1)
_SUM, _PRODUCT, _CHUNK = (_moved(rounding_of(slot, 0)) for slot in (SUM, PRODUCT, CHUNK))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def matmul_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_starts,
    b_starts,
    m,
    n,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    key_low,
    key_high,
    sums: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out`` = a @ b + out, out contiguous and rounded already; element i has random bits i."""
    across = tl.cdiv(n, COLUMNS)
    tiles = tl.cdiv(m, ROWS) * across
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a_ptrs = a_ptr + tl.load(a_starts + batch) + rows.to(tl.int64) * a_row
    b_ptrs = b_ptr + tl.load(b_starts + batch) + columns.to(tl.int64) * b_column
    a_mask, b_mask = rows < m, columns < n
    index = (batch * m + rows) * n + columns
    mask = a_mask & b_mask
    total = tl.load(out_ptr + index, mask=mask, other=0.0)
    h = tl.zeros_like(total).to(tl.uint32)
    index_high = h
    if sums.adder.rounding == "stochastic":
        h = start_bits((index & 0xFFFFFFFF).to(tl.uint32), key_low)
        index_high = (index >> 32).to(tl.uint32)
    key = key_high
    if sums.chunk == 0:
        for _ in range(0, depth):
            x, y = tl.load(a_ptrs, mask=a_mask, other=0.0), tl.load(b_ptrs, mask=b_mask, other=0.0)
            total = _added_product(total, x, y, h, index_high, key, sums)
            a_ptrs, b_ptrs, key = a_ptrs + a_column, b_ptrs + b_row, key + _STRIDE
    else:
        one = tl.full(total.shape, 1.0, tl.float32)
        for first in range(0, depth, sums.chunk):
            part = tl.zeros_like(total)
            random = finish_bits(h, index_high, key + _CHUNK)
            for _ in range(first, tl.minimum(first + sums.chunk, depth)):
                x = tl.load(a_ptrs, mask=a_mask, other=0.0)
                y = tl.load(b_ptrs, mask=b_mask, other=0.0)
                part = _added_product(part, x, y, h, index_high, key, sums)
                a_ptrs, b_ptrs, key = a_ptrs + a_column, b_ptrs + b_row, key + _STRIDE
            total = _fma(part, one, total, random, sums.between, True)
    tl.store(out_ptr + index, total, mask=mask)


@triton.jit
def _added_product(total, x, y, h, index_high, key, sums: tl.constexpr):
    """The sum after one more step, whose roundings have the bits of the key."""
    x, y = tl.broadcast_to(x, total.shape), tl.broadcast_to(y, total.shape)
    if sums.rounds_products:
        random = finish_bits(h, index_high, key + _PRODUCT)
        # to add -0 changes no product, not even the sign of a zero
        x = _fma(x, y, tl.full(total.shape, -0.0, tl.float32), random, sums.adder, False)
        y = tl.full(total.shape, 1.0, tl.float32)
    random = finish_bits(h, index_high, key + _SUM)
    return _fma(x, y, total, random, sums.adder, True)


@triton.jit
def _fma(x, y, z, random, grid: tl.constexpr, IS_SUM: tl.constexpr):
    """x * y + z, rounded once to the grid (stochastically: after float32)."""
    if grid.is_float32 or grid.rounding == "stochastic":
        bits = to_bits(fma_nearest(x, y, z))
    else:
        below, above = to_bits(fma_down(x, y, z)), to_bits(fma_up(x, y, z))
        # Where both are even it is exact, and they are the same but for x + (-x).
        if grid.rounding == "down" and IS_SUM:
            bits = tl.where((above & 1) != 0, above, below)
        else:
            bits = tl.where((below & 1) != 0, below, above)
    if not grid.is_float32:
        bits = round_bits(bits, random, grid)
    return from_bits(bits, tl.float32)
