"""Matrix products and convolutions as rule 1 has them, in the recipe's accumulator, forward and backward.

There are three products in a linear layer, and each is a `rows` of the others' operands::

    output      = input @ weight.T              rows(input, weight)
    grad_input  = grad_output @ weight          rows(grad_output, weight.T)
    grad_weight = grad_output.T @ input         rows(grad_output.T, input.T)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from halfstep import ops
from halfstep.format import Accumulator

if TYPE_CHECKING:
    from halfstep.format import Format
    from halfstep.switching.emulated import Emulator

__all__ = ["convolve", "matmul", "repeated_rows", "rows", "wide_rows"]


_TINY = 1 << 19


def _pick_gemm() -> Callable[[Tensor, Tensor], Tensor]:
    """oneDNN's FP32 GEMM where torch has it: twice as fast as MKL's on processors that are not Intel's.

    Below `_TINY` multiplications its set-up costs more than it saves.
    """
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None or not torch.backends.mkldnn.is_available():
        return F.linear

    def gemm(a: Tensor, b: Tensor) -> Tensor:
        if a.device.type != "cpu" or a.numel() * b.size(0) < _TINY:
            return F.linear(a, b)
        return linear(a, b, None, "none", [], "")

    return gemm


_gemm = _pick_gemm()


def wide_rows(a: Tensor, b: Tensor, accumulate: Format) -> Tensor:
    """``a @ b.T`` of FP32 carriers (M, K) and (N, K), added in ``accumulate``; FP32, no graph."""
    if accumulate.name == "fp32":
        return _gemm(a, b)
    return ops.multiply(a, b.t(), Accumulator.parse(accumulate))


def repeated_rows(b: Tensor, count: int, accumulate: Format) -> Callable[[Tensor], Tensor]:
    """`wide_rows` with ``b``, for many ``a`` of about ``count`` rows: oneDNN lays ``b`` out for it once."""
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    worth = count * b.numel() >= _TINY and b.device.type == "cpu" and accumulate.name == "fp32"
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
    flat = a.reshape(-1, a.size(-1))
    out: Any = _Rows.apply(flat, b, bias, emulator)
    return out.view(*a.shape[:-1], b.size(0))


class _Batched(Function):
    """``a @ b`` of carriers (batch, M, K) and (batch, K, N); gradients use the same accumulator."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, accumulate: Format) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.accumulate = accumulate
        return ops.multiply(a, b, Accumulator.parse(accumulate))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return (
            _Batched.apply(grad, b.transpose(-2, -1), ctx.accumulate)
            if ctx.needs_input_grad[0]
            else None,
            _Batched.apply(a.transpose(-2, -1), grad, ctx.accumulate)
            if ctx.needs_input_grad[1]
            else None,
            None,
        )


def matmul(a: Tensor, b: Tensor, accumulate: Format) -> Tensor:
    """``torch.matmul`` of FP32 carriers, added in ``accumulate``; not rounded to the store format."""
    if accumulate.name == "fp32":
        return torch.matmul(a, b)
    if b.dim() == 1:
        return matmul(a, b.unsqueeze(-1), accumulate).squeeze(-1)
    if a.dim() == 1:
        return matmul(a.unsqueeze(0), b, accumulate).squeeze(-2)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    right = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    out: Any = _Batched.apply(left, right, accumulate)
    return out.reshape(*batch, a.size(-2), b.size(-1))


def convolve(
    emulator: Emulator,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``conv1d`` or ``conv2d``, each output one sum over channels and taps in the recipe's accumulator.

    x (N, C, [H,] W), weight (O, C / groups, [KH,] KW), low dtype in and out. The gradient of x is the sum of
    the taps' products; those of overlapping windows are added in the low dtype, as torch's fold does.
    """
    if weight.dim() == 3:
        out = convolve(
            emulator,
            x.unsqueeze(-2),
            weight.unsqueeze(-2),
            bias,
            (1, *_pair(stride, 1)),
            (0, *_pair(padding, 1)),
            (1, *_pair(dilation, 1)),
            groups,
        )
        return out.squeeze(-2)
    if x.dim() == 3:
        return convolve(
            emulator, x.unsqueeze(0), weight, bias, stride, padding, dilation, groups
        ).squeeze(0)
    (sh, sw), (ph, pw), (dh, dw) = (_pair(v, 2) for v in (stride, padding, dilation))
    n, _, height, width = x.shape
    out_channels, _, kh, kw = weight.shape
    out_h = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    out_w = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    taps = F.unfold(x, (kh, kw), (dh, dw), (ph, pw), (sh, sw))  # (N, C KH KW, L)
    biases = (None,) * groups if bias is None else bias.chunk(groups)
    parts = [
        rows(t.transpose(1, 2), w.reshape(w.size(0), -1), part, emulator)
        for t, w, part in zip(taps.chunk(groups, 1), weight.chunk(groups, 0), biases, strict=True)
    ]
    out = torch.cat(parts, 2) if groups > 1 else parts[0]  # (N, L, O)
    return out.transpose(1, 2).reshape(n, out_channels, out_h, out_w)


def _pair(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    values = tuple(value)
    return values * n if len(values) == 1 and n > 1 else values
