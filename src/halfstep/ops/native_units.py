"""Matrix units on the CPU: thin calls into ``halfstep._core``. Equal to the reference bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.format import Accumulator, Unit
from halfstep.ops import native
from halfstep.ops.layout import refuses_memory, starts
from halfstep.ops.random_bits import Key

__all__ = ["matmul_into", "refuses_matmul"]

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
    out.copy_(initial)
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
        a=a.data_ptr(),
        a_starts=a_starts.data_ptr(),
        a_row=a.stride(-2),
        a_column=a.stride(-1),
        b=b.data_ptr(),
        b_starts=b_starts.data_ptr(),
        b_row=b.stride(-2),
        b_column=b.stride(-1),
        out=out.data_ptr(),
        batch=len(a_starts),
        m=a.shape[-2],
        n=b.shape[-1],
        k=a.shape[-1],
        block=path.block,
        fraction_bits=path.fraction_bits,
        result_bits=path.result_bits,
        lowest_exponent=path.lowest_exponent,
        a_least=left.min_exponent,
        b_least=right.min_exponent,
        chunk=accumulator.chunk,
        threads=torch.get_num_threads(),
    )
