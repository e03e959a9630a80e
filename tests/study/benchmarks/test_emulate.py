"""The table of emulated recipes: which rows there are, and their targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from halfstep.study.benchmarks import emulate, layers
from halfstep.study.benchmarks import tiny as operations
from halfstep.study.benchmarks.harness import Clock
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
    monkeypatch.setattr(operations, "_CALLS", 1)
    monkeypatch.setattr(layers, "PEERS", ())
    rows = list(emulate.rows(rounds=4))
    steps = [row for row in rows if row.against == "fp32, time ratio"]
    assert len(steps) == 2 * len(emulate.BOUNDS)
    assert (steps[0].case, str(steps[0].target)) == ("fp16 step, CNN", "<= 1.30")
    assert (steps[-1].case, str(steps[-1].target)) == ("int8 step, LSTM", "<= 6.00")
    assert all(row.figure.median > 0 for row in steps)
    slow = {"fp16-acc16", "fp8-chunk64"}  # have fewer rounds
    assert {row.case.split()[0] for row in steps if row.figure.rounds == 3} == slow


def test_a_row_is_given_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch):
    """A table that is cut short has every row up to then."""
    begun: list[str] = []

    def step(workload: Workload, *, recipe: str) -> Callable[[], None]:
        begun.append(recipe)
        return lambda: None

    monkeypatch.setattr(emulate, "WORKLOADS", (lambda: tiny("CNN"),))
    monkeypatch.setattr(emulate, "switched_step", step)
    monkeypatch.setattr(operations, "rows", lambda rounds: iter(()))
    first = next(emulate.rows(rounds=1))
    assert (first.case, begun) == ("fp16 step, CNN", ["fp16"])


def test_operations_on_tiny_tensors_are_in_microseconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operations, "_CALLS", 1)
    rows = {row.case: row for row in operations.rows(rounds=1)}
    for recipe in ("fp16-naive", "mxfp8", "nvfp4:keep=none,hadamard=0"):
        assert str(rows[f"4x4 linear, {recipe} emulated"].target) == "<= 30.00"
    assert "microseconds" in rows["4x4 matmul fp16 in fp16"].against
    assert rows["4x4 round_to fp16"].figure.median > 0.5


@pytest.mark.parametrize("peer", layers.PEERS, ids=lambda peer: peer.package)
def test_a_peer_that_is_installed_has_a_row(
    peer: layers.LayersPeer, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip(peer.package)
    monkeypatch.setattr(layers, "_WIDTH", 32)
    monkeypatch.setattr(layers, "PEERS", (peer,))
    (row,) = layers.rows(rounds=1, clock=Clock.CPU)
    assert row.against.startswith(peer.package)
    assert set(row.details["seconds"]) == {"fp32", peer.package, peer.recipe}


def test_a_peer_that_is_not_installed_has_none(monkeypatch: pytest.MonkeyPatch):
    absent = dataclasses.replace(layers.PEERS[0], package="no-such-package")
    monkeypatch.setattr(layers, "PEERS", (absent,))
    assert list(layers.rows(rounds=1, clock=Clock.CPU)) == []
