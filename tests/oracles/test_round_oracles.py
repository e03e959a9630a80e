"""`round_to` against other people's casts: torch's, numpy's and ml_dtypes'."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import halfstep
from adversarial import adversarial, high_half_patterns, same_numbers, sixteen_bit_patterns
from halfstep.format import Format

BACKENDS = ["reference", "auto"]
TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e5m2": torch.float8_e5m2,
    "e4m3fn": torch.float8_e4m3fn,
}
ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fn:nan": ml_dtypes.float8_e4m3fn,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def inputs(name: str) -> Tensor:
    """float32: all upper halves, all 16-bit numbers, and the adversarial ones of the format."""
    f = Format.parse(name)
    return torch.cat(
        [
            high_half_patterns(),
            sixteen_bit_patterns(torch.float16).float(),
            adversarial(f, torch.float32),
        ]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TORCH)
def test_equals_torch_casts(name: str, backend: str):
    """e4m3fn too, beyond its range and at infinity: torch's cast saturates as our literal does."""
    x = inputs(name)
    assert same_numbers(
        halfstep.round_to(x, name, backend=backend), x.to(TORCH[name]).float()
    ).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TORCH)
def test_equals_torch_casts_from_sixteen_bits(name: str, dtype: torch.dtype, backend: str):
    x = sixteen_bit_patterns(dtype)
    out = torch.empty(x.shape)
    halfstep.round_to(x, name, out=out, backend=backend)
    assert same_numbers(out, x.float().to(TORCH[name]).float()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ML_DTYPES)
def test_equals_ml_dtypes(name: str, backend: str):
    """NaN is left out where they have no NaN: they make it -0 or the largest number."""
    x = inputs(name)
    with np.errstate(all="ignore"):
        theirs = x.numpy().astype(ML_DTYPES[name]).astype(np.float32)
    same = same_numbers(halfstep.round_to(x, name, backend=backend), torch.from_numpy(theirs))
    assert (same if Format.parse(name).has_nan else same | x.isnan()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_numpy_from_float64(backend: str):
    """numpy's float64 to float16 rounds once; torch's and ml_dtypes' casts go through float32."""
    x = adversarial(Format.parse("fp16"), torch.float64)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(x.numpy().astype(np.float16).astype(np.float64))
    assert same_numbers(halfstep.round_to(x, "fp16", backend=backend), theirs).all()
    assert not same_numbers(x.half().double(), theirs).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_e8m0_equals_ml_dtypes_but_at_zero(backend: str):
    x = inputs("e8m0")
    with np.errstate(all="ignore"):
        theirs = x.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    same = same_numbers(halfstep.round_to(x, "e8m0", backend=backend), torch.from_numpy(theirs))
    # theirs is 2^-126 between 2^-127 and 1.5 * 2^-127, where 2^-127 is nearer; and NaN at zero
    subnormal = (x > 0) & (x < 2**-126)
    assert (same | (x == 0) | subnormal).all()
