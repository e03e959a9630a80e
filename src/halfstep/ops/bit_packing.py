"""From numbers of a format to codes, from codes to bytes, and back; exact inverses, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from halfstep.format import Format, Kind
from halfstep.ops.reference import power_of_two

__all__ = ["codes_of", "pack", "packed_length", "stored_as", "unpack", "values_of"]

# The formats that torch has a dtype for, by their fields: overflow is no property of a code.
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e8m0": torch.float8_e8m0fnu,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
    }
)
_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def stored_as(format: Format) -> torch.dtype:
    """The dtype in which numbers of the format are stored.

    torch's own where it has one, int8 for fixed-point numbers of 8 bits; else codes: uint8 for up
    to 8 bits, without gaps (`pack`), and int16 or int32 beyond.
    """
    if format.kind is Kind.FIXED and format.bits == 8:
        return torch.int8
    named = _DTYPES.get(format.name.partition(":")[0])
    return named or _INTEGERS[8 if format.bits <= 8 else 16 if format.bits <= 16 else 32]


def codes_of(values: Tensor, format: Format) -> Tensor:
    """int32 codes of finite numbers that are in the format; the sign bit of zero is kept.

    >>> codes_of(torch.tensor([0.5, -6.0]), Format.parse("e2m1")).tolist()
    [1, 15]
    """
    if format.kind is Kind.BINARY:
        return (values > 0).to(torch.int32)
    value = values.to(torch.float64)
    if format.kind is Kind.FIXED:
        return (value * 2.0**format.mantissa_bits).to(torch.int32) & (2**format.bits - 1)
    magnitude = value.abs()
    exponent = torch.frexp(magnitude).exponent.to(torch.int64) - 1
    exponent = exponent.where(magnitude > 0, format.min_exponent).clamp(min=format.min_exponent)
    significand = (magnitude * power_of_two(format.mantissa_bits - exponent)).to(torch.int64)
    # a subnormal number has the exponent of field 1, and no leading one that would make it 1
    field = exponent + format.bias - 1
    code = (field << format.mantissa_bits) + significand
    return (code + (value.signbit().to(torch.int64) << (format.bits - 1))).to(torch.int32)


def values_of(codes: Tensor, format: Format) -> Tensor:
    """The numbers, as float64, that integer codes mean, infinities and NaN too.

    >>> values_of(torch.tensor([1, 15]), Format.parse("e2m1")).tolist()
    [0.5, -6.0]
    """
    codes = codes.to(torch.int64) & (2**format.bits - 1)
    if format.kind is Kind.BINARY:
        return codes.to(torch.float64) * 2 - 1
    sign_bit = 1 << (format.bits - 1)
    if format.kind is Kind.FIXED:
        integer = torch.where(codes >= sign_bit, codes - 2 * sign_bit, codes)
        return integer.to(torch.float64) * 2.0**-format.mantissa_bits
    magnitude = codes & (sign_bit - 1) if format.signed else codes
    # a subnormal number has the exponent of field 1, and no leading one
    lowest = 1 if format.zero else 0
    exponent = (magnitude >> format.mantissa_bits).clamp(min=lowest)
    significand = magnitude - ((exponent - 1) << format.mantissa_bits)
    exponent = exponent - format.bias - format.mantissa_bits
    value = significand.to(torch.float64) * power_of_two(exponent)
    value = value.masked_fill(magnitude > format.max_magnitude_code, math.nan)
    if format.has_inf:
        value = value.masked_fill(magnitude == format.max_magnitude_code + 1, math.inf)
    return torch.where(codes >= sign_bit, -value, value) if format.signed else value


def packed_length(length: int, bits: int) -> int:
    """Bytes of ``length`` codes without gaps."""
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of up to 8 bits as bytes without gaps along ``dim``; the first code lowest.

    Element i has the bits from i * bits on of a little-endian stream: two codes of 4 bits make a
    byte, the first in its lower half; four of 6 bits make three bytes. A last byte is filled up
    with zeros.

    >>> pack(torch.tensor([1, 2, 3]), 4, 0).tolist()
    [33, 3]
    """
    length = codes.shape[dim]
    group = 8 // math.gcd(bits, 8)  # the fewest codes that fill whole bytes
    groups = -(-length // group)
    row = codes.to(torch.int64).movedim(dim, -1)
    row = torch.nn.functional.pad(row, (0, groups * group - length))
    row = row.reshape(*row.shape[:-1], groups, group)
    shifts = torch.arange(group, device=codes.device) * bits
    word = (row << shifts).sum(-1, keepdim=True)
    wide = (word >> (torch.arange(group * bits // 8, device=codes.device) * 8)) & 0xFF
    wide = wide.flatten(-2)[..., : packed_length(length, bits)]
    return wide.to(torch.uint8).movedim(-1, dim).contiguous()


def unpack(packed: Tensor, bits: int, length: int, dim: int) -> Tensor:
    """The ``length`` int32 codes along ``dim`` that `pack` made bytes of.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3, 0).tolist()
    [1, 2, 3]
    """
    group = 8 // math.gcd(bits, 8)
    size = group * bits // 8
    groups = -(-length // group)
    row = packed.to(torch.int64).movedim(dim, -1)
    row = torch.nn.functional.pad(row, (0, groups * size - row.shape[-1]))
    row = row.reshape(*row.shape[:-1], groups, size)
    word = (row << (torch.arange(size, device=packed.device) * 8)).sum(-1, keepdim=True)
    wide = (word >> (torch.arange(group, device=packed.device) * bits)) & (2**bits - 1)
    return wide.flatten(-2)[..., :length].to(torch.int32).movedim(-1, dim).contiguous()
