"""Block formats on the CPU: thin calls into ``halfstep._core``, equal to the reference bit for bit.

What the kernels have no layout for is passed on to the reference.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from halfstep.format import (
    Accumulator,
    BlockFormat,
    Format,
    Kind,
    Overflow,
    Rounding,
    ScaleRule,
    Subnormals,
)
from halfstep.ops import block_reference as reference
from halfstep.ops import native
from halfstep.ops.bit_packing import packed_length, stored_as, values_of
from halfstep.ops.block_reference import Parts, scales_shape
from halfstep.ops.layout import overlaps
from halfstep.ops.random_bits import Key

__all__ = ["dequantize_into", "kernel_rounder", "quantize", "refuses", "round_into", "rounder"]

_CHUNK = 2048  # elements along an axis that share a scale given beforehand
_FP32 = Format.parse("fp32")
_FLOAT32 = torch.finfo(torch.float32)
_NARROW = {torch.float16: Format.parse("fp16"), torch.bfloat16: Format.parse("bf16")}


def refuses(asked: Format | Accumulator | None, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot take these elements or tensors; empty if they can."""
    if (
        not isinstance(asked, Format)
        or asked.bits > 8
        or not asked.has_zero
        or asked.overflow is Overflow.WRAP
        or asked.subnormals is Subnormals.FLUSH
    ):
        return f"elements {asked} have no native kernel"
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return "float64 has no native kernel for blocks"
        if tensor.numel() >= 2**32:
            return "2^32 elements and more have no native kernel for blocks"
    return native.refuses_round(asked, tensors)


def quantize(x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key) -> Parts:
    """The stored form of ``x``; see `halfstep.quantize_blocks`."""
    layout = _layout(x.shape, format, dim, packs=format.element.bits < 8)
    if layout is None or not x.numel():
        return reference.quantize(x, format, dim, rounding, key)
    x = x.detach().resolve_neg().contiguous()
    bits = format.element.bits
    sizes = list(x.shape)
    sizes[dim] = packed_length(sizes[dim], bits) if bits < 8 else sizes[dim]
    values = torch.empty(sizes, dtype=stored_as(format.element))
    scales = torch.empty(scales_shape(x.shape, format, dim), dtype=stored_as(format.scale))
    known = _look(x, format, layout, dim)
    if format.rows == 0:
        scales = reference.store_scales(torch.full(scales.shape, known.given), format)
    _run(x, format, layout, known, rounding, key, values=values, scales=scales)
    return Parts(values=values, scales=scales, tensor_scale=known.tensor_scale)


def round_into(
    out: Tensor, x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key
) -> None:
    """Writes ``x`` as the block format has it; see `halfstep.ops.round_blocks`."""
    layout = _layout(x.shape, format, dim, packs=False)
    if layout is None:
        order = _with_tiles_last(x.dim(), format, dim)
        if rounding is Rounding.STOCHASTIC or order == tuple(range(x.dim())):
            return reference.round_into(out, x, format, dim, rounding, key)  # bits go by the order
        turned = x.detach().permute(order).contiguous()
        round_into(turned, turned, format, order.index(dim), rounding, key)
        out.permute(order).copy_(turned)
        return None
    if not x.numel():
        return None
    source = x.detach().resolve_neg().contiguous()
    direct = out.is_contiguous() and not out.is_neg() and not overlaps(out, source)
    rounded = out if direct else torch.empty_like(source)
    one_call = _one_call(format, x.dtype)
    if one_call is None or not one_call.run(
        layout,
        source.data_ptr(),
        native.CARRIERS[x.dtype],
        rounded.data_ptr(),
        source.numel(),
        native.CODES[rounding],
        key.low,
        key.high,
        torch.get_num_threads(),
    ):
        known = _look(source, format, layout, dim)
        _run(source, format, layout, known, rounding, key, out=rounded)
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(rounded)
    return None


