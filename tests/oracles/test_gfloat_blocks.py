"""Block formats against gfloat's: their element and scale formats, their decoder, their encoder.

What the specification leaves free, and both decide apart, is in `test_where_the_two_differ`.
"""

from __future__ import annotations

import math
from typing import Any

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as theirs
from torch import Tensor

import halfstep
from halfstep.format import BlockFormat, Format
from halfstep.ops import BlockTensor
from halfstep.ops.bit_packing import codes_of, pack, unpack

MX: dict[str, gfloat.BlockFormatInfo] = {
    "mxfp8_e4m3": theirs.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": theirs.format_info_mxfp8_e5m2,
    "mxfp6_e3m2": theirs.format_info_mxfp6_e3m2,
    "mxfp6_e2m3": theirs.format_info_mxfp6_e2m3,
    "mxfp4": theirs.format_info_mxfp4_e2m1,
    "mxint8": theirs.format_info_mxint8,
}
BACKENDS = ["reference", "auto"]
SIZE = 32


def their_scale(block: np.ndarray, info: gfloat.BlockFormatInfo) -> float:
    """MX section 6.3: the power of two of amax over that of the element's largest number."""
    return gfloat.compute_scale_amax(float(info.etype.emax), block)


def their_block(block: np.ndarray, info: gfloat.BlockFormatInfo, scale: float) -> np.ndarray:
    """Rounded with saturation, then decoded again."""
    rounded = gfloat.round_ndarray(info.etype, block / scale, sat=True)
    return rounded * scale


def stored(codes: list[int], scale: int, name: str) -> BlockTensor:
    """One block of these codes, under the scale that a byte stands for."""
    format = BlockFormat.parse(name)
    element = format.element
    values = torch.tensor(codes, dtype=torch.uint8)
    dtype = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}
    if element.bits < 8:
        values = pack(values, element.bits, 0)
    elif name == "mxint8":
        values = values.view(torch.int8)
    else:
        values = values.view(dtype[name])
    return BlockTensor(
        values=values,
        scales=torch.tensor([scale], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        tensor_scale=torch.ones(()),
        format=format,
        shape=torch.Size([len(codes)]),
        dim=0,
        dtype=torch.float32,
    )
