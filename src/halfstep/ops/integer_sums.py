"""Integer and fixed-point accumulators where no sum can leave the range: exact, in any order.

So it is a library's matrix product. What may saturate or wrap on the way is added step by step, by
the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from halfstep.format import Accumulator, Format, Kind, Rounding, Unit
from halfstep.ops import summation
from halfstep.ops.random_bits import Key
from halfstep.ops.reference import round_into

__all__ = ["matmul_into", "refuses_matmul", "result_dtype", "takes_bytes"]

_EXACT = 2**24  # float32 has every integer to here
_WORTH = 64  # products of one float32 piece; where fewer fit, float64 is as fast


def result_dtype(accumulator: Accumulator) -> torch.dtype:
    """float64 for fixed-point sums of more than 25 bits, which float32 cannot hold; else float32."""
    wide = any(
        isinstance(adder, Format) and adder.kind is Kind.FIXED and adder.bits > 25
        for adder in (accumulator.adder, accumulator.between)
    )
    return torch.float64 if wide else torch.float32


def refuses_matmul(accumulator: Accumulator, tensors: Sequence[Tensor]) -> str:
    """Why sums might round, saturate or wrap; empty if they cannot."""
    adder = accumulator.adder
    if isinstance(adder, Unit) or adder.kind is not Kind.FIXED:
        return f"{adder} is no fixed-point format"
    if len(accumulator.operands) != 2 or any(
        f.kind is not Kind.FIXED for f in accumulator.operands
    ):
        return f"what {adder} adds are no fixed-point numbers"
    if accumulator.between != adder or accumulator.compensated:
        return f"no library adds as {accumulator} does"
    if adder.mantissa_bits < sum(f.mantissa_bits for f in accumulator.operands):
        return f"{adder} rounds the products"
    steps = tensors[0].shape[-1]
    if steps * _largest_product(accumulator) > adder.max:
        return f"{steps} products may be more than {adder} holds"
    return ""


def _largest_product(accumulator: Accumulator) -> float:
    left, right = accumulator.operands
    return left.lowest * right.lowest  # two's complement: the most negative one is the largest


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, initial: Tensor, accumulator: Accumulator, key: Key
) -> None:
    """Writes ``a @ b + initial`` to ``out``, exact; step by step where ``initial`` is too large."""
    adder = accumulator.format
    if initial.numel() and not any(initial.stride()):
        initial = initial.flatten()[:1]  # one number for all
    start = torch.empty_like(initial, dtype=out.dtype)
    round_into(start, initial, adder, Rounding.NEAREST, Key())
    bound = a.shape[-1] * _largest_product(accumulator)
    if start.numel() and float(start.abs().amax()) + bound > adder.max:
        summation.matmul_into(out, a, b, initial.expand(out.shape), accumulator, key)
        return
    torch.add(start, _exact_product(a, b, accumulator), out=out)


def takes_bytes(a: Tensor, b: Tensor, accumulator: Accumulator) -> bool:
    """True where `torch._int_mm` of these int8 tensors is their sum in the accumulator, and fast."""
    return (
        a.dtype is b.dtype is torch.int8
        and a.dim() == b.dim() == 2
        and a.device.type == b.device.type == "cpu"
        and a.shape[1] == b.shape[0]
        and bool(a.numel() and b.numel())
        and min(format.bits for format in accumulator.operands) >= 8
        and not refuses_matmul(accumulator, (a, b))
        and _has_fast_bytes()
    )


def _exact_product(a: Tensor, b: Tensor, accumulator: Accumulator) -> Tensor:
    left, right = accumulator.operands
    quanta = 2.0 ** (left.mantissa_bits + right.mantissa_bits)
    piece = int(_EXACT // (_largest_product(accumulator) * quanta))
    steps = a.shape[-1]
    bytes_only = a.dim() == 2 and quanta == 1 and max(left.bits, right.bits) <= 8
    if bytes_only and _has_fast_bytes() and not bool(a.isnan().any() or b.isnan().any()):
        return torch.ops.aten._int_mm(a.to(torch.int8), b.to(torch.int8).contiguous())
    if piece < _WORTH or torch.get_float32_matmul_precision() != "highest":
        return torch.matmul(a.double(), b.double())
    if steps <= piece:
        return torch.matmul(a, b)
    total = torch.matmul(a[..., :piece], b[..., :piece, :]).double()
    for first in range(piece, steps, piece):
        total += torch.matmul(a[..., first : first + piece], b[..., first : first + piece, :])
    return total


@cache
def _has_fast_bytes() -> bool:
    """True if torch multiplies bytes with instructions for it, exactly: older ones saturate at 16 bits."""
    if not torch.cpu._is_vnni_supported():
        return False
    least = torch.full((32, 64), -128, dtype=torch.int8)
    return bool((torch.ops.aten._int_mm(least, least.t()) == 64 * 128 * 128).all())
