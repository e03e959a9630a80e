"""Weights that receive small updates: which share of an update arrives, by format and rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfstep.format import Format, Rounding
from halfstep.ops import round_to
from halfstep.study.lab.results import Axis, Curve, Curves, Finding, Result

__all__ = ["arrived", "significands", "updates"]

RATIOS = range(5, 21)
_NEAREST = ("fp32", "fp16", "e6m9", "bf16", "e4m3")
_STOCHASTIC = ("fp16", "bf16")
_ELEMENTS = 2**18
_SIGMAS = 5
_MICIKEVICIUS = "Micikevicius et al., arXiv 1710.03740, section 3.1"
_ZAMIRAI = "Zamirai et al., arXiv 2010.06192, sections 3 and 4"


def updates(seed: int = 0) -> Result:
    """``round(w + w 2^-r)`` for r of 5 to 20: the mean of (result - w) / (w 2^-r).

    w takes every significand of the format in [1, 2) (of fp32, 2^18 of them, evenly spaced), so
    nearest has no chance in it; stochastic rounding draws from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    curves: list[Curve] = []
    shares: dict[tuple[str, Rounding], dict[int, float]] = {}
    for rounding, names in ((Rounding.NEAREST, _NEAREST), (Rounding.STOCHASTIC, _STOCHASTIC)):
        for name in names:
            weights = significands(Format.parse(name))
            if rounding is Rounding.STOCHASTIC:
                weights = weights.repeat(_ELEMENTS // len(weights))
            share = {
                r: float(arrived(weights, name, rounding, r, generator).mean()) for r in RATIOS
            }
            shares[name, rounding] = share
            curves.append(
                Curve(
                    name=f"{name}, {rounding.value}",
                    x=tuple(2.0**-r for r in share),
                    y=tuple(share.values()),
                    hue=name,
                )
            )
    findings = [_first_swallowed(name, source) for name, source in _THRESHOLDS.items()]
    findings += [
        Finding(
            claim=f"{name}, nearest: share that arrives of an update 2^-{digits + 1} of its weight",
            published="0",
            ours=shares[name, Rounding.NEAREST][digits + 1],
            low=0.0,
            high=0.0,
            derivation="less than half the spacing above any significand: exact",
            source=source,
        )
        for name, source in _THRESHOLDS.items()
        for digits in (Format.parse(name).precision,)
    ]
    findings += [
        _on_average(name, r, shares[name, Rounding.STOCHASTIC][r])
        for name, r in (("fp16", 14), ("bf16", 11))
    ]
    return Result(
        name="updates",
        title="Updates that do not arrive",
        setting=(
            "w + w 2^-r, rounded once, for every significand w of the format: the mean of what "
            "was added over what should have been. Above 1 an update arrives too large, because "
            "whole spacings are all there is to add."
        ),
        lesson=(
            "Rounded to nearest, a 16-bit weight ignores what is less than half its spacing, for "
            "ever; rounded stochastically it takes it now and then, and on average all of it. FP32 "
            "master weights move the cliff 13 binades away."
        ),
        seed=seed,
        findings=tuple(findings),
        panels=(
            Curves(
                name="updates",
                title="Share of an update that arrives",
                x=Axis(title="update / weight", log=True),
                y=Axis(title="mean of (new weight - weight) / update"),
                curves=tuple(curves),
            ),
        ),
    )


_THRESHOLDS = {"fp16": _MICIKEVICIUS, "bf16": _ZAMIRAI}


def significands(format: Format) -> Tensor:
    """The numbers of the format in [1, 2), float64; of fp32 2^18 of them."""
    count = min(2**format.mantissa_bits, _ELEMENTS)
    return 1 + torch.arange(count, dtype=torch.float64) / count


def arrived(
    weights: Tensor, format: str, rounding: Rounding, r: int, generator: torch.Generator
) -> Tensor:
    """The share of the update 2^-r of each weight that the rounded sum has; float64 holds the
    unrounded one exactly.
    """
    update = weights * 2.0**-r
    after = round_to(weights + update, format, rounding, generator=generator)
    return (after - weights) / update


def _first_swallowed(name: str, source: str) -> Finding:
    weights = significands(Format.parse(name))
    quiet = torch.Generator()  # nearest draws nothing
    first = next(
        r for r in RATIOS if (arrived(weights, name, Rounding.NEAREST, r, quiet) == 0).any()
    )
    digits = Format.parse(name).precision
    return Finding(
        claim=f"{name}, nearest: weight / update from which an update can be swallowed",
        published=str(2**digits),
        ours=2.0**first,
        low=2.0**digits,
        high=2.0**digits,
        derivation="half the spacing at 1, a tie that goes to the even 1: exact",
        source=source,
    )


def _on_average(name: str, r: int, share: float) -> Finding:
    """Each weight takes a whole spacing q with probability f = update / q, else nothing."""
    format = Format.parse(name)
    weights = significands(format)
    f = weights * 2.0**-r / format.eps
    sigma = math.sqrt(float(((1 - f) / f).mean()) / _ELEMENTS)
    return Finding(
        claim=f"{name}, stochastic: share that arrives of an update 2^-{r} of its weight",
        published="1 on average",
        ours=share,
        low=1 - _SIGMAS * sigma,
        high=1 + _SIGMAS * sigma,
        derivation=f"{_SIGMAS} sigma of the mean of 2^18 draws with probability update / spacing",
        source=_ZAMIRAI,
    )
