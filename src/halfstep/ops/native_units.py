"""Matrix units, and saturating integers, on the CPU: thin calls into ``halfstep._core``.

Equal to the reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfstep.format import Accumulator, Kind, Overflow, Rounding, Unit
from halfstep.ops import native
from halfstep.ops.layout import refuses_memory, starts
from halfstep.ops.random_bits import Key

__all__ = ["fixed_into", "matmul_into", "refuses_fixed", "refuses_matmul"]

_FLOAT_EXACT = 2**24  # float32 has every integer to here; float64 every one that there can be
_FEW = 16  # columns that leave most of a vector empty


def refuses_matmul(accumulator: Accumulator, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot add like that; empty if they can."""
    if not isinstance(accumulator.adder, Unit):
        return f"{accumulator.adder} is no unit"
    if native.MISSING:
        return native.MISSING
    if accumulator.split > 1 or (accumulator.chunk and accumulator.between.name != "fp32"):
        return f"no native kernel adds as {accumulator} does"
    if accumulator.chunk > native.core().unit_depth:
        return f"the kernels' chunks end at {native.core().unit_depth} products"
    return refuses_memory(tensors)


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, initial: Tensor, accumulator: Accumulator, key: Key
) -> None:
    """Writes ``a @ b + initial`` to ``out``, added as the unit does; see `halfstep.format.Unit`.

    ``out`` is contiguous; ``a`` and ``b`` may be broadcast.
    """
    if accumulator.start.name == "fp32" or accumulator.chunk:
        out.copy_(initial)
    else:
        native.round_into(out, initial, accumulator.start, Rounding.NEAREST, key)
    if not out.numel():
        return
    rows, columns = out.shape[-2:]
    if columns < _FEW and rows > columns:
        # a product does not mind which operand is which: the longer side fills the vectors
        turned = out.mT.contiguous()
        _accumulate(turned, b.mT, a.mT, accumulator.replace(operands=accumulator.operands[::-1]))
        out.copy_(turned.mT)
    else:
        _accumulate(out, a, b, accumulator)
        torch.autograd.graph.increment_version(out)


def _accumulate(out: Tensor, a: Tensor, b: Tensor, accumulator: Accumulator) -> None:
    unit = accumulator.adder
    if not isinstance(unit, Unit):
        raise TypeError(unit)
    left, right = accumulator.operands
    path = unit.datapath(left, right)
    a_starts, b_starts = starts(a), starts(b)
    native.core().unit_accumulate(
        of=_matrices(a, a_starts, b, b_starts),
        out=out.data_ptr(),
        block=path.block,
        fraction_bits=path.fraction_bits,
        result_bits=path.result_bits,
        result_is_half=path.result == "fp16",
        lowest_exponent=path.lowest_exponent,
        a_least=left.min_exponent,
        b_least=right.min_exponent,
        chunk=accumulator.chunk,
        threads=torch.get_num_threads(),
    )


def _matrices(a: Tensor, a_starts: Tensor, b: Tensor, b_starts: Tensor) -> Any:
    return native.core().Matrices(
        a=a.data_ptr(),
        a_starts=a_starts.data_ptr(),
        a_row=a.stride(-2),
        a_column=a.stride(-1),
        b=b.data_ptr(),
        b_starts=b_starts.data_ptr(),
        b_row=b.stride(-2),
        b_column=b.stride(-1),
        batch=len(a_starts),
        m=a.shape[-2],
        n=b.shape[-1],
        k=a.shape[-1],
    )


def refuses_fixed(accumulator: Accumulator, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot add in that fixed-point format step by step; empty if they can."""
    adder, operands = accumulator.adder, accumulator.operands
    if isinstance(adder, Unit) or adder.kind is not Kind.FIXED:
        return f"{adder} is no fixed-point format"
    if native.MISSING:
        return native.MISSING
    if len(operands) != 2 or any(f.kind is not Kind.FIXED for f in operands):
        return f"what {adder} adds are no fixed-point numbers"
    plain = Accumulator.parse(adder).replace(chunk=accumulator.chunk, rounding=accumulator.rounding)
    if accumulator != plain or adder.overflow is not Overflow.SATURATE:
        return f"no native kernel adds as {accumulator} does"
    if accumulator.chunk > native.core().unit_depth:
        return f"the kernels' chunks end at {native.core().unit_depth} products"
    if adder.mantissa_bits < sum(f.mantissa_bits for f in operands):
        return f"{adder} rounds the products"
    return refuses_memory(tensors)


def fixed_into(
    out: Tensor, a: Tensor, b: Tensor, initial: Tensor, accumulator: Accumulator, key: Key
) -> None:
    """Writes ``a @ b + initial`` to ``out``, which stops at the format's ends after every step."""
    adder, (left, right) = accumulator.format, accumulator.operands
    sums = torch.empty_like(out, dtype=torch.float64)
    native.round_into(sums, initial.to(torch.float64), adder, Rounding.NEAREST, key)
    if out.numel():
        # the farthest that a sum gets before it is kept in the range, in steps of the format
        farthest = (left.lowest * right.lowest - adder.lowest) * 2.0**adder.mantissa_bits
        a_starts, b_starts = starts(a), starts(b)
        native.core().fixed_accumulate(
            of=_matrices(a, a_starts, b, b_starts),
            out=sums.data_ptr(),
            lowest=adder.lowest,
            highest=adder.max,
            single=farthest <= _FLOAT_EXACT,
            chunk=accumulator.chunk,
            threads=torch.get_num_threads(),
        )
    out.copy_(sums)
