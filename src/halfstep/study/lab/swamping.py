"""A long sum of numbers of mean 1: from where on the sum is too large to notice what is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.format import Accumulator, Format, Order, Rounding
from halfstep.ops import matmul, round_to
from halfstep.study.lab.results import Axis, Curve, Curves, Finding, Result

__all__ = ["LENGTHS", "Kept", "running_sums", "swamping"]

LENGTHS = tuple(2**e for e in range(4, 17))
ROWS = 64
OPERANDS = "e6m9"
_LARGEST = 1 + math.sqrt(3)  # of a uniform distribution of mean 1 and standard deviation 1
_SIGMAS = 5
_WANG = "Wang et al., arXiv 1812.08011, section 2.3 and figure 3"
_HIGHAM = "N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapter 4"
_STOCHASTIC = "Connolly, Higham and Mary, SIAM J. Sci. Comput. 43(1), 2021"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One accumulator of the experiment, and what the literature says that it keeps."""

    name: str
    accumulate: str
    published: str
    source: str

    @property
    def format(self) -> Format:
        """The numbers that the sum is kept in."""
        return Format.parse(self.accumulate.partition("/")[0])


CASES = (
    Kept(name="fp32", accumulate="fp32", published="1", source=_HIGHAM),
    Kept(name="fp16", accumulate="fp16", published="stops at 2^13: 0.125", source=_WANG),
    Kept(name="e6m9", accumulate="e6m9", published="stops at 2^12: 0.063", source=_WANG),
    Kept(name="bf16", accumulate="bf16", published="stops at 2^10: 0.016", source=_WANG),
    Kept(
        name="e6m9, stochastic",
        accumulate="e6m9/stochastic",
        published="1.00",
        source=_STOCHASTIC,
    ),
    Kept(name="e6m9, chunks of 64", accumulate="e6m9/chunk64", published="1.005", source=_WANG),
    Kept(name="e6m9, pairwise", accumulate="e6m9/pairwise", published="1.00", source=_HIGHAM),
    Kept(name="e6m9, Kahan", accumulate="e6m9/kahan", published="1.00", source=_HIGHAM),
)


def swamping(
    seed: int = 0, *, lengths: Sequence[int] = LENGTHS, cases: Sequence[Kept] = CASES
) -> Result:
    """Sums of 16 to 65,536 numbers, uniform with mean 1 and standard deviation 1, in 64 repeats.

    The numbers are those of e6m9, drawn from ``seed``; the share kept is the mean over repeats of
    sum / true sum.
    """
    x = _numbers(seed, max(lengths))
    true = x.double().cumsum(0)[torch.tensor(lengths) - 1]
    findings: list[Finding] = []
    curves = [_curve("the true sum", lengths, true.mean(1), hue="", theory=True)]
    for case in cases:
        sums = running_sums(x, case.accumulate, seed, lengths)
        kept = (sums[-1] / true[-1]).mean().item()
        low, high, derivation = _allowed(case, x)
        curves.append(_curve(case.name, lengths, sums.mean(1), hue=case.format.name))
        findings.append(
            Finding(
                claim=f"{case.name}: share of the sum of {len(x)} numbers that is kept",
                published=case.published,
                ours=kept,
                low=low,
                high=high,
                derivation=derivation,
                source=case.source,
            )
        )
    return Result(
        name="swamping",
        title="Long sums that stop growing",
        setting=(
            "Numbers from a uniform distribution of mean 1 and standard deviation 1, rounded to "
            "e6m9 and added in different accumulators: the mean of 64 sums at each length."
        ),
        lesson=(
            "Where half a spacing of the sum is more than the largest number, nothing that is added "
            "arrives: e6m9 stops at 4096 whatever follows. Stochastic rounding, chunks, a tree or "
            "Kahan's correction keep the same 16 bits going."
        ),
        seed=seed,
        findings=tuple(findings),
        panels=(
            Curves(
                name="swamping",
                title="The running sum",
                x=Axis(title="numbers added", log=True),
                y=Axis(title="sum", log=True),
                curves=tuple(curves),
            ),
        ),
    )


