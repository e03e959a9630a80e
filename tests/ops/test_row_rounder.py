"""`ops.row_rounder`: a bias added to a matrix, both rounded, in one call; for many small tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adversarial import adversarial, same_numbers
from halfstep import ops
from halfstep.format import Format
from halfstep.ops import native

FORMATS = ["fp16", "bf16", "e5m2", "e4m3fn", "e6m9", "int8", "fp16:saturate", "fp32", "e8m0"]
NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()


def expected(made: Tensor, row: Tensor | None, format: Format) -> Tensor:
    """By the reference, step by step."""
    if row is not None:
        made = made + ops.round_to(row, format, backend="reference")
    return ops.round_to(made, format, backend="reference")


def matrices(format: Format) -> list[Tensor]:
    """Small ones, one wider than a piece of the kernel, one of more pieces than one, hard numbers."""
    hard = adversarial(format, torch.float32)[:4096]
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]] = [
        (4, 4),
        (1, 1),
        (3, 5000),
        (700, 33),
        (9500, 7),
        (0, 3),
        (3, 0),
        (70, 1),
    ]
    shapes += [(2, 3, 4, 5), (7,)]
    made = [torch.randn(shape, generator=generator) * 100 for shape in shapes]
    return [*made, hard.view(1, -1), hard.view(-1, 1).expand(-1, 3).contiguous()]


@pytest.mark.parametrize("name", FORMATS)
def test_gives_what_the_three_operations_do(name: str):
    format = Format.parse(name)
    rounded = ops.row_rounder(format)
    generator = torch.Generator().manual_seed(4)
    for made in matrices(format):
        row = torch.randn(made.shape[-1], generator=generator) * 10
        if row.numel() > 2:
            row[1], row[2] = math.inf, math.nan
        for added in (row, None):
            want = expected(made, added, format)
            for instructions in NATIVE_SETS:
                with native.instruction_set(instructions):
                    out = rounded(given := made.clone(), added)
                assert out is given
                assert same_numbers(out, want).all()


def test_what_has_no_order_of_its_own_is_rounded_too():
    format = Format.parse("e4m3fn")
    made, row = torch.randn(6, 4).t(), torch.randn(12)[::2]
    want = expected(made, row, format)
    assert torch.equal(ops.row_rounder(format)(made, row), want)
    assert torch.equal(
        ops.row_rounder(format)(torch.ones(2, 3), torch.ones(1).expand(3)), torch.full((2, 3), 2.0)
    )
