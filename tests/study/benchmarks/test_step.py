"""`halfstep bench step`: what is compared steps the same arrays; the table has its rows."""

from __future__ import annotations

import pytest
import torch

from halfstep.ops import native
from halfstep.study.benchmarks.step import rows

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason="no native kernels")


def test_rows_and_their_figures():
    found = list(rows(parameters=4000, tensors=4, rounds=2))
    assert [row.case for row in found[::2]] == [
        f"{name} step, {copies} copies"
        for name in ("AdamW", "Adam", "SGD momentum")
        for copies in ("fp16", "bf16")
    ]
    assert [str(row.target) for row in found[:2]] == [">= 0.80", ">= 1.30"]
    # gradient twice, weight and moments to and fro, copy: 8 + 24 + 2 and 8 + 16 + 2 bytes
    assert [row.details["gigabytes_moved"] * 1e9 / 4000 for row in found[::4]] == pytest.approx(
        [34, 34, 26]
    )
    assert all(row.figure.rounds == 2 and row.figure.median > 0 for row in found)
    assert torch.is_grad_enabled()
