"""Dot products of growing length: how their error grows with it, by accumulator and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.format import Format
from halfstep.ops import matmul
from halfstep.study.lab.results import Axis, Curve, Curves, Finding, Result

__all__ = ["LENGTHS", "Bound", "dot_length"]

LENGTHS = tuple(2**e for e in range(4, 17))
OPERANDS = "fp16"
SIDE = 24  # rows of a and columns of b: 576 dot products at each length
_GROWTH = (2**8, 2**16)  # the lengths between which growth is measured
_SIGMAS = 5
_HIGHAM = "N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 3 and 4"
_MARY = "Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019"
_CONNOLLY = "Connolly, Higham and Mary, SIAM J. Sci. Comput. 43(1), 2021"
_WANG = "Wang et al., arXiv 1812.08011, section 2.3"

ACCUMULATORS = (
    "fp32",
    "fp16",
    "bf16",
    "e6m9",
    "fp16/stochastic",
    "fp16/pairwise",
    "fp16/chunk64",
    "fp16/kahan",
)


def _positive(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=generator).abs()


# name on the page -> how operands are drawn
_LAWS: Mapping[str, Callable[..., Tensor]] = {"zero-mean": torch.randn, "positive": _positive}
_TITLES = {
    "zero-mean": "Normal operands: signs cancel",
    "positive": "Their magnitudes, as after a ReLU: the sum only grows",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What no sum can exceed: an error of ``factor(K, u) u`` of the sum of magnitudes."""

    accumulate: str
    written: str
    factor: Callable[[int, float], float]
    derivation: str
    source: str


