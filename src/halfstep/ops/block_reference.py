"""The living definition of block formats, in plain torch, on any device.

The steps and their names are those of the scalar twin in tests/block_twin.py. All is computed in the
*working type*, float64 for float64 tensors and float32 for all others; each operation rounds once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.format import BlockFormat, Format, Rounding, ScaleRule
from halfstep.ops import reference
from halfstep.ops.bit_packing import codes_of, pack, stored_as, unpack, values_of
from halfstep.ops.random_bits import Key

__all__ = [
    "Parts",
    "amax_of",
    "dequantize_into",
    "load_scales",
    "quantize",
    "round_into",
    "scales_of",
    "scales_shape",
    "store_scales",
    "tensor_scale_of",
    "working_type",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is stored of a tensor in a block format."""

    values: Tensor
    scales: Tensor
    tensor_scale: Tensor


def working_type(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def scales_shape(shape: torch.Size, format: BlockFormat, dim: int) -> list[int]:
    """The shape of a tensor's scales: along each axis, how many blocks there are."""
    blocks = list(shape)
    for axis, extent in format.extents(len(shape), dim):
        blocks[axis] = -(-blocks[axis] // extent) if extent else min(blocks[axis], 1)
    return blocks


def quantize(x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key) -> Parts:
    """The stored form of ``x``; see `halfstep.quantize_blocks`."""
    elements, scales, tensor_scale = _elements(x, format, dim, rounding, key)
    elements = torch.where(_spread(scales.isnan(), x.shape, format, dim), 0, elements)
    return Parts(
        values=_store(elements, format.element, dim),
        scales=store_scales(scales, format),
        tensor_scale=tensor_scale,
    )


def dequantize_into(out: Tensor, parts: Parts, format: BlockFormat, dim: int) -> None:
    """Writes the numbers that the stored form means; see `halfstep.ops.BlockTensor.dequantize`."""
    working = working_type(out.dtype)
    elements = _load(parts.values, format.element, out.shape[dim], dim).to(working)
    scales = load_scales(parts.scales, format)
    _write(out, _scaled(elements, scales, parts.tensor_scale, format, dim))


def round_into(
    out: Tensor, x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key
) -> None:
    """Writes ``x`` as the block format has it; see `halfstep.ops.round_blocks`."""
    elements, scales, tensor_scale = _elements(x, format, dim, rounding, key)
    _write(out, _scaled(elements, scales, tensor_scale, format, dim))


def _elements(
    x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key
) -> tuple[Tensor, Tensor, Tensor]:
    """Elements in the working type, scales and tensor scale in float32; a bad block's scale is NaN."""
    x = x.detach().to(working_type(x.dtype))
    amax = amax_of(x, format, dim)
    tensor_scale = tensor_scale_of(amax, format)
    scales = scales_of(amax, tensor_scale, format)
    quotient = x / _spread(scales * tensor_scale, x.shape, format, dim).to(x.dtype)
    elements = torch.empty_like(quotient)
    reference.round_into(elements, quotient, format.element, rounding, key)
    return elements, scales, tensor_scale


def amax_of(x: Tensor, format: BlockFormat, dim: int) -> Tensor:
    """The largest magnitude of each block; NaN where there is one."""
    amax = x.abs()
    for axis, extent in format.extents(x.dim(), dim):
        length = amax.shape[axis]
        if extent == 0:
            amax = amax.amax(axis, keepdim=True) if length else amax
        else:
            blocks = -(-length // extent)
            padding = [0, 0] * (x.dim() - 1 - axis) + [0, blocks * extent - length]
            amax = torch.nn.functional.pad(amax, padding)
            amax = amax.unflatten(axis, (blocks, extent)).amax(axis + 1)
    return amax


def tensor_scale_of(amax: Tensor, format: BlockFormat) -> Tensor:
    """float32 of shape (): what all scales are multiples of; 1 where the format has none.

    Of the finite blocks: what is not finite spoils its own block only.
    """
    if not format.has_tensor_scale:
        return torch.ones((), dtype=torch.float32, device=amax.device)
    finite = amax.where(amax.isfinite(), 0)
    largest = finite.max() if amax.numel() else amax.new_zeros(())
    return _to_float32(largest / format.largest)


def _to_float32(number: Tensor) -> Tensor:
    limits = torch.finfo(torch.float32)
    return number.clamp(limits.smallest_normal, limits.max).to(torch.float32)


def scales_of(amax: Tensor, tensor_scale: Tensor, format: BlockFormat) -> Tensor:
    """float32 scales of blocks with these amax."""
    if format.rule is ScaleRule.AMAX:
        quotient = amax / format.element.max / tensor_scale.to(amax.dtype)
        quotient = quotient.clamp(format.smallest_scale, format.scale.max)
        scales = torch.empty_like(quotient, dtype=torch.float32)
        reference.round_into(scales, quotient, format.scale, Rounding.NEAREST, Key())
    else:
        scales = _power_of_two_scales(amax.to(torch.float64), format)
    return scales.where(amax.isfinite(), math.nan)


def _power_of_two_scales(amax: Tensor, format: BlockFormat) -> Tensor:
    half, above = torch.frexp(amax)  # amax = half * 2^above, and half is in [0.5, 1)
    exponent = above.to(torch.int64) - 1
    if format.rule is ScaleRule.CEIL:
        exponent = exponent + (half > 0.5)
    elif format.rule is ScaleRule.EVEN:
        exponent = exponent + (half >= 1 - 2.0 ** -(format.digits + 2))
    elif format.rule is ScaleRule.RCEIL:
        exponent = exponent + (half > math.frexp(format.element.max)[0])
    lowest, highest = format.scale.min_exponent, format.scale.max_exponent
    exponent = (exponent - format.element.max_exponent).clamp(lowest, highest)
    exponent = exponent.where(amax > 0, lowest)
    return reference.power_of_two(exponent).to(torch.float32)


def _spread(blocks: Tensor, shape: torch.Size, format: BlockFormat, dim: int) -> Tensor:
    """A number for each block as one for each element."""
    for axis, extent in format.extents(len(shape), dim):
        if extent:
            blocks = blocks.repeat_interleave(extent, axis).narrow(axis, 0, shape[axis])
    return blocks.expand(shape)


def _scaled(
    elements: Tensor, scales: Tensor, tensor_scale: Tensor, format: BlockFormat, dim: int
) -> Tensor:
    total = _spread(scales * tensor_scale, elements.shape, format, dim)
    return (elements * total.to(elements.dtype)).masked_fill(total.isnan(), math.nan)


def _write(out: Tensor, numbers: Tensor) -> None:
    out.copy_(numbers)
    if out.dtype is not numbers.dtype:  # casts to 16 bits make various NaNs of one
        out.masked_fill_(numbers.isnan(), math.nan)


def store_scales(scales: Tensor, format: BlockFormat) -> Tensor:
    """float32 scales in the dtype that they are stored in; NaN is one of its codes."""
    return _store(scales, format.scale, 0)


def load_scales(scales: Tensor, format: BlockFormat) -> Tensor:
    """float32 scales of stored ones."""
    return _load(scales, format.scale, 0, 0).to(torch.float32)


def _store(numbers: Tensor, format: Format, dim: int) -> Tensor:
    dtype = stored_as(format)
    if dtype.is_floating_point and format.has_zero:
        return numbers.to(dtype)
    codes = codes_of(numbers.nan_to_num(0.0), format)
    if not format.has_zero and format.has_nan:
        codes = codes.masked_fill(numbers.isnan(), format.max_magnitude_code + 1)
    if format.bits < 8:
        return pack(codes, format.bits, dim)
    return codes.to(torch.uint8).view(dtype) if format.bits == 8 else codes.to(dtype)


def _load(stored: Tensor, format: Format, length: int, dim: int) -> Tensor:
    if stored.dtype.is_floating_point and format.has_zero:
        return stored.to(torch.float64)
    if format.bits < 8:
        return values_of(unpack(stored, format.bits, length, dim), format)
    codes = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored
    return values_of(codes, format)