def rounder(
    format: BlockFormat, first: Format | None = None, *, joined: bool = False
) -> Callable[[Tensor, int], Tensor | None] | None:
    """``x`` with blocks along ``dim``, rounded to nearest, in a new tensor; None where there is no kernel.

    ``first``: a format that ``x`` is rounded to before. ``joined``: all axes after ``dim`` are one.

    For FP32 tensors with memory of their own, and no graph. None for what takes more: axes that do not lie
    as a contiguous tensor's or, of a matrix, its transpose's; and what the kernels pass on.
    """
    steps = _steps(format, first)
    if steps is None:
        return None
    run, grid = steps
    last = (-1, 1)

    @lru_cache(maxsize=1024)
    def layout_of(shape: torch.Size, dim: int) -> Any:
        dim %= len(shape)
        if joined:
            shape = torch.Size((*shape[: dim + 1], math.prod(shape[dim + 1 :])))
        return _layout(shape, format, dim, packs=False)

    def rounded(x: Tensor, dim: int) -> Tensor | None:
        shape, n = x.shape, x.numel()
        if not x.is_contiguous():
            if x.dim() != 2 or x.stride() != (1, shape[0]):
                return None
            shape, dim = shape[::-1], 0 if dim in last else 1
        layout = layout_of(shape, dim) if 0 < n < 2**32 and shape else None
        if layout is None:
            return None
        out = torch.empty_like(x)
        threads = torch.get_num_threads()
        return out if run(layout, x.data_ptr(), out.data_ptr(), n, 0, grid, threads) else None

    return rounded


def kernel_rounder(
    format: BlockFormat, first: Format | None = None
) -> Callable[[Tensor, int], Tensor | None] | None:
    """As `rounder`, of a convolution's weight (a, b, *positions) in tiles over a and b; ``dim`` is 0 or 1."""
    steps = _steps(format, first)
    if steps is None:
        return None
    run, grid = steps

    @lru_cache(maxsize=1024)
    def layout_of(shape: torch.Size, dim: int) -> tuple[Any, int]:
        positions = math.prod(shape[2:])
        turned = torch.Size((positions, *shape[:2]))
        return _layout(turned, format, dim + 1, packs=False), positions

    def rounded(x: Tensor, dim: int) -> Tensor | None:
        n = x.numel()
        if not x.is_contiguous() or not 0 < n < 2**32:
            return None
        layout, positions = layout_of(x.shape, dim)
        if layout is None:
            return None
        out = torch.empty_like(x)
        threads = torch.get_num_threads()
        done = run(layout, x.data_ptr(), out.data_ptr(), n, positions, grid, threads)
        return out if done else None

    return rounded


def _steps(format: BlockFormat, first: Format | None) -> tuple[Any, Any] | None:
    """What rounds an operand, and the grid that comes first, or None; None where there is no kernel."""
    one_call = None if refuses(format.element, ()) else _one_call(format, torch.float32)
    if one_call is None:
        return None
    if first is None:
        return one_call.run_operand, None
    if not native.holds(torch.float32, first) or native.refuses_round(first, ()):
        return None
    return one_call.run_operand, native.grid_of(first, Rounding.NEAREST, in_float64=False)


def dequantize_into(out: Tensor, parts: Parts, format: BlockFormat, dim: int) -> None:
    """Writes the numbers that the stored form means; see `halfstep.ops.BlockTensor.dequantize`."""
    layout = _layout(out.shape, format, dim, packs=format.element.bits < 8)
    if layout is None:
        return reference.dequantize_into(out, parts, format, dim)
    if not out.numel():
        return None
    direct = out.is_contiguous() and not out.is_neg()
    target = out if direct else torch.empty(out.shape, dtype=out.dtype)
    values, scales = parts.values.contiguous(), parts.scales.contiguous()
    tensor_scale = parts.tensor_scale
    given = float(reference.load_scales(scales, format)) if format.rows == 0 else 0.0
    native.core().dequantize_blocks(
        plan=_plan(format, out.dtype),
        tensor_scale=float(tensor_scale),
        given_scale=given,
        layout=layout,
        out=target.data_ptr(),
        carrier=native.CARRIERS[out.dtype],
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        scale_table=_table(format.scale).data_ptr(),
        n=out.numel(),
        threads=torch.get_num_threads(),
    )
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(target)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beforehand:
    """What one look at all of a tensor tells, for formats that need one."""

    tensor_scale: Tensor = field(default_factory=lambda: torch.ones(()))
    given: float = 0.0
    """The scale of all, where one block is the whole tensor."""
    tops: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """The bits of each block's amax, where they were found on the way."""