def running_sums(x: Tensor, accumulate: str, seed: int, lengths: Sequence[int]) -> Tensor:
    """(lengths, rows): the sums of the first numbers of each column of ``x``, each begun anew."""
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(1, len(x))
    sums = [
        matmul(ones[:, :length], x[:length], OPERANDS, accumulate, generator=generator)
        for length in lengths
    ]
    return torch.cat(sums).double()


def _numbers(seed: int, count: int) -> Tensor:
    """(count, rows) numbers of e6m9."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, ROWS, generator=generator)
    return round_to(1 + math.sqrt(3) * (2 * uniform - 1), OPERANDS)


def _curve(
    name: str, lengths: Sequence[int], sums: Tensor, *, hue: str, theory: bool = False
) -> Curve:
    x = tuple(float(length) for length in lengths)
    return Curve(name=name, x=x, y=tuple(sums.tolist()), hue=hue, theory=theory)


def _allowed(case: Kept, x: Tensor) -> tuple[float, float, str]:
    """The interval that theory gives for the share kept, and which theory it is."""
    accumulator, eps = Accumulator.parse(case.accumulate), case.format.eps
    count, total = len(x), float(len(x))
    u = eps / 2
    weight = float((x.abs().sum(0) / x.sum(0)).max())  # sum of magnitudes over sum
    if accumulator.rounding is Rounding.STOCHASTIC:
        sigma = _stochastic_sigma(x, eps) / math.sqrt(ROWS)
        reason = (
            f"{_SIGMAS} sigma of {ROWS} sums, each step drawing with probability rest / spacing"
        )
        return 1 - _SIGMAS * sigma, 1 + _SIGMAS * sigma, reason
    if accumulator.order is Order.PAIRWISE:
        bound = math.log2(count) * u * weight
        return 1 - bound, 1 + bound, "log2(n) u sum|x| / sum x"
    if accumulator.compensated:
        bound = (2 * u + count * u * u) * weight
        return 1 - bound, 1 + bound, "(2 u + n u^2) sum|x| / sum x"
    if accumulator.chunk:
        bound = _SIGMAS * _chunk_sigma(count, accumulator.chunk, eps) / total
        reason = f"{_SIGMAS} sigma of chunk sums rounded with errors uniform in half a spacing"
        return 1 - bound, 1 + bound, reason
    if count * u < 1:
        return 1 - count * u * weight, 1 + count * u * weight, "n u sum|x| / sum x"
    # Sums in [2^s, 2^(s+1)) are 2^s eps apart; the first s where half of that exceeds every number.
    stop = 2.0 ** (1 + math.floor(math.log2(2 * _LARGEST / eps)))
    spread = _SIGMAS * math.sqrt(count)  # of the true sum: standard deviation 1 a number
    reason = f"the sum stops where half a spacing exceeds 1 + sqrt(3); true sum n, {_SIGMAS} sigma"
    return stop / (total + spread), stop / (total - spread), reason


def _stochastic_sigma(x: Tensor, eps: float) -> float:
    """Relative standard deviation of one sum: a step takes the farther of two neighbours, q apart,
    with probability f = rest / q, and f (1 - f) q^2 is its variance.
    """
    sums = x.double().cumsum(0)
    spacing = torch.exp2(sums.abs().clamp(min=1).log2().floor()) * eps
    rest = (x.double() / spacing).frac().abs()
    variance = (rest * (1 - rest) * spacing**2).sum(0)
    return float((variance.sqrt() / sums[-1]).max())


def _chunk_sigma(count: int, chunk: int, eps: float) -> float:
    """Standard deviation of the sum of chunks that are ``chunk`` each, the sums of chunks known."""
    sums = torch.arange(1, count // chunk + 1, dtype=torch.float64) * chunk
    spacing = torch.exp2(sums.log2().floor()) * eps
    return float((spacing**2 / 12).sum().sqrt())
