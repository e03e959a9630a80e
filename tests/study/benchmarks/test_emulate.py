"""The table of emulated recipes: which rows there are, and their targets."""

from __future__ import annotations

import pytest
import torch

from halfstep.study.benchmarks import emulate
from halfstep.study.benchmarks.models import Workload


def tiny(name: str) -> Workload:
    torch.manual_seed(0)
    return Workload(
        name=name,
        description="8 inputs, 4 classes",
        model=torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))),
        inputs=torch.randn(16, 8),
        targets=torch.randint(8, (16,)),
    )


def test_every_recipe_has_a_row_for_every_model(monkeypatch: pytest.MonkeyPatch):
    builders = tuple(lambda name=name: tiny(name) for name in ("CNN", "LSTM"))
    monkeypatch.setattr(emulate, "WORKLOADS", builders)
    rows = list(emulate.rows(rounds=2))
    assert len(rows) == 2 * len(emulate.BOUNDS)
    assert (rows[0].case, str(rows[0].target)) == ("fp16 step, CNN", "<= 1.30")
    assert (rows[-1].case, str(rows[-1].target)) == ("int8 step, LSTM", "<= 6.00")
    assert all(row.figure.median > 0 and row.against == "fp32, time ratio" for row in rows)
