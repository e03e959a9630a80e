"""The living definition of an optimizer's step, in plain torch, on any device.

Every back end is held to it bit for bit; it is held to torch's own optimizers (``fused=True``), whose order
of operations it has. Where their vectors round a product and a sum once (`fused`), so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from halfstep.ops.stepping import AdamNumbers, SgdNumbers

__all__ = ["adam", "adam_at", "fused", "sgd", "sgd_at", "some", "written"]

T = TypeVar("T")


def adam(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: AdamNumbers,
) -> None:
    """One step of Adam or AdamW in place; see `halfstep.ops.adam_step`."""
    for i, (w, m, v) in enumerate(zip(weights, means, squares, strict=True)):
        g = _gradient(gradients[i], w, numbers)
        if numbers.decay != 1.0:
            w.mul_(numbers.decay)
        ahead = g - m
        if numbers.moment < 0.5:  # from the end that is nearer
            m.copy_(fused(numbers.moment, ahead, m))
        else:
            m.copy_(fused(numbers.rest, ahead, g))
        v.copy_(fused(g * numbers.square, g, v * numbers.beta2))
        below = _root(v) / numbers.roots[i] + numbers.eps
        w.add_(m * numbers.steps[i] / below)
        if copies:
            copies[i].copy_(w)


def sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: SgdNumbers,
) -> None:
    """One step of SGD in place; see `halfstep.ops.sgd_step`."""
    for i, w in enumerate(weights):
        g = _gradient(gradients[i], w, numbers)
        if means:
            m = means[i]
            m.copy_(g if numbers.fresh else fused(g, numbers.gain, m * numbers.momentum))
            g = fused(m, numbers.momentum, g) if numbers.nesterov else m
        w.copy_(fused(g, numbers.step, w))
        if copies:
            copies[i].copy_(w)


def _gradient(gradient: Tensor, weight: Tensor, numbers: AdamNumbers | SgdNumbers) -> Tensor:
    """As the step takes it: over the scale, of the sign that descends, with the penalty."""
    g = gradient.to(torch.float32)
    if numbers.scale != 1.0:
        g = g / numbers.scale
    if numbers.maximize:
        g = -g
    if numbers.penalizes:
        g = fused(weight, numbers.penalty, g)
    return g


def fused(a: Tensor | float, b: Tensor | float, c: Tensor) -> Tensor:
    """a * b + c of float32 numbers, rounded once.

    In float64 the product is exact; the sum is rounded to odd, after which a rounding to fewer bits is that
    of the exact sum (S. Boldo, G. Melquiond, IEEE Trans. Computers, 2008; not checked).
    """
    wide = c.to(torch.float64)
    product = _wide(a, wide) * _wide(b, wide)
    total = product + wide
    part = total - product
    error = (product - (total - part)) + (wide - part)
    bits = total.view(torch.int64)
    moves = (error != 0) & error.isfinite() & (bits & 1 == 0)
    moved = torch.where((error > 0) == (total > 0), bits + 1, bits - 1)
    return torch.where(moves, moved, bits).view(torch.float64).to(torch.float32)


def _root(x: Tensor) -> Tensor:
    """The square root, to nearest; that of MKL, which torch uses in float32, is off by one unit in the last
    place for a fifth of all numbers. (Of float64's root a second rounding is innocuous.)"""
    return x.to(torch.float64).sqrt().to(torch.float32)


def _wide(x: Tensor | float, like: Tensor) -> Tensor:
    return x.to(torch.float64) if isinstance(x, Tensor) else torch.full_like(like, x)


def adam_at(
    places: Sequence[int],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: AdamNumbers,
) -> None:
    """`adam` of the tensors at the places: what a kernel leaves."""
    w, g, m, v, c = (some(places, one) for one in (weights, gradients, means, squares, copies))
    roots, steps = some(places, numbers.roots), some(places, numbers.steps)
    adam(w, g, m, v, c, replace(numbers, roots=roots, steps=steps))


def sgd_at(
    places: Sequence[int],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: SgdNumbers,
) -> None:
    """`sgd` of the tensors at the places."""
    w, g, m, c = (some(places, one) for one in (weights, gradients, means, copies))
    sgd(w, g, m, c, numbers)


def some(places: Sequence[int], values: Sequence[T]) -> list[T]:
    """The values at the places; none where there are none at all."""
    return [values[i] for i in places if values]


def written(places: Sequence[int], *lists: Sequence[Tensor]) -> None:
    """Tells autograd that the tensors at the places have new numbers."""
    changed = [one[i] for one in lists if one for i in places]
    if changed:
        torch.autograd.graph.increment_version(changed)
