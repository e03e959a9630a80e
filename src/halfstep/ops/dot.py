"""Dot products with a chosen accumulator: the checks; back ends do the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.errors import OperandError
from halfstep.format import Format, Kind, Specials
from halfstep.ops.backends import Backend, choose

__all__ = ["dot_accumulate"]

_OPERANDS = (torch.float32, torch.float16, torch.bfloat16)
_MOST_DIGITS = 22  # two less than float32's, which a rounding in two steps needs to be exact


def dot_accumulate(
    a: Tensor, b: Tensor, accumulate: Format | str, *, backend: Backend | str = Backend.AUTO
) -> Tensor:
    """``a @ b`` with the sum rounded to a format after every step, as float32.

    ``a`` is (..., M, K) and ``b`` is (..., K, N), float32 or 16-bit, leading dimensions broadcast;
    they are taken as they are: round them first where they should be in a format. In order of k::

        sum = +0
        for k in range(K):
            sum = round_to_nearest_even(sum + a[..., m, k] * b[..., k, n])   # one rounding

    The product and the sum are exact before that rounding (a fused multiply-add in the format).
    K = 0 gives +0. ``accumulate`` is a float format of at most 21 mantissa bits that has an
    infinity; overflow, NaN, infinities and signs of zero are IEEE 754's. No gradient is recorded.

    Raises `OperandError` for shapes, dtypes or formats that it cannot take.

    >>> ones = torch.ones(1, 4096)
    >>> dot_accumulate(ones, ones.T, "fp16").item()   # 2048 + 1 is 2048 in fp16
    2048.0

    Source: IEEE 754-2019, section 5.4.1 (fusedMultiplyAdd).
    """
    format = Format.parse(accumulate)
    _check_format(format)
    for name, operand in (("a", a), ("b", b)):
        if operand.dtype not in _OPERANDS or operand.dim() < 2:
            raise OperandError(
                f"dot_accumulate: {name} is {operand.dtype} of shape {tuple(operand.shape)}; "
                "allowed: float32, float16 or bfloat16 of two or more dimensions"
            )
    if a.shape[-1] != b.shape[-2] or a.device != b.device:
        raise OperandError(
            f"dot_accumulate: a is {tuple(a.shape)} on {a.device} and b is {tuple(b.shape)} on "
            f"{b.device}; wanted: (..., M, K) and (..., K, N) on one device"
        )
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise OperandError(
            f"dot_accumulate: leading dimensions of a {tuple(a.shape)} and b {tuple(b.shape)} "
            "do not broadcast"
        ) from None
    with torch.no_grad():
        a = a.detach().float().resolve_neg().expand(*batch, *a.shape[-2:])
        b = b.detach().float().resolve_neg().expand(*batch, *b.shape[-2:])
        out = a.new_zeros((*batch, a.shape[-2], b.shape[-1]))
        choice = choose(
            "dot_accumulate", a.device, Backend.parse(backend), format=format, tensors=(a, b)
        )
        choice.function(out, a, b, format)
    return out


def _check_format(format: Format) -> None:
    if (
        format.kind is not Kind.FLOAT
        or format.specials is not Specials.IEEE
        or format.precision > _MOST_DIGITS
    ):
        raise OperandError(
            f"dot_accumulate: accumulate={format}; allowed: eXmY with Y up to {_MOST_DIGITS - 1}, "
            "and the named formats that are such (fp16, bf16, tf32, e5m2, e4m3)"
        )
