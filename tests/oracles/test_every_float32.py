"""All 2^32 float32 numbers, against torch's casts."""

from __future__ import annotations

import pytest
import torch

import halfstep
from adversarial import same_numbers

CHUNK = 1 << 24
CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e5m2": torch.float8_e5m2,
    "e4m3fn": torch.float8_e4m3fn,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASTS)
def test_every_float32(name: str):
    out = torch.empty(CHUNK)
    for start in range(-(2**31), 2**31, CHUNK):
        x = torch.arange(start, start + CHUNK, dtype=torch.int32).view(torch.float32)
        halfstep.round_to(x, name, out=out)
        right = x.to(CASTS[name]).float()
        # bit for bit, but for NaN
        if not torch.equal(out.view(torch.int32), right.view(torch.int32)):
            assert same_numbers(out, right).all(), hex(start & 0xFFFFFFFF)
