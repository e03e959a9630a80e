"""`conv1d` ... `conv_transpose3d`: the public edge of convolutions. `convolved` has the gradient."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from halfstep.errors import OperandError, UnknownNameError
from halfstep.format import Format
from halfstep.ops.arithmetic import (
    Arithmetic,
    Keywords,
    arithmetic_of,
    arithmetic_text,
    carried,
    check_operand,
    operands_of,
    rounded,
)
from halfstep.ops.carriers import INTEGERS
from halfstep.ops.convolved import convolved
from halfstep.ops.custom import is_traced
from halfstep.ops.windows import Form, Geometry

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]

Sizes = int | tuple[int, ...] | list[int]
_KEYWORDS = Keywords.__optional_keys__


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    generator: torch.Generator | None = None,
    **arithmetic: Unpack[Keywords],
) -> Tensor:
    """`torch.nn.functional.conv1d` with a chosen accumulator; all as for `conv2d`.

    >>> x, w = torch.ones(1, 1, 4096), torch.ones(1, 1, 4096)
    >>> conv1d(x, w).item(), conv1d(x, w, chunk=64).item()   # 2048 + 1 is 2048 in fp16
    (2048.0, 4096.0)
    """
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, generator, arithmetic)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    generator: torch.Generator | None = None,
    **arithmetic: Unpack[Keywords],
) -> Tensor:
    """`torch.nn.functional.conv2d` with a chosen accumulator, bit for bit defined.

    ``input`` ([N,] C, H, W), ``weight`` (O, C / groups, KH, KW), ``bias`` (O), and the arguments up
    to ``groups`` are as for torch; padding may be "valid" or "same". float32, float64 or 16-bit,
    on one device; the result is float32, float64 where an operand is. Integers too where the operands'
    format is ``intN``; int32 where all three, and the accumulator's format, are of integers.

    The keywords are those of `halfstep.matmul` (all but ``initial``) and mean the same, operands
    being input and weight. Each element of the result is one dot product as defined there, with

    - k running over (channel of the group, kernel position), row-major as the weight is laid out;
    - zeros of the padding being terms like others: they count in chunks, parts and trees, and give
      NaN with an infinite weight;
    - +0 as its start. The bias is added afterwards, by one addition in the result's dtype: a GPU's
      kernels have it in the FP32 epilogue, not in the accumulator.

    Gradient: straight through, with one dot product an element, added as ``grad_accumulate`` says,
    of the rounded operands and the gradient rounded to ``gradient``:

    - of the input, over (output channel of the group, kernel position), row-major; those positions
      that meet this element, places beyond the edge of the output counting as zeros, those between
      two strides not at all;
    - of the weight, over (N, output position), row-major;
    - of the bias, torch's sum.

    Beyond operands and result it takes 64 MB; for a gradient of the weight whose sum has to be made
    in one piece (pairwise, chunks, Kahan, split, stochastic) one channel of each, where that is more.

    Raises `OperandError` for what cannot be convolved, `TypeError` for a keyword that is not there, and the
    errors of `halfstep.matmul`.

    >>> x = torch.ones(1, 1, 3, 3)
    >>> conv2d(x, torch.ones(1, 1, 2, 2), torch.tensor([0.5]), operands="e4m3fn", accumulate="e5m2")
    tensor([[[[4.5000, 4.5000],
              [4.5000, 4.5000]]]])

    Source: Chellapilla et al., High performance convolutional neural networks for document
    processing, 2006 (a convolution as a matrix product); the bias in the epilogue: NVIDIA cuDNN,
    ConvolutionBiasActivationForward (neither checked).
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, generator, arithmetic)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    generator: torch.Generator | None = None,
    **arithmetic: Unpack[Keywords],
) -> Tensor:
    """`torch.nn.functional.conv3d` with a chosen accumulator; all as for `conv2d`.

    >>> conv3d(torch.ones(1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)).shape
    torch.Size([1, 1, 1, 1])
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, generator, arithmetic)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    generator: torch.Generator | None = None,
    **arithmetic: Unpack[Keywords],
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` with a chosen accumulator; all as `conv_transpose2d`.

    >>> conv_transpose1d(torch.ones(1, 1, 2), torch.ones(1, 1, 3), stride=2)
    tensor([[[1., 1., 2., 1., 1.]]])
    """
    return _transposed(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation,
        generator, arithmetic,
    )  # fmt: skip


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    generator: torch.Generator | None = None,
    **arithmetic: Unpack[Keywords],
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` with a chosen accumulator, bit for bit defined.

    ``input`` ([N,] C, H, W), ``weight`` (C, O / groups, KH, KW), ``bias`` (O), and the arguments up
    to ``dilation`` are as for torch. Dtypes, keywords, bias and errors are as for `conv2d`.

    Each element of the result is gathered by one dot product, not scattered and added up: for the
    output position i, k runs over (channel of the group, kernel position), row-major as the weight
    is laid out, and over those kernel positions only for which the stride divides
    i + padding - position * dilation; that quotient is the place in the input, +0 where it is beyond
    the edge. The gradients are those of `conv2d` with the parts exchanged: of the input over
    (output channel of the group, kernel position), of the weight over (N, input position).

    >>> conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), accumulate="bf16")
    tensor([[[[1., 2., 1.],
              [2., 4., 2.],
              [1., 2., 1.]]]])

    Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv
    1603.07285 (not checked).
    """
    return _transposed(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation,
        generator, arithmetic,
    )  # fmt: skip


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    generator: torch.Generator | None = None,
    **arithmetic: Unpack[Keywords],
) -> Tensor:
    """`torch.nn.functional.conv_transpose3d` with a chosen accumulator; all as `conv_transpose2d`.

    >>> conv_transpose3d(torch.ones(1, 1, 1, 1), torch.ones(1, 2, 2, 2, 2)).shape
    torch.Size([2, 2, 2, 2])
    """
    return _transposed(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation,
        generator, arithmetic,
    )  # fmt: skip


def _conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    generator: torch.Generator | None,
    keywords: Keywords,
) -> Tensor:
    op = f"conv{dims}d"
    how = _arithmetic(op, keywords)
    input, weight, counts = _carried(how, input, weight, bias)
    _check(op, dims, input, weight, groups, channels=1)
    strides, dilations = (
        _numbers(op, "stride", stride, dims),
        _numbers(op, "dilation", dilation, dims),
    )
    size, kernel = tuple(input.shape[-dims:]), tuple(weight.shape[2:])
    spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before, after = _padding(op, padding, strides, spans)
    out = tuple(
        (i + b + a - span - 1) // s + 1
        for i, b, a, span, s in zip(size, before, after, spans, strides, strict=True)
    )
    if min(out) < 1:
        raise OperandError(
            f"{op}: input {tuple(input.shape)} with padding {before} and {after} is smaller than the "
            f"kernel {kernel} with dilation {dilations}; allowed: at least {tuple(s + 1 for s in spans)}"
        )
    geometry = Geometry(
        size=size, kernel=kernel, out=out,
        stride=strides, before=before, dilation=dilations, groups=groups,
    )  # fmt: skip
    return _convolved(op, Form.OUTPUT, input, weight, bias, geometry, how, generator, counts)


def _transposed(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    groups: int,
    dilation: Sizes,
    generator: torch.Generator | None,
    keywords: Keywords,
) -> Tensor:
    op = f"conv_transpose{dims}d"
    how = _arithmetic(op, keywords)
    input, weight, counts = _carried(how, input, weight, bias)
    _check(op, dims, input, weight, groups, channels=0)
    strides, dilations = (
        _numbers(op, "stride", stride, dims),
        _numbers(op, "dilation", dilation, dims),
    )
    before = _numbers(op, "padding", padding, dims, least=0)
    more = _numbers(op, "output_padding", output_padding, dims, least=0)
    if any(m >= max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)):
        raise OperandError(
            f"{op}: output_padding={output_padding}; allowed: less than the stride or the dilation, "
            f"{strides} and {dilations}"
        )
    out, kernel = tuple(input.shape[-dims:]), tuple(weight.shape[2:])
    size = tuple(
        (o - 1) * s - 2 * b + d * (k - 1) + m + 1
        for o, s, b, d, k, m in zip(out, strides, before, dilations, kernel, more, strict=True)
    )
    if min(size) < 1:
        raise OperandError(
            f"{op}: input {tuple(input.shape)} and kernel {kernel} with padding {before} give a result "
            f"of {size}; allowed: 1 and more"
        )
    geometry = Geometry(
        size=size, kernel=kernel, out=out,
        stride=strides, before=before, dilation=dilations, groups=groups,
    )  # fmt: skip
    return _convolved(op, Form.INPUT, input, weight, bias, geometry, how, generator, counts)


def _convolved(
    op: str,
    form: Form,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    how: Arithmetic | str,
    generator: torch.Generator | None,
    counts: bool,
) -> Tensor:
    """``counts``: the result is one of integers."""
    dims = len(geometry.size)
    outputs = weight.shape[0] if form is Form.OUTPUT else weight.shape[1] * geometry.groups
    if bias is not None:
        if not counts:
            check_operand(op, "bias", bias, least=1)
        if bias.shape != (outputs,) or bias.device != input.device:
            raise OperandError(
                f"{op}: bias is {tuple(bias.shape)} on {bias.device}; "
                f"wanted: ({outputs},) on {input.device}"
            )
    of_weight, of_input, _ = _operands(how)
    x, w = rounded(input, of_input), rounded(weight, of_weight)
    batched = x if x.dim() == dims + 2 else x.unsqueeze(0)
    out = convolved(op, form, w, batched, geometry, how, generator)
    if counts:
        out = out.to(torch.int32)
    if bias is not None:
        out = out + bias.to(out.dtype).view(-1, *[1] * dims)
    return out if x.dim() == dims + 2 else out.squeeze(0)


def _operands(how: Arithmetic | str) -> tuple[Format | str, Format | str, str]:
    """The formats of weight and input, and which of them ("a", "b") and the sum ("+") are of integers."""
    if isinstance(how, str):
        of_weight, of_input, _, *integers = operands_of(how).splitlines()
        return of_weight, of_input, "".join(integers)
    return *how.operands, how.integers


def _carried(
    how: Arithmetic | str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """Input and weight in floating-point dtypes, if they may be integers; True if the result is, too."""
    *_, integers = _operands(how)
    given = (input, weight) if bias is None else (input, weight, bias)
    counts = integers == "ab+" and all(isinstance(x, Tensor) and x.dtype in INTEGERS for x in given)
    return carried(input, "b" in integers), carried(weight, "a" in integers), counts


def _arithmetic(op: str, keywords: Keywords) -> Arithmetic | str:
    """What the keywords mean, as text in a graph; operands in the order of `Form.operands`: weight first."""
    for name in keywords:
        if name not in _KEYWORDS:
            raise TypeError(
                f"{op}() got an unexpected keyword argument {name!r}; beside torch's it has those of "
                "halfstep.matmul but initial and sparse"
            )
    operands: Any = keywords.get("operands", "fp16")
    if isinstance(operands, tuple | list) and len(operands) == 2:
        keywords = {**keywords, "operands": (operands[1], operands[0])}
        if keywords.get("gradient") is None:
            keywords["gradient"] = operands[0]
    return arithmetic_text(op, None, keywords) if is_traced() else arithmetic_of(op, **keywords)


def _check(op: str, dims: int, x: Tensor, w: Tensor, groups: object, *, channels: int) -> None:
    """``channels``: the dimension of the weight that the input's channels are in."""
    check_operand(op, "input", x, least=dims + 1)
    check_operand(op, "weight", w, least=dims + 2)
    if type(groups) is not int or groups < 1:
        raise OperandError(f"{op}: groups={groups!r}; allowed: a whole number from 1")
    wanted = w.shape[1] * groups if channels else w.shape[0]
    if (
        x.dim() > dims + 2
        or w.dim() > dims + 2
        or x.shape[-dims - 1] != wanted
        or w.shape[0] % groups
        or 0 in w.shape
        or x.device != w.device
    ):
        shape = "(O, C / groups, *kernel)" if channels else "(C, O / groups, *kernel)"
        raise OperandError(
            f"{op}: input is {tuple(x.shape)} on {x.device} and weight is {tuple(w.shape)} on "
            f"{w.device}, groups={groups}; wanted: ([N,] C, *size) and {shape} with {dims} spatial "
            "dimensions, groups dividing C and O, on one device"
        )


def _numbers(op: str, name: str, given: object, dims: int, *, least: int = 1) -> tuple[int, ...]:
    """One number for each dimension, from one for all or a sequence."""
    values = tuple(given) if isinstance(given, tuple | list) else (given,)
    values = values * dims if len(values) == 1 else values
    numbers = tuple(value for value in values if isinstance(value, int) and value >= least)
    if len(numbers) != dims or len(values) != dims:
        raise OperandError(
            f"{op}: {name}={given!r}; allowed: a whole number from {least}, or {dims} of them"
        )
    return numbers


def _padding(
    op: str, given: Sizes | str, stride: tuple[int, ...], spans: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many zeros stand before and after the input; "same" has an odd one after, as torch."""
    if not isinstance(given, str):
        numbers = _numbers(op, "padding", given, len(spans), least=0)
        return numbers, numbers
    if given not in ("valid", "same"):
        raise UnknownNameError("padding", given, ["valid", "same"])
    if given == "valid":
        return (0,) * len(spans), (0,) * len(spans)
    if max(stride) > 1:
        raise OperandError(
            f"{op}: padding='same' with stride={stride}; allowed: stride 1, or padding in numbers"
        )
    before = tuple(span // 2 for span in spans)
    return before, tuple(span - b for span, b in zip(spans, before, strict=True))
