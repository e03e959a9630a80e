"""One architecture in FP32 and in recipes, in a process of its own: a line of JSON for each.

``python -m halfstep.study.architectures.measure bert fp16 bf16`` prints first what FP32 does, with
five seeds, then what each recipe does with the first of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import halfstep
from halfstep.study.architectures.architecture import Architecture
from halfstep.study.architectures.catalogue import ARCHITECTURES
from halfstep.study.architectures.program import draw_batches, seed_everything, train

__all__ = ["SEEDS", "cosine", "first_gradient", "main"]

SEEDS = (0, 1, 2, 3, 4)
_TRIES = 40  # from 2^16 a loss scale has reached its floor


def first_gradient(architecture: Architecture, recipe: str = "fp32") -> Tensor:
    """The gradient of the first batch with respect to all parameters (n), in evaluation mode; of a
    recipe with a loss scale, at the first scale at which nothing overflows.

    There is no dropout in evaluation mode, and batch normalisation does not look at the batch: in an
    untrained network its gradients grow exponentially with depth, and any rounding with them, FP32's too.

    Raises:
        halfstep.errors.NonFiniteError: no scale mends it.

    Source: Yang et al., A Mean Field Theory of Batch Normalization, arXiv 1902.08129, section 1.
    """
    seed_everything(SEEDS[0])
    model = architecture.build().eval()
    optimizer = SGD(model.parameters(), lr=0.0)
    switch = halfstep.switch(model, optimizer, recipe=recipe)
    batch = draw_batches(architecture)[0]
    for _ in range(_TRIES):
        optimizer.zero_grad()
        seed_everything(SEEDS[0])  # of models that draw what they hide
        architecture.loss(model, batch).backward()
        found = _flat(model)
        optimizer.step()
        if switch.last_step is None or switch.last_step.applied:
            break
    switch.off()
    return found


def _flat(model: nn.Module) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    ).double()


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two gradients; NaN where one is zero or not finite."""
    return float(a @ b / (a.norm() * b.norm()))


def _of_seeds(architecture: Architecture, idle: int) -> list[float]:
    """FP32's loss after the last step, with each seed; the first ``idle`` steps are not applied."""
    return [train(architecture, seed, idle=idle).after for seed in SEEDS]


def _in_recipe(architecture: Architecture, recipe: str, reference: Tensor) -> dict[str, Any]:
    skipped = 0

    def prepare(model: nn.Module, optimizer: Optimizer) -> None:
        nonlocal skipped
        switch = halfstep.switch(model, optimizer, recipe=recipe)

        def count(*_: object) -> None:
            nonlocal skipped
            skipped += switch.last_step is not None and not switch.last_step.applied

        optimizer.register_step_post_hook(count)

    start = time.perf_counter()
    losses = train(architecture, SEEDS[0], prepare=prepare)
    found = {} if not skipped else {"fp32": _of_seeds(architecture, skipped)}
    return found | {
        "steps": losses.steps,
        "after": losses.after,
        "cosine": cosine(first_gradient(architecture, recipe), reference),
        "skipped": skipped,
        "seconds": time.perf_counter() - start,
    }


def main(arguments: Sequence[str]) -> None:
    """The process: a line for FP32, then one for each recipe; a recipe that fails is a line, too."""
    name, *recipes = arguments
    torch.set_num_threads(1)  # sums in the same order every time, and a core for the process beside
    architecture = ARCHITECTURES[name]
    reference = first_gradient(architecture)
    _say({"parameters": len(reference), "fp32": _of_seeds(architecture, 0)})
    for recipe in recipes:
        try:
            _say({"recipe": recipe, **_in_recipe(architecture, recipe, reference)})
        except Exception as error:
            _say({"recipe": recipe, "error": f"{type(error).__name__}: {error}"})


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
