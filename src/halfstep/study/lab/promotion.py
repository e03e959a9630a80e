"""FP8 products on a unit that keeps 14 bits of their sum, and what promotion to FP32 mends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from halfstep.ops import matmul, round_to
from halfstep.study.lab.results import Axis, Curve, Curves, Finding, Result

__all__ = ["bits_kept", "promotion"]

UNIT = "h100"
OPERANDS = "e4m3fn"
DEPTH = 4096
PUBLISHED_INTERVAL = 128
ROWS = 32
INTERVALS = (128, 256, 512, 1024, 2048, 4096)
_FRACTION_BITS, _BLOCK = 13, 32
_DEEPSEEK = "DeepSeek-V3, arXiv 2412.19437, section 3.3.2"
_LAWS: Mapping[str, Callable[..., Tensor]] = {"zero-mean": torch.randn, "all positive": torch.rand}
_HUES = {"zero-mean": "fp16", "all positive": "e5m2"}


def promotion(seed: int = 0, *, rows: int = ROWS, intervals: Sequence[int] = INTERVALS) -> Result:
    """Products of ``rows`` x 4096 by 4096 x ``rows`` in e4m3 on the H100's unit, its sum moved to FP32
    every so many products; normal and uniform operands from ``seed``; errors against exact ones.

    Of the ``intervals``, 128 and 4096 are needed.
    """
    errors: dict[str, dict[int, float]] = {}
    largest: dict[int, float] = {}
    curves: list[Curve] = []
    for law, draw in _LAWS.items():
        generator = torch.Generator().manual_seed(seed)
        a = draw(rows, DEPTH, generator=generator)
        b = draw(DEPTH, rows, generator=generator)
        exact = round_to(a, OPERANDS).double() @ round_to(b, OPERANDS).double()
        errors[law] = {}
        for interval in intervals:
            result = matmul(a, b, OPERANDS, f"{UNIT}/chunk{interval}").double()
            errors[law][interval] = float((result - exact).norm() / exact.norm())
            if law == "all positive":
                largest[interval] = float(((result - exact) / exact).abs().max())
        curves.append(_curve(f"{law}: normwise error", errors[law], hue=_HUES[law]))
        rounding = float(
            (exact - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
        )
        flat: dict[int, float] = dict.fromkeys(intervals, rounding)
        name = f"{law}: what rounding the operands to FP8 does"
        curves.append(_curve(name, flat, hue=_HUES[law], theory=True))
    curves.insert(
        2, _curve("all positive: largest relative error", largest, hue=_HUES["all positive"])
    )
    return Result(
        name="promotion",
        title="FP8 sums in 14 bits, promoted to FP32",
        setting=(
            f"e4m3 operands, K = {DEPTH}, on the H100's matrix unit as it was measured (32 products "
            "at once, aligned and truncated to 13 fraction bits); its sum is moved to an FP32 sum "
            "and begun anew after every so many products."
        ),
        lesson=(
            "Truncation always errs toward zero, so where the terms have one sign the errors add "
            "up, to percents at K = 4096 and beyond what rounding the operands costs. Where signs "
            "cancel it is a tenth of a percent. Promotion every 128 products mends both. The paper "
            "does not say what its random matrices were: its 2% lies between the two."
        ),
        seed=seed,
        findings=_findings(errors, largest),
        panels=(
            Curves(
                name="promotion",
                title="Error against the interval of promotion",
                x=Axis(title="products between promotions (4096: none)", log=True),
                y=Axis(title="relative error", log=True),
                curves=tuple(curves),
            ),
        ),
    )


def bits_kept(unit: str = UNIT, operands: str = OPERANDS) -> int:
    """How many bits below and with its leading one a sum of 1 keeps of a product added to it."""
    for bits in range(2, 30):
        step = torch.tensor([[2.0 ** -(bits // 2)]]), torch.tensor([[2.0 ** -(bits - bits // 2)]])
        one = torch.ones(1, 1)
        if matmul(*step, operands=operands, accumulate=unit, initial=one).item() == 1.0:
            return bits
    return 0


def _findings(
    errors: Mapping[str, Mapping[int, float]], largest: Mapping[int, float]
) -> tuple[Finding, ...]:
    published = 0.02
    # In each block every product, and the sum itself, loses less than one unit of 2^-13.
    most = DEPTH * (_BLOCK + 1) / _BLOCK * 2.0**-_FRACTION_BITS
    zero_mean = errors["zero-mean"]
    ratio = DEPTH / PUBLISHED_INTERVAL
    return (
        Finding(
            claim="bits of a sum of FP8 products that the unit keeps",
            published="about 14",
            ours=float(bits_kept()),
            low=14.0,
            high=14.0,
            derivation="the leading bit and 13 more: exact",
            source=_DEEPSEEK,
        ),
        Finding(
            claim="all positive, no promotion: largest relative error",
            published="nearly 2%",
            ours=largest[DEPTH],
            low=published,
            high=most,
            derivation="one sign is the worst case: no less than published; less than 2^-13 a term",
            source=_DEEPSEEK,
        ),
        Finding(
            claim="zero-mean, no promotion: normwise error",
            published="nearly 2%",
            ours=zero_mean[DEPTH],
            low=0.0,
            high=published,
            derivation="mixed signs are the kind case: no more than published",
            source=_DEEPSEEK,
        ),
        Finding(
            claim=f"zero-mean: error without over error with promotion every {PUBLISHED_INTERVAL}",
            published="'significantly'",
            ours=zero_mean[DEPTH] / zero_mean[PUBLISHED_INTERVAL],
            low=math.sqrt(ratio),
            high=ratio,
            derivation="from the root of the interval (errors independent) to the interval (all alike)",
            source=_DEEPSEEK,
        ),
        Finding(
            claim=f"all positive: error without over error with promotion every {PUBLISHED_INTERVAL}",
            published="'significantly'",
            ours=largest[DEPTH] / largest[PUBLISHED_INTERVAL],
            low=ratio,
            high=ratio**2,
            derivation="the units lost grow with the sum, at least as the interval and at most as its square",
            source=_DEEPSEEK,
        ),
    )


def _curve(name: str, errors: Mapping[int, float], *, hue: str, theory: bool = False) -> Curve:
    x = tuple(float(interval) for interval in errors)
    return Curve(name=name, x=x, y=tuple(errors.values()), hue=hue, theory=theory)
