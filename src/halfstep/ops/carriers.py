"""The dtypes that a tensor may have where its numbers are rounded, and which numbers they hold."""

from __future__ import annotations

import math
from functools import cache

import torch

from halfstep.format import Format, Kind

__all__ = ["CARRIERS", "INTEGERS", "holds", "result_dtype"]

CARRIERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What is rounded and what a result is written to."""
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
"""What is only read."""


@cache
def holds(dtype: torch.dtype, format: Format) -> bool:
    """True if every number of the format is one of the floating-point dtype."""
    limits = torch.finfo(dtype)
    digits = format.precision if format.kind is Kind.FLOAT else format.bits - 1
    return (
        digits <= 1 - math.log2(limits.eps)
        and max(format.max, -format.lowest) <= limits.max
        and format.quantum_exponent >= math.log2(limits.smallest_normal) + math.log2(limits.eps)
    )


def result_dtype(dtype: torch.dtype, format: Format) -> torch.dtype:
    """The dtype of what is rounded to the format: its own, and of integers float32 if that holds it."""
    if dtype not in INTEGERS:
        return dtype
    return torch.float32 if holds(torch.float32, format) else torch.float64
