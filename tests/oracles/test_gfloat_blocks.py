"""Block formats against gfloat's: its elements, scales, encoder and decoder, bit for bit.

Both are the OCP's (MX v1.0, sections 5 and 6.3). Where that leaves a choice, for blocks that hold an
infinity, the two differ: `test_an_infinity_spoils_its_block_here_and_saturates_there`.
"""

from __future__ import annotations

from collections.abc import Iterable

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as theirs
from torch import Tensor

import halfstep
from halfstep.format import BlockFormat
from halfstep.ops import BlockTensor
from halfstep.ops.bit_packing import pack, stored_as

MX: dict[str, gfloat.BlockFormatInfo] = {
    "mxfp8_e4m3": theirs.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": theirs.format_info_mxfp8_e5m2,
    "mxfp6_e3m2": theirs.format_info_mxfp6_e3m2,
    "mxfp6_e2m3": theirs.format_info_mxfp6_e2m3,
    "mxfp4": theirs.format_info_mxfp4_e2m1,
    "mxint8": theirs.format_info_mxint8,
}
NVFP4 = gfloat.BlockFormatInfo(
    "nvfp4", theirs.format_info_ocp_e2m1, 16, theirs.format_info_ocp_e4m3
)
BACKENDS = ["reference", "auto"]


def as_float32(values: Iterable[float], like: Tensor) -> Tensor:
    """Their float64 numbers, which float32 holds but for its overflow and its own subnormals."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.fromiter(values, np.float64).astype(np.float32)).view_as(like)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(nan=0), b.nan_to_num(nan=0)
    assert torch.equal(a, b)
    assert torch.equal(a.signbit(), b.signbit())


def blocks(info: gfloat.BlockFormatInfo) -> Tensor:
    """Ordinary blocks at every scale of float32, and those where encoders go wrong."""
    size = info.k
    generator = torch.Generator().manual_seed(33)
    exponents = torch.arange(-149, 128)[:, None].double()
    random = torch.randn(len(exponents), size, generator=generator).double()
    ordinary = (random * 2**exponents).float().nan_to_num()  # what overflowed: the largest
    wide = torch.randn(64, size, generator=generator)
    wide *= 2.0 ** torch.randint(-40, 40, (64, size), generator=generator)
    # on the grid, half way between its numbers, beside that; under an amax that keeps the scale 1
    codes = [gfloat.decode_float(info.etype, code).fval for code in range(2**info.etype.k)]
    finite = torch.tensor(sorted({abs(c) for c in codes if np.isfinite(c)})).float()
    middles = (finite[1:] + finite[:-1]) / 2
    up, down = middles.nextafter(torch.tensor(9e9)), middles.nextafter(torch.tensor(0.0))
    hard = torch.cat([finite, middles, up, down, -middles, -up, -down])
    hard = torch.nn.functional.pad(hard, (0, -len(hard) % (size - 1))).view(-1, size - 1)
    hard = torch.nn.functional.pad(hard, (1, 0), value=float(finite[-1]))
    # amax between the largest number and the next power of two: elements that saturate
    beyond = float(finite[-1]) * torch.linspace(1, 1.999, 40)[:, None] * torch.ones(size)
    beyond = beyond.clamp(max=2.0 ** (int(info.etype.emax) + 1) * (1 - 2**-24))
    ones = torch.eye(size)[:1]
    edges = [2.0**-149, 2.0**-126, -(2.0**-133), 3.4028234663852886e38, -1.7014118346046923e38]
    single = torch.cat([ones * edge for edge in edges])
    zeros = torch.cat([ones * 0, -ones * 0])
    return torch.cat(
        [ordinary, wide, hard, hard * 2**20, beyond, beyond * -(2**-30), single, zeros]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MX)
def test_every_code_under_every_kind_of_scale(name: str, backend: str):
    """Infinities, NaNs and codes that our rounding never makes (-2 in int8) among them."""
    info, format = MX[name], BlockFormat.parse(name)
    bits, count = format.element.bits, 2**format.element.bits
    codes = torch.arange(count, dtype=torch.uint8)
    scales = [0, 1, 2, 100, 126, 127, 128, 253, 254, 255]
    values = pack(codes, bits, 0) if bits < 8 else codes.view(stored_as(format.element))
    for scale in scales:
        per_block = torch.full((-(-count // info.k),), scale, dtype=torch.uint8)
        ours = BlockTensor(
            values=values,
            scales=per_block.view(torch.float8_e8m0fnu),
            tensor_scale=torch.ones(()),
            format=format,
            shape=torch.Size([count]),
            dim=0,
            dtype=torch.float32,
        ).dequantize(backend=backend)
        with np.errstate(invalid="ignore"):
            expected = as_float32(gfloat.decode_block(info, [scale, *range(count)]), ours)
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("name", MX)
def test_mx_equals_gfloat(name: str):
    info = MX[name]
    x = blocks(info)
    found = [
        gfloat.quantize_block(info, row, gfloat.compute_scale_amax) for row in x.double().numpy()
    ]
    expected = as_float32(np.concatenate(found), x)
    for backend in BACKENDS:
        stored = halfstep.quantize_blocks(x, name, backend=backend)
        assert_same_bits(stored.dequantize(backend=backend), expected)


def test_nvfp4_equals_gfloats_parts():
    """gfloat has no second scale: its e4m3 rounds the scales, its e2m1 the float32 quotients."""
    x = blocks(NVFP4)
    x = x[x.abs().amax(-1) < 2.0**60]
    tensor_scale = x.abs().max() / (6 * 448)
    e4m3, rows = NVFP4.stype, []
    for block in x:
        wanted = float(block.abs().max() / 6 / tensor_scale)
        smallest = gfloat.decode_float(e4m3, 1).fval  # scales never become 0
        scale = max(gfloat.round_float(e4m3, wanted, sat=True), smallest)
        quotients = (block / (torch.tensor(scale) * tensor_scale)).double().tolist()
        decoded = gfloat.decode_block(NVFP4, gfloat.encode_block(NVFP4, scale, quotients))
        elements = torch.tensor(list(decoded)).double() / scale
        rows.append(elements.float() * (torch.tensor(scale) * tensor_scale))
    for backend in BACKENDS:
        stored = halfstep.quantize_blocks(x, "nvfp4", backend=backend)
        assert torch.equal(stored.tensor_scale, tensor_scale)
        assert_same_bits(stored.dequantize(backend=backend), torch.stack(rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MX)
def test_an_infinity_spoils_its_block_here_and_saturates_there(name: str, backend: str):
    """MX section 6.3 leaves it to the implementation. A NaN has no other way out."""
    info = MX[name]
    x = torch.ones(info.k)
    x[3] = torch.inf
    assert halfstep.quantize_blocks(x, name, backend=backend).dequantize().isnan().all()
    there = gfloat.quantize_block(info, x.double().numpy(), gfloat.compute_scale_amax)
    assert np.isfinite(there).all() and there[3] == info.etype.max * 2.0**127
