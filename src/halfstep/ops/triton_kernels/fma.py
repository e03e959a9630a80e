"""The fused multiply-add of float32 in Triton, in three roundings.

CUDA's library, as Triton links it, flushes subnormal numbers to zero (fma.rm.ftz): hence PTX. The
interpreter has none that rounds once: there they are made of float64's arithmetic.
"""

# What is here is compiled by Triton, which may not be installed; its constants have our attributes.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from halfstep.ops.triton_kernels.rounding import INTERPRETED, to_bits

__all__ = ["fma_down", "fma_nearest", "fma_up"]


@triton.jit
def fma_nearest(x, y, z):
    """x * y + z, rounded once, to nearest."""
    if INTERPRETED:
        return _to_odd(x, y, z).to(tl.float32)
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fma_up(x, y, z):
    """x * y + z, rounded once, up."""
    if INTERPRETED:
        exact = _to_odd(x, y, z)
        near = exact.to(tl.float32)
        bits = near.to(tl.int32, bitcast=True)
        next = tl.where(bits < 0, bits - 1, bits + 1)
        bits = tl.where(near.to(tl.float64) < exact, next, bits)
        return bits.to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise(
        "fma.rp.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fma_down(x, y, z):
    """x * y + z, rounded once, down."""
    if INTERPRETED:
        exact = _to_odd(x, y, z)
        near = exact.to(tl.float32)
        bits = near.to(tl.int32, bitcast=True)
        next = tl.where(bits < 0, bits + 1, bits - 1)
        bits = tl.where(near.to(tl.float64) > exact, next, bits)
        signs_differ = (to_bits(x) ^ to_bits(y) ^ to_bits(z)) < 0
        bits = tl.where((exact == 0) & signs_differ, -0x80000000, bits)
        return bits.to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise(
        "fma.rm.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _to_odd(x, y, z):
    """x * y + z in float64, rounded to odd; see `halfstep.ops.summation`."""
    product, z = x.to(tl.float64) * y.to(tl.float64), z.to(tl.float64)
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    bits = total.to(tl.int64, bitcast=True)
    moves = (error != 0) & (tl.abs(error) < float("inf")) & ((bits & 1) == 0)
    moved = tl.where((error > 0) == (total > 0), bits + 1, bits - 1)
    return tl.where(moves, moved, bits).to(tl.float64, bitcast=True)
