"""Block formats against other people's: torchao's MX and NVFP4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import halfstep
from halfstep.format import Format
from halfstep.ops.bit_packing import unpack, values_of

torchao = pytest.importorskip("torchao", reason="pip install 'halfstep[peers]'")

ELEMENTS: dict[str, Any] = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": torch.float4_e2m1fn_x2,
}
BACKENDS = ["reference", "auto"]


def numbers(dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, each block at a scale of its own; no zeros."""
    generator = torch.Generator().manual_seed(31)
    x = torch.randn(64, 256, generator=generator)
    scale = 2.0 ** torch.randint(-20, 20, (64, 8), generator=generator).repeat_interleave(32, 1)
    return (x * scale).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_equals_torchao(name: str, rule: str, dtype: torch.dtype, backend: str):
    """Scales and elements, bit for bit. Blocks of zeros differ under RCEIL, and infinities always."""
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    x = numbers(dtype)
    scales, elements = to_mx(x, ELEMENTS[name], 32, ScaleCalculationMode(rule))
    ours = halfstep.quantize_blocks(x, f"{name}:{rule}", backend=backend)
    assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8).view(64, 8))
    values = ours.values
    if name.startswith("mxfp6"):  # they leave two bits of each byte unused
        values = unpack(values, 6, 256, 1).to(torch.uint8)
    assert torch.equal(values.view(torch.uint8), elements.view(torch.uint8).view(values.shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nvfp4_equals_torchao_but_for_its_reciprocal(backend: str):
    """Scales bit for bit. They multiply by a rounded reciprocal where we divide: elements may differ
    by one step where the quotient is within 2^-22 of a middle between two."""
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(32))
    tensor_scale = per_tensor_amax_to_scale(x.abs().max())
    scales, packed = nvfp4_quantize(x, 16, tensor_scale)
    ours = halfstep.quantize_blocks(x, "nvfp4", backend=backend)
    assert torch.equal(ours.tensor_scale, tensor_scale)
    assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8).view(64, 16))
    e2m1 = Format.parse("e2m1")
    theirs = values_of(unpack(packed.view(torch.uint8), 4, 256, 1), e2m1)
    mine = values_of(unpack(ours.values, 4, 256, 1), e2m1)
    total = (ours.scales.float() * ours.tensor_scale).repeat_interleave(16, 1)
    quotient = (x / total).double().abs()
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    near = ((quotient[..., None] / middles - 1).abs() < 2.0**-22).any(-1)
    assert ((theirs == mine) | near).all()
