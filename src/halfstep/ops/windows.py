"""Convolutions as matrix products of windows, in bounded memory; no graph, no checks.

A convolution pairs three tensors, in g groups::

    x (N, g C, *size)      w (g O, C, *kernel)      y (N, g O, *out)
    y[n, o, l], w[o, c, k] and x[n, c, l * stride - before + k * dilation]   stand together

and each is, from the other two, one dot product an element (`Form`). What lies outside x, or outside
y, is +0, a term like others. The terms are in the order in which they are laid out::

    OUTPUT   y[n, o, l] = sum over (c, k)             conv, and the input's gradient of conv_transpose
    INPUT    x[n, c, i] = sum over (o, k), those k for which stride divides i + before - k * dilation
                                                      conv_transpose, and the input's gradient of conv
    WEIGHT   w[o, c, k] = sum over (n, l)             the weight's gradient of both

Windows are copied out in slabs of `_SLAB` bytes, each of which is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfstep.format import Accumulator, Format, Order, Rounding
from halfstep.ops.arithmetic import NO_KEY, next_key
from halfstep.ops.backends import Backend
from halfstep.ops.products import plain_multiply
from halfstep.ops.random_bits import Key

__all__ = ["Form", "Geometry", "convolve"]

_SLAB = 32 << 20


class Form(Enum):
    """Which of the three tensors is the sum."""

    OUTPUT = "y"
    INPUT = "x"
    WEIGHT = "w"

    @property
    def operands(self) -> tuple[Form, Form]:
        """The other two, in the order in which `convolve` takes them."""
        left = Form.INPUT if self is Form.WEIGHT else Form.WEIGHT
        return left, Form.INPUT if self is Form.OUTPUT else Form.OUTPUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How the three tensors lie to each other; one number for each spatial dimension."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    """Zeros before the first element of x."""
    dilation: tuple[int, ...]
    groups: int

    @property
    def numbers(self) -> list[int]:
        """All of them, in one list; `of` is its inverse."""
        it = (self.size, self.kernel, self.out, self.stride, self.before, self.dilation)
        return [*chain.from_iterable(it), self.groups]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """The geometry of these `numbers`."""
        dims = len(numbers) // 6
        size, kernel, out, stride, before, dilation = (
            tuple(numbers[dims * i : dims * (i + 1)]) for i in range(6)
        )
        return cls(
            size=size, kernel=kernel, out=out,
            stride=stride, before=before, dilation=dilation, groups=numbers[-1],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Multiply:
    """`multiply` as one call of `convolve` has it, with a key of its own for each slab."""

    accumulator: Accumulator
    key: Key
    backend: Backend

    def __call__(self, a: Tensor, b: Tensor, slab: int, initial: Tensor | None = None) -> Tensor:
        key = next_key(self.key, slab)
        return plain_multiply(
            a, b, self.accumulator, initial=initial, key=key, backend=self.backend
        )

    @property
    def goes_on(self) -> bool:
        """True where a sum over all products is that over the first ones, gone on with."""
        it = self.accumulator
        plain = it.order is Order.SEQUENTIAL and not (it.chunk or it.split > 1 or it.compensated)
        return plain and it.rounding is not Rounding.STOCHASTIC and isinstance(it.adder, Format)


def convolve(
    form: Form,
    left: Tensor,
    right: Tensor,
    geometry: Geometry,
    accumulator: Accumulator,
    *,
    key: Key = NO_KEY,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The tensor that ``form`` names, from the other two, which are rounded already; float32.

    ``left`` and ``right`` are ``form.operands``: w and x, w and y, or x and y; float32, or a dtype
    that float32 holds the values of. Checks are the caller's.
    """
    multiply = _Multiply(accumulator=accumulator, key=key, backend=backend)
    make = {Form.OUTPUT: _output, Form.INPUT: _input, Form.WEIGHT: _weight}[form]
    return make(left.detach().resolve_neg(), right.detach().resolve_neg(), geometry, multiply)


def _output(w: Tensor, x: Tensor, geometry: Geometry, multiply: _Multiply) -> Tensor:
    x = x.unflatten(1, (geometry.groups, w.shape[1]))
    w = w.unflatten(0, (geometry.groups, -1)).flatten(2).float()  # (g, O, C k)
    out = w.new_empty((len(x), *w.shape[:2], *geometry.out))
    starts = _starts(geometry)
    for slab, box in enumerate(_boxes((len(x), *geometry.out), _columns_of(w))):
        part = multiply(w, _windows(x, starts, geometry.stride, box), slab)
        _write(out, box, part)
    return out.flatten(1, 2)


def _input(w: Tensor, y: Tensor, geometry: Geometry, multiply: _Multiply) -> Tensor:
    groups = geometry.groups
    y, w = y.unflatten(1, (groups, -1)), w.unflatten(0, (groups, -1))
    out = y.new_empty((len(y), groups, w.shape[2], *geometry.size), dtype=torch.float32)
    w = w.transpose(1, 2).flatten(3)  # (g, C, O, k)
    slab = 0
    # positions that lie alike to the stride meet the same k
    for position in product(*map(range, map(min, geometry.stride, geometry.size))):
        strides = [slice(p, None, s) for p, s in zip(position, geometry.stride, strict=True)]
        alike = out[(..., *strides)]
        taps, starts = _taps(geometry, position)
        if not taps:
            alike.zero_()
            continue
        whole = len(taps) == prod(geometry.kernel)
        lefts = (w if whole else w[..., taps]).flatten(2).float()  # (g, C, O k)
        for box in _boxes((len(y), *alike.shape[3:]), _columns_of(lefts)):
            part = multiply(lefts, _windows(y, starts, (1,) * len(position), box), slab)
            _write(alike, box, part)
            slab += 1
    return out.flatten(1, 2)


