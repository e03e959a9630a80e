"""Inputs that a rounding gets wrong first. All are made of bits, so that each is what it says."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.format import Format, Kind

SEED = 20260
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def bits(x: Tensor) -> Tensor:
    """The bits of every element, as integers: equal bits are equal NaNs and zeros too."""
    return x.view(INTEGERS[x.dtype])


def same_numbers(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors have the same number with the same sign of zero, or both NaN."""
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())


def sixteen_bit_patterns(dtype: torch.dtype) -> Tensor:
    """All 2^16 of float16 or bfloat16."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def high_half_patterns() -> Tensor:
    """Every float32 whose upper 16 bits are any and whose lower ones are zero, one, half, all."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper | lower).flatten().view(torch.float32)


def specials() -> Tensor:
    """Zeros, infinities, ends of float32's range, NaNs of every kind of payload, as float32."""
    patterns = [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000]
    patterns += [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FC12345, 0x7FFFFFFF]
    both = [p - (s << 31) for s in (0, 1) for p in patterns]
    return torch.tensor(both, dtype=torch.int32).view(torch.float32)


def around_the_grid(format: Format) -> Tensor:
    """float64: numbers of the grid and middles between neighbours, and what is next to each.

    Next to means one float32 ulp, one float64 ulp and 2^-40 of the spacing off: what rounds twice,
    through float32, goes wrong at the last two. Both signs; beyond the largest number too.
    """
    if format.kind is Kind.FLOAT:
        mantissa = format.mantissa_bits
        # the ends of the range, and its middle
        low, high = format.min_exponent, format.max_exponent
        near = [*range(low - mantissa - 3, low + 3), *range(-3, 3), *range(high - 3, high + 3)]
        exponents = torch.tensor(near)
        significands = torch.tensor([0, 1, 2, 3, 2**mantissa - 2, 2**mantissa - 1])
        significands = significands.clamp(0, 2**mantissa - 1).unique()
        e = exponents[:, None].clamp(min=format.min_exponent)
        grid = (2**mantissa + significands) * (2.0 ** (e - mantissa).double())
        spacing = (2.0 ** (e - mantissa).double()).expand_as(grid)
        subnormal = torch.arange(min(2**mantissa, 64)) * 2.0**format.quantum_exponent
        grid = torch.cat([grid.flatten(), subnormal.double()])
        spacing = torch.cat([spacing.flatten(), torch.full_like(subnormal, format.smallest)])
    else:
        step = 2.0**format.quantum_exponent
        near_zero = torch.arange(0, 70, dtype=torch.float64) * step
        grid = torch.cat([near_zero, near_zero + format.max - 35 * step])
        spacing = torch.full_like(grid, step)
    middles = grid + spacing / 2
    points = torch.cat([grid, middles, grid + spacing / 4])
    width = spacing.repeat(3)
    neighbours = [points, points + width * 2.0**-40, points - width * 2.0**-40]
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    single = points.float()
    neighbours += [single.nextafter(up).double(), single.nextafter(down).double()]
    neighbours += [points.nextafter(up.double()), points.nextafter(down.double())]
    found = torch.cat(neighbours).unique()
    return torch.cat([found, -found])


def adversarial(format: Format, dtype: torch.dtype) -> Tensor:
    """All of the above, and random bits and random numbers, in that dtype."""
    generator = torch.Generator().manual_seed(SEED)
    grid = around_the_grid(format)
    width = {torch.float64: 64, torch.float32: 32}.get(dtype, 16)
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    any_bits = torch.randint(low, high, (4096,), generator=generator).to(INTEGERS[dtype])
    normal = torch.randn(4096, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1e-3, 1.0, min(format.max, 1e300) / 2 or 1.0], dtype=torch.float64)
    scaled = (normal[:, None] * scales).flatten()
    return torch.cat([grid.to(dtype), specials().to(dtype), any_bits.view(dtype), scaled.to(dtype)])