def _look(x: Tensor, format: BlockFormat, layout: Any, dim: int) -> _Beforehand:
    if format.rows != 0 and not format.has_tensor_scale:
        return _Beforehand()
    size = layout.block_columns
    in_line = layout.rows == 1 and layout.down == 0 and _CHUNK % size == 0
    keeps = format.has_tensor_scale and in_line
    tops = torch.empty(-(-x.numel() // size) if keeps else 0, dtype=torch.int32)
    top = native.core().top_magnitude(
        x=x.data_ptr(),
        n=x.numel(),
        carrier=native.CARRIERS[x.dtype],
        size=size,
        tops=tops.data_ptr(),
        threads=torch.get_num_threads(),
    )
    amax: float = struct.unpack("f", struct.pack("i", top))[0]
    if format.rows == 0:
        return _Beforehand(given=_scale_of(amax, format))
    if math.isfinite(amax):
        return _Beforehand(tensor_scale=torch.tensor(_tensor_scale_of(amax, format)), tops=tops)
    # what is not finite spoils its own block only
    all = tops.view(torch.float32) if keeps else reference.amax_of(x.float(), format, dim)
    return _Beforehand(tensor_scale=reference.tensor_scale_of(all, format), tops=tops)


# Single numbers, in Python's: a division of two float32 in float64, rounded to float32, is float32's.


def _scale_of(amax: float, format: BlockFormat) -> float:
    """`reference.scales_of` of one block, without a tensor scale."""
    if format.rule is not ScaleRule.AMAX or format.scale.bits < 32:
        return float(reference.scales_of(torch.tensor(amax), torch.ones(()), format))
    if not math.isfinite(amax):
        return math.nan
    most, least, top, _ = _limits(format)
    return max(_float32(amax / most), least) if amax / most < top else top


def _tensor_scale_of(amax: float, format: BlockFormat) -> float:
    """`reference.tensor_scale_of` where the largest of all amax is finite."""
    *_, largest = _limits(format)
    return max(_float32(min(amax / largest, _FLOAT32.max)), _FLOAT32.smallest_normal)


@cache
def _limits(format: BlockFormat) -> tuple[float, float, float, float]:
    """The largest element, the smallest and the largest scale, the largest element at the latter."""
    most, largest = torch.tensor([format.element.max, format.largest]).tolist()
    return most, format.smallest_scale, format.scale.max, largest


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def _run(
    x: Tensor,
    format: BlockFormat,
    layout: Any,
    known: _Beforehand,
    rounding: Rounding,
    key: Key,
    *,
    out: Tensor | None = None,
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    native.core().quantize_blocks(
        plan=_plan(format, x.dtype),
        tensor_scale=float(known.tensor_scale),
        given_scale=known.given,
        layout=layout,
        x=x.data_ptr(),
        carrier=native.CARRIERS[x.dtype],
        out=0 if out is None else out.data_ptr(),
        values=0 if values is None else values.data_ptr(),
        scales=0 if scales is None else scales.data_ptr(),
        n=x.numel(),
        tops=known.tops.data_ptr(),
        rounding=native.CODES[rounding],
        key_low=key.low,
        key_high=key.high,
        threads=torch.get_num_threads(),
    )


@lru_cache(maxsize=1024)
def _layout(shape: torch.Size, format: BlockFormat, dim: int, *, packs: bool) -> Any:
    """Where the blocks of a contiguous tensor are; None where the kernels have no words for it.

    ``packs``: whether codes are packed along ``dim``; blocks must then begin at whole bytes.
    """
    extents = dict(format.extents(len(shape), dim))
    length = shape[dim]
    if format.rows == 0:  # the scale is known beforehand: any cut will do
        extents = {dim: _CHUNK}
    along = min(extents[dim] or length, length) or 1
    if packs and along < length and along * format.element.bits % 8:
        return None
    others = {axis: extent for axis, extent in extents.items() if axis != dim and extent > 1}
    last = len(shape) - 1
    if not others:
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        whole_bytes = not packs or along * format.element.bits % 8 == 0
        if inner == 1 and length % along == 0 and whole_bytes:  # rows lie end to end as one
            return _Layout(outer=1, rows=1, columns=outer * length, block_columns=along)
        if inner == 1:
            return _Layout(outer=1, rows=outer, columns=length, block_columns=along)
        return _Layout(outer=outer, columns=length, down=inner, block_columns=along)
    ((other, across),) = others.items()
    if {dim, other} != {last - 1, last} or (packs and dim != last):
        return None
    outer = math.prod(shape[: last - 1])
    high, wide = (across, along) if dim == last else (along, across)
    return _Layout(
        outer=outer,
        rows=shape[last - 1],
        columns=shape[last],
        block_rows=high,
        block_columns=min(wide, shape[last]) or 1,
    )


def _with_tiles_last(dimensions: int, format: BlockFormat, dim: int) -> tuple[int, ...]:
    """The order of axes in which those of the blocks are the last ones."""
    spanned = sorted(axis for axis, extent in format.extents(dimensions, dim) if extent > 1)
    others = [axis for axis in range(dimensions) if axis not in spanned]
    return (*others, *spanned)


def _Layout(  # noqa: N802
    *,
    outer: int,
    columns: int,
    rows: int = 1,
    down: int = 0,
    block_rows: int = 1,
    block_columns: int,
) -> Any:
    return native.core().BlockLayout(
        outer=outer,
        rows=rows,
        columns=columns,
        down=down,
        block_rows=block_rows,
        block_columns=block_columns,
    )


@cache
def _table(format: Format) -> Tensor:
    """What each byte means; of a wider format, not used."""
    codes = torch.arange(256)
    return values_of(codes, format).float() if format.bits == 8 else codes.float()


@cache
def _plan(format: BlockFormat, carrier: torch.dtype) -> Any:
    element = format.element
    is_float = element.kind is Kind.FLOAT
    scale = _FP32 if format.scale.bits == 32 or not format.scale.has_zero else format.scale
    return native.core().BlockPlan(
        element=native.grid_of(element, Rounding.NEAREST, in_float64=False),
        element_bits=element.bits,
        element_bias=element.bias,
        element_is_fixed=not is_float,
        element_has_inf=element.has_inf,
        max_magnitude_code=element.max_magnitude_code if is_float else 0,
        by_amax=format.rule is ScaleRule.AMAX,
        exponent=element.max_exponent,
        carry_from=_carry_from(format),
        largest=element.max,
        least_scale=format.smallest_scale,
        most_scale=format.scale.max,
        scale=native.grid_of(scale, Rounding.NEAREST, in_float64=False),
        scale_is_byte=format.scale.bits == 8,
        carrier=native.grid_of(_NARROW.get(carrier, _FP32), Rounding.NEAREST, in_float64=False),
    )


@cache
def _one_call(format: BlockFormat, carrier: torch.dtype) -> Any:
    """What looks at a tensor and rounds it; None where a single scale is no plain quotient."""
    plan = _plan(format, carrier)
    most, _, _, largest = _limits(format)
    if format.rows == 0:
        plain = format.rule is ScaleRule.AMAX and format.scale.bits == 32
        return native.core().BlockRounder(plan, 2, most) if plain else None
    return native.core().BlockRounder(plan, int(format.has_tensor_scale), largest)


def _carry_from(format: BlockFormat) -> int:
    """The least float32 mantissa field of amax from which the power of two is the next one."""
    never = 2**23
    if format.rule is ScaleRule.CEIL:
        return 1
    if format.rule is ScaleRule.EVEN:
        return math.ceil(never - 2.0 ** (22 - format.digits))
    if format.rule is ScaleRule.RCEIL:
        half = math.frexp(format.element.max)[0]
        return int((2 * half - 1) * never) + 1
    return never
