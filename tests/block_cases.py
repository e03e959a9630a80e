"""Block formats of every kind, and numbers that are hard for them."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.format import block_formats

SEED = 4711
NAMED = list(block_formats())
RULES = ["floor", "ceil", "even", "rceil"]
_FAMILIES = """
e4m3fn@tensor e5m2@row e4m3fn@1x128 e4m3fn@128x128 int8@32x32 int8@row e2m1@1x16:floor
e4m3fn@4x8:rceil int4@1x32 ternary@row e3m2@2x16 int5@1x8 q3.5@row e4m3@row fp16@1x64 bf16@row
e6m9@1x32 int12@row int8@row:symmetric:ceil e1m2@1x16 binary@1x8
"""
FAMILIES = _FAMILIES.split()
EVERY = [
    *NAMED,
    *(f"{name}:{rule}" for name in ("mxfp8_e4m3", "mxfp4", "mxint8") for rule in RULES[1:]),
    "mxint8:symmetric",
    *FAMILIES,
]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = SEED) -> Tensor:
    """Normal numbers over many binades, ties among them, zeros, blocks of zeros; all finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-12, 9, shape, generator=generator)
    kind = torch.randint(0, 6, shape, generator=generator)
    x = torch.where(kind == 0, torch.round(x * 4) / 4, x)  # on grids, and at ties
    x = torch.where(kind == 1, torch.sign(x) * 2.0 ** torch.round(x.abs().clamp(max=9)), x)
    x = torch.where(kind == 2, x * 0, x)  # zeros of both signs
    if x.numel():
        x.view(-1)[: x.numel() // 5] = 0
    return x.to(dtype)
