"""The living definition of dot products with a chosen accumulator, in plain torch, on any device.

Every sum is exact in float64, rounded to odd, before it is rounded once to the adder's format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfstep.format import Accumulator, Format, Order, Products, Rounding, Unit
from halfstep.ops.random_bits import STRIDE, Key
from halfstep.ops.reference import round_into
from halfstep.ops.unit_sums import sum_of_blocks

__all__ = ["CHUNK", "PRODUCT", "SUM", "matmul_into", "rounding_of"]

# Which of a step's roundings: each has random bits of its own, see `_Adder.rounded`.
SUM, PRODUCT, CHUNK, _PART, _LESS, _GAINED, _LOST, _START, _LEVELS = range(9)
# Far from each other in all of the bits: of keys that differ in the uppermost ones alone the random bits
# are the same but for their uppermost ones. 34 slots stay more than 2^26 steps apart (golden ratio).
_SLOT = 0x9E3779B9


def rounding_of(slot: int, k: int) -> int:
    """The number of a rounding of step k, which has random bits of its own; see `_key_of`."""
    return (slot * _SLOT + k) & 0xFFFFFFFF


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, initial: Tensor, accumulator: Accumulator, key: Key
) -> None:
    """Writes ``a @ b + initial`` to ``out``, added as the accumulator says; see `halfstep.matmul`.

    ``a`` is (..., M, K), ``b`` is (..., K, N), ``out`` and ``initial`` (..., M, N); same leading
    dimensions, operands of at most 24 bits.
    """
    adder = _Adder(accumulator=accumulator, key=key)
    depth = a.shape[-1]
    starts_between = accumulator.chunk > 0 or accumulator.split > 1
    start = torch.empty_like(out, dtype=torch.float64)
    to = accumulator.between if starts_between else accumulator.start
    round_into(start, initial, to, Rounding.NEAREST, Key())
    out.copy_(_sum_of_parts(adder, a.to(torch.float64), b.to(torch.float64), depth, start))


def _sum_of_parts(adder: _Adder, a: Tensor, b: Tensor, depth: int, start: Tensor) -> Tensor:
    split = adder.accumulator.split
    if split == 1:
        return _sum_of_chunks(adder, a, b, range(depth), start)
    total, length = start, -(-depth // split)
    for first in range(0, depth, max(length, 1)):
        part = range(first, min(first + length, depth))
        part_sum = _sum_of_chunks(adder, a, b, part, torch.zeros_like(start))
        total = adder.added_between(total, part_sum, _PART, first)
    return total


def _sum_of_chunks(adder: _Adder, a: Tensor, b: Tensor, steps: range, start: Tensor) -> Tensor:
    chunk = adder.accumulator.chunk
    if not chunk:
        return _sum_of_products(adder, a, b, steps, start)
    total = start
    for first in range(steps.start, steps.stop, chunk):
        inside = range(first, min(first + chunk, steps.stop))
        chunk_sum = _sum_of_products(adder, a, b, inside, torch.zeros_like(start))
        total = adder.added_between(total, chunk_sum, CHUNK, first)
    return total


def _sum_of_products(adder: _Adder, a: Tensor, b: Tensor, steps: range, start: Tensor) -> Tensor:
    unit = adder.accumulator.adder
    if isinstance(unit, Unit):
        return sum_of_blocks(unit, adder.accumulator.operands, a, b, steps, start)
    if adder.accumulator.order is Order.PAIRWISE:
        return _tree(adder, a, b, steps, start)
    if adder.accumulator.compensated:
        return _compensated(adder, a, b, steps, start)
    total = start
    for k in steps:
        total = adder.added(total, adder.product(a, b, k), SUM, k)
    return total


def _compensated(adder: _Adder, a: Tensor, b: Tensor, steps: range, start: Tensor) -> Tensor:
    total, lost = start, torch.zeros_like(start)
    for k in steps:
        term = adder.added(adder.product(a, b, k), -lost, _LESS, k)
        new = adder.added(total, term, SUM, k)
        gained = adder.added(new, -total, _GAINED, k)
        lost = adder.added(gained, -term, _LOST, k)
        total = new
    return total


def _tree(adder: _Adder, a: Tensor, b: Tensor, steps: range, start: Tensor) -> Tensor:
    nodes = [(k, adder.product(a, b, k)) for k in steps]
    level = _LEVELS
    while len(nodes) > 1:
        pairs = zip(nodes[::2], nodes[1::2], strict=False)
        above = [(k, adder.added(left, right, level, k)) for (k, left), (_, right) in pairs]
        nodes = above + nodes[2 * len(above) :]  # the last one of an odd number goes up as it is
        level += 1
    for k, root in nodes:
        return adder.added(start, root, _START, k)
    return start


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adder:
    """What one addition does; all numbers are float64 tensors, exact."""

    accumulator: Accumulator
    key: Key

    def product(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        """(..., M, N): the products of step k, exact (24 + 24 bits) or rounded."""
        exact = a[..., :, k, None] * b[..., k, None, :]
        if self.accumulator.products is Products.EXACT:
            return exact
        return self._rounded(exact, self.accumulator.format, self.accumulator.rounding, PRODUCT, k)

    def added(self, x: Tensor, y: Tensor, slot: int, k: int) -> Tensor:
        """x + y, rounded once to the adder's format."""
        rounding = self.accumulator.rounding
        exact = _add_to_odd(x, y, rounding)
        return self._rounded(exact, self.accumulator.format, rounding, slot, k)

    def added_between(self, x: Tensor, y: Tensor, slot: int, k: int) -> Tensor:
        """x + y, rounded once to the format that sums of chunks and parts are added in."""
        if self.accumulator.between == self.accumulator.adder:
            return self.added(x, y, slot, k)
        exact = _add_to_odd(x, y, Rounding.NEAREST)
        return self._rounded(exact, self.accumulator.between, Rounding.NEAREST, slot, k)

    def _rounded(self, x: Tensor, format: Format, rounding: Rounding, slot: int, k: int) -> Tensor:
        if rounding is Rounding.STOCHASTIC:
            x = x.to(torch.float32)  # in two steps: see `halfstep.matmul`
        out = torch.empty_like(x, dtype=torch.float64)
        round_into(out, x, format, rounding, _key_of(self.key, rounding_of(slot, k)))
        return out


def _key_of(key: Key, rounding: int) -> Key:
    """Element i of this stream has the bits of counter ``(rounding << 32) + i`` of the key's."""
    return replace(key, high=(key.high + rounding * STRIDE) & 0xFFFFFFFF)


def _add_to_odd(x: Tensor, y: Tensor, rounding: Rounding) -> Tensor:
    """x + y rounded to odd: where it is not exact, the neighbour whose last bit is 1.

    A second rounding, to at most two bits less, is then the rounding of the exact sum (S. Boldo and
    G. Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers, 2008; not checked).
    """
    total = x + y
    part = total - x  # Knuth's two-sum: total + error is x + y exactly
    error = (x - (total - part)) + (y - part)
    to_odd = (error != 0) & error.isfinite() & (total.view(torch.int64) & 1 == 0)
    toward = torch.where(error > 0, torch.inf, -torch.inf)
    total = torch.where(to_odd, torch.nextafter(total, toward), total)
    if rounding is Rounding.DOWN:  # IEEE 754: x + (-x) is -0 in this rounding only
        total = torch.where((total == 0) & (x.signbit() != y.signbit()), -0.0, total)
    return total
