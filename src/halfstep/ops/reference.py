"""The living definition of every op, in plain torch, on any device. Every back end is held to it.

Names and control flow are those of the text-book twin, `halfstep.format.codec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from halfstep.format import Format, Kind, Overflow, Rounding, Subnormals, overflow
from halfstep.ops.random_bits import Key, random_bits

__all__ = ["count_nonfinite", "power_of_two", "round_into", "unscale"]


def round_into(out: Tensor, x: Tensor, format: Format, rounding: Rounding, key: Key) -> None:
    """Writes to ``out`` every element of ``x``, rounded once to the format.

    See `halfstep.round_to`. All is computed in float64, where every step is exact: a float of at
    most 53 bits, divided by a power of two, is a float64, and so is its rest below an integer.
    """
    value = _as_float64(x.detach())
    if format.kind is Kind.BINARY:
        result = _round_binary(value, rounding, key)
    else:
        result = _round_number(value, format, rounding, key)
    # value + value: a signalling NaN becomes quiet and keeps its sign and payload
    out.copy_(torch.where(value.isnan(), value + value, result))


def _as_float64(x: Tensor) -> Tensor:
    """Exactly; but int64 beyond 2^53 to odd, so that the rounding that follows is the only one."""
    wide = x.to(torch.float64)
    if x.dtype is not torch.int64:
        return wide
    excess = (torch.frexp(wide).exponent - 53).clamp(min=0).to(torch.int64)
    dropped = x & ((1 << excess) - 1)
    odd = (x >> excess) | (dropped != 0)  # of the two neighbours, the one below and the next
    return odd.to(torch.float64) * power_of_two(excess)


def _round_number(value: Tensor, format: Format, rounding: Rounding, key: Key) -> Tensor:
    negative = value.signbit()
    magnitude = value.abs()
    # Numbers below 2^-300 all round alike; scaled as they are, the least would vanish.
    magnitude = torch.where(magnitude > 0, magnitude.clamp(min=2.0**-300), magnitude)
    exponent = _quantum_exponent(magnitude, format)
    count = magnitude * power_of_two(-exponent)
    whole = count.floor()
    odd = _is_odd(whole, exponent, format)
    whole = whole + _STEPS[rounding](odd, count - whole, negative, key)
    result = whole * power_of_two(exponent)
    if format.subnormals is Subnormals.FLUSH:
        result = result.where(result >= 2.0**format.min_exponent, 0.0)
    if not format.has_zero:
        result = result.clamp(min=format.smallest)
    if format.signed:
        result = torch.copysign(result, value)
    if format.overflow is Overflow.WRAP:
        result = _wrapped(result.where(magnitude < 2.0**100, value), format)  # those are integers
    else:
        result = _overflow(result, value, format, rounding)
    if not format.signed:
        result = result.where(~negative | (magnitude == 0), torch.nan)
    return result if format.has_negative_zero else result + 0.0


def _quantum_exponent(magnitude: Tensor, format: Format) -> Tensor:
    """log2 of the grid's spacing where each number is, as if exponents had no upper end."""
    if format.kind is Kind.FIXED:
        return torch.full_like(magnitude, format.quantum_exponent, dtype=torch.int64)
    exponent = torch.frexp(magnitude).exponent.to(torch.int64) - 1
    # Beyond 2^128 every format overflows, and below 2^-300 it is flushed; the clamp keeps the powers
    # of two in float64's range, and the undefined exponents of infinity and NaN.
    keeps = format.subnormals is Subnormals.KEEP
    return exponent.clamp(format.min_exponent if keeps else -300, 128) - format.mantissa_bits


def _is_odd(whole: Tensor, quantum_exponent: Tensor, format: Format) -> Tensor:
    if format.odd_exponents:
        return (whole == 1) & ((quantum_exponent + format.bias) % 2 == 1)
    return whole.remainder(2) == 1


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exactly (torch.ldexp goes through float32)."""
    return ((exponent + 1023) << 52).view(torch.float64)


_Step = Callable[[Tensor, Tensor, Tensor, Key], Tensor]


def _to_nearest(odd: Tensor, rest: Tensor, _: Tensor, __: Key) -> Tensor:
    return (rest > 0.5) | ((rest == 0.5) & odd)


def _stochastic(_: Tensor, rest: Tensor, __: Tensor, key: Key) -> Tensor:
    uniform = random_bits(key, rest.shape, rest.device)  # in units of 2^-32
    return (rest * 2.0**32).floor() + uniform >= 2.0**32


# rounding -> does the count of quanta grow by one? (it is odd, rest in [0, 1), negative, key)
_STEPS: Mapping[Rounding, _Step] = MappingProxyType(
    {
        Rounding.NEAREST: _to_nearest,
        Rounding.AWAY: lambda _, rest, __, ___: rest >= 0.5,
        Rounding.TOWARD_ZERO: lambda _, rest, __, ___: rest > 1,
        Rounding.UP: lambda _, rest, negative, __: (rest > 0) & ~negative,
        Rounding.DOWN: lambda _, rest, negative, __: (rest > 0) & negative,
        Rounding.STOCHASTIC: _stochastic,
        Rounding.TO_ODD: lambda odd, rest, _, __: (rest > 0) & ~odd,
    }
)


def _wrapped(result: Tensor, format: Format) -> Tensor:
    span = 2.0 ** (format.bits + format.quantum_exponent)
    part = result.fmod(span)  # exact, as is every step
    part = torch.where(part > format.max, part - span, part)
    part = torch.where(part < format.lowest, part + span, part)
    return part.where(result.isfinite(), torch.nan)


def _overflow(result: Tensor, value: Tensor, format: Format, rounding: Rounding) -> Tensor:
    finite = value.isfinite()
    for negative in (False, True):
        beyond = result < format.lowest if negative else result > format.max
        if negative and not format.signed:
            continue
        for is_finite in (False, True):
            becomes = float(overflow(format, rounding, negative=negative, finite=is_finite))
            result = result.masked_fill(beyond & (finite == is_finite), becomes)
    return result


def _round_binary(value: Tensor, rounding: Rounding, key: Key) -> Tensor:
    if rounding is Rounding.STOCHASTIC:
        # (1 + value) / 2 + uniform >= 1 in units of 2^-32; 1 + value alone would round
        uniform = random_bits(key, value.shape, value.device)
        positive = (value.clamp(-1, 1) * 2.0**31).floor() + uniform >= 2.0**31
    else:
        positive = value >= 0
    return positive.to(torch.float64) * 2 - 1


def count_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements of each tensor are infinite or NaN; see `halfstep.ops.count_nonfinite`."""
    counts = [(~t.isfinite()).sum() for t in tensors]
    device = counts[0].device
    return torch.stack([count.to(device) for count in counts]).tolist()


def unscale(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """FP32 copies over ``scale``; see `halfstep.ops.unscale`."""
    return [t.to(torch.float32, copy=True).div_(scale) for t in tensors]
