"""Dot products of an emulated program: FP32 carriers in, the recipe's accumulator, not rounded at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfstep import ops
from halfstep.errors import SwitchError
from halfstep.format import Accumulator
from halfstep.ops.windows import Form, Geometry, convolve
from halfstep.switching.products import FP32_SUMS, wide_product

__all__ = ["product"]


def product(
    op: torch._ops.OpOverload,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    accumulate: Accumulator,
) -> Any:
    """What the aten dot product ``op`` gives for FP32 operands that are rounded already.

    ``accumulate``: `FP32_SUMS` itself where sums are in FP32.

    Raises:
        SwitchError: the accumulator is narrow and no such product is known; it is never FP32 instead.
    """
    if name == "mm" and not kwargs:
        return wide_product(args[0], args[1], accumulate)
    if name == "addmm" and not kwargs and args[0].dim() == 1:
        return wide_product(args[1], args[2], accumulate).add_(args[0])
    if accumulate is FP32_SUMS:
        return op(*args, **kwargs)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if name in ("bmm", "matmul"):
        return ops.multiply(args[0], args[1], accumulate)
    if name in ("addmm", "baddbmm"):
        added = ops.multiply(args[1], args[2], accumulate)
        return (added if alpha == 1 else added * alpha) + (args[0] if beta == 1 else args[0] * beta)
    if name == "mv":
        return ops.multiply(args[0], args[1].unsqueeze(1), accumulate).squeeze(1)
    if name == "dot":
        return ops.multiply(args[0].unsqueeze(0), args[1].unsqueeze(1), accumulate).view(())
    if name in ("convolution", "_convolution"):
        return _convolution(args, accumulate)
    if name == "convolution_backward":
        return _convolution_backward(args, accumulate)
    raise SwitchError(
        f"{op} has no kernel that adds in {accumulate}; "
        "use a recipe with accumulate=fp32 for this program"
    )


def _geometry(
    x: Tensor, y_size: tuple[int, ...], weight: Tensor, numbers: Any, transposed: bool
) -> Geometry:
    """How input and output lie to each other; a transposed convolution has them the other way round."""
    stride, padding, dilation, groups = numbers
    dims = weight.dim() - 2
    size = tuple(x.shape[2:])

    def each(given: Any) -> tuple[int, ...]:
        values = tuple(given)
        return values * dims if len(values) == 1 else values

    return Geometry(
        size=y_size if transposed else size,
        kernel=tuple(weight.shape[2:]),
        out=size if transposed else y_size,
        stride=each(stride),
        before=each(padding),
        dilation=each(dilation),
        groups=groups,
    )


def _convolution(args: tuple[Any, ...], accumulate: Accumulator) -> Tensor:
    x, weight, bias, stride, padding, dilation, transposed, more, groups, *_ = args
    stride, padding, dilation, more = (
        tuple(v) * (weight.dim() - 2) if len(v) == 1 else tuple(v)
        for v in (stride, padding, dilation, more)
    )
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True)
    if transposed:
        out = tuple((i - 1) * s - 2 * p + d * (k - 1) + m + 1 for i, k, s, p, d, m in sizes)
    else:
        out = tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d, _ in sizes)
    geometry = _geometry(x, out, weight, (stride, padding, dilation, groups), transposed)
    form = Form.INPUT if transposed else Form.OUTPUT
    result = convolve(form, weight, x, geometry, accumulate).to(torch.float32)
    if bias is not None:
        result = result + bias.view(-1, *[1] * (weight.dim() - 2))
    return result


def _convolution_backward(
    args: tuple[Any, ...], accumulate: Accumulator
) -> tuple[Tensor | None, ...]:
    grad, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = args
    numbers = (stride, padding, dilation, groups)
    geometry = _geometry(x, tuple(grad.shape[2:]), weight, numbers, transposed)
    of_input = of_weight = of_bias = None
    if wanted[0]:
        form = Form.OUTPUT if transposed else Form.INPUT
        of_input = convolve(form, weight, grad, geometry, accumulate).to(torch.float32)
    if wanted[1]:
        operands = (grad, x) if transposed else (x, grad)
        of_weight = convolve(Form.WEIGHT, *operands, geometry, accumulate).to(torch.float32)
    if wanted[2]:
        of_bias = grad.sum([0, *range(2, grad.dim())])
    return of_input, of_weight, of_bias
