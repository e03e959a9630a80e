"""Rounders for many small tensors: what `round_blocks` gives, in every format and layout."""

from __future__ import annotations

import math

import pytest
import torch

import halfstep
from adversarial import same_numbers
from block_cases import EVERY, numbers
from halfstep.format import BlockFormat, Format
from halfstep.ops import block_rounder, kernel_rounder, round_blocks


@pytest.mark.parametrize("name", EVERY)
def test_a_rounder_gives_what_round_blocks_does(name: str):
    """For every axis of tensors that lie in order, transposed and otherwise; not finite, and empty."""
    format = BlockFormat.parse(name)
    rounded = block_rounder(format)
    spoilt = numbers((9, 40), torch.float32)
    spoilt[2, 3], spoilt[8, 39] = math.nan, -math.inf
    for x in (
        numbers((40,), torch.float32),
        numbers((9, 40), torch.float32),
        numbers((40, 9), torch.float32).t(),
        numbers((40, 18), torch.float32)[:, ::2],
        numbers((2, 3, 40), torch.float32),
        numbers((3, 2, 40), torch.float32).transpose(0, 1),
        numbers((1, 40), torch.float32).t(),
        numbers((4, 8), torch.float64),
        numbers((4, 8), torch.bfloat16),
        torch.empty(0, 4),
        spoilt,
        spoilt.t(),
    ):
        for dim in range(-x.dim(), x.dim()):
            expected = round_blocks(x, format, dim, backend="reference")
            result = rounded(x, dim)
            assert same_numbers(result, expected).all()
            assert result.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("first", [None, "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_rounders_of_convolutions_give_what_round_blocks_does(name: str, first: str | None):
    """An activation's positions are one axis; a weight's tiles span its channels, at each position."""
    format, before = BlockFormat.parse(name), first and Format.parse(first)
    plane = block_rounder(format, before, joined=True)
    kernel = kernel_rounder(format, before)
    spoilt = numbers((2, 3, 5), torch.float32)
    spoilt[1, 2, 4] = math.nan
    for x in (
        numbers((3, 5, 4), torch.float32),
        numbers((40, 33, 3, 3), torch.float32),
        numbers((2, 3, 2, 2, 3), torch.float32),
        numbers((300, 9, 1, 1), torch.float32),
        numbers((7, 5, 3, 2), torch.float32).transpose(2, 3),
        numbers((4, 4, 3), torch.float64),
        torch.empty(0, 4, 3),
        spoilt,
    ):
        of = x if before is None else halfstep.round_to(x, before)
        turned = of.permute(*range(2, x.dim()), 0, 1).contiguous()
        for dim in (0, 1):
            wanted = round_blocks(of.flatten(dim + 1), format, dim, backend="reference")
            assert same_numbers(plane(x, dim), wanted.view(x.shape)).all()
            wanted = round_blocks(turned, format, dim - 2, backend="reference")
            back = wanted.permute(x.dim() - 2, x.dim() - 1, *range(x.dim() - 2))
            assert same_numbers(kernel(x, dim), back).all()
