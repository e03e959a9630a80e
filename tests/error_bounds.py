"""Bounds of rounding errors by counting roundings, in Higham's notation: what a test may allow, and no more.

The *unit* u of a format with p digits is 2^-p: half a unit in the last place, relative to the number. For n
roundings one after another, and for a dot product of n terms in any order, with fused multiply-adds or
without, all in a format of unit u::

    prod (1 + d_i) = 1 + t with |t| <= gamma(n) = n u / (1 - n u)      if |d_i| <= u
    |computed - a . b| <= gamma(n) |a| . |b|

What is rounded to a format of unit v in the end is off by v of itself more, or by half of the format's
smallest number.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (SIAM 2002); not checked here.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP32 = 2.0**-24


def unit(dtype: torch.dtype) -> float:
    """u of a dtype: 2^-24, 2^-11 (FP16), 2^-8 (BF16)."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, u: float) -> float:
    """The bound of n roundings, relative. ``n u`` must be below 1."""
    assert n * u < 1
    return n * u / (1 - n * u)


def random_walk(n: int, u: float, sigmas: float = 3.0) -> float:
    """What n roundings that have nothing to do with each other add up to, root mean square, relative.

    Each is uniform within u, so has the standard deviation u / sqrt(3).
    """
    return sigmas * u * (n / 3) ** 0.5


def flips(n: int, u: float, noise: int, sigmas: float = 3.0) -> float:
    """As `random_walk`, of n roundings in each of two programs that differ by ``noise`` FP32 roundings.

    A number so near to the middle between two of the format's, gamma(noise), falls to the other side in one
    of the two: one of gamma(noise) / u do, and then are 2 u apart.
    """
    return sigmas * 2 * u * (n * gamma(noise, FP32) / u) ** 0.5


def of_sum(exact: Tensor, magnitude: Tensor, n: int, low: torch.dtype) -> Tensor:
    """How far a sum of n FP32 products, rounded once to ``low``, may be from ``exact``; element by element.

    ``magnitude`` is the same sum of the products' magnitudes; both are float64.
    """
    before = gamma(n, FP32) * magnitude
    limits = torch.finfo(low)
    smallest = limits.smallest_normal * limits.eps
    return before + unit(low) * (exact.abs() + before) + smallest / 2


def assert_product(
    out: Tensor, a: Tensor, b: Tensor, low: torch.dtype, slack: Tensor | float = 0.0
) -> None:
    """``out`` is ``a @ b``, summed in FP32 and rounded once to ``low``: on its grid, and as near as that.

    Both operands are exact, (..., M, K) and (..., K, N); ``slack`` is what else may be added to the bound.
    A second rounding of the result goes beyond the bound at some of many elements, and one that is left
    out is off the grid.
    """
    a, b = a.double(), b.double()
    exact = a @ b
    assert torch.equal(out.float(), out.to(low).float())
    bound = of_sum(exact, a.abs() @ b.abs(), a.shape[-1], low) + slack
    excess = ((out.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"an element is off by {excess:.2f} of its bound"
