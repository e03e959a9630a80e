"""Matrix products and convolutions as rule 1 has them, in the recipe's accumulator, forward and backward.

There are three products in a linear layer, and each is a `rows` of the others' operands::

    output      = input @ weight.T              rows(input, weight)
    grad_input  = grad_output @ weight          rows(grad_output, weight.T)
    grad_weight = grad_output.T @ input         rows(grad_output.T, input.T)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from halfstep import ops
from halfstep.format import Accumulator
from halfstep.ops.custom import operator
from halfstep.switching.tracing import is_tracing

if TYPE_CHECKING:
    from halfstep.switching.emulated import Emulator

__all__ = ["FP32_SUMS", "convolution", "matmul", "repeated_rows", "rows", "wide_rows"]


FP32_SUMS = Accumulator.parse("fp32")
"""As FP32 kernels add, in an order of their own."""
_TINY = 1 << 19


def _pick_gemm() -> Callable[[Tensor, Tensor], Tensor]:
    """oneDNN's FP32 GEMM where torch has it: twice as fast as MKL's on processors that are not Intel's.

    Below `_TINY` multiplications its set-up costs more than it saves.
    """
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None or not torch.backends.mkldnn.is_available():
        return F.linear

    def large(a: Tensor, b: Tensor) -> Tensor:
        return linear(a, b, None, "none", [], "")

    # Inductor knows oneDNN's only with a weight that is a constant: in a graph it is a node of ours.
    node = operator(
        "gemm",
        "(Tensor a, Tensor b) -> Tensor",
        large,
        fake=lambda a, b: a.new_empty(a.size(0), b.size(0)),
    )

    def gemm(a: Tensor, b: Tensor) -> Tensor:
        traced = is_tracing()
        # A DTensor has no rule for oneDNN's.
        plain = traced or (type(a) is Tensor and type(b) is Tensor)
        if not plain or a.device.type != "cpu" or a.numel() * b.size(0) < _TINY:
            return F.linear(a, b)
        return node(a, b) if traced else large(a, b)

    return gemm


_gemm = _pick_gemm()


def wide_rows(a: Tensor, b: Tensor, accumulate: Accumulator) -> Tensor:
    """``a @ b.T`` of FP32 carriers (M, K) and (N, K), added in ``accumulate``; FP32, no graph."""
    if accumulate is FP32_SUMS or accumulate == FP32_SUMS:
        return _gemm(a, b)
    if is_tracing():  # a node of its own, for `multiply` has none
        return ops.matmul(a, b.t(), "fp32", accumulate)
    return ops.multiply(a, b.t(), accumulate)


def wide_product(a: Tensor, b: Tensor, accumulate: Accumulator) -> Tensor:
    """``a @ b`` of FP32 carriers: the bits of ``wide_rows(a, b.T)``."""
    if accumulate is FP32_SUMS and a.numel() * b.size(1) < _TINY:
        return torch.mm(a, b)
    return wide_rows(a, b.t(), accumulate)


def repeated_rows(b: Tensor, count: int, accumulate: Accumulator) -> Callable[[Tensor], Tensor]:
    """`wide_rows` with ``b``, for many ``a`` of about ``count`` rows: oneDNN lays ``b`` out for it once."""
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    worth = count * b.numel() >= _TINY and b.device.type == "cpu" and accumulate == FP32_SUMS
    if pack is None or _gemm is F.linear or not worth:
        return lambda a: wide_rows(a, b, accumulate)
    packed = pack(b.contiguous(), count)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda a: linear(a, packed, None, "none", [], "")


class _Rows(Function):
    """``a @ b.T + bias`` with operands and result in the low dtype; only those are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, emulator: Emulator) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.emulator = emulator
        out = wide_rows(a.float(), b.float(), emulator.accumulate)
        if bias is not None:
            out += bias
        return out.to(emulator.low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        emulator = ctx.emulator
        need_a, need_b, need_bias, _ = ctx.needs_input_grad
        return (
            _Rows.apply(grad, b.t(), None, emulator) if need_a else None,
            _Rows.apply(grad.t(), a.t(), None, emulator) if need_b else None,
            grad.float().sum(0).to(grad.dtype) if need_bias else None,
            None,
        )


def rows(a: Tensor, b: Tensor, bias: Tensor | None, emulator: Emulator) -> Tensor:
    """``a @ b.T + bias``, rounded once: a (..., K), b (N, K), bias (N); low dtype in and out.

    The batch of ``a`` is folded into its rows, so that the gradient of ``b`` is one dot product over it.
    """
    flat = a.reshape(math.prod(a.shape[:-1]), a.size(-1))
    out: Any = _Rows.apply(flat, b, bias, emulator)
    return out.view(*a.shape[:-1], b.size(0))


def matmul(a: Tensor, b: Tensor, accumulate: Accumulator) -> Tensor:
    """``torch.matmul`` of FP32 carriers, added in ``accumulate``; not rounded to the store format."""
    if accumulate == FP32_SUMS:
        return torch.matmul(a, b)
    return ops.matmul(a, b, "fp32", accumulate, gradient="fp32")


_Convolution = Callable[[Tensor, Tensor, Tensor | None, Accumulator], Tensor]


def convolution(name: str, args: tuple[Any, ...]) -> _Convolution | None:
    """The convolution of input, weight and bias that a call of that operation is; None for others.

    Carriers in, FP32 out, not rounded to the store format; see `halfstep.ops.conv2d`.
    """
    rest = args[3:]
    if name in ("convolution", "_convolution"):
        stride, padding, dilation, transposed, more, groups = args[3:9]
        name = f"conv{'_transpose' if transposed else ''}{args[1].dim() - 2}d"
        rest = (stride, padding, *((more, groups, dilation) if transposed else (dilation, groups)))
    op = _CONVOLUTIONS.get(name)
    if op is None:
        return None
    return lambda x, weight, bias, accumulate: op(
        x, weight, bias, *rest, operands="fp32", accumulate=accumulate, gradient="fp32"
    )


_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    op.__name__: op
    for op in (
        ops.conv1d,
        ops.conv2d,
        ops.conv3d,
        ops.conv_transpose1d,
        ops.conv_transpose2d,
        ops.conv_transpose3d,
    )
}