def _weight(x: Tensor, y: Tensor, geometry: Geometry, multiply: _Multiply) -> Tensor:
    groups, starts = geometry.groups, _starts(geometry)
    x, y = x.unflatten(1, (groups, -1)), y.unflatten(1, (groups, -1))
    channels, outputs = x.shape[2], y.shape[2]
    shape = (groups, channels, len(starts), outputs)
    out = x.new_zeros(shape, dtype=torch.float32)
    places = (len(y), *geometry.out)
    if multiply.goes_on:
        rows = out.flatten(1, 2)
        for box in _boxes(places, _SLAB // (4 * prod(shape[:3]) + 4 * prod(shape[::3]))):
            right = _places_first(_at(y, box))
            rows = multiply(_windows(x, starts, geometry.stride, box), right, 0, rows)
        out = rows.view(shape)
    else:  # each sum in one piece, some of them at a time
        everywhere, most = _box(places), _SLAB // max(8 * prod(places), 1)
        slab = 0
        for group, channel, tap in _boxes(shape[:3], most):
            windows = _windows(x[:, group, channel], starts[tap], geometry.stride, everywhere)
            for (output,) in _boxes(shape[3:], most // len(windows)):
                part = multiply(windows, _places_first(y[:, group, output]), slab)
                into = out[group, channel, tap, output]
                into.copy_(part.view(into.shape))
                slab += 1
    out = out.permute(0, 3, 1, 2).reshape(groups * outputs, channels, *geometry.kernel)
    return out.contiguous()


def _starts(geometry: Geometry) -> list[tuple[int, ...]]:
    """For each k in order, where l = 0 meets x."""
    along = [
        range(-before, -before + kernel * dilation, dilation)
        for before, kernel, dilation in zip(
            geometry.before, geometry.kernel, geometry.dilation, strict=True
        )
    ]
    return list(product(*along))


def _taps(geometry: Geometry, position: Sequence[int]) -> tuple[list[int], list[tuple[int, ...]]]:
    """The k that meet x at ``position``, by their number, and where in y they do."""
    taps: list[int] = []
    places: list[tuple[int, ...]] = []
    for tap, starts in enumerate(_starts(geometry)):
        parts = [
            divmod(i - start, stride)
            for i, start, stride in zip(position, starts, geometry.stride, strict=True)
        ]
        if not any(rest for _, rest in parts):
            taps.append(tap)
            places.append(tuple(place for place, _ in parts))
    return taps, places


def _columns_of(w: Tensor) -> int:
    """How many columns a slab has for weights (g, M, K): those of windows and result."""
    groups, rows, depth = w.shape
    return _SLAB // (4 * groups * (rows + depth))


def _box(sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in sizes)


def _boxes(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most so many elements, and one at least, that together are a box of these sizes.

    Row by row: each is a piece of the whole in row-major order, and they are in that order.
    """
    cuts: list[list[slice]] = []
    for size in reversed(sizes):
        length = max(min(size, most), 1)
        cuts.append([slice(i, min(i + length, size)) for i in range(0, size, length)])
        most = most // length if length == size else 1
    return product(*reversed(cuts))


def _at(t: Tensor, box: tuple[slice, ...]) -> Tensor:
    """The part of t (N, groups, channels, *places) in a box of (N, *places)."""
    return t[(box[0], slice(None), slice(None), *box[1:])]


def _places_first(t: Tensor) -> Tensor:
    """(groups, N * places, channels) of t (N, groups, channels, *places); float32."""
    return t.movedim(2, -1).transpose(0, 1).flatten(1, -2).float()


def _write(out: Tensor, box: tuple[slice, ...], part: Tensor) -> None:
    """Copies part (groups, channels, places of the box) to where it belongs in out."""
    into = _at(out, box)
    into.copy_(part.view(*into.shape[1:3], len(into), *into.shape[3:]).movedim(2, 0))


def _windows(
    source: Tensor, starts: Sequence[tuple[int, ...]], step: Sequence[int], box: tuple[slice, ...]
) -> Tensor:
    """(groups, channels * len(starts), places of the box): what each start meets at each place.

    source (N, groups, channels, *size) at ``start + step * place``, +0 outside of it; float32.
    """
    batch, *places = box
    source = source[batch].movedim(0, 2)
    lengths = [place.stop - place.start for place in places]
    shape = (*source.shape[:2], len(starts), source.shape[2], *lengths)
    windows = source.new_zeros(shape, dtype=torch.float32)
    for tap, start in enumerate(starts):
        into: list[Any] = [...]
        of: list[Any] = [...]
        for size, at, by, place in zip(source.shape[3:], start, step, places, strict=True):
            first = max(place.start, -(at // by))
            last = min(place.stop - 1, (size - 1 - at) // by)
            if first > last:
                break
            into.append(slice(first - place.start, last + 1 - place.start))
            of.append(slice(at + by * first, at + by * last + 1, by))
        else:
            windows[:, :, tap][tuple(into)] = source[tuple(of)]
    return windows.flatten(3).flatten(1, 2)
