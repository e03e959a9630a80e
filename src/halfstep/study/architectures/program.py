"""Trains one of the architectures in plain PyTorch and prints its losses as JSON: no recipe is known here.

``python -m halfstep.study.architectures.program bert --seed 3`` trains in FP32;
``halfstep run --recipe bf16 -m halfstep.study.architectures.program bert`` the same in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from halfstep.study.architectures.architecture import Architecture
from halfstep.study.architectures.batches import Batch
from halfstep.study.architectures.catalogue import ARCHITECTURES

__all__ = ["BATCHES", "STEPS", "Losses", "draw_batches", "seed_everything", "train"]

STEPS = 20
BATCHES = 4
_DATA_SEED = 1710


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The loss of each step, and the mean over the batches after the last."""

    steps: tuple[float, ...]
    after: float


def draw_batches(architecture: Architecture) -> tuple[Batch, ...]:
    """The data, the same for every seed: a seed is of weights and dropout."""
    draw = torch.Generator().manual_seed(_DATA_SEED)
    return tuple(architecture.batch(draw) for _ in range(BATCHES))


def _quiet(model: nn.Module) -> None:
    """No dropout, nor anything else that is drawn in training; batch normalisation goes on looking at the
    batch, of whose running statistics a few steps know little.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


def seed_everything(seed: int) -> None:
    """Torch's random numbers, and numpy's: SpecAugment draws from those."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def train(
    architecture: Architecture,
    seed: int,
    *,
    steps: int = STEPS,
    idle: int = 0,
    prepare: Callable[[nn.Module, Optimizer], object] = lambda model, optimizer: None,
) -> Losses:
    """``steps`` of AdamW on four batches in turn, of which the first ``idle`` are not applied; ``prepare``
    is given model and optimizer beforehand.
    """
    seed_everything(seed)
    model = architecture.build()
    optimizer = AdamW(model.parameters(), lr=architecture.rate)
    prepare(model, optimizer)
    data = draw_batches(architecture)
    losses: list[float] = []
    for step in range(steps):
        loss = architecture.loss(model, data[step % BATCHES])
        loss.backward()
        if step >= idle:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    _quiet(model)
    seed_everything(seed)  # of models that draw what they hide
    with torch.no_grad():
        after = sum(float(architecture.loss(model, batch)) for batch in data) / BATCHES
    return Losses(steps=tuple(losses), after=after)


def main(arguments: Sequence[str]) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in the same order every time
    losses = train(ARCHITECTURES[given.architecture], given.seed, steps=given.steps)
    print(json.dumps({"steps": losses.steps, "after": losses.after}))


if __name__ == "__main__":
    main(sys.argv[1:])
