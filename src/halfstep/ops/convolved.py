"""Convolutions of operands that are rounded already: one node of graphs, its gradient two more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from halfstep.ops.arithmetic import (
    Arithmetic,
    check_steps,
    key_for,
    key_of_node,
    next_key,
    rounded,
    seed_of_node,
)
from halfstep.ops.custom import operator
from halfstep.ops.products import derives, each, is_transformed
from halfstep.ops.random_bits import Key
from halfstep.ops.windows import Form, Geometry, convolve

__all__ = ["convolved"]


def convolved(
    op: str,
    form: Form,
    weight: Tensor,
    other: Tensor,
    geometry: Geometry,
    how: Arithmetic | str,
    generator: torch.Generator | None,
) -> Tensor:
    """The tensor that ``form`` names, OUTPUT or INPUT, from the other two; checks are the caller's.

    ``how``: for operands in this order; text in a graph.
    """
    if isinstance(how, str):
        seed = seed_of_node(how, generator)
        return _node(weight, other, form.value, geometry.numbers, how, seed, [])
    places = other.shape[0] * prod(geometry.out)
    steps = max(prod(weight.shape[1:]), weight[:, 0].numel(), places)
    arguments = (weight, other, form, geometry, how, key_for(op, how, steps, generator))
    if derives(weight, other) or is_transformed():
        return _derived(*arguments)
    return _convolve(*arguments)


def _derived(*arguments: Any) -> Any:
    return (_Transformed if is_transformed() else _Convolution).apply(*arguments)


def _convolve(
    left: Tensor, right: Tensor, form: Form, geometry: Geometry, how: Arithmetic, key: Key
) -> Tensor:
    out = convolve(form, left, right, geometry, how.accumulator, key=key, backend=how.backend)
    return out.double() if torch.float64 in (left.dtype, right.dtype) else out


class _Convolution(Function):
    """One of the three tensors from the other two; each derivative is another of the three."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        form: Form,
        geometry: Geometry,
        how: Arithmetic,
        key: Key,
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.form, ctx.geometry, ctx.how, ctx.key = form, geometry, how, key
        return _convolve(left, right, form, geometry, how, key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        def again(left: Tensor, right: Tensor, wanted: Form, how: Arithmetic, turn: int) -> Any:
            key = next_key(ctx.key, turn)
            return _derived(left, right, wanted, ctx.geometry, how, key)

        return (*_gradients(ctx, grads[0], ctx.form, ctx.how, again), None, None, None, None)


class _Transformed(_Convolution):
    """The same for `torch.func` and forward mode, which have another form; it takes longer to call."""

    @staticmethod
    def forward(
        left: Tensor, right: Tensor, form: Form, geometry: Geometry, how: Arithmetic, key: Key
    ) -> Tensor:
        return _convolve(left, right, form, geometry, how, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        left, right, ctx.form, ctx.geometry, ctx.how, ctx.key = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        how, parts = ctx.how, []
        for number, tangent in enumerate(tangents[:2]):
            if tangent is not None:
                operands, formats = list(ctx.saved_tensors), list(how.operands)
                operands[number], formats[number] = rounded(tangent, how.gradient), how.gradient
                back = replace(how, forward=how.backward, operands=(formats[0], formats[1]))
                key = next_key(ctx.key, number + 1)
                parts.append(_derived(*operands, ctx.form, ctx.geometry, back, key))
        return sum(part.to(ctx.dtype) for part in parts)  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, left: Tensor, right: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        examples = [
            _derived(each(left, in_dims[0], i), each(right, in_dims[1], i), *rest)
            for i in range(info.batch_size)
        ]
        return torch.stack(examples), 0


def _gradients(
    ctx: Any,
    grad: Tensor,
    form: Form,
    how: Arithmetic,
    again: Callable[[Tensor, Tensor, Form, Arithmetic, int], Tensor],
) -> list[Tensor | None]:
    """Those of left and right; ``again`` is a convolution with random bits of the turn's own."""
    tensors = dict(zip(form.operands, ctx.saved_tensors[:2], strict=True))
    formats = dict(zip(form.operands, how.operands, strict=True))
    tensors[form], formats[form] = rounded(grad, how.gradient), how.gradient
    found: list[Tensor | None] = [None, None]
    for number, wanted in enumerate(form.operands):
        if ctx.needs_input_grad[number]:
            left, right = wanted.operands
            back = replace(how, forward=how.backward, operands=(formats[left], formats[right]))
            to_it = again(tensors[left], tensors[right], wanted, back, ~number)
            found[number] = to_it.to(tensors[wanted].dtype)
    return found


# In a graph; halfstep.ops.custom says how.


def _eager(
    left: Tensor,
    right: Tensor,
    form: str,
    geometry: list[int],
    how: str,
    seed: Tensor | None,
    turns: list[int],
) -> Tensor:
    key = key_of_node(seed, turns)
    return _convolve(left, right, Form(form), Geometry.of(geometry), Arithmetic.of_text(how), key)


def _fake(
    left: Tensor,
    right: Tensor,
    form: str,
    geometry: list[int],
    how: str,
    seed: Tensor | None,
    turns: list[int],
) -> Tensor:
    it, groups = Geometry.of(geometry), geometry[-1]
    if Form(form) is Form.OUTPUT:
        steps, shape = prod(left.shape[1:]), (right.shape[0], left.shape[0], *it.out)
    elif Form(form) is Form.INPUT:
        steps, shape = left[:, 0].numel(), (right.shape[0], left.shape[1] * groups, *it.size)
    else:
        steps, shape = (
            right.shape[0] * prod(it.out),
            (right.shape[1], left.shape[1] // groups, *it.kernel),
        )
    check_steps("convolution", Arithmetic.of_text(how), steps)
    wide = torch.float64 in (left.dtype, right.dtype)
    return left.new_empty(shape, dtype=torch.float64 if wide else torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, ctx.form, ctx.geometry, ctx.how, seed, ctx.turns = inputs
    ctx.save_for_backward(left, right, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    def again(left: Tensor, right: Tensor, wanted: Form, how: Arithmetic, turn: int) -> Tensor:
        seed, turns = ctx.saved_tensors[2], [*ctx.turns, turn]
        return _node(left, right, wanted.value, ctx.geometry, how.text, seed, turns)

    found = _gradients(ctx, grad, Form(ctx.form), Arithmetic.of_text(ctx.how), again)
    return (*found, None, None, None, None, None)


_node = operator(
    "convolve",
    "(Tensor left, Tensor right, str form, SymInt[] geometry, str how, Tensor? seed, int[] turns) "
    "-> Tensor",
    _eager,
    fake=_fake,
    backward=_backward,
    setup=_save,
)
