"""What an optimizer's step in one pass reaches of the memory's bandwidth, and what it saves.

A step is that of a loop with a loss scale: gradients looked at and unscaled, weights and moments updated, the
next 16-bit working copies made. All contestants step the same arrays and take turns in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfstep.ops import AdamRule, SgdRule, adam_step, count_nonfinite, sgd_step
from halfstep.ops.native_step import touch
from halfstep.study.benchmarks.harness import Clock, Row, Sense, Target, interleave, ratio

__all__ = ["rows"]

_OF_BANDWIDTH = Target(sense=Sense.AT_LEAST, bound=0.8)
_FASTER = Target(sense=Sense.AT_LEAST, bound=1.3)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
OURS, BOUND, TORCH = "one pass", "memory", "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """Weights with gradients, and what a step of theirs reads and writes beside."""

    weights: list[torch.nn.Parameter]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    copies: list[Tensor]

    @property
    def bytes(self) -> int:
        """What a step moves: gradients are read twice, copies written, the rest read and written."""
        of = {
            name: sum(t.nbytes for t in getattr(self, name))
            for name in ("weights", "gradients", "means", "squares", "copies")
        }
        both = of["weights"] + of["means"] + of["squares"]
        return 2 * of["gradients"] + 2 * both + of["copies"]


def rows(
    *,
    parameters: int = 100_000_000,
    tensors: int = 200,
    rounds: int = 9,
    clock: Clock = Clock.WALL,
) -> Iterator[Row]:
    """The rows of the table, each optimizer's as soon as they are measured."""
    for name, build in _OPTIMIZERS.items():
        for format, dtype in _DTYPES.items():
            arrays, ours, theirs = build(parameters // tensors, tensors, dtype)
            seconds = interleave(
                {OURS: ours, BOUND: _bound(arrays), TORCH: theirs},
                rounds=rounds,
                warmup=1,
                clock=clock.read,
            )
            details = {
                "parameters": sum(w.numel() for w in arrays.weights),
                "tensors": tensors,
                "gigabytes_moved": arrays.bytes / 1e9,
                "seconds": {each: statistics.median(found) for each, found in seconds.items()},
                "gigabytes_per_second": {
                    each: arrays.bytes / 1e9 / statistics.median(seconds[each])
                    for each in (OURS, BOUND)
                },
            }
            case = f"{name} step, {format} copies"
            yield Row(
                case=case,
                against="same arrays, one addition each; share",
                figure=ratio(seconds[BOUND], seconds[OURS]),
                target=_OF_BANDWIDTH,
                details=details,
            )
            yield Row(
                case=case,
                against="unscale_, fused=True, cast; times faster",
                figure=ratio(seconds[TORCH], seconds[OURS]),
                target=_FASTER,
                details=details,
            )


_Built = tuple[Arrays, Callable[[], None], Callable[[], None]]


def _adam(kind: type[torch.optim.Adam], size: int, count: int, dtype: torch.dtype) -> _Built:
    weights, copies = _weights(size, count, dtype)
    optimizer = kind(weights, lr=1e-4, weight_decay=0.01, fused=True)
    theirs = _by_torch(optimizer, weights, copies)
    theirs()  # makes the state
    state = [optimizer.state[w] for w in weights]
    arrays = Arrays(
        weights=weights,
        gradients=_gradients(weights),
        means=[s["exp_avg"] for s in state],
        squares=[s["exp_avg_sq"] for s in state],
        copies=copies,
    )
    rule = AdamRule(lr=1e-4, weight_decay=0.01, decoupled=kind is torch.optim.AdamW)

    def ours() -> None:
        adam_step(
            arrays.weights,
            arrays.gradients,
            arrays.means,
            arrays.squares,
            [100.0] * count,
            rule,
            copies=copies,
        )

    return arrays, ours, theirs


def _sgd(size: int, count: int, dtype: torch.dtype) -> _Built:
    weights, copies = _weights(size, count, dtype)
    optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9, fused=True)
    theirs = _by_torch(optimizer, weights, copies)
    theirs()
    arrays = Arrays(
        weights=weights,
        gradients=_gradients(weights),
        means=[optimizer.state[w]["momentum_buffer"] for w in weights],
        squares=[],
        copies=copies,
    )
    rule = SgdRule(lr=1e-4, momentum=0.9)

    def ours() -> None:
        sgd_step(arrays.weights, arrays.gradients, arrays.means, rule, copies=copies)

    return arrays, ours, theirs


_OPTIMIZERS: dict[str, Callable[[int, int, torch.dtype], _Built]] = {
    "AdamW": lambda *given: _adam(torch.optim.AdamW, *given),
    "Adam": lambda *given: _adam(torch.optim.Adam, *given),
    "SGD momentum": _sgd,
}


def _weights(
    size: int, count: int, dtype: torch.dtype
) -> tuple[list[torch.nn.Parameter], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for _ in range(count)]
    for w in weights:
        w.grad = torch.randn(size, generator=generator) * 1e-3
    return weights, [torch.zeros(size, dtype=dtype) for _ in weights]


def _gradients(weights: list[torch.nn.Parameter]) -> list[Tensor]:
    return [w.grad for w in weights if w.grad is not None]


def _by_torch(
    optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], copies: list[Tensor]
) -> Callable[[], None]:
    """As a loop with torch's scaler does it. The scale is 1, so that gradients stay what they are."""
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.ones(1))

    def step() -> None:
        scaler.unscale_(optimizer)
        optimizer.step()
        scaler.update()
        with torch.no_grad():
            for copy, weight in zip(copies, weights, strict=True):
                copy.copy_(weight)

    return step


def _bound(arrays: Arrays) -> Callable[[], None]:
    """The gradients read once, then everything that a step reads and writes with one addition each."""

    def run() -> None:
        count_nonfinite(arrays.gradients)
        touch(arrays.weights, arrays.gradients, arrays.means, arrays.squares, arrays.copies)

    return run
