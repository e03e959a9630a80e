"""The number formats themselves: how far they reach, how fine they are, and where."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfstep.format import Format
from halfstep.ops import round_to
from halfstep.study.lab.results import Axis, Curve, Curves, Finding, Result, Span, Spans, Ticks

__all__ = ["formats", "numbers_up_to", "reach", "spacing"]

RANGES = ("fp32", "bf16", "e6m9", "fp16", "e5m2", "e4m3fn", "e3m2", "e2m3", "e2m1")
SPACINGS = ("fp32", "bf16", "e6m9", "fp16", "e5m2", "e4m3fn", "e2m1")
LINES = ("e5m2", "e4m3fn", "e3m2", "e2m3", "e2m1", "int4", "ternary")
_MICIKEVICIUS = "Micikevicius et al., arXiv 1710.03740, section 3.2"
_FP8 = "Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433, table 1"
_MX = "OCP Microscaling Formats (MX) v1.0, section 5.3"
_TINY, _HUGE = 1e-300, 1e300
_PER_BINADE = 4
_EXACT = "a limit of the format: exact"


def formats(seed: int = 0) -> Result:
    """Reach and relative spacing of formats, asked of `round_to` and not of their definitions.

    The largest number is 10^300 rounded toward zero, the smallest 10^-300 rounded up; the spacing
    around a magnitude is that rounded up less that rounded down, at four points of each binade
    whose place is drawn from ``seed``.
    """
    spans = {name: reach(name) for name in RANGES}
    return Result(
        name="formats",
        title="What a number format can say",
        setting=(
            "Every figure is what round_to does: 10^300 toward zero is the largest number, 10^-300 "
            "upwards the smallest, a magnitude upwards less the same downwards the spacing there."
        ),
        lesson=(
            "Exponent bits buy reach, mantissa bits buy fineness. Below the smallest normal number "
            "a format gets coarser by a factor of two a binade, then ends; bf16 has FP32's reach "
            "and needs no loss scale, fp16 has three bits more and does."
        ),
        seed=seed,
        findings=_findings(spans),
        panels=(
            Spans(
                name="reach",
                title="From the smallest to the largest number",
                x=Axis(title="magnitude", log=True),
                below="subnormal: fewer bits",
                above="normal: all bits",
                spans=tuple(spans.values()),
            ),
            Curves(
                name="spacing",
                title="Spacing of neighbours over their magnitude",
                x=Axis(title="magnitude", log=True),
                y=Axis(title="spacing / magnitude", log=True),
                curves=tuple(_spacing_curve(name, spans[name], seed) for name in SPACINGS),
            ),
            Ticks(
                name="number-lines",
                title="The numbers from 0 to 8",
                x=Axis(title="value"),
                rows={name: numbers_up_to(name, 8.0) for name in LINES},
            ),
        ),
    )


def reach(name: str) -> Span:
    """Smallest, smallest normal and largest positive number: normal is where a step up of a power
    of two is as fine, relatively, as it ever gets.
    """
    low = float(round_to(torch.tensor(_TINY, dtype=torch.float64), name, "up"))
    high = float(round_to(torch.tensor(_HUGE, dtype=torch.float64), name, "toward_zero"))
    exponents = range(math.frexp(low)[1] - 1, math.frexp(high)[1])
    powers = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    relative = spacing(name, powers * (1 + 2.0**-40)) / powers
    finest = relative == relative[:-1].min()
    return Span(name=name, low=low, middle=float(powers[finest][0]), high=high)


def spacing(name: str, magnitudes: Tensor) -> Tensor:
    """The distance between the two neighbours of each of the float64 magnitudes, none of which
    is a number of the format; 0 above the largest number.
    """
    return round_to(magnitudes, name, "up") - round_to(magnitudes, name, "down")


def numbers_up_to(name: str, bound: float) -> tuple[float, ...]:
    """The distinct numbers of the format in [0, bound], found by rounding a fine grid."""
    quantum = Format.parse(name).quantum_exponent
    grid = torch.arange(0, int(bound * 2.0**-quantum) + 1, dtype=torch.float64) * 2.0**quantum
    return tuple(round_to(grid, name).unique().tolist())


def _spacing_curve(name: str, span: Span, seed: int) -> Curve:
    generator = torch.Generator().manual_seed(seed)
    exponents = range(math.frexp(span.low)[1] - 1, math.frexp(span.high)[1] - 1)
    offset = float(torch.rand((), dtype=torch.float64, generator=generator))
    within = 1 + (torch.arange(_PER_BINADE, dtype=torch.float64) + offset) / _PER_BINADE
    # An odd multiple of 2^-30: no format of fewer bits has it.
    within = (torch.floor(within * 2**29) * 2 + 1) * 2.0**-30
    binades = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    points = (binades[:, None] * within).flatten()
    relative = spacing(name, points) / points
    return Curve(name=name, x=tuple(points.tolist()), y=tuple(relative.tolist()), hue=name)


def _findings(spans: dict[str, Span]) -> tuple[Finding, ...]:
    fp16 = spans["fp16"]
    binades = 1 + math.log2(2.0 ** math.floor(math.log2(fp16.high)) / fp16.low)
    cases = [("fp16", "binades from the smallest to the largest number", "40", binades)]
    cases = [(*cases[0], _MICIKEVICIUS)]
    for name, low, middle, high, source in (
        ("e5m2", "2^-16", "2^-14", "57344", _FP8),
        ("e4m3fn", "2^-9", "2^-6", "448", _FP8),
        ("e3m2", "2^-4", "2^-2", "28", _MX),
        ("e2m3", "2^-3", "2^0", "7.5", _MX),
        ("e2m1", "2^-1", "2^0", "6", _MX),
    ):
        span = spans[name]
        cases.append((name, "smallest number", low, span.low, source))
        cases.append((name, "smallest normal number", middle, span.middle, source))
        cases.append((name, "largest number", high, span.high, source))
    return tuple(
        Finding(
            claim=f"{name}: {what}",
            published=published,
            ours=ours,
            low=_number(published),
            high=_number(published),
            derivation=_EXACT,
            source=source,
        )
        for name, what, published, ours, source in cases
    )


def _number(written: str) -> float:
    base, _, exponent = written.partition("^")
    return float(base) ** float(exponent or 1)
