"""FP8 on a unit of 14 bits: the published 2% lies between the two laws, and promotion mends both."""

from __future__ import annotations

import pytest
import torch

from halfstep.ops import matmul
from halfstep.study.lab.promotion import DEPTH, UNIT, bits_kept, promotion


@pytest.fixture(scope="module")
def result():
    return promotion(11, rows=8, intervals=(128, 512, 4096))


def curve(result, name: str) -> dict[float, float]:
    (found,) = (c for c in result.panels[0].curves if c.name == name)
    return dict(zip(found.x, found.y, strict=True))


def test_every_finding_is_reproduced(result):
    assert [f.claim for f in result.findings if not f.reproduced] == []
    assert len(result.findings) == 5


def test_the_published_figure_lies_between_mixed_signs_and_one_sign(result):
    mixed = curve(result, "zero-mean: normwise error")[DEPTH]
    single = curve(result, "all positive: largest relative error")[DEPTH]
    assert mixed < 0.02 < single


def test_errors_fall_with_the_interval_and_below_those_of_the_operands(result):
    for law in ("zero-mean", "all positive"):
        errors = list(curve(result, f"{law}: normwise error").values())
        assert errors == sorted(errors)
        rounding = curve(result, f"{law}: what rounding the operands to FP8 does")
        assert errors[0] < rounding[128]


def test_a_unit_keeps_as_many_bits_as_its_data_path_has():
    assert bits_kept() == 14
    assert bits_kept("a100", "fp16") == 24 + 1 - 1  # aligned to 24 bits, returned as fp32


def test_the_interval_is_the_chunk_of_the_unit():
    a = torch.rand(2, 256, generator=torch.Generator().manual_seed(0))
    halves = [matmul(part, part.T, "e4m3fn", UNIT).double() for part in (a[:, :128], a[:, 128:])]
    promoted = matmul(a, a.T, "e4m3fn", f"{UNIT}/chunk128").double()
    assert torch.equal(promoted, (halves[0] + halves[1]).float().double())