_JEANNEROD = "Jeannerod and Rump, SIAM J. Matrix Anal. Appl. 34(2), 2013"
_ANY_ORDER = "one rounding of at most u for each addition that a product goes through"
BOUNDS = (
    Bound(
        accumulate="fp16",
        written="K u",
        factor=lambda k, u: k,
        derivation=_ANY_ORDER,
        source=_JEANNEROD,
    ),
    Bound(
        accumulate="bf16",
        written="K u",
        factor=lambda k, u: k,
        derivation=_ANY_ORDER,
        source=_JEANNEROD,
    ),
    Bound(
        accumulate="fp16/pairwise",
        written="(log2 K + 1) u",
        factor=lambda k, u: math.log2(k) + 1,
        derivation=_ANY_ORDER,
        source=_HIGHAM,
    ),
    Bound(
        accumulate="fp16/chunk64",
        written="(64 + K/64) u",
        factor=lambda k, u: 64 + k / 64,
        derivation=_ANY_ORDER,
        source=_WANG,
    ),
    Bound(
        accumulate="fp16/kahan",
        written="(3 + 3 K u) u",
        factor=lambda k, u: 3 + 3 * k * u,
        derivation="2 u and what is of order K u^2 (here 3), and u for the product",
        source=_HIGHAM,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errors:
    """Of one accumulator at each length."""

    normwise: Mapping[int, float]
    """||error|| over ||exact||."""
    backward: Mapping[int, float]
    """The largest error over its sum of magnitudes, of all dot products."""


def dot_length(
    seed: int = 0, *, lengths: Sequence[int] = LENGTHS, growth: tuple[int, int] = _GROWTH
) -> Result:
    """The error of 576 dot products of fp16 operands at each length, against exact ones (float64).

    Operands are normal, and the magnitudes of normal ones, from ``seed``; ``growth`` are the two of
    the lengths between which the growth of the error is looked at.
    """
    errors = {law: _measure(draw, lengths, seed) for law, draw in _LAWS.items()}
    panels = tuple(
        Curves(
            name=f"dot-length-{law}",
            title=_TITLES[law],
            x=Axis(title="K", log=True),
            y=Axis(title="||error|| / ||exact||", log=True),
            curves=(
                *(
                    _curve(name, found.normwise, hue=_format(name).name)
                    for name, found in errors[law].items()
                ),
                *_laws_of_growth(lengths),
            ),
        )
        for law in _LAWS
    )
    return Result(
        name="dot-length",
        title="How the error of a dot product grows with its length",
        setting=(
            "fp16 operands, exact products; 576 dot products at each length, their error as a "
            "whole over their size as a whole. Dotted: the slopes of theory, from u of fp16."
        ),
        lesson=(
            "Rounding errors that are independent grow like the root of K, as they do here, far "
            "below the bound K u. Where all terms have one sign a sum to nearest stops growing and "
            "its error runs into 1; stochastic rounding keeps below the root. A tree, chunks and "
            "Kahan's sum hardly grow at all."
        ),
        seed=seed,
        findings=(*_bounded(errors, lengths), *_grown(errors, growth)),
        panels=panels,
    )


def _measure(draw: Callable[..., Tensor], lengths: Sequence[int], seed: int) -> dict[str, _Errors]:
    generator = torch.Generator().manual_seed(seed)
    a = draw(SIDE, max(lengths), generator=generator).half()
    b = draw(max(lengths), SIDE, generator=generator).half()
    found: dict[str, _Errors] = {}
    for name in ACCUMULATORS:
        normwise: dict[int, float] = {}
        backward: dict[int, float] = {}
        for length in lengths:
            left, right = a[:, :length].double(), b[:length].double()
            exact, magnitudes = left @ right, left.abs() @ right.abs()
            result = matmul(a[:, :length], b[:length], OPERANDS, name, generator=generator).double()
            normwise[length] = float((result - exact).norm() / exact.norm())
            backward[length] = float(((result - exact).abs() / magnitudes).max())
        found[name] = _Errors(normwise=normwise, backward=backward)
    return found


def _bounded(errors: Mapping[str, Mapping[str, _Errors]], lengths: Sequence[int]) -> list[Finding]:
    """No error of any dot product, of either law and any length, exceeds the bound."""
    findings: list[Finding] = []
    for bound in BOUNDS:
        u = _format(bound.accumulate).eps / 2
        most = max(
            errors[law][bound.accumulate].backward[length] / (bound.factor(length, u) * u)
            for law in errors
            for length in lengths
        )
        findings.append(
            Finding(
                claim=f"{bound.accumulate}: largest error / {bound.written} sum|a b|, all lengths",
                published="<= 1",
                ours=most,
                low=0.0,
                high=1.0,
                derivation=bound.derivation,
                source=bound.source,
            )
        )
    return findings


def _grown(errors: Mapping[str, Mapping[str, _Errors]], growth: tuple[int, int]) -> list[Finding]:
    """Independent errors: var(sum of k) ~ k^2, relative to sums of size sqrt(k) (zero mean) or k.

    For stochastic sums of one sign that is a bound: a draw of probability p has variance p (1 - p)
    units^2, which goes to 0 as the terms become small beside a unit of the sum.
    """
    shorter, longer = growth
    expected = math.sqrt(longer / shorter)
    # The rms of n errors has a relative standard deviation of 1 / sqrt(2 n); two of them in a ratio.
    spread = _SIGMAS / SIDE
    return [
        Finding(
            claim=f"{name}, {law} operands: growth of the error from K = {shorter} to {longer}",
            published="at most root of K" if bound else "root of K",
            ours=errors[law][name].normwise[longer] / errors[law][name].normwise[shorter],
            low=0.0 if bound else expected * (1 - spread),
            high=expected * (1 + spread),
            derivation=f"root of {longer // shorter}, {_SIGMAS} sigma of two rms over {SIDE**2} errors",
            source=source,
        )
        for name, law, source, bound in (
            ("fp16", "zero-mean", _MARY, False),
            ("e6m9", "zero-mean", _MARY, False),
            ("fp16/stochastic", "zero-mean", _CONNOLLY, False),
            ("fp16/stochastic", "positive", _CONNOLLY, True),
        )
    ]


def _laws_of_growth(lengths: Sequence[int]) -> tuple[Curve, ...]:
    u = _format("fp16").eps / 2
    return tuple(
        _curve(f"{written} (fp16)", {k: min(factor(k), 1 / u) * u for k in lengths}, theory=True)
        for written, factor in (
            ("K u", float),
            ("sqrt(K) u", math.sqrt),
            ("log2(K) u", math.log2),
        )
    )


def _curve(name: str, values: Mapping[int, float], *, hue: str = "", theory: bool = False) -> Curve:
    positive = {k: value for k, value in values.items() if value > 0}
    x = tuple(float(k) for k in positive)
    return Curve(name=name, x=x, y=tuple(positive.values()), hue=hue, theory=theory)


def _format(accumulate: str) -> Format:
    """The numbers of an accumulator's text form."""
    return Format.parse(accumulate.partition("/")[0])
