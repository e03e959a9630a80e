"""`round_to` against `copy_` of the same tensors: what the memory of this machine allows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from halfstep.format import Format, Rounding
from halfstep.ops import round_to
from halfstep.study.benchmarks.harness import Clock, Row, Sense, Target, interleave, ratio

__all__ = ["FORMATS", "ROUNDINGS", "rows"]

FORMATS = ("fp16", "e4m3fn", "e6m9")
ROUNDINGS = (Rounding.NEAREST, Rounding.STOCHASTIC)
_TARGET = Target(sense=Sense.AT_LEAST, bound=0.8)
_COPY = "copy_, throughput"


def rows(*, size: int = 2**24, rounds: int = 30, clock: Clock = Clock.WALL) -> Iterator[Row]:
    """A row for each format and rounding: throughput of ``round_to(x, f, out=out)`` over ``copy_``.

    ``x`` is ``size`` normal float32 numbers, ``out`` exists; all cases and the copy take turns.
    """
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)

    def run(format: Format, rounding: Rounding) -> None:
        round_to(x, format, rounding, out=out)

    cases = {f"{f}, {r.value}": (Format.parse(f), r) for f in FORMATS for r in ROUNDINGS}
    contestants = {name: (lambda case=case: run(*case)) for name, case in cases.items()}
    contestants = {_COPY: lambda: _copy(out, x), **contestants}
    seconds = interleave(contestants, rounds=rounds, clock=clock.read)
    for name in cases:
        yield Row(
            case=f"round_to {name}, 2^{size.bit_length() - 1} float32",
            against=_COPY,
            figure=ratio(seconds[_COPY], seconds[name]),
            target=_TARGET,
            details={
                "seconds": statistics.median(seconds[name]),
                "copy_seconds": statistics.median(seconds[_COPY]),
            },
        )


def _copy(out: torch.Tensor, x: torch.Tensor) -> None:
    out.copy_(x)
