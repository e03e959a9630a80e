"""What the loss scale asks of all gradients, in Triton: one launch for all of a dtype.

A table says which tensors there are, and which part of which is each program's.
"""

# What is here is compiled by Triton, which may not be installed.
# pyright: reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from halfstep.ops.triton_kernels.rounding import to_bits

__all__ = ["count_kernel", "pointer", "unscale_kernel"]


@triton.jit
def count_kernel(
    addresses,
    sizes,
    which,
    begins,
    counts,
    word: tl.constexpr,
    infinity: tl.constexpr,
    aligned: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds to ``counts`` how many words of each tensor have all bits of ``infinity``."""
    tensor = tl.load(which + tl.program_id(0))
    begin = tl.load(begins + tl.program_id(0))
    size = tl.load(sizes + tensor)
    x_ptr = pointer(addresses, tensor, word, aligned)
    found = tl.zeros((BLOCK,), tl.int32)
    for _ in range(0, PART, BLOCK):
        inside = tl.arange(0, BLOCK)
        bits = tl.load(x_ptr + begin + inside, mask=inside < size - begin, other=0)
        found += ((bits & infinity) == infinity).to(tl.int32)
        begin += BLOCK
    tl.atomic_add(counts + tensor, tl.sum(found).to(tl.int64))


@triton.jit
def unscale_kernel(
    addresses,
    sizes,
    which,
    begins,
    outputs,
    scale,
    number: tl.constexpr,
    aligned: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each tensor over ``scale`` to the float32 one at its place in ``outputs``."""
    tensor = tl.load(which + tl.program_id(0))
    begin = tl.load(begins + tl.program_id(0))
    size = tl.load(sizes + tensor)
    x_ptr = pointer(addresses, tensor, number, aligned)
    out_ptr = pointer(outputs, tensor, tl.float32, aligned)
    for _ in range(0, PART, BLOCK):
        inside = tl.arange(0, BLOCK)
        mask = inside < size - begin
        x = to_bits(tl.load(x_ptr + begin + inside, mask=mask)).to(tl.float32, bitcast=True)
        tl.store(out_ptr + begin + inside, tl.div_rn(x, scale), mask=mask)
        begin += BLOCK


@triton.jit
def pointer(addresses, tensor, number: tl.constexpr, aligned: tl.constexpr):
    """To the first element of a tensor of the table."""
    address = tl.load(addresses + tensor)
    if aligned:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(number))
